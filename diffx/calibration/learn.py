"""Stage (c): Gauss-Newton on a whole table: where the calls lie, which time the network is told, what each prediction weighs.

A run of N calls has about 4 N free numbers, and thousands of residuals: a least-squares problem, for which Gauss-Newton needs
a few steps where gradient descent needs hundreds. Derivatives are differences of runs. A number that acts from call c on needs only the
calls from c on, and the last row none: a whole Jacobian costs 61 network calls a sample at N = 6, and 195 at N = 10. No network is ever
differentiated, so that memory does not grow with N and any network will do.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedulers.calibrated import Calibration, sigmas_of
from ..schedulers.grid import Convention, Grid
from ..schedulers.process import Process
from ..schedulers.scheduler import TableScheduler
from ..schedulers.table import Row, State, Table, combine
from ..schedulers.turn import Run
from .problem import Problem
from .reference import recorded

STEP = {torch.float32: 1e-3, torch.float64: 1e-4}  # of a difference; half precision rounds much more
HALF_STEP = 3e-2
LOOK_BACK = 3  # older predictions with weights of their own in a row; those beyond keep what the start gives them
EASIER, HARDER, TRIALS = 0.2, 5.0, 6  # factors on the damping after a step that helped and one that did not; tries per iteration


@dataclass(frozen=True)
class Knob:
    """One free number: ``kind`` "level" (log sigma / alpha of call k), "time" (told at call k) or "weight" (of x0 number j in row k)."""

    kind: str
    k: int
    j: int = 0

    @property
    def acts_from(self) -> int:
        """The first network call that it changes; N is the end."""
        return self.k + (self.kind == "weight")


def knobs_of(calls: int) -> list[Knob]:
    """Every free number of a run of that many network calls."""
    places = [Knob(kind, k) for kind in ("level", "time") for k in range(calls)]
    return places + [Knob("weight", k, j) for k in range(1, calls) for j in range(1, min(k, LOOK_BACK) + 1)]


class Knobs:
    """Every free number of a run, as differences from a starting calibration; all zero is that calibration.

    The level of a first call on pure noise stays; another one says only how that call's noise is read. A weight is a share of its
    row's gain, the newest prediction taking what is left to 1, so that every setting is a table that keeps the noise levels of its
    grid.

    Args:
        process: of the model, in the frame "vp" or "flow".
        start: a calibration for it.
    """

    def __init__(self, process: Process, start: Calibration) -> None:
        calls = start.num_inference_steps
        self.process = process
        self.levels = np.asarray(start.levels, np.float64)
        grid = sigmas_of(start.levels, process)
        alpha, sigma = process.levels(grid)
        self.told = np.asarray(start.timesteps, np.float64) - process.t_at(grid[:-1])  # some samplers tell a whole time nearby
        self.unit = np.abs(np.diff(start.timesteps, append=0.0))  # of the times
        self.shares = np.zeros((calls, calls))
        for k, (_, *weights) in enumerate(start.rows):
            self.shares[k, : len(weights)] = np.array(weights) / (alpha[k + 1] - sigma[k + 1] / sigma[k] * alpha[k])
        self.all = [knob for knob in knobs_of(calls) if knob.kind != "level" or self.levels[knob.k] < 1]

    def run(self, values: np.ndarray) -> Calibration:
        """The run with these values, one for each of ``all``.

        Raises:
            ValueError: levels or times that no longer fall.
        """
        levels, told, shares = self.levels.copy(), self.told.copy(), self.shares.copy()
        for knob, value in zip(self.all, values, strict=True):
            if knob.kind == "level":
                ratio = levels[knob.k] / (1 - levels[knob.k]) * math.exp(value)
                levels[knob.k] = ratio / (1 + ratio)
            elif knob.kind == "time":
                told[knob.k] += value * self.unit[knob.k]
            else:
                shares[knob.k, knob.j] += value
        grid = sigmas_of(levels, self.process)
        alpha, sigma = self.process.levels(grid)
        rows = []
        for k in range(len(shares)):
            keep, older = sigma[k + 1] / sigma[k], shares[k, 1 : k + 1]
            gain = alpha[k + 1] - keep * alpha[k]
            rows.append([float(w) for w in (keep, gain * (1 - older.sum()), *(gain * older))])
        timesteps = np.maximum(self.process.t_at(grid[:-1]) + told, 0.0)
        return Calibration(levels=levels.tolist(), timesteps=timesteps.tolist(), rows=rows)

    def moved(self, values: np.ndarray, i: int, step: float) -> tuple[Calibration, float]:
        """The run with number i moved by ``step``, or back by it where the times of two calls would cross; and by how much."""
        for by in (step, -step):
            with contextlib.suppress(ValueError):
                return self.run(values + by * np.eye(len(values))[i]), by
        raise ValueError(f"the times of two calls are nearer than {step:g} of their distance")


class Tail(TableScheduler, options=dict(timestep_spacing="trailing", clip_sample=False, clip_sample_range=1.0)):
    """A calibration from one of its calls on, with the predictions of the calls before."""

    zero_snr = 0.0
    convention = Convention(whole_t=False)

    def load(self, run: Calibration, begin: int = 0, history: tuple[Tensor, ...] = ()) -> None:
        """What the next ``set_timesteps`` begins; ``history`` is newest first."""
        self._calibration, self._begin, self._history = run, begin, history

    def _make_grid(self, *wanted: Any) -> Grid:
        made = self._calibration
        return Grid(np.asarray(made.timesteps[self._begin :]), sigmas_of(made.levels, self._process)[self._begin :])

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None) -> None:
        """Begin; the pipeline's arguments but for ``device`` change nothing."""
        super().set_timesteps(1, device)
        self._turn.run = Run(0, self._table(0), State(history=self._history))

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        rows = tuple(Row(tuple(row)) for row in self._calibration.rows[self._begin :])
        return Table(alpha, sigma, rows, known=len(self._history))


