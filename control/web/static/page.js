// The page: pictures in by server-sent events, tables out. It sends nothing but questions for requests.

import { CLASSES, REQUESTS, SENT, TENANTS, WORKERS, clock, count, percent, printable, span } from "./rows.js";
import { Table, make, put } from "./table.js";

const SILENT_MS = 6000; // Pictures come every second, of a large fleet every third: without one for so long, what is shown is stale.
const RETRY_MS = 2000;
const HISTORY = 120; // Pictures that the small curves remember.
const LEADER_LEASE_S = 5;

const LEFT_OUT = { held_by: [], position: null };
// What the status of a request leaves out where it is this (schemas/status.py).

const $ = (id) => document.getElementById(id);

// The figures on top, with what they were of late.

const FIGURES = [
  ["running", "run", "running", (picture) => picture.running, count],
  ["queued", "queue", "queued", (picture) => picture.queued, count],
  ["held", "held", "held", (picture) => picture.held, count],
  ["tokens", "speed", "output tokens/s", (picture) => picture.output_tokens_per_s, count],
  ["wait", "queue", "longest wait", (picture) => Math.max(0, ...picture.tenants.filter((row) => row.queued).map((row) => row.oldest_queued_s)), (seconds) => (seconds ? span(seconds) : "–")],
  ["kv", "speed", "KV cache in use", (picture) => mean(live(picture).map((row) => row.kv_used)), percent],
].map(([id, style, title, value, words]) => {
  const box = $("figures").appendChild(make("div", `figure ${style}`));
  const label = box.appendChild(make("span"));
  put(label, title);
  const figure = box.appendChild(make("b"));
  figure.id = `figure-${id}`;
  const svg = box.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const curve = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  return { value, words, figure, svg, curve, past: [] };
});

const live = (picture) => picture.workers.filter((row) => row.liveness === "live");
const mean = (numbers) => (numbers.length ? numbers.reduce((sum, each) => sum + each, 0) / numbers.length : 0);

function drawFigures(picture) {
  for (const each of FIGURES) {
    const value = each.value(picture);
    each.past.push(value);
    if (each.past.length > HISTORY) each.past.shift();
    put(each.figure, each.words(value));
    const most = Math.max(...each.past) || 1;
    const first = each.past.length < HISTORY / 4 ? HISTORY / 4 - each.past.length : 0;
    each.svg.setAttribute("viewBox", `0 0 ${Math.max(HISTORY / 4, each.past.length) - 1} 24`);
    each.curve.setAttribute("points", each.past.map((was, place) => `${first + place},${(23 - (21 * was) / most).toFixed(1)}`).join(" "));
  }
}

// One tenant or worker, and its requests.

const FACTS = {
  tenant: (row) => [
    ["class", row.class], ["weight", +row.weight.toPrecision(4)], ["share / due", `${percent(row.share)} / ${percent(row.due)}`],
    ["queued", count(row.queued)], ["running", count(row.running)], ["held", count(row.held)],
    ["oldest wait", row.queued ? span(row.oldest_queued_s) : "–"], ["TTFT, median", row.ttft_s === null ? "–" : span(row.ttft_s)],
    ["output tokens/s", count(row.output_tokens_per_s)], ["output tokens", count(row.output_tokens_total)],
    ["recomputed tokens", count(row.recomputed_tokens_total)], ["finished", count(row.finished_total)],
    ["virtual time", count(row.virtual_time)], ["most running", row.max_running ?? "–"], ["most queued", row.max_queued ?? "–"],
  ],
  worker: (row) => [
    ["state", row.liveness === "live" ? row.state : `silent ${span(row.silent_s)}`], ["model", row.model],
    ["queued", count(row.queued)], ["running", count(row.running)], ["held", count(row.held)],
    ["slots", `${row.running_slots} of ${row.active_slots}`], ["slots of held", row.held_slots], ["KV in use", percent(row.kv_used)],
    ["KV of held", percent(row.kv_held)], ["step, median", row.step_s ? span(row.step_s) : "–"],
    ["output tokens/s", count(row.output_tokens_per_s)], ["commands applied", count(row.applied_total)],
    ["commands refused", count(row.rejected_total)],
  ],
};

