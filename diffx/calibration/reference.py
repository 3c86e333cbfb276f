"""Where many-step runs end, computed once: batches in a folder that is named by everything they depend on."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..evaluation.report import write_atomically
from ..evaluation.samplers import make_sampler
from ..schedulers.scheduler import TableScheduler
from .problem import Problem, key_of

BLOCK = 16  # samples per file: another batch size finds the same files


class References:
    """The ends of ``problem`` with a deterministic many-step sampler. What was computed before is read; an interrupted run goes on.

    Args:
        sampler: as ``diffx.evaluation.samplers.make_sampler`` takes it; one of ours, without noise.
        cache: a folder for all references, which may be shared.

    Raises:
        ValueError: the sampler draws noise, or is not one of ours.
    """

    def __init__(self, problem: Problem, sampler: str, num_inference_steps: int, cache: Path) -> None:
        self.problem, self.steps = problem, num_inference_steps
        scheduler = make_sampler(sampler, problem.config)
        if not isinstance(scheduler, TableScheduler):
            raise ValueError(f"reference={sampler!r} must be a sampler of diffx, such as DPMSolver:timestep_spacing=trailing")
        self.scheduler = scheduler
        if is_stochastic(scheduler, num_inference_steps):
            raise ValueError(f"reference={sampler!r} draws fresh noise: its ends say nothing about one noise; use a deterministic sampler")
        self.folder = cache / key_of({**problem.describe(), "reference": sampler, "steps": num_inference_steps})

    def missing(self, count: int) -> int:
        """How many of the samples 0 .. count - 1 are still to be computed."""
        return sum(min(BLOCK, count - first) for first in range(0, count, BLOCK) if self._read(self._file(first, count)) is None)

    def ends(self, count: int, advance: Callable[[int], Any] = lambda calls: None) -> Tensor:
        """(count, ...) the ends of samples 0 .. count - 1; ``advance`` is told the network calls (per sample) of each block.

        Raises:
            FloatingPointError: a reference holds NaN or infinity.
        """
        blocks = []
        for first in range(0, count, BLOCK):
            file, samples = self._file(first, count), range(first, min(first + BLOCK, count))
            block = self._read(file)
            if block is None:
                with torch.no_grad():
                    block = self.problem.ends(self.scheduler, samples, self.steps).float().cpu()
                if not block.isfinite().all():
                    raise FloatingPointError(
                        f"the {self.steps}-call reference of samples {first} .. {samples[-1]} holds NaN or infinity; "
                        "try float32, a smaller guidance scale or another reference"
                    )
                file.parent.mkdir(parents=True, exist_ok=True)
                content = save({"ends": block.contiguous()})
                write_atomically(file, lambda out: out.write(content))  # noqa: B023
                advance(len(samples) * self.steps)
            blocks.append(block)
        return torch.cat(blocks)

    def path(self, count: int) -> tuple[Tensor, Tensor]:
        """The whole runs of samples 0 .. count - 1: (calls + 1, count, ...) samples, and (calls, count, ...) x0 predictions."""
        with recorded(self.scheduler) as (samples, predictions), torch.no_grad():
            end = self.problem.ends(self.scheduler, range(count), self.steps)
        return torch.stack([*samples, end]).float().cpu(), torch.stack(predictions).float().cpu()

    def _file(self, first: int, count: int) -> Path:
        return self.folder / f"{first:06d}-{min(first + BLOCK, count):06d}.safetensors"

    @staticmethod
    def _read(file: Path) -> Tensor | None:
        try:
            return load_file(file)["ends"]
        except (OSError, SafetensorError, KeyError):  # not there, or damaged: made again
            return None


def is_stochastic(scheduler: TableScheduler, num_inference_steps: int) -> bool:
    """Whether a run of that many steps adds noise anywhere."""
    scheduler.set_timesteps(num_inference_steps, mu=0.5 if scheduler.config.use_dynamic_shifting else None)  # any shift has the noise
    return any(call.noise for call in scheduler.plan().calls)


@contextmanager
def recorded(scheduler: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Inside, every step of ``scheduler`` adds the sample it was given and the x0 it made of it to the two lists."""
    samples: list[Tensor] = []
    predictions: list[Tensor] = []
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its parameters
    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        samples.append(sample)
        predictions.append(result.pred_original_sample if return_dict else result[1])
        return result

    scheduler.step = recording
    try:
        yield samples, predictions
    finally:
        del scheduler.step
