"""A whole run around the loop: resume, progress bar, log, checkpoints, measurements, sample sheets, and a clean stop."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tqdm.auto import tqdm

from ..conditioning.adapter import AdaptedFamily
from ..evaluation.report import write_atomically
from . import checkpoint
from .curve import GAIN, draw, moment
from .loop import Progress, Training
from .pictures import picture_size
from .sheet import pictures, sheet


@dataclass(frozen=True)
class Measured:
    """What a metric found: ``value``, of which less is better, ``figures`` that belong to it, and a sheet of the pictures it looked at."""

    value: float
    figures: Mapping[str, float] = field(default_factory=dict)
    sheet: Image.Image | None = None


Metric = Callable[[Any, Mapping[str, Any]], float | Measured]  # of (stock pipeline, call arguments); less is better
KEPT = 2  # checkpoints besides the best
REPORTED = 8  # prompts
PIXELS_AT_ONCE = 2**19  # of a sample sheet, made in one call: two pictures of 512 x 512; large ones together would need the most memory
# What may differ at a resume: it changes no weight of any step.
FREE = ("train.save_every", "train.evaluate_every", "train.patience", "model.from", "held_out")


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and saved itself; ``number`` is the signal that asked (SIGINT where only another process got one)."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass
class Run:
    """One training run in a folder.

    The folder holds run.yaml (all that was asked for), log.jsonl (a line per step), checkpoints/, samples/.

    Args:
        described: what identifies the run, in plain values by section; compared at a resume.
        metric: measured with the exported weights every ``evaluate_every`` steps; the best checkpoint is the result.
        prompts: of the sample sheets; the first few are in the report.
        from_start: measure before the first step, too.
    """

    training: Training
    folder: Path
    described: Mapping[str, Any]
    metric: Metric | None = None
    prompts: Sequence[str] | None = None
    progress: bool = True
    from_start: bool = False

    def __post_init__(self) -> None:
        self.checkpoints = self.folder / "checkpoints"
        self.main = self.training.accelerator.is_main_process
        self.measured: dict[int, float | None] = {}  # None where the metric was not finite
        self.curve: dict[int, dict[str, float]] = {}  # the figures that belong to them

    def go(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if there is one; then the networks hold the result. Returns the report.

        Raises:
            Stopped: after SIGINT or SIGTERM; the same call goes on.
            FloatingPointError: a loss that is not finite; the last good checkpoint stays.
            ValueError: the folder holds another run.
        """
        self._claim()
        self._resume()
        training, config = self.training, self.training.config
        if self.from_start and self.metric and not training.step and not self.measured:
            self._evaluate(0)
        with stopping() as stop, self._bar() as bar:
            for now in () if self._had_enough() else training.steps():
                self._log(now)
                bar.update()
                bar.set_postfix({role: f"{loss:.4g}" for role, loss in now.losses.items()} | {"lr": f"{now.lr:.2g}"})
                last = now.step == config.train_steps
                if (config.evaluate_every and not now.step % config.evaluate_every) or last:
                    self._evaluate(now.step)
                asked = self._anyone(bool(stop))
                if asked or last or not now.step % config.save_every:
                    self._save()
                if asked and not last:
                    raise Stopped(
                        f"stopped after step {now.step} of {config.train_steps}, which is saved; the same call goes on from there",
                        stop[0] if stop else signal.SIGINT,
                    )
                if self._had_enough():
                    self._save()
                    break
        return self._finish()

    # --- the folder -------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write run.yaml, or compare with the one that is there."""
        file, mine = self.folder / "run.yaml", json.loads(json.dumps(self.described))
        if file.exists():
            theirs = yaml.safe_load(file.read_text())
            changed = [name for name in differences(theirs, mine) if name not in FREE]
            if changed:
                said = "; ".join(f"{name}: {value_at(theirs, name)!r} there, {value_at(mine, name)!r} now" for name in changed)
                raise ValueError(f"{self.folder} holds a run with other settings ({said}); give the same ones to go on, or another output")
        elif self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, lambda out: out.write(yaml.safe_dump(mine, sort_keys=False).encode()))

    def _resume(self) -> None:
        found = checkpoint.newest(self.checkpoints)
        if found is not None:
            self._load(found)
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]  # a crash may have cut the last one
        kept = [entry for entry in entries if entry["step"] <= self.training.step]  # those of lost steps are taken again
        self.measured = {entry["step"]: entry["metric"] for entry in kept if "metric" in entry}
        self.curve = {entry["step"]: entry["figures"] for entry in kept if "figures" in entry}
        if self.main and lines:
            write_atomically(log, lambda out: out.write("".join(f"{json.dumps(entry)}\n" for entry in kept).encode()))
            self._point_at_best()

    def _load(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        self.training.load_state(tensors, state)

    def _save(self) -> None:
        tensors, state = self.training.state()  # on every process: each may hold a part
        if self.main:
            checkpoint.save(self.checkpoints, self.training.step, tensors, state)
            checkpoint.prune(self.checkpoints, KEPT)
        self.training.accelerator.wait_for_everyone()

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _bar(self) -> tqdm:
        total, size = self.training.config.train_steps, self.training.config.batch_size
        shown = self.progress and self.main
        return tqdm(total=total, initial=self.training.step, unit=f" updates of {size}", disable=not shown, dynamic_ncols=True)

    def _log(self, now: Progress) -> None:
        flat = {f"loss/{k}": v for k, v in now.losses.items()} | dict(now.logs) | {f"grad_norm/{k}": v for k, v in now.grad_norms.items()}
        flat |= {"lr": now.lr, "examples_per_second": self.training.config.batch_size / now.seconds}
        self.training.accelerator.log(flat, step=now.step)
        self._write({"step": now.step, "stage": now.stage, **flat})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.main:
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")

    def _evaluate(self, step: int) -> None:
        """A sample sheet, and the metric where there is one; a checkpoint that is the best so far is kept."""
        if self.main:
            pipe, call_kwargs = self.training.result()
            found = self.metric(pipe, call_kwargs) if self.metric else math.nan
            found = found if isinstance(found, Measured) else Measured(float(found))
            if drawn := found.sheet or self._sheet(pipe, call_kwargs):
                folder = self.folder / "samples"
                folder.mkdir(exist_ok=True)
                write_atomically(folder / f"step-{step:08d}.png", lambda out: drawn.save(out, format="png"))
            if self.metric:
                self.measured[step] = found.value if math.isfinite(found.value) else None  # as JSON says it
                entry = {"step": step, "metric": self.measured[step]}
                if found.figures:
                    self.curve[step] = entry["figures"] = dict(found.figures)
                self._write(entry)
                self.training.accelerator.log({"metric": found.value, **found.figures}, step=step)
                self._draw_curve()
        if self.metric:
            self._save()
            if self.main:
                self._point_at_best()

    def _sheet(self, pipe: Any, call_kwargs: Mapping[str, Any]) -> Image.Image | None:
        if isinstance(self.training.nets.family, AdaptedFamily):
            return None  # only a metric knows what its samples could be shown
        height, width = picture_size(self.training.nets.family, None)
        return sheet(pictures(pipe, call_kwargs, self.prompts, at_once=max(1, PIXELS_AT_ONCE // (height * width))))

    def _draw_curve(self) -> None:
        if self.curve:
            log = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
            losses = {entry["step"]: entry["loss/student"] for entry in log if "loss/student" in entry}
            write_atomically(self.folder / "curve.png", lambda out: draw(out, self.curve, losses, self._best()))

    def _best(self) -> int | None:
        """The step of the best figure; of equally good ones, the later one."""
        figures = {step: math.inf if value is None else value for step, value in self.measured.items()}
        return min(figures, key=lambda step: (figures[step], -step)) if figures else None

    def _had_enough(self) -> bool:
        """Whether the last ``patience`` measurements were no better than one before."""
        best, patience = self._best(), self.training.config.patience
        return bool(patience) and self._anyone(best is not None and sum(step > best for step in self.measured) >= patience)

    def _point_at_best(self) -> None:
        best = self._best()
        if best is not None:
            checkpoint.point(self.checkpoints, "best", self.checkpoints / checkpoint.name_of(best))

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all save the same step."""
        accelerator = self.training.accelerator
        if accelerator.num_processes == 1:
            return asked
        flags: Any = accelerator.reduce(torch.tensor([float(asked)], device=accelerator.device), reduction="sum")
        return bool(flags.item())

    def _finish(self) -> dict[str, Any]:
        best = checkpoint.pointed(self.checkpoints, "best") if self.metric else None
        if best is not None and best.name != checkpoint.name_of(self.training.step):
            self._load(best)
        report: dict[str, Any] = {"train_steps": self.training.config.train_steps, "kept_step": self.training.step}
        if self.prompts:
            report["prompts"] = list(self.prompts[:REPORTED])
        if self.metric:
            report["metric"] = {str(step): value for step, value in sorted(self.measured.items())}
        if self.curve:
            report["figures"] = {str(step): figures for step, figures in sorted(self.curve.items())}
            report["converged_step"] = moment({step: figures[GAIN] for step, figures in self.curve.items() if GAIN in figures})
        if self.main:
            write_atomically(self.folder / "report.json", lambda out: out.write(json.dumps(report, indent=1).encode()))
        return report


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """The signals that came, SIGINT (Ctrl-C) and SIGTERM, which do not end the program inside; a second SIGINT ends it at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield came
        return

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """Dotted names at which two nests of plain values differ."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        names = sorted({*one, *two})
        return [found for name in names for found in differences(one.get(name), two.get(name), f"{path}.{name}" if path else name)]
    return [] if one == two else [path]


def value_at(nest: Any, path: str) -> Any:
    """What stands at a dotted name; None where nothing does."""
    for name in path.split("."):
        nest = nest.get(name) if isinstance(nest, Mapping) else None
    return nest
