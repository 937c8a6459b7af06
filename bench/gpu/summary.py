"""One short table from the JSON of a run. Pure but for reading the files; needs neither vLLM nor a GPU.

Intervals are 95 % by bootstrap: of requests for their latencies, of half-second blocks for the batch's rate.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.gpu.modes import MODES, row

RESAMPLES = 1_000

Parts = dict[str, Any]


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 0) -> str:
        """As `12 [11 13]`, in units of 1/scale."""
        value, low, high = (f"{number * scale:,.{digits}f}" for number in self)
        return f"{value} [{low} {high}]"


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear between ranks, as numpy's default."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def bootstrap(samples: Sequence[float], of: Callable[[Sequence[float]], float]) -> Estimate:
    """A statistic and its interval over resamples; the seed is fixed, so that a table can be made again."""
    source = random.Random(5)
    again = sorted(of(source.choices(samples, k=len(samples))) for _ in range(RESAMPLES))
    return Estimate(of(samples), again[int(RESAMPLES * 0.025)], again[int(RESAMPLES * 0.975) - 1])


def quantile(samples: Sequence[float], share: float) -> Estimate:
    """A percentile and its interval."""
    return bootstrap(samples, lambda again: percentile(again, share))


def ttft(result: dict[str, Any], share: float) -> Estimate:
    """A percentile of time to first token, s."""
    return quantile(result["ttft_s"], share)


def batch_rate(result: dict[str, Any]) -> Estimate:
    """The batch's output tokens/s while interactive requests arrived."""
    blocks = bootstrap(result["batch_tokens_by_block"], statistics.fmean)
    value = result["batch_tokens_per_s"]
    scale = value / blocks.value if blocks.value else 1.0
    return Estimate(value, blocks.low * scale, blocks.high * scale)


