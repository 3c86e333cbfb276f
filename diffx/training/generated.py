"""Samples that the model makes itself, for training without pictures: the ends of its pipeline's runs, keyed by seed and prompt."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.compare import lent
from ..families import Family
from .data import DataConfig, Prompts
from .draws import hashed
from .encoders import TEXT_ENCODERS, finite, hash_of, made_by
from .pictures import Size
from .store import Rows

AT_ONCE = 16  # samples in one call
LEAST = 1024  # samples of few prompts


class Wanted(NamedTuple):
    """The ``copy``-th sample of a prompt, of a class, or of a model that is told nothing."""

    word: str | int | None
    copy: int


class Generated:
    """The samples of ``prompts``, which take turns; row i is a function of (seed, its prompt, how often that came before).

    Raises:
        ValueError: the settings do not fit the prompts or the model.
    """

    def __init__(self, prompts: Prompts, family: Family, config: DataConfig, size: Size) -> None:
        self.prompts, self.family, self.config, self.size = prompts, family, config, size
        words: Sequence[str | int | None] = prompts.texts or prompts.labels or [None]
        num = config.num_generated or max(len(words), LEAST)
        if num < len(words):
            raise ValueError(f"num_generated={num} is less than the {len(words)} prompts; leave some out, or make one sample of each")
        if config.aspect_buckets or config.num_crops > 1 or config.random_flip:
            raise ValueError("aspect_buckets, num_crops and random_flip are for pictures; the samples that a model makes have one size")
        if not family.guidable and config.generation_guidance_scale not in (None, 1):
            raise ValueError(
                f"generation_guidance_scale={config.generation_guidance_scale}, but {type(family.denoiser).__name__} cannot be guided; "
                "leave it out"
            )
        self.scale = (3.0 if family.guidable else 1.0) if config.generation_guidance_scale is None else config.generation_guidance_scale
        self.rows = [Wanted(words[i % len(words)], i // len(words)) for i in range(num)]

    def describe(self) -> dict[str, Any]:
        """All that the samples depend on, in plain numbers and strings."""
        scheduler = self.family.pipe.scheduler
        public = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        return {
            "generated": self.size, "rows": hash_of(tuple(row) for row in self.rows), "seed": self.config.seed,
            "steps": self.config.generation_steps, "guidance_scale": self.scale, "scheduler": [type(scheduler).__name__, public],
            **made_by(self.family, (*TEXT_ENCODERS, self.family.network)),
        }  # fmt: skip

    def samples(self, some: range) -> Rows:
        """``x0`` (B, ...) float32 of those rows.

        Raises:
            FloatingPointError: a sample holds NaN or infinity.
        """
        rows = self.rows[some.start : some.stop]
        x0 = torch.cat([self._ends(rows[k : k + AT_ONCE]) for k in range(0, len(rows), AT_ONCE)])
        return {"x0": finite(x0, lambda i: f"the sample of {rows[i].word!r}")}

    def _ends(self, rows: Sequence[Wanted]) -> Tensor:
        pipe: Any = self.family.pipe
        words = [row.word for row in rows]
        generators = [noise_generator(self.config.seed, row) for row in rows]
        takes = inspect.signature(type(pipe).__call__).parameters
        told = next((name for name in ("prompt", "class_labels") if name in takes), None)
        with lent(pipe), _last_of(pipe.scheduler) as last:
            if told:
                options = {told: words, "generator": generators, "output_type": "latent", "height": self.size[0], "width": self.size[1]}
                options |= self.family.call_kwargs(self.config.generation_steps, self.scale)
                if isinstance(negative := options.get("negative_prompt"), str):
                    options["negative_prompt"] = [negative] * len(rows)  # pipelines want one per prompt
                pipe(**{name: value for name, value in options.items() if name in takes})
            else:
                self._run(words, generators)
        ends = last[0][: len(rows)]  # some pipelines step both halves of a guided batch
        return self.family.from_pipeline(ends, self.size).float().cpu()

    def _run(self, words: list[Any], generators: list[torch.Generator]) -> None:
        """The loop that everybody writes, for networks whose pipeline takes no condition."""
        family, scheduler, network = self.family, self.family.pipe.scheduler, self.family.denoiser
        labels = torch.tensor(words, device=network.device) if self.prompts.labels else None
        condition = family.encode_condition(None, labels, size=self.size)
        noise = torch.stack([torch.randn(family.sample_shape(self.size), generator=generator) for generator in generators])
        scheduler.set_timesteps(self.config.generation_steps)
        options: dict[str, Any] = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x = noise.to(network.device, network.dtype) * getattr(scheduler, "init_noise_sigma", 1.0)  # flow-matching Euler has neither
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        for t in scheduler.timesteps:
            out = family.forward(network, scale(x, t), t.to(x.device).expand(len(x)), condition)
            x = scheduler.step(out, t, x, **options, return_dict=False)[0]


def noise_generator(seed: int, row: Wanted) -> torch.Generator:
    """Of all noise of one sample: on the CPU, so that every device starts from the same noise."""
    return torch.Generator().manual_seed(hashed(seed, *row) >> 32)  # torch's generator looks at 32 bits


@contextlib.contextmanager
def _last_of(scheduler: Any) -> Iterator[list[Tensor]]:
    """Inside, the list holds the sample after the scheduler's last step: what the network denoised, whatever a pipeline makes of it."""
    last: list[Tensor] = []
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its parameters
    def listening(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result[0]]
        return result

    scheduler.step = listening
    try:
        yield last
    finally:
        del scheduler.step
