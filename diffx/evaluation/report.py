"""What a comparison found: records to compute with, and the same as a table, a grid of pictures and an error plot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .metrics import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .quality import Evaluation

MIN_CELL, MAX_CELL = 96, 256  # pixels of a picture's longer side in the grid
GAP, LINE = 14, 3  # pixels between two samplers, between two pictures
PAPER = (236, 236, 236)  # not white, so that pictures on white have an edge
INK, FADED = (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One sampler at one number of steps and one guidance scale.

    ``role``: "reference"; "floor" is the reference at half its steps, whose distance says below which figure two samplers
    cannot be told apart; "control" is one of Diffusers' own classes; "sampler" any other.
    """

    role: Literal["reference", "floor", "control", "sampler"]
    sampler: str
    guidance_scale: float
    num_inference_steps: int
    nfe: int  # network calls per picture, counted; a guided pair in one batch is one call
    batch_factor: float  # rows the network saw per picture and call: 2 where guidance runs condition and uncondition together
    seconds: float  # wall clock per picture, text encoding and decoding included
    stochastic: bool  # fresh noise was drawn on the way: no distance to a deterministic reference
    rms: float | None  # to the reference's pictures in [0, 1]; None where stochastic
    psnr: float | None  # dB; None where stochastic or equal
    latent_rms: float | None  # to the reference's final latents; None also where the pipeline shows none
    measures: tuple[Measure, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found: ``rows`` to compute with, ``markdown()`` to read, ``save(folder)`` to keep.

    ``images[sampler, num_inference_steps, guidance_scale]`` is (len(prompts), H, W, 3) uint8, the first picture of each prompt.
    """

    rows: tuple[Result, ...]
    images: Mapping[tuple[str, int, float], np.ndarray]
    prompts: tuple[str, ...]
    settings: Mapping[str, Any]

    def markdown(self) -> str:
        """A heading with the settings, and one table row per run."""
        return markdown(self)

    def to_json(self) -> str:
        """Settings, prompts and rows; the pictures are not in it."""
        content = {"settings": dict(self.settings), "prompts": list(self.prompts), "rows": [asdict(row) for row in self.rows]}
        return json.dumps(content, indent=2, allow_nan=False)

    def save(self, folder: str | Path) -> None:
        """Write report.md, report.json, compare.png and error.png, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.md", lambda file: file.write(self.markdown().encode()))
        write_atomically(folder / "report.json", lambda file: file.write(self.to_json().encode()))
        write_atomically(folder / "compare.png", lambda file: picture_grid(self).save(file, format="png"))
        write_atomically(folder / "error.png", lambda file: error_plot(self).savefig(file, format="png", dpi=150))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """``path`` holds what ``write`` puts into the file it is given; a reader, or a crash, never meets half of it."""
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.chmod(part, 0o644)  # mkstemp's files are private
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def markdown(comparison: Comparison) -> str:
    """The settings in a few lines, then one row per run; the best distance of each guidance scale and NFE is bold."""
    s, rows = comparison.settings, comparison.rows
    names = list(dict.fromkeys(m.name for row in rows for m in row.measures))
    batch_rows = ", ".join(f"{row.batch_factor:g} at guidance {row.guidance_scale:g}" for row in rows if row.role == "reference")
    head = ["guidance", "sampler", "NFE", "RMS", "PSNR dB", "latent RMS", *names, "s/picture"]
    lines = [
        f"# {len({row.sampler for row in rows})} samplers on {s['pipeline']}",
        "",
        f"{s['count']} pictures of {len(comparison.prompts)} prompts, seed {s['seed']}. "
        f"{s['device']}, {s['dtype']}, CPU threads: {s['threads']}. "
        f"RMS and PSNR: pictures in [0, 1] against {s['reference']} at {s['reference_steps']} steps from the same noise; "
        f"floor: the same at {s['reference_steps'] // 2} steps, smaller differences mean nothing. "
        f"NFE counts network calls per picture; rows per picture in each call: {batch_rows}.",
        *(f"{m.name}: {m.count} pictures, seed {m.seed}, real versus real {m.floor:.3f}." for m in rows[0].measures),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---:" if name not in ("sampler",) else ":---" for name in head) + "|",
    ]
    best: dict[tuple, float] = {}  # rounded as printed, so that what looks equal is marked equally
    for row in rows:
        if row.rms is not None and row.role in ("control", "sampler"):
            key = row.guidance_scale, row.nfe
            best[key] = min(round(row.rms, 4), best.get(key, np.inf))
    lines += ["| " + " | ".join(_cells(row, names, best)) + " |" for row in rows]
    usual = {row.guidance_scale: row.batch_factor for row in rows if row.role == "reference"}
    if narrow := list(dict.fromkeys(row.sampler for row in rows if row.batch_factor < usual[row.guidance_scale])):
        lines += ["", f"{', '.join(narrow)}: guidance is in the weights, and each call has one row per picture."]
    if any(row.stochastic for row in rows):
        lines += ["", "*noise*: the sampler draws fresh noise, so that its distance to a deterministic reference says nothing."]
    return "\n".join(lines) + "\n"


def _cells(row: Result, names: Sequence[str], best: dict[tuple, float]) -> list[str]:
    distance = "*noise*" if row.rms is None else f"{row.rms:.4f}"
    if row.role in ("control", "sampler") and row.rms is not None and round(row.rms, 4) == best[row.guidance_scale, row.nfe]:
        distance = f"**{distance}**"
    values = {m.name: f"{m.value:.3f}" for m in row.measures}
    label = row.sampler if row.role in ("control", "sampler") else f"{row.sampler} ({row.role})"
    return [
        f"{row.guidance_scale:g}", label, str(row.nfe), distance, _number(row.psnr, ".1f"), _number(row.latent_rms, ".4f"),
        *(values.get(name, "") for name in names), f"{row.seconds:.2f}",
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def picture_grid(comparison: Comparison | Evaluation) -> Image.Image:
    """Prompts (times guidance scales) as rows, the reference and then samplers times NFE as columns."""
    runs = [row for row in comparison.rows if row.role != "floor"]
    scales = list(dict.fromkeys(row.guidance_scale for row in runs))
    images: Mapping[Any, np.ndarray] = comparison.images
    groups: dict[tuple[str, bool], list[Any]] = {}
    for row in runs:
        if row.guidance_scale == scales[0]:
            groups.setdefault((row.sampler, row.role == "reference"), []).append(row)
    height, width = next(iter(images.values())).shape[1:3]
    shown = _cell_size(width, height)
    cell = shown[0] + LINE, shown[1] + LINE
    font, small = ImageFont.load_default(16), ImageFont.load_default(14)

    spans = {key: max(len(columns) * cell[0], MIN_CELL + 56) for key, columns in groups.items()}
    titles = {key: wrap_text(key[0] + (", reference" if key[1] else ""), font, spans[key]) for key in groups}
    top = 20 * max(title.count("\n") + 1 for title in titles.values()) + 30
    left = 170
    num_rows = len(scales) * len(comparison.prompts)
    canvas = Image.new("RGB", (left + sum(spans.values()) + GAP * len(spans), top + num_rows * cell[1]), PAPER)
    draw = ImageDraw.Draw(canvas)
    for block, scale in enumerate(scales):
        for i, prompt in enumerate(comparison.prompts):
            label = prompt + (f"\nguidance {scale:g}" if len(scales) > 1 else "")
            lines = "\n".join(wrap_text(line, font, left - 16) for line in label.split("\n")).split("\n")
            y = top + (block * len(comparison.prompts) + i) * cell[1]
            draw.multiline_text((8, y + 6), "\n".join(lines[: cell[1] // 20]), INK, font)
    x = left
    for key, columns in groups.items():
        draw.multiline_text((x, 4), titles[key], INK, font)
        for j, column in enumerate(columns):
            if column.nfe:  # real pictures have none
                draw.text((x + j * cell[0] + 2, top - 20), f"NFE {column.nfe}", FADED, small)
            for block, scale in enumerate(scales):
                for i, pixels in enumerate(images[column.sampler, column.num_inference_steps, scale]):
                    how = Image.Resampling.NEAREST if shown[0] >= width else Image.Resampling.LANCZOS
                    corner = x + j * cell[0], top + (block * len(comparison.prompts) + i) * cell[1]
                    canvas.paste(Image.fromarray(pixels).resize(shown, how), corner)
        x += spans[key] + GAP
    return canvas


def _cell_size(width: int, height: int) -> tuple[int, int]:
    longer = max(width, height)
    if longer < MIN_CELL:  # a whole factor keeps small pictures' pixels square
        return width * -(-MIN_CELL // longer), height * -(-MIN_CELL // longer)
    factor = min(1.0, MAX_CELL / longer)
    return max(1, round(width * factor)), max(1, round(height * factor))


def wrap_text(text: str, font: Any, width: float) -> str:
    """``text`` with line breaks where it grows wider than ``width`` pixels, after a space or a sign if there is one."""
    lines = [""]
    for character in text:
        if font.getlength(lines[-1] + character) > width and lines[-1]:
            cut = max((lines[-1].rfind(sign) for sign in " :,=_-/"), default=-1) + 1
            cut = cut or len(lines[-1])
            lines[-1:] = [lines[-1][:cut].rstrip(), lines[-1][cut:]]
        lines[-1] += character
    return "\n".join(lines)


def error_plot(comparison: Comparison) -> Figure:
    """RMS distance to the reference against NFE, both logarithmic; one panel per guidance scale, controls dashed, the floor dotted."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    runs = [row for row in comparison.rows if row.role in ("control", "sampler") and row.rms]
    scales = list(dict.fromkeys(row.guidance_scale for row in comparison.rows))
    samplers = list(dict.fromkeys(row.sampler for row in runs))
    figure = Figure(figsize=(0.5 + 5.5 * len(scales), 5 + 0.25 * len(samplers)), layout="constrained")
    for panel, scale in zip(figure.subplots(1, len(scales), sharey=True, squeeze=False)[0], scales, strict=True):
        for number, sampler in enumerate(samplers):
            line = sorted((row.nfe, row.rms, row.role) for row in runs if row.sampler == sampler and row.guidance_scale == scale)
            if line:
                # A control often lies exactly on the line of its drop-in: hollow and large, both stay visible.
                control = dict(linestyle="--", markerfacecolor="none", markersize=11) if line[0][2] == "control" else {}
                style = dict(color=f"C{number % 10}", marker="osD^v<>Pphx"[number % 11]) | control
                panel.plot([n for n, _, _ in line], [error for _, error, _ in line], label=sampler, **style)
        for row in comparison.rows:
            if row.role == "floor" and row.guidance_scale == scale and row.rms:
                panel.axhline(row.rms, color="gray", linestyle=":", label=f"floor: reference at {row.nfe} calls")
        ticks = sorted({row.nfe for row in runs})
        panel.set(xscale="log", yscale="log", xlabel="network calls (NFE)", title=f"guidance {scale:g}")
        panel.set_xticks(ticks, [str(n) for n in ticks])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel(f"RMS to {comparison.settings['reference']}, {comparison.settings['reference_steps']} steps")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=9, frameon=False)
    return figure
