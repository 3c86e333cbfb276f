"""Samplers side by side on one pipeline, from the same noise: one table, one grid of pictures, one error plot."""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..schedulers import Calibrated, TableScheduler
from .candidate import make_candidate, make_runs, networks_of
from .emoji import Evaluator
from .metrics import Measure, psnr, rms
from .report import Comparison, Result
from .samplers import is_control

REQUIRED = ("prompt", "num_inference_steps", "guidance_scale", "generator", "output_type")


def compare(
    pipe: Any,
    samplers: Sequence[str],
    *,
    num_inference_steps: Sequence[int] = (4, 8, 16),
    guidance_scale: Sequence[float] = (3.0,),
    prompts: Sequence[str],
    seed: int = 0,
    num_images_per_prompt: int = 1,
    reference: str = "diffusers:DDIMScheduler",
    reference_steps: int = 100,
    evaluator: Evaluator | None = None,
    batch_size: int = 16,
    progress: bool = True,
    **call_kwargs: Any,
) -> Comparison:
    """Every sampler at every number of steps and guidance scale, from the same initial noise as a many-step reference.

    Picture i starts from noise keyed by (seed, i) alone, so that neither ``batch_size`` nor the other prompts change it. The
    pipeline's own scheduler is back in its place afterwards, also after an error.

    Args:
        pipe: any Diffusers text-to-image pipeline.
        samplers: as ``make_candidate`` takes them. One may have steps of its own: "Heun@3" runs at 3 alone, whatever
            ``num_inference_steps`` says. A calibrated table runs at the number that it was made for, and a student with its own call
            arguments and weights.
        reference: a deterministic sampler; it also runs at half of ``reference_steps``, for the floor.
        evaluator: what else to measure, for instance ``GlyphEvaluator()`` for the embedded model.
        batch_size: pictures per pipeline call. In memory are the pictures of two runs, and one per prompt and run for the grid.
        call_kwargs: passed to every call of the pipeline, for instance height, width, negative_prompt.

    Raises:
        ValueError: an unknown sampler, a count below one, a calibrated table asked for another number of steps than its own, or a
            pipeline that takes no prompt, steps, guidance or generator.
        FloatingPointError: a sampler produced NaN or infinity; the message names it.
    """
    if isinstance(prompts, str) or isinstance(samplers, str):
        raise ValueError("prompts and samplers are lists of strings, not one string")
    prompts, samplers = tuple(prompts), tuple(samplers)
    steps, scales = tuple(num_inference_steps), tuple(float(scale) for scale in guidance_scale)
    _check(pipe, samplers, prompts, (*steps, reference_steps, num_images_per_prompt, batch_size), scales, call_kwargs)
    candidates, runs = make_runs(samplers, pipe, steps)  # all errors before the first run
    candidates[reference] = make_candidate(reference, pipe)
    most = max(n for _, n in runs)
    if reference_steps < max(2, most):
        raise ValueError(f"reference_steps={reference_steps} must be at least 2 and no fewer than the most steps of any sampler, {most}")
    if candidates[reference].call_kwargs:
        raise ValueError(f"reference={reference!r} was made for few steps; use a sampler that takes {reference_steps}")
    plan = [(reference, reference_steps, "reference"), (reference, reference_steps // 2, "floor")]
    plan += [(spec, n, "control" if is_control(spec) else "sampler") for spec, n in runs]
    wanted = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]

    rows: list[Result] = []
    images: dict[tuple[str, int, float], np.ndarray] = {}
    num_batches = -(-len(wanted) // batch_size)
    total = len(scales) * num_batches * sum(n for _, n, _ in plan)
    with lent(pipe), tqdm(total=total, unit="call", disable=not progress) as bar:
        for scale in scales:
            goal: Run | None = None
            for spec, n, role in plan:
                bar.set_description(f"{spec}, {n} steps, guidance {scale:g}")
                arguments = {"num_inference_steps": n, "guidance_scale": scale, **candidates[spec].call_kwargs, **call_kwargs}
                with candidates[spec].in_place(pipe), _counted(pipe, bar.update) as meter:
                    run = _run(pipe, meter, wanted, seed, batch_size, arguments, f"{spec} at {n} steps and guidance {scale:g}")
                goal = goal or run
                if goal.stochastic:
                    raise ValueError(f"reference={reference!r} draws fresh noise; use a deterministic one, such as diffusers:DDIMScheduler")
                if role != "floor":
                    images[spec, n, scale] = (run.images[::num_images_per_prompt] * 255).round().byte().permute(0, 2, 3, 1).numpy()
                measures = evaluator.evaluate(run.images, wanted) if evaluator and role != "floor" else ()
                rows.append(_result(role, spec, scale, n, run, goal, measures))
    settings = {
        "pipeline": type(pipe).__name__, "seed": seed, "num_images_per_prompt": num_images_per_prompt, "count": len(wanted),
        "reference": reference, "reference_steps": reference_steps, "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "call_kwargs": {key: repr(value) for key, value in call_kwargs.items()},
    }  # fmt: skip
    return Comparison(tuple(rows), images, prompts, settings)


@dataclass
class Meter:
    """Counts the network's calls, and remembers where the random generators stood at the first of them."""

    generators: list[torch.Generator] = field(default_factory=list)
    calls: int = 0
    network_rows: int = 0
    at_first_call: list[Tensor] = field(default_factory=list)
    latents: Tensor | None = None
    tick: Callable[[], Any] = lambda: None

    def start(self, generators: list[torch.Generator]) -> None:
        self.generators, self.calls, self.network_rows, self.at_first_call, self.latents = generators, 0, 0, [], None

    def before_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.calls:
            self.at_first_call = self._states()
        self.calls += 1
        self.network_rows += len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1))
        self.tick()

    def after_step(self, pipe: Any, index: int, t: Any, tensors: dict) -> dict:
        self.latents = tensors["latents"]
        return tensors

    def noise_was_drawn(self) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(self.at_first_call, self._states(), strict=True))

    def _states(self) -> list[Tensor]:
        shared = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
        return shared + [generator.get_state() for generator in self.generators]


