// What the tables show, and by what they sort: rows of a picture in, cells out. The same as in `cox top`
// (control/top/columns.py). No state here, and no markup: every text that comes from outside becomes a text node.

const LEADER_LEASE_S = 5; // Past it, workers end a leader's holds.
const OFF = 0.1; // A share this far under what is due, with something waiting, is marked.

// Numbers as people read them: as control/cli/words.py has them.

export function span(seconds) {
  if (seconds < 0) return "-" + span(-seconds);
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)}ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)}s`;
  const whole = Math.round(seconds);
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86400)}d${two(Math.floor((whole % 86400) / 3600))}h`;
}

export function count(number) {
  if (number < 0) return "-" + count(-number);
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (number >= size && number >= 10000) return `${(number / size).toFixed(1)}${unit}`;
  return number.toFixed(0);
}

export const percent = (part) => `${Math.round(100 * part)}%`;
export const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });

// Names come from strangers: what cannot be seen, or would turn the line round, is written out.
export const printable = (text) =>
  text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);

// Cells: {text, style, title}, or a bar {part, over, due, style, title}.

const plain = (text, style = "") => ({ text: String(text), style });
const number = (value, style) => plain(count(value), value ? style : "dim");
const none = plain("–", "dim");
const wait = (row) => (row.queued ? plain(span(row.oldest_queued_s)) : none);
const caps = (row) => {
  const [running, queued] = [row.max_running, row.max_queued].map((cap) => (cap === null ? "–" : count(cap)));
  return running === "–" && queued === "–" ? none : plain(`${running}/${queued}`);
};
const state = (row) => ({ queued: "queue", running: "run", held: "held" })[row.state];

// A column: [title, cell of (row, now), sort key or null, class names, what it means].
const column = (title, cell, key, style = "", hint = "") => ({ title, cell, key, style, hint });
const three = [
  column("Queued", (row) => number(row.queued, "queue"), (row) => row.queued, "right", "Requests that wait"),
  column("Run", (row) => number(row.running, "run"), (row) => row.running, "right", "Requests that run"),
  column("Held", (row) => number(row.held, "held"), (row) => row.held, "right", "Requests that were stopped and keep their place"),
];
const waiting = column("Wait", wait, (row) => (row.queued ? row.oldest_queued_s : -1), "right", "How long the one that waits longest has waited");
const share = (row) => ({
  part: row.share, due: row.due, style: row.due - row.share > OFF && row.queued ? "less" : "",
  title: `has ${percent(row.share)} of what was served of late, is due ${percent(row.due)}`,
});

export const TENANTS = {
  id: "tenants", empty: "No live worker has any tenant.", sort: "Share", key: (row) => row.tenant, opens: "tenant",
  words: (row) => `${row.tenant} ${row.class}`,
  columns: [
    column("Tenant", (row) => plain(row.tenant), (row) => row.tenant, "name"),
    column("Class", (row) => plain(row.class, "tag"), (row) => row.class, "p3"),
    column("Weight", (row) => plain(+row.weight.toPrecision(4)), (row) => row.weight, "right p3"),
    ...three,
    waiting,
    column("TTFT", (row) => (row.ttft_s === null ? none : plain(span(row.ttft_s))), (row) => row.ttft_s ?? -1, "right p2", "Median time to the first token, of late"),
    column("Share", (row) => plain(percent(row.share)), (row) => row.share, "right", "Of what was served of late, as workers charged it"),
    column("Due", (row) => plain(percent(row.due)), (row) => row.due, "right p2", "What its weight is worth among the tenants of its class that want anything"),
    column("", share, null, "wide p2", "Share, and a mark at what is due"),
    column("Owed", (row) => { const owed = row.due - row.share; return Math.abs(owed) < 0.005 ? plain("0", "dim") : plain(`${owed > 0 ? "+" : "−"}${percent(Math.abs(owed))}`, owed > OFF ? "held" : ""); }, (row) => row.due - row.share, "right p4", "Due less share"),
    column("Tok/s", (row) => number(row.output_tokens_per_s, ""), (row) => row.output_tokens_per_s, "right p2"),
    column("Caps", caps, (row) => row.max_running ?? Infinity, "right p4", "At most so many running / queued"),
    column("Finished", (row) => number(row.finished_total, ""), (row) => row.finished_total, "right p4"),
  ],
};

const kv = (row) => ({
  part: row.kv_used, over: row.kv_held, style: "kv",
  title: `${percent(row.kv_used)} of the KV cache in use, ${percent(row.kv_held)} by held requests`,
});
const leader = (row) => {
  if (row.leader_age_s === null) return plain("none", "dim");
  return plain(`${row.leader_policy ?? "?"} ${span(row.leader_age_s)}`, row.leader_age_s > LEADER_LEASE_S ? "bad" : "");
};

