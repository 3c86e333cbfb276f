"""How well what is trained follows what it is shown, over the steps of a run: a plot, and the moment at which it began to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

TRUE, SHUFFLED, GAIN = "true", "shuffled", "gain"  # figures of a measurement: likeness to what was shown, to what others were shown
LEAST = 4.0  # a jump counts where it is more times the spread around it; that of a straight line is at most so many
SMOOTH = 40  # points that remain of the loss


def moment(gains: Mapping[int, float]) -> int | None:
    """The step of the first measurement after the one jump that explains a curve best; None where there is no such jump.

    Of all ways to cut the curve in two, each part replaced by its mean, the one with the least squared error. It counts where the
    means differ by more than four times the root of that error's mean, which no straight line does, and the curve rises.
    """
    steps = sorted(gains)
    values = np.array([gains[step] for step in steps])
    if len(values) < 4:
        return None  # two points and a jump between them say nothing
    errors = [part(values[:k]) + part(values[k:]) for k in range(1, len(values))]
    cut = int(np.argmin(errors)) + 1
    rise = values[cut:].mean() - values[:cut].mean()
    return steps[cut] if rise > LEAST * np.sqrt(errors[cut - 1] / len(values)) else None


def part(values: np.ndarray) -> float:
    """The squared error of the mean of some values."""
    return float(((values - values.mean()) ** 2).sum())


def draw(file: Any, figures: Mapping[int, Mapping[str, float]], losses: Mapping[int, float], best: int | None) -> None:
    """A plot of all figures by step, the loss in the background, the best step and the moment marked; written to ``file`` as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    steps = sorted(figures)
    for name in dict.fromkeys(name for found in figures.values() for name in found):
        line = [figures[step].get(name, np.nan) for step in steps]
        axis.plot(steps, line, marker=".", linewidth=2 if name == GAIN else 1, label=name)
    if best is not None:
        axis.axvline(best, color="black", linewidth=0.8, label=f"best, step {best}")
    began = moment({step: found[GAIN] for step, found in figures.items() if GAIN in found})
    if began is not None:
        axis.axvline(began, color="black", linewidth=0.8, linestyle="--", label=f"begins to follow, step {began}")
    axis.set(xlabel="updates", ylabel="likeness to what was shown")
    if losses:
        behind = axis.twinx()
        at, values = np.array(sorted(losses)), np.array([losses[step] for step in sorted(losses)])
        width = max(1, len(at) // SMOOTH)
        kernel = np.ones(width) / width
        behind.plot(np.convolve(at, kernel, "valid"), np.convolve(values, kernel, "valid"), color="0.75", linewidth=1, zorder=0)
        behind.set_ylabel("loss, running mean", color="0.6")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, format="png", dpi=100)