@dataclass(frozen=True)
class Pass:
    """One run of some samples, remembered: (N + 1) samples, the end being the last, and N predictions."""

    samples: list[Tensor]
    predictions: list[Tensor]

    @property
    def end(self) -> Tensor:
        """(B, ...) where it ended."""
        return self.samples[-1]


class Runner:
    """Runs of a problem's samples with any calibration, from the start or from the first call that differs from a remembered run."""

    def __init__(self, problem: Problem, spend: Callable[[int], Any] = lambda calls: None) -> None:
        self.problem, self.spend = problem, spend
        self.scheduler: Any = Tail.from_config(problem.config)

    def whole(self, run: Calibration, samples: Sequence[int]) -> Pass:
        """The run from its first call."""
        self.scheduler.load(run)
        with recorded(self.scheduler) as (inputs, predictions), torch.no_grad():
            end = self.problem.ends(self.scheduler, samples, run.num_inference_steps)
        self.spend(len(samples) * run.num_inference_steps)
        return Pass([*inputs, end], predictions)

    def changed(self, run: Calibration, call: int, before: Pass, samples: Sequence[int]) -> Tensor:
        """The end of ``run``, which agrees with the run of ``before`` up to what network call ``call`` is fed and told."""
        if not call:
            return self.whole(run, samples).end
        history = tuple(before.predictions[:call][::-1])
        x = combine(run.rows[call - 1], before.samples[call - 1], history)
        left = run.num_inference_steps - call
        if not left:
            return x
        self.scheduler.load(run, call, history)
        self.spend(len(samples) * left)
        with torch.no_grad():
            return self.problem.ends(self.scheduler, samples, left, x)


def normal_equations(
    runner: Runner, knobs: Knobs, values: np.ndarray, passes: Sequence[tuple[Sequence[int], Pass]], goals: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(J^T W J, J^T W r) of the residuals r = end - goal, W being the weights of ``pseudo_huber``.

    Args:
        passes: batches of sample numbers, and their runs at ``values``.
        goals: (samples, ...) where the samples should end.
    """
    scale = mean_distance(passes, goals)
    square, slope = np.zeros((len(values), len(values))), np.zeros(len(values))
    for samples, before in passes:
        step = STEP.get(before.end.dtype, HALF_STEP)
        residual = _flat(before.end) - _flat(goals[list(samples)])
        columns = []
        for i, knob in enumerate(knobs.all):
            run, by = knobs.moved(values, i, step)
            end = runner.changed(run, knob.acts_from, before, samples)
            columns.append((_flat(end) - _flat(before.end)) / by)
        jacobian = torch.stack(columns, 2)  # (B, D, knobs)
        weight = pseudo_huber(residual, scale)[1]
        square += torch.einsum("b,bdi,bdj->ij", weight, jacobian, jacobian).numpy()
        slope += torch.einsum("b,bdi,bd->i", weight, jacobian, residual).numpy()
    return square, slope


def pseudo_huber(residual: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B,) losses scale^2 (sqrt(1 + d^2 / scale^2) - 1) of each sample's RMS d, and the weights 1 / sqrt(1 + d^2 / scale^2).

    Quadratic below ``scale``, linear above: a sample that ends in another mode does not outweigh all others.
    """
    root = (1 + residual.square().mean(1) / scale**2).sqrt()
    return scale**2 * (root - 1), 1 / root


def mean_distance(passes: Sequence[tuple[Sequence[int], Pass]], goals: Tensor) -> float:
    """Mean over samples of the RMS distance of each one's end from its goal."""
    return float(torch.cat([distances(made.end, goals[list(samples)]) for samples, made in passes]).mean()) + 1e-12


def distances(end: Tensor, goal: Tensor) -> Tensor:
    """(B,) float64 root mean square of ``end - goal`` over the entries of each sample."""
    return (_flat(end) - _flat(goal)).square().mean(1).sqrt()


def loss_of(passes: Sequence[tuple[Sequence[int], Pass]], goals: Tensor, scale: float) -> float:
    """Mean ``pseudo_huber`` loss of all samples; infinity where a run is not finite."""
    losses = [pseudo_huber(_flat(made.end) - _flat(goals[list(samples)]), scale)[0] for samples, made in passes]
    mean = float(torch.cat(losses).mean())
    return mean if math.isfinite(mean) else math.inf


def _flat(x: Tensor) -> Tensor:
    return x.detach().double().cpu().flatten(1)