const drawer = {
  kind: null,
  name: "",
  asking: false,

  open(kind, name) {
    [this.kind, this.name] = [kind, name];
    $("drawer").dataset.kind = kind;
    put($("drawer-kind"), kind);
    put($("drawer-name"), printable(name));
    tables.requests.show([], 0, "…");
    if (!$("drawer").open) $("drawer").showModal();
    this.draw();
  },

  closed() {
    this.kind = null;
  },

  draw() {
    if (this.kind === null || scene === null) return;
    const row = (this.kind === "tenant" ? scene.picture.tenants : scene.picture.workers).find((each) => each[this.kind] === this.name);
    $("facts").replaceChildren(
      ...(row ? FACTS[this.kind](row) : []).map(([title, value]) => {
        const [fact, term, words] = [make("div"), make("dt"), make("dd")];
        put(term, title);
        put(words, printable(String(value)));
        fact.append(term, words);
        return fact;
      }),
    );
    this.ask();
  },

  async ask() {
    if (this.asking) return; // One at a time: the next picture asks again.
    this.asking = true;
    const [kind, name] = [this.kind, this.name];
    try {
      const answer = await fetch(`requests?${new URLSearchParams({ [kind]: name })}`, { signal: AbortSignal.timeout(SILENT_MS) });
      if (!answer.ok) return;
      const { at, total, rows } = await answer.json();
      if (this.kind !== kind || this.name !== name) return;
      const flat = rows.map(({ worker, status }) => ({ worker, ...LEFT_OUT, ...status }));
      tables.requests.show(flat, at, total > rows.length ? `the first ${rows.length} of ${total}` : `${total}`);
    } catch {
      // The stream tells of a break; the next picture asks again.
    } finally {
      this.asking = false;
      if (this.kind !== null && (this.kind !== kind || this.name !== name)) this.ask();
    }
  },
};

// Head, happenings, trouble.

function chip(node, parts, bad = false) {
  node.replaceChildren(...parts.map((part, place) => {
    const piece = make(place % 2 ? "b" : "span");
    put(piece, printable(part));
    return piece;
  }));
  node.classList.toggle("bad", bad);
}

function drawHead({ controller, picture }) {
  put($("fleet"), printable(picture.fleet));
  document.title = `${printable(picture.fleet)} – Coxswain`;
  const { leader } = picture;
  if (leader === null) chip($("leader"), ["no leader"], picture.workers.length > 0);
  else chip($("leader"), ["leader ", leader.policy ?? "?", ` epoch ${leader.epoch[1]}${leader.age_s < 2 ? "" : `, heard ${span(leader.age_s)} ago`}`], leader.age_s > LEADER_LEASE_S);
  chip($("controller"), ["", controller.name, controller.leading ? " leads" : " stands by"]);
  put($("clock"), clock(picture.at));
}

function drawLog(happenings) {
  const words = wanted();
  const shown = happenings.filter((each) => words.every((word) => `${each.worker} ${each.text}`.toLowerCase().includes(word))).reverse();
  const lines = shown.map((each) => {
    const [line, time, who, what] = [make("li", each.weight), make("time"), make("bdi"), make("span")];
    put(time, clock(each.at));
    put(who, printable(each.worker));
    put(what, printable(each.text));
    line.append(time, who, what);
    return line;
  });
  if (!lines.length) lines.push(Object.assign(make("li", "dim"), { textContent: "Nothing yet." }));
  $("log").replaceChildren(...lines);
}

const wanted = () => $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);

// The stream.

