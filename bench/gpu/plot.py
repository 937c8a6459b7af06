"""The frontier of co-location as a picture: time to first token against what the batch still gets.

    python -m bench.gpu plot DIR      reads DIR/colocation.json, writes DIR/frontier.png

Needs matplotlib, which nothing else here does: `pip install matplotlib`.
"""

from pathlib import Path
from typing import Any

import msgspec

from bench.gpu.summary import batch_rate, ttft

SHARES = ((0.5, "p50", "o"), (0.99, "p99", "s"))


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (more is better, less is better) those that none is better than in both, in the order of the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best[::-1]


def plot(folder: Path) -> Path:
    """Draw it; returns the picture's path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    part: dict[str, Any] = msgspec.json.decode((folder / "colocation.json").read_bytes())
    alone = part.pop("alone", None)
    # In waves the batch's rate depends on how many fell into the window: see `colocation`.
    part = {name: result for name, result in part.items() if name.startswith("steady: ") and result["ttft_s"]}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for share, label, mark in SHARES:
        for index, (name, result) in enumerate(part.items()):
            x, y = batch_rate(result), ttft(result, share)
            axes.errorbar(
                x.value, y.value * 1e3, xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
                yerr=[[(y.value - y.low) * 1e3], [(y.high - y.value) * 1e3]], fmt=mark, color=f"C{index}", capsize=2,
                label=name.removeprefix("steady: ") if label == "p50" else None,
            )  # fmt: skip
        points = [(batch_rate(result).value, ttft(result, share).value * 1e3) for result in part.values()]
        axes.step(*zip(*frontier(points), strict=True), where="post", color="grey", linewidth=0.8, zorder=0)
        if alone is not None:
            value = ttft(alone, share).value * 1e3
            axes.axhline(value, color="black", linewidth=0.8, linestyle=":" if label == "p50" else "--")
            axes.annotate(
                f"alone, {label}", (0.995, value), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
    axes.set(yscale="log", xlabel="batch output tokens/s", ylabel="time to first token, ms (○ p50, □ p99)",
             title="Interactive requests beside a batch that fills the engine")  # fmt: skip
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter("")
    axes.legend(fontsize="small")
    axes.grid(visible=True, which="both", alpha=0.25)
    path = folder / "frontier.png"
    figure.savefig(path, dpi=150)
    return path