@dataclass(frozen=True)
class Run:
    """The pictures (N, 3, H, W) in [0, 1] of one sampler, their final latents where the pipeline shows them, and the counts."""

    images: Tensor
    latents: Tensor | None
    nfe: int
    batch_factor: float
    seconds: float
    stochastic: bool


@contextmanager
def lent(pipe: Any) -> Iterator[None]:
    """A pipeline without its progress bar; that and its scheduler are as before when the block ends, whatever it put there."""
    scheduler, bar = pipe.scheduler, vars(pipe).get("_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bar)


@contextmanager
def _counted(pipe: Any, tick: Callable[[], Any]) -> Iterator[Meter]:
    """Count the pipeline's network calls, each with a ``tick``; its hooks are as before when the block ends."""
    meter = Meter(tick=tick)
    hooks = [pipe.components[name].register_forward_pre_hook(meter.before_call, with_kwargs=True) for name in networks_of(pipe)]
    try:
        yield meter
    finally:
        for hook in hooks:
            hook.remove()


def _run(pipe: Any, meter: Meter, prompts: list[str], seed: int, batch_size: int, arguments: dict, label: str, first_index: int = 0) -> Run:
    images, latents, counts, factors, stochastic = [], [], [], [], False
    if isinstance(pipe.scheduler, Calibrated):
        pipe.scheduler.warn_of_misfits(pipe, arguments["guidance_scale"])
    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        meter.start([noise_generator(seed, first_index + first + i) for i in range(len(batch))])
        options = dict(arguments)
        if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
            options |= {"callback_on_step_end": meter.after_step, "callback_on_step_end_tensor_inputs": ["latents"]}
        if isinstance(options.get("negative_prompt"), str):  # pipelines want one per prompt
            options["negative_prompt"] = [options["negative_prompt"]] * len(batch)
        output = pipe(prompt=batch, generator=meter.generators, output_type="pt", **options)
        images.append(output.images.float().cpu())
        if meter.latents is not None:
            latents.append(meter.latents.float().cpu())
        counts.append(meter.calls)
        factors.append(meter.network_rows / (meter.calls * len(batch)))
        stochastic |= meter.noise_was_drawn()
        for name, made in (("pictures", images), ("latents", latents)):
            if made and not made[-1].isfinite().all():
                raise FloatingPointError(f"{label}: the {name} hold NaN or infinity; try more steps, a smaller guidance scale or float32")
    seconds = (time.perf_counter() - start) / len(prompts)
    assert len(set(counts)) == 1, counts
    if isinstance(pipe.scheduler, TableScheduler):  # its own keyed noise leaves no trace in any generator
        stochastic |= any(call.noise for call in pipe.scheduler.plan().calls)
    return Run(torch.cat(images), torch.cat(latents) if latents else None, counts[0], max(factors), seconds, stochastic)


def _result(role: Any, spec: str, scale: float, n: int, run: Run, goal: Run, measures: tuple[Measure, ...]) -> Result:
    distance = None if run.stochastic else rms(run.images, goal.images)
    return Result(
        role=role, sampler=spec, guidance_scale=scale, num_inference_steps=n, nfe=run.nfe, batch_factor=run.batch_factor,
        seconds=run.seconds, stochastic=run.stochastic, rms=distance, psnr=psnr(run.images, goal.images) if distance else None,
        latent_rms=None if run.stochastic or run.latents is None or goal.latents is None else rms(run.latents, goal.latents),
        measures=measures,
    )  # fmt: skip


def noise_generator(seed: int, index: int) -> torch.Generator:
    """Of the initial noise of one sample: on the CPU, so that every device starts from the same noise."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))


def _check(pipe: Any, samplers: tuple, prompts: tuple, counts: tuple, scales: tuple, call_kwargs: dict) -> None:
    parameters = inspect.signature(type(pipe).__call__).parameters
    missing = [name for name in REQUIRED if name not in parameters]
    if missing or not networks_of(pipe):
        lacks = f"takes no {', '.join(missing)}" if missing else "has no unet or transformer"
        raise ValueError(f"{type(pipe).__name__} {lacks}; a text-to-image pipeline is needed")
    if unknown := [name for name in call_kwargs if name not in parameters]:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]!r}; it takes {', '.join(p for p in parameters if p != 'self')}")
    if taken := {*REQUIRED, "num_images_per_prompt", "latents", "callback_on_step_end"} & call_kwargs.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: compare() passes this itself")
    if not prompts or not samplers or not scales or len(counts) < 4:
        raise ValueError("prompts, samplers, num_inference_steps and guidance_scale each need at least one entry")
    if bad := [count for count in counts if count < 1 or count != int(count)]:
        raise ValueError(f"steps, pictures per prompt and batch_size must be whole numbers from 1 on, got {bad[0]}")
    if bad := [scale for scale in scales if not math.isfinite(scale)]:
        raise ValueError(f"guidance_scale={bad[0]} is not a finite number; 1 switches guidance off")
