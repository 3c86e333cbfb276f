"""The stages of a calibration, from cheap to dear, and the choice among their results on held-out samples."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..evaluation.report import write_atomically
from ..schedulers.calibrated import Calibrated, Calibration
from ..schedulers.multistep import dpmpp
from ..schedulers.table import Table
from .fixed import candidates, written
from .learn import EASIER, HARDER, TRIALS, Knobs, Runner, distances, knobs_of, loss_of, mean_distance, normal_equations
from .path import best_grid
from .problem import Problem, key_of, mu_of
from .reference import References

MOST_CALLS = 24  # of a run: beyond, known samplers are near their limit, and stage (b) cuts its grid from 48
PATH_CALLS, PATH_SAMPLES = 48, 16  # of the recorded runs that stage (b) cuts its grids from
POWERS = (0.0, 0.5, 1.0)  # of sigma, by which stage (b) weighs distances; each gives a candidate
FEW, FINALISTS = 16, 4  # samples of the first round of a search, and how many candidates see all samples


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much a calibration may spend; ``cost`` says what that is in network calls."""

    num_inference_steps: int
    num_samples: int = 64  # noises to learn from
    num_held_out: int = 32  # noises, with prompts of their own, that decide
    reference: str = "DPMSolver:timestep_spacing=trailing"
    reference_steps: int = 64
    iterations: int = 6  # Gauss-Newton steps of stage (c); 0 leaves it out
    batch_size: int = 16  # samples of one pipeline call
    seed: int = 0
    time_budget: float | None = None  # seconds after which stage (c) stops where it is

    @property
    def learns(self) -> bool:
        """Whether there is a stage (c): a run of one call has nothing to learn."""
        return self.iterations > 0 and self.num_inference_steps > 1

    def __post_init__(self) -> None:
        least = {
            "num_inference_steps": 1, "num_samples": 8, "num_held_out": 8, "reference_steps": 2 * self.num_inference_steps,
            "iterations": 0, "batch_size": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value != int(value) or value < low:
                why = f": twice num_inference_steps={self.num_inference_steps}" if name == "reference_steps" else ""
                raise ValueError(f"{name}={value} must be a whole number of at least {low}{why}")
        if self.num_inference_steps > MOST_CALLS:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} is no few-step run; at most {MOST_CALLS} can be calibrated")
        if self.time_budget is not None and not self.time_budget > 0:
            raise ValueError(f"time_budget={self.time_budget} must be a positive number of seconds")