export const WORKERS = {
  id: "workers", empty: "No worker is heard.", sort: "Worker", key: (row) => row.worker, opens: "worker",
  words: (row) => `${row.worker} ${row.state} ${row.model} ${row.liveness}`,
  rowStyle: (row) => (row.liveness === "live" ? "" : "silent"),
  columns: [
    column("Worker", (row) => ({ ...plain(row.worker), title: row.model }), (row) => row.worker, "name"),
    column("State", (row) => (row.liveness === "live" ? plain(row.state, row.state === "serving" ? "run" : "held") : plain(`silent ${span(row.silent_s)}`, "bad")), (row) => row.liveness + row.state),
    ...three,
    column("Slots", (row) => plain(`${row.running_slots}/${row.active_slots}${row.held_slots ? `+${row.held_slots}` : ""}`), (row) => row.running_slots / (row.active_slots || 1), "right p2", "Running / may run, + slots that held requests keep"),
    column("KV", (row) => plain(percent(row.kv_used)), (row) => row.kv_used, "right p2", "KV cache in use"),
    column("", kv, null, "wide p4", "KV cache in use, and of it by held requests"),
    column("Step", (row) => (row.step_s ? plain(span(row.step_s)) : none), (row) => row.step_s, "right p3", "Median time between steps"),
    column("Tok/s", (row) => number(row.output_tokens_per_s, ""), (row) => row.output_tokens_per_s, "right"),
    column("Refused", (row) => number(row.rejected_total, "bad"), (row) => row.rejected_total, "right p4", "Commands that it refused"),
    column("Leader", leader, (row) => row.leader_age_s ?? Infinity, "p3", "Which policy leads it, and how long ago it heard so"),
  ],
};

export const CLASSES = {
  id: "classes", empty: "No live worker has any class.", sort: "Class", key: (row) => row.class, words: (row) => row.class,
  columns: [
    column("Class", (row) => plain(row.class), (row) => row.class, "name"),
    ...three,
    waiting,
    column("Share", (row) => plain(percent(row.share)), (row) => row.share, "right"),
    column("Caps", caps, (row) => row.max_running ?? Infinity, "right p2", "At most so many running / queued"),
  ],
};

const outcome = (row) => (row.ok ? plain("accepted", "run") : plain(row.code === null ? "no answer" : `refused ${row.code}`, "bad"));

export const SENT = {
  id: "sent", empty: "None yet: it sends commands while it leads.", sort: "Worker", key: (row) => `${row.worker} ${row.verb}`,
  words: (row) => `${row.worker} ${row.verb}`,
  columns: [
    column("Worker", (row) => plain(row.worker), (row) => `${row.worker} ${row.verb}`, "name"),
    column("Command", (row) => plain(row.verb), (row) => row.verb),
    column("Sent", (row) => number(row.sent_total, ""), (row) => row.sent_total, "right"),
    column("Refused", (row) => number(row.refused_total, "bad"), (row) => row.refused_total, "right p2"),
    column("Ago", (row, now) => plain(span(Math.max(0, now - row.at))), (row) => row.at, "right"),
    column("Latest", outcome, (row) => (row.ok ? 1 : 0)),
    column("Why", (row) => plain(row.reason, "dim"), null, "words p2"),
  ],
};

const deadline = (row, now) => {
  if (row.deadline_s === null) return none;
  return plain(span(row.deadline_s - now), row.deadline_s < now ? "bad" : "");
};

export const REQUESTS = {
  id: "requests", empty: "None now: of those that wait, a worker lists the first 64.", sort: null,
  key: (row) => `${row.worker} ${row.request} ${row.child}`,
  words: (row) => `${row.request} ${row.tenant} ${row.class} ${row.state} ${row.kv} ${row.held_by.join(" ")} ${row.worker}`,
  columns: [
    column("State", (row) => plain(row.state === "held" ? `held (${row.kv}) by ${row.held_by.join("+")}` : row.position === null ? row.state : `${row.state} #${row.position}`, state(row)), (row) => row.state),
    column("Tenant", (row) => plain(row.tenant), (row) => row.tenant, "name of-tenant p2"),
    column("Class", (row) => plain(row.class, "tag"), (row) => row.class, "p2"),
    column("Prio", (row) => plain(row.priority), (row) => row.priority, "right p2"),
    column("Age", (row, now) => plain(span(Math.max(0, now - row.arrived_at))), (row) => -row.arrived_at, "right"),
    column("Prompt", (row) => number(row.prompt_tokens, ""), (row) => row.prompt_tokens, "right"),
    column("Output", (row) => number(row.output_tokens, ""), (row) => row.output_tokens, "right"),
    column("Due", deadline, (row) => row.deadline_s ?? Infinity, "right p2"),
    column("Worker", (row) => plain(row.worker), (row) => row.worker, "of-worker p2"),
    column("Request", (row) => plain(row.request + (row.child ? ` #${row.child}` : "")), null, "id p3"),
  ],
};
