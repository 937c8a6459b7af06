"""A run as pictures: service over time, first-token latency, who held what when. Writes PNG files and a page of them.

matplotlib is an extra (`lab`) and is imported here alone.
"""

import html
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from coxswain.lab.life import ENDED, HELD, QUEUED, RUNNING, Life
from coxswain.lab.metrics import WINDOW_S, asked_rates, service_rates
from coxswain.lab.trace import natural, tenants

MOST_LINES: Final = 10
"""Tenants with a line of their own: those that asked for most; the rest are drawn as one, in grey."""
MOST_ROWS: Final = 5_000
"""Requests in the picture of who held what; beyond, the first to arrive."""
POINTS: Final = 240
LINES: Final = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#1a2a6c",
)  # fmt: skip
"""Colours of tenants with a line of their own: matplotlib's, but for the grey, which is that of the rest."""
APART: Final = 0.022
"""Labels of tenants are at least this part of the axis apart: the larger have theirs first."""
COLOURS: Final = {QUEUED: "#d9d9d9", RUNNING: "#4c9f70", HELD: "#d1495b"}


def draw(lives: Sequence[Life], title: str, folder: Path) -> list[Path]:
    """Write `service.png`, `ttft.png`, `held.png` and `index.html` into the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: tuple[tuple[str, str, Callable[[Any, Sequence[Life]], None]], ...] = (
        ("service.png", "Service over time", service),
        ("ttft.png", "First-token latency per tenant", ttft),
        ("held.png", "Who held what when", held),
    )
    written = []
    for name, what, paint in pictures:
        path = folder / name
        _figure(path, f"{title}: {what.lower()}", lambda axes, paint=paint: paint(axes, lives))  # type: ignore[misc]
        written.append(path)
    page = folder / "index.html"
    page.write_text(_page(title, [(name, what) for name, what, _ in pictures]))
    return [*written, page]


def service(axes: Any, lives: Sequence[Life]) -> None:
    """What each tenant was served per second in a sliding window, and what it asked for (dotted)."""
    done = [life for life in lives if life.done]
    if not done:
        return
    last = max(life.finished_s or 0.0 for life in done)
    middle = np.linspace(0.0, last, POINTS)
    begins, ends = middle - WINDOW_S / 2, middle + WINDOW_S / 2
    names = tenants([life.arrival for life in done])
    served, asked = service_rates(done, begins, ends), asked_rates(done, begins, ends)
    lines = _lines(lives)
    shown = [place for name in lines for place, each in enumerate(names) if each == name]
    for place in shown:
        colour = lines[names[place]]
        axes.plot(middle, served[place], color=colour, label=names[place])
        axes.plot(middle, asked[place], color=colour, linestyle=":", linewidth=0.8)
    rest = [place for place in range(len(names)) if place not in shown]
    if rest:
        axes.plot(middle, served[rest].sum(axis=0), color="grey", linestyle="--", label=f"{len(rest)} others")
    axes.set(xlabel="time, s", ylabel=f"weighted tokens/s over {WINDOW_S:g} s (dotted: asked for)")
    axes.set_xlim(0.0, last)
    axes.set_ylim(bottom=0.0)
    _legend(axes)


def ttft(axes: Any, lives: Sequence[Life]) -> None:
    """The distribution of first-token latency, a line per tenant."""
    for name, colour in _lines(lives).items():
        waits = sorted(
            life.ttft_s for life in lives if life.arrival.tenant == name and life.ttft_s is not None
        )
        if waits:
            axes.step(
                waits, np.arange(1, len(waits) + 1) / len(waits), where="post", color=colour, label=name
            )
    axes.set_xscale("symlog", linthresh=0.1)  # from 0, and logarithmic beyond 0.1 s
    axes.set(xlabel="first-token latency, s", ylabel="part of the requests", ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:g}")
    _legend(axes)


def held(axes: Any, lives: Sequence[Life]) -> None:
    """A line per request, in order of arrival within its tenant: grey waits, green runs, red is held."""
    rows = sorted(lives[:MOST_ROWS], key=lambda life: (natural(life.arrival.tenant), life.arrival.at_s))
    width = min(1.5, max(0.5, 500 / len(rows)))
    spans: dict[str, tuple[list[float], list[float], list[int]]] = {state: ([], [], []) for state in COLOURS}
    for place, life in enumerate(rows):
        for since, until, state in life.spans():
            if state != ENDED:
                begins, ends, places = spans[state]
                begins.append(since)
                ends.append(until)
                places.append(place)
    for state, (begins, ends, places) in spans.items():
        axes.hlines(places, begins, ends, colors=COLOURS[state], linewidth=width, label=state)
    marks = {life.arrival.tenant: place for place, life in reversed(list(enumerate(rows)))}
    counts = Counter(life.arrival.tenant for life in rows)
    labels: dict[str, int] = {}
    for name in sorted(marks, key=lambda name: -counts[name]):
        if all(abs(marks[name] - place) >= APART * len(rows) for place in labels.values()):
            labels[name] = marks[name]
    axes.set_yticks(list(labels.values()), list(labels), fontsize="x-small")
    axes.set(xlabel="time, s", ylabel="requests by tenant, in order of arrival")
    axes.set_xlim(left=0.0)
    axes.margins(y=0.01)
    _legend(axes)


def _lines(lives: Sequence[Life]) -> dict[str, str]:
    """The tenants that asked for most, the first for the most, and the colour of each in every picture."""
    asked = dict.fromkeys(tenants([life.arrival for life in lives]), 0)
    for life in lives:
        asked[life.arrival.tenant] += life.arrival.cost
    return dict(zip(sorted(asked, key=lambda name: -asked[name])[:MOST_LINES], LINES, strict=False))


def _legend(axes: Any) -> None:
    """Beside the picture, where it hides nothing; lines in it are thick enough to tell their colours."""
    legend = axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for line in legend.get_lines() if legend else ():
        line.set_linewidth(2.0)


def _figure(path: Path, title: str, paint: Callable[[Any], None]) -> None:
    from matplotlib.figure import Figure  # not pyplot: no windows, no global state

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    paint(axes)
    figure.savefig(path, dpi=110)


def _page(title: str, pictures: Sequence[tuple[str, str]]) -> str:
    images = "\n".join(f'<h2>{what}</h2>\n<img src="{name}" alt="{what}">' for name, what in pictures)
    name = html.escape(title)
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>{name}</title>\n<h1>{name}</h1>\n{images}\n"