const table = (spec) => new Table(spec, wanted, (kind, name) => drawer.open(kind, name));
const tables = {
  tenants: table(TENANTS), workers: table(WORKERS), classes: table(CLASSES), sent: table(SENT), requests: table(REQUESTS),
};
let scene = null;
let drawn = "";
let heardAt = null; // When the last picture came, by this browser's clock.
let paused = false;
let source = null;
const began = Date.now();

function draw() {
  const { picture, tenants_total, sent } = scene;
  drawHead(scene);
  const more = tenants_total - picture.tenants.length;
  tables.tenants.show(picture.tenants, picture.at, more ? `${picture.tenants.length} of ${tenants_total}` : "");
  tables.workers.show(picture.workers, picture.at);
  tables.classes.show(picture.classes, picture.at);
  tables.sent.show(sent, picture.at);
  const log = JSON.stringify([picture.happenings.at(-1), picture.happenings.length, wanted()]);
  if (log !== drawn) drawLog(picture.happenings);
  drawn = log;
  drawer.draw();
}

function heard(event) {
  heardAt = Date.now();
  const latest = JSON.parse(event.data);
  if (latest.picture.workers.length) drawFigures(latest.picture);
  if (!paused) {
    scene = latest;
    draw();
  }
  watch();
}

function listen() {
  source?.close();
  source = new EventSource("events");
  source.addEventListener("message", heard);
  source.addEventListener("error", () => {
    watch();
    // The browser comes back by itself unless it was refused: then it is for us to try again.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  });
}

// What is wrong, and since when (by this browser's clock; null: the words say all).
function trouble() {
  const since = heardAt ?? began;
  const old = Date.now() - since;
  if (old > SILENT_MS || (old > RETRY_MS && source.readyState !== EventSource.OPEN))
    return heardAt === null
      ? ["Nothing is heard from the controller: it is not there, or as many watch as may. Trying again.", since]
      : [`Stale since ${clock(since / 1000)}: nothing is heard from the controller. Trying again.`, since];
  if (scene !== null && !scene.controller.reaches_nats)
    return ["The controller has lost NATS: shown is what it last heard. Workers go on by themselves.", null];
  return ["", null];
}

function watch() {
  const [words, since] = trouble();
  put($("trouble-words"), words);
  put($("trouble-age"), since === null ? "" : `(${span(Math.round((Date.now() - since) / 1000))})`);
  $("trouble").hidden = !words;
  document.body.classList.toggle("stale", words !== "");
  document.body.classList.toggle("live", words === "" && heardAt !== null);
}

// What people do.

function setPaused(on) {
  paused = on;
  $("pause").setAttribute("aria-pressed", String(on));
  put($("pause"), on ? "Paused" : "Pause");
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  put($("theme"), dark() ? "Light" : "Dark");
}

const dark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

$("pause").addEventListener("click", () => setPaused(!paused));
$("theme").addEventListener("click", () => {
  const theme = dark() ? "light" : "dark";
  try { localStorage.setItem("theme", theme); } catch { /* Not kept, then. */ }
  setTheme(theme);
});
$("filter").addEventListener("input", () => {
  if (scene !== null) draw();
});
$("drawer-close").addEventListener("click", () => $("drawer").close());
$("drawer").addEventListener("close", () => drawer.closed());
$("drawer").addEventListener("click", (event) => {
  if (event.target === $("drawer")) $("drawer").close(); // Beside it.
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, button, dialog") !== null;
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("filter").focus();
  } else if (event.key === " " && !typing) {
    event.preventDefault();
    setPaused(!paused);
  } else if (event.key === "Escape" && event.target === $("filter")) {
    $("filter").value = "";
    $("filter").blur();
    if (scene !== null) draw();
  }
});
addEventListener("pagehide", () => source?.close());
addEventListener("pageshow", (event) => { if (event.persisted) listen(); });

let kept = null;
try { kept = localStorage.getItem("theme"); } catch { /* None is kept. */ }
setTheme(kept === "dark" || kept === "light" ? kept : null);
listen();
setInterval(watch, 1000);