@dataclass(frozen=True)
class Cost:
    """Network calls of one sample each (a guided pair counts once), by stage; that of "learn" is more where a step has to be shortened."""

    reference: int
    search: int
    path: int
    learn: int
    held_out: int

    @property
    def total(self) -> int:
        """All stages together."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        return "\n".join([f"{name:<10} {calls:>10,}" for name, calls in [*asdict(self).items(), ("total", self.total)]])


@dataclass(frozen=True)
class Stage:
    """What one stage came to: its sampler, its mean distance to the references on the samples it saw and on held-out ones, its cost."""

    name: str
    sampler: str
    error: float
    held_out_error: float
    calls: int
    seconds: float


def cost_of(settings: Settings, num_candidates: int) -> Cost:
    """The network calls of a calibration that has none of its references yet."""
    s, n = settings, settings.num_inference_steps
    jacobian = sum(n - knob.acts_from for knob in knobs_of(n))
    return Cost(
        reference=(s.num_samples + s.num_held_out) * s.reference_steps,
        search=n * (num_candidates * min(FEW, s.num_samples) + FINALISTS * s.num_samples),
        path=min(PATH_SAMPLES, s.num_samples) * min(PATH_CALLS, s.reference_steps) + n * len(POWERS) * s.num_samples,
        learn=s.learns * s.num_samples * (s.iterations * (2 * n + jacobian) + n),
        held_out=n * s.num_held_out * (2 + s.learns * (s.iterations + 1)),
    )


@dataclass
class Calibrator:
    """One calibration under way: two problems that differ in prompts and noises only, their references, and a count of what was spent."""

    learned: Problem
    held_out: Problem
    settings: Settings
    cache: Path
    progress: bool = True
    spent: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.mu = mu_of(self.learned)

    def run(self) -> tuple[Calibration, list[Stage]]:
        """The calibration with the smallest held-out error, and all stages."""
        s = self.settings
        fixed = candidates(self.learned.config, s.num_inference_steps, self.mu)
        references = [References(p, s.reference, s.reference_steps, self.cache) for p in (self.learned, self.held_out)]
        cost = cost_of(s, len(fixed))
        with tqdm(total=cost.total, unit="call", unit_scale=True, disable=not self.progress) as self._bar:
            self._bar.set_description("reference")
            self._bar.update((s.num_samples - references[0].missing(s.num_samples)) * s.reference_steps)
            self._bar.update((s.num_held_out - references[1].missing(s.num_held_out)) * s.reference_steps)
            self._goals = [r.ends(n, self._spend) for r, n in zip(references, (s.num_samples, s.num_held_out))]
            found = [self._timed("search", self._search, fixed), self._timed("path", self._path)]
            if s.learns:
                _, start = min(found, key=lambda pair: pair[0].error)
                found.append(self._timed("learn", self._learn, start, references[0].folder))
        _, winner = min(found, key=lambda pair: pair[0].held_out_error)
        return winner, [stage for stage, _ in found]

    def _timed(self, name: str, stage: Callable[..., tuple[str, Calibration, float]], *arguments: Any) -> tuple[Stage, Calibration]:
        self._bar.set_description(name)
        spent, start = self.spent, time.monotonic()
        sampler, calibration, error = stage(*arguments)
        held_out = self._error(calibration, held_out=True)
        return Stage(name, sampler, error, held_out, self.spent - spent, round(time.monotonic() - start, 1)), calibration

    # --- the stages, each (a name, its calibration, its error on the samples to learn from) -------------------------

    def _search(self, fixed: Mapping[str, Calibration]) -> tuple[str, Calibration, float]:
        few = min(FEW, self.settings.num_samples)
        first = {name: self._error(made, count=few) for name, made in fixed.items()}
        finalists = sorted(first, key=lambda name: first[name])[:FINALISTS]
        errors = {name: self._error(fixed[name]) for name in finalists}
        best = min(errors, key=lambda name: errors[name])
        if not math.isfinite(errors[best]):
            raise FloatingPointError(f"every known sampler gave NaN or infinity at {self.settings.num_inference_steps} calls; try float32")
        return best, fixed[best], errors[best]

    def _path(self) -> tuple[str, Calibration, float]:
        calls = self.settings.num_inference_steps
        recorder = References(self.learned, self.settings.reference, min(PATH_CALLS, self.settings.reference_steps), self.cache)
        x, x0 = recorder.path(min(PATH_SAMPLES, self.settings.num_samples))
        self._spend(x0.shape[0] * x0.shape[1])
        alpha, sigma = recorder.scheduler._levels
        made = {}
        for power in POWERS:
            places = best_grid(x, x0, alpha, sigma, calls, power=power) if calls > 1 else [0]
            made[f"2M on a cut path, power {power:g}"] = self._on_grid(recorder.scheduler, places)
        errors = {name: self._error(each) for name, each in made.items()}
        best = min(errors, key=lambda name: errors[name])
        return best, made[best], errors[best]

    def _on_grid(self, scheduler: Any, places: Sequence[int]) -> Calibration:
        """DPM-Solver++ 2M on some of the calls of the scheduler's own run, from its first to its end."""
        alpha, sigma = (np.append(level[places], level[-1]) for level in scheduler._levels)
        orders = [1, *[2] * (len(places) - 2), 1][: len(places)]
        return written(
            Table(alpha, sigma, tuple(dpmpp(alpha, sigma, orders))), scheduler.timesteps[places].tolist(), scheduler._process.frame
        )

    def _learn(self, start: Calibration, folder: Path) -> tuple[str, Calibration, float]:
        """Damped Gauss-Newton from ``start`` (Levenberg and Marquardt); of its states, the one with the smallest held-out error."""
        s = self.settings
        runner = Runner(self.learned, self._spend)
        knobs = Knobs(runner.scheduler._make_process(), start)
        made_for = {**asdict(replace(s, time_budget=None, iterations=0)), "start": start.to_dict(), "held_out": self.held_out.describe()}
        file = folder / f"learn-{key_of(made_for)}.json"
        state = Progress.read(file, len(knobs.all))
        batches = [range(first, min(first + s.batch_size, s.num_samples)) for first in range(0, s.num_samples, s.batch_size)]
        while state.iteration < s.iterations and not state.stuck and not self._out_of_time():
            values = np.array(state.values)
            passes = [(batch, runner.whole(knobs.run(values), batch)) for batch in batches]
            square, slope = normal_equations(runner, knobs, values, passes, self._goals[0])
            state = self._step(state, runner, knobs, (square, slope), passes)
            state.write(file)
            self._bar.set_postfix(held_out=f"{state.best_error:.4g}")
        made = knobs.run(np.array(state.best))
        return f"{state.iteration} Gauss-Newton steps", made, self._error(made)

    def _step(self, state: "Progress", runner: Runner, knobs: Knobs, equations: tuple[np.ndarray, np.ndarray], passes: list) -> "Progress":
        """The state after one iteration: the first step, shorter and shorter, that lowers the loss; none does at an end of the descent."""
        (square, slope), goals, damping = equations, self._goals[0], state.damping
        scale = mean_distance(passes, goals)
        before = loss_of(passes, goals, scale)
        diagonal = np.diag(square) + 1e-6 * np.trace(square) / len(square)
        for _ in range(TRIALS):
            values = np.array(state.values) - np.linalg.solve(square + damping * np.diag(diagonal), slope)
            try:
                run = knobs.run(values)
            except ValueError:  # the times of two calls crossed
                damping *= HARDER
                continue
            after = loss_of([(batch, runner.whole(run, batch)) for batch, _ in passes], goals, scale)
            if after < before:
                held_out = self._error(run, held_out=True)
                best, error = (values.tolist(), held_out) if held_out < state.best_error else (state.best, state.best_error)
                return Progress(state.iteration + 1, values.tolist(), damping * EASIER, best, error)
            damping *= HARDER
        return replace(state, iteration=state.iteration + 1, damping=damping, stuck=True)

    def _out_of_time(self) -> bool:
        return self.settings.time_budget is not None and time.monotonic() - self.started > self.settings.time_budget

    def _error(self, calibration: Calibration, *, held_out: bool = False, count: int | None = None) -> float:
        """Mean over samples of the RMS distance between the run's end and the reference's; infinity where the run is not finite.

        A mean of roots, since a few samples whose run ends in another mode of the data would outweigh all others in a mean of squares.
        """
        problem, goals = (self.held_out, self._goals[1]) if held_out else (self.learned, self._goals[0])
        count = count or len(goals)
        scheduler = Calibrated.from_config(problem.config, calibration=calibration.to_dict())
        found, steps = [], calibration.num_inference_steps
        for first in range(0, count, self.settings.batch_size):
            samples = range(first, min(first + self.settings.batch_size, count))
            with torch.no_grad():
                end = problem.ends(scheduler, samples, steps)
            self._spend(len(samples) * steps)
            found.append(distances(end, goals[list(samples)]))
        mean = float(torch.cat(found).mean())
        return mean if math.isfinite(mean) else math.inf

    def _spend(self, calls: int) -> None:
        self.spent += calls
        self._bar.update(calls)


@dataclass(frozen=True)
class Progress:
    """Where stage (c) stands, and the best it has seen; on disk after every iteration, so that an interrupted stage goes on."""

    iteration: int
    values: list[float]
    damping: float
    best: list[float]
    best_error: float
    stuck: bool = False

    def write(self, file: Path) -> None:
        """All of it, atomically."""
        content = json.dumps(asdict(self)).encode()
        write_atomically(file, lambda out: out.write(content))

    @classmethod
    def read(cls, file: Path, knobs: int) -> "Progress":
        """What ``write`` left; the beginning where there is nothing to read."""
        try:
            found = cls(**json.loads(file.read_text()))
            if len(found.values) == len(found.best) == knobs:
                return found
        except (OSError, ValueError, TypeError):  # not there, or damaged
            pass
        return cls(0, [0.0] * knobs, 1e-2, [0.0] * knobs, math.inf)
