"""What an evaluation found: records to compute with, and the same as a table, a grid of pictures and a plot of steps against quality."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .metrics import Measure
from .report import picture_grid, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLER_IS_BETTER = ("FD", "KID")  # all others: larger
NO_AXIS = ("KID sd",)  # in the table only
Column = tuple[str, int | None, float | None]  # sampler, num_inference_steps, guidance_scale


@dataclass(frozen=True, kw_only=True)
class Score:
    """One set of pictures against the real ones.

    ``role``: "reference" is the other half of the real pictures, whose values are the floors; "control" is one of Diffusers' own
    samplers, "sampler" any other; "pictures" came from elsewhere, and steps, guidance, calls and seconds are None.
    """

    role: Literal["reference", "control", "sampler", "pictures"]
    sampler: str
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    nfe: int | None = None  # network calls per picture, counted; a guided pair in one batch is one call
    seconds: float | None = None  # wall clock per picture, without measuring
    measures: tuple[Measure, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found: ``rows`` to compute with, ``markdown()`` to read, ``save(folder)`` to keep.

    ``rows[0]`` is real against real. ``images[sampler, num_inference_steps, guidance_scale]`` is (len(prompts), H, W, 3) uint8, the
    first few pictures of each row.
    """

    rows: tuple[Score, ...]
    images: Mapping[Column, np.ndarray]
    prompts: tuple[str, ...]  # of the pictures in ``images``; empty texts where there are none
    settings: Mapping[str, Any]

    def markdown(self) -> str:
        """A heading with the settings, and one table row per set of pictures."""
        return markdown(self)

    def to_json(self) -> str:
        """Settings, prompts and rows; the pictures are not in it."""
        content = {"settings": dict(self.settings), "prompts": list(self.prompts), "rows": [asdict(row) for row in self.rows]}
        return json.dumps(content, indent=2, allow_nan=False)

    def save(self, folder: str | Path) -> list[Path]:
        """The files written, each whole or not at all: report.md, report.json, pictures.png and, where steps vary, quality.png."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        writers = {
            "report.md": lambda file: file.write(self.markdown().encode()),
            "report.json": lambda file: file.write(self.to_json().encode()),
            "pictures.png": lambda file: picture_grid(_in_every_block(self)).save(file, format="png"),
        }
        if any(row.nfe for row in self.rows):
            writers["quality.png"] = lambda file: quality_plot(self).savefig(file, format="png", dpi=150)
        for name, write in writers.items():
            write_atomically(folder / name, write)
        return [folder / name for name in writers]


def _in_every_block(evaluation: Evaluation) -> Evaluation:
    """The same with the real pictures once for each guidance scale, as the grid shows them."""
    real, *runs = evaluation.rows
    scales = dict.fromkeys(row.guidance_scale for row in runs)
    shown = evaluation.images[real.sampler, None, None]
    images = {**evaluation.images, **{(real.sampler, None, scale): shown for scale in scales}}
    return replace(evaluation, rows=(*(replace(real, guidance_scale=scale) for scale in scales), *runs), images=images)


def markdown(evaluation: Evaluation) -> str:
    """The settings in a few lines, then one row per set of pictures; the first is the floor of every column."""
    s = evaluation.settings
    names = _names(evaluation)
    head = ["guidance", "pictures", "steps", "NFE", *names, "s/picture"]
    better = [name for name in names if name in SMALLER_IS_BETTER]
    lines = [
        f"# Quality of {s['generated']}",
        "",
        f"{s['count']} pictures in every row against {s['count']} of {s['num_real']} real ones ({s['real']}), seed {s['seed']}. "
        f"Features: {s['features']}, {s['width']} numbers" + (f"; classes: {s['classifier']}. " if s["classifier"] else ". ")
        + "Row *real* is the floor: as many other real pictures, measured the same way; no model can be told from the data below it. "
        + (f"Smaller is better: {', '.join(better)}. " if better else "")
        + "Other measures: larger is better, up to about their floor. Figures of other counts or features do not compare.",
        *(f"{note}" for note in s["notes"]),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "|".join(":---" if name == "pictures" else "---:" for name in head) + "|",
    ]  # fmt: skip
    for row in evaluation.rows:
        values = {m.name: m.value for m in row.measures}
        cells = [
            _cell(row.guidance_scale, "g"), "*real*" if row.role == "reference" else row.sampler, _cell(row.num_inference_steps, "d"),
            _cell(row.nfe, "d"), *(_cell(values.get(name), ".3g") for name in names), _cell(row.seconds, ".2f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def quality_plot(evaluation: Evaluation) -> Figure:
    """One panel per measure: its value against NFE (logarithmic) of every sampler and guidance scale, the floor dotted."""
    from matplotlib.figure import Figure

    runs = [row for row in evaluation.rows if row.nfe]
    names = [name for name in _names(evaluation) if name not in NO_AXIS]
    floors = {measure.name: measure.floor for measure in evaluation.rows[0].measures}
    lines = list(dict.fromkeys((row.sampler, row.guidance_scale) for row in runs))
    columns = min(3, len(names))
    figure = Figure(figsize=(4.2 * columns, 3.2 * -(-len(names) // columns) + 0.25 * len(lines)), layout="constrained")
    panels = figure.subplots(-(-len(names) // columns), columns, squeeze=False).flat
    for name, panel in zip(names, panels):  # in this order: zip asks its last one only for names that exist
        for number, (sampler, scale) in enumerate(lines):
            own = [row for row in runs if (row.sampler, row.guidance_scale) == (sampler, scale)]
            points = sorted((row.nfe or 0, m.value) for row in own for m in row.measures if m.name == name)
            style = dict(color=f"C{number % 10}", marker="osD^v<>Pphx"[number % 11])
            panel.plot([n for n, _ in points], [value for _, value in points], label=f"{sampler}, guidance {scale:g}", **style)
        panel.axhline(floors[name], color="gray", linestyle=":", label="floor: real against real")
        ticks = sorted({row.nfe for row in runs if row.nfe})
        panel.set(xscale="log", xlabel="network calls (NFE)", title=name + (" (smaller is better)" if name in SMALLER_IS_BETTER else ""))
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels:  # what is left of the last row
        panel.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=9, frameon=False)
    return figure


def _names(evaluation: Evaluation) -> Sequence[str]:
    return [measure.name for measure in evaluation.rows[0].measures]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
