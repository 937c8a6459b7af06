"""The first line of `cox top`, and those of what happened. Pure: called by `app.py`."""

import time
from collections.abc import Sequence

from rich.text import Text

from coxswain.control.cli.words import count, plural, printable, span
from coxswain.control.top.sources import Live, Replay, Source
from coxswain.control.view.picture import Happening, LeaderRow, Picture
from coxswain.schemas.policy import LEADER_LEASE_S


def head(picture: Picture, source: Source, troubles: Sequence[str], *, stopped: bool, width: int) -> Text:
    """One line; where it is too long, what matters least is left out."""
    at = time.strftime("%H:%M:%S", time.localtime(picture.at))
    dim, red = "dim", "bold red"
    parts = [
        (0, Text(f"cox top {picture.fleet}", style="bold")),
        (0, _clock(source, at, stopped=stopped)),
        (2, Text(plural(len(picture.workers), "worker"))),
        (0, Text(f"{count(picture.queued)} queued", style="" if picture.queued else dim)),
        (0, Text(f"{count(picture.running)} running", style="green" if picture.running else dim)),
        (0, Text(f"{count(picture.held)} held", style="yellow" if picture.held else dim)),
        (3, Text(f"{count(picture.output_tokens_per_s)} tok/s")),
        (1 if _heard(picture.leader) else 0, _leader(picture.leader)),
    ]
    if isinstance(source, Live) and source.recorder is not None:
        full = source.recorder.full
        parts.append((0, Text("recording full" if full else "● recording", style=red if full else "red")))
    if troubles and troubles[-1] != "back":
        words = "NATS lost" if troubles[-1] == "lost" else troubles[-1]
        parts.append((0, Text(printable(words), style=red)))
    for least in (3, 2, 1):
        if sum(text.cell_len + 2 for _, text in parts) <= width:
            break
        parts = [part for part in parts if part[0] < least]
    return Text("  ").join(text for _, text in parts)


def _clock(source: Source, at: str, *, stopped: bool) -> Text:
    if not isinstance(source, Replay):
        return Text(f"{at} paused" if stopped else at, style="reverse" if stopped else "")
    start, end = source.recording.start, source.recording.end
    where = f"{span(source.now() - start)} of {span(end - start)}"
    sign = "■" if source.ended else "‖" if source.paused else "▶"
    return Text(f"{sign} {at} {where} ×{source.speed:g}", style="reverse")


def _heard(leader: LeaderRow | None) -> bool:
    return leader is None or leader.age_s <= LEADER_LEASE_S


def _leader(leader: LeaderRow | None) -> Text:
    if leader is None:
        return Text("no leader", style="dim")
    words = f"{leader.policy or 'leader'} #{leader.epoch[1]} {span(leader.age_s)} ago"
    return Text(printable(words), style="" if _heard(leader) else "bold red")


def line(each: Happening) -> Text:
    """What happened, and when."""
    at = time.strftime("%H:%M:%S", time.localtime(each.at))
    style = "yellow" if each.weight == "warning" else "bold" if each.worker == "you" else ""
    return Text.assemble(
        (f"{at} ", "dim"),
        (printable(f"{each.worker}: {each.text}"), style),
        no_wrap=True,
        overflow="ellipsis",
    )