def table(head: str, rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up; the head is its first line."""
    cells = [head.split(" | "), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def identity(part: Parts) -> str:
    """How many requests said the same, by what was done to them."""
    rows = []
    for kv in ("keep", "park", "drop"):
        cases = [case for case in part.get("cases", ()) if case["kv"] == kv]
        if cases:
            where: dict[str, int] = {}
            for case in cases:
                for kind, count in case["kv_while_held"].items():
                    where[kind] = where.get(kind, 0) + count
            rows.append((
                f"hold, {kv}", len(cases), f"{sum(c['equal'] for c in cases)} of {sum(c['of'] for c in cases)}",
                ", ".join(f"{count} {kind}" for kind, count in sorted(where.items())),
                sum(case["moved_while_held"] for case in cases), sum(case["recomputed_tokens"] for case in cases),
            ))  # fmt: skip
    for case in part.get("cut_in", ()):
        equal, count = case["equal"] + case["others_equal"], case["of"] + case["others"]
        rows.append((f"cut-in {case['cut_in']}", 1, f"{equal} of {count}", f"at most {case['held_most']} held", "–",
                     case["recomputed_tokens"]))  # fmt: skip
    control = part.get("control", {})
    text = table(
        "tokens equal to an undisturbed run | cases | equal | KV while held | moved | recomputed", rows
    )
    return (
        f"{text}\nNegative control, two block tables swapped: requests {control.get('changed')} of "
        f"{control.get('requests')} changed. Passed: {part.get('passed')}"
    )


def overhead(part: Parts) -> str:
    """Steered against stock, rounds in turns."""
    rows = []
    fields = {"output_tokens_per_s": ("output tokens/s", 0), "inter_token_ms": ("inter-token ms", 2)}
    for slots in sorted({result["slots"] for result in part.values()}):
        rounds = sorted({name.split("-")[1] for name in part if name.startswith(f"{slots}-")})
        pairs = [(part.get(f"{slots}-{turn}-stock"), part.get(f"{slots}-{turn}-steered")) for turn in rounds]
        whole = [(stock, steered) for stock, steered in pairs if stock and steered]
        for field, (what, digits) in fields.items() if whole else ():
            stock, steered = (statistics.fmean(pair[side][field] for pair in whole) for side in (0, 1))
            ratios = ", ".join(f"{ours[field] / theirs[field]:.3f}" for theirs, ours in whole)
            rows.append(
                (
                    slots,
                    what,
                    f"{stock:,.{digits}f}",
                    f"{steered:,.{digits}f}",
                    f"{steered / stock:.3f}",
                    ratios,
                )
            )
    return table("slots | overhead | stock | steered | ratio | by round", rows)


def decoding(part: Parts) -> str:
    """The same where all requests only decode; the interval is of the mean over rounds."""
    rows = []
    for slots in sorted({result["slots"] for result in part.values()}):
        stem = f"decoding-{slots}-"
        rounds = sorted({name.split("-")[2] for name in part if name.startswith(stem)})
        pairs = [(part.get(f"{stem}{turn}-stock"), part.get(f"{stem}{turn}-steered")) for turn in rounds]
        whole = [(stock, steered) for stock, steered in pairs if stock and steered]
        for what, digits, of in DECODED if whole else ():
            ratios = [of(steered) / of(stock) for stock, steered in whole]
            stock, steered = (statistics.fmean(of(pair[side]) for pair in whole) for side in (0, 1))
            rows.append((
                slots, what, f"{stock:,.{digits}f}", f"{steered:,.{digits}f}",
                bootstrap(ratios, statistics.fmean).text(1, 3), ", ".join(f"{ratio:.3f}" for ratio in ratios),
            ))  # fmt: skip
    return table("slots | all decode | stock | steered | ratio | by round", rows)


DECODED: tuple[tuple[str, int, Callable[[dict[str, Any]], float]], ...] = (
    ("output tokens/s", 0, lambda result: float(result["output_tokens_per_s"])),
    ("inter-token ms", 2, lambda result: float(result["inter_token_ms"])),
    ("step ms", 2, lambda result: float(result["steps"]["decode_step_ms"])),
)


def colocation(part: Parts) -> str:
    """Time to first token and the batch's rate, by variant."""
    rows = []
    # Who waits least stands first; the batch alone has nobody who waits.
    for name, result in sorted(part.items(), key=lambda item: percentile(item[1]["ttft_s"] or [inf], 0.99)):
        late = result["ttft_s"]
        step = result["steps"]
        rows.append((
            name, ttft(result, 0.5).text(1e3) if late else "–", ttft(result, 0.99).text(1e3) if late else "–",
            batch_rate(result).text() if result["batch_tokens_per_s"] > 1 else "–",
            f"{step.get('step_ms', 0):.1f} / {step.get('step_p99_ms', 0):.1f}", step.get("held_most", 0),
            result.get("recomputed_tokens", "–"), result["unanswered"],
        ))  # fmt: skip
    ignored = sorted({field for result in part.values() for field in result.get("ignored", ())})
    note = (
        f"\nNot acted on by this version, so their variants prove nothing: {', '.join(ignored)}"
        if ignored
        else ""
    )
    head = (
        "co-location | TTFT p50 ms | TTFT p99 ms | batch tokens/s | step p50 / p99 ms"
        " | held at most | recomputed | unanswered"
    )
    return table(head, rows) + note + stages(part)


def stages(part: Parts) -> str:
    """What times to first token are made of, medians; those of one request add up, medians need not."""
    known = {
        name: result["stages_s"] for name, result in part.items() if any(result.get("stages_s", {}).values())
    }
    if not known:
        return ""
    rows = [
        (name, *(f"{statistics.median(times) * 1e3:.1f}" for times in passed.values()))
        for name, passed in known.items()
    ]
    return "\n\n" + table(" | ".join(("first token: median ms", *next(iter(known.values())))), rows)


def continuing(part: Parts) -> str:
    """Continue to next token, kept against dropped."""
    rows = []
    for result in sorted(part.values(), key=lambda result: result["context"]):
        for beside in sorted({name.partition(", ")[2] for name in result if ", " in name}):
            kept, dropped = result[f"keep, {beside}"], result[f"drop, {beside}"]
            times = [statistics.median(side["next_token_s"]) * 1e3 for side in (kept, dropped)]
            again = dropped["recomputed_tokens"] / dropped["cycles"]
            rows.append((
                f"{result['context']:,}", beside.removeprefix("beside "), f"{times[0]:.1f}", f"{times[1]:.1f}",
                f"{times[1] / times[0]:.1f}×", kept["recomputed_tokens"], f"{again:,.0f}",
            ))  # fmt: skip
    head = "continue: context | beside | kept ms | dropped ms | ratio | recomputed, kept | each, dropped"
    return table(head, rows)


def command(part: Parts) -> str:
    """Publish to in force, and step times."""
    rows = []
    for result in sorted(part.values(), key=lambda result: result["slots"]):
        process, thread, none = (
            statistics.fmean(
                result["bus"][turn]["step_ms"] for turn in result["bus"] if turn.split()[0] == kind
            )
            for kind in ("process", "thread", "none")
        )
        beyond, replied = result.get("beyond_a_step_s"), result.get("replied_s")
        rows.append((
            result["slots"], *(quantile(result["in_force_s"], share).text(1e3, 1) for share in (0.5, 0.99)),
            quantile(beyond, 0.99).text(1e3, 1) if beyond else "–",
            quantile(replied, 0.99).text(1e3, 1) if replied else "–",
            f"{result['steps']['step_ms']:.2f}", f"{result['steps_with_commands']['step_ms']:.2f}",
            f"{process:.2f} / {thread:.2f} / {none:.2f}", f"{process / none:.3f}", f"{thread / none:.3f}",
        ))  # fmt: skip
    head = (
        "command path: running | in force p50 ms | p99 ms | beyond a step p99 ms | replied p99 ms | step ms"
        " | with commands | step ms, bus in a process / a thread / none | process | thread"
    )
    return table(head, rows)


def modes(part: Parts) -> str:
    """What came of every mode."""
    head = (
        "mode | runner | cases | equal | kept / parked / dropped | recomputed / restored / reloaded | remarks"
    )
    return table(head, [row(way, part[way.name]) for way in MODES if way.name in part])


PARTS: dict[str, Callable[[Parts], str]] = {
    "identity": identity, "overhead": overhead, "decoding": decoding, "colocation": colocation,
    "continue": continuing, "command": command, "modes": modes,
}  # fmt: skip


def summary(folder: Path) -> str:
    """All tables of what is saved in a folder."""
    texts = []
    if (path := folder / "machine.json").exists():
        texts.append(
            ", ".join(f"{name} {value}" for name, value in msgspec.json.decode(path.read_bytes()).items())
        )
    for name, say in PARTS.items():
        if (path := folder / f"{name}.json").exists():
            texts.append(say(msgspec.json.decode(path.read_bytes())))
    return "\n\n".join(texts)
