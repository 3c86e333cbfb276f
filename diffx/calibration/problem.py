"""What is calibrated, seen as a map from a scheduler and numbered samples to the samples' ends: a pipeline, or a bare network."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..evaluation.compare import lent, noise_generator
from ..schedulers.calibrated import fingerprint, network_of
from ..schedulers.one_step import DDIM


class Problem(Protocol):
    """A model with everything that a run depends on but the scheduler: conditions, guidance, initial noise.

    Sample i has a condition and a noise of its own, which depend on (seed, i) alone.
    """

    config: Mapping[str, Any]  # of the model's own scheduler

    def ends(self, scheduler: Any, samples: Sequence[int], num_inference_steps: int, start: Tensor | None = None) -> Tensor:
        """(B, ...) where the runs of these samples end; ``start`` (B, ...) takes the place of their initial noise."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that the ends depend on, in plain numbers and strings: the key of cached reference runs."""
        ...


@dataclass
class PipelineProblem:
    """A text-to-image pipeline at one guidance scale; sample i has the prompt i (modulo their number). Ends are latents.

    The pipeline's own loop runs, so that whatever it does between network and scheduler (guidance, masks, added conditions) is part
    of what is calibrated.
    """

    pipe: Any
    prompts: Sequence[str]
    guidance_scale: float
    seed: int = 0
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.pipe.scheduler.config

    def ends(self, scheduler: Any, samples: Sequence[int], num_inference_steps: int, start: Tensor | None = None) -> Tensor:
        with lent(self.pipe):
            self.pipe.scheduler = scheduler
            return self.pipe(
                prompt=[self.prompts[i % len(self.prompts)] for i in samples],
                generator=[noise_generator(self.seed, i) for i in samples],
                latents=start,
                num_inference_steps=num_inference_steps,
                guidance_scale=self.guidance_scale,
                output_type="latent",
                return_dict=False,
                **self.call_kwargs,
            )[0]

    def describe(self) -> dict[str, Any]:
        network = network_of(self.pipe)
        return {
            "pipeline": type(self.pipe).__name__, "network": fingerprint(self.pipe), "weights": sketch(network),
            "dtype": str(network.dtype), "prompts": list(self.prompts), "guidance_scale": self.guidance_scale, "seed": self.seed,
            "call_kwargs": {key: repr(value) for key, value in self.call_kwargs.items()},
            "scheduler": {key: value for key, value in self.config.items() if not key.startswith("_")},
        }  # fmt: skip


@dataclass
class NetworkProblem:
    """A bare network in the loop that everybody writes: ``out = network(scheduler.scale_model_input(x, t), t)``.

    Args:
        network: (x (B, ...), t) -> output of the kind that ``config["prediction_type"]`` names.
        shape: of one sample.
        name: what stands for the network in the cache of reference runs; change it when the network changes.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    config: Mapping[str, Any]
    shape: Sequence[int]
    name: str
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def ends(self, scheduler: Any, samples: Sequence[int], num_inference_steps: int, start: Tensor | None = None) -> Tensor:
        scheduler.set_timesteps(num_inference_steps)
        if start is None:
            noise = [torch.randn(tuple(self.shape), generator=noise_generator(self.seed, i), dtype=self.dtype) for i in samples]
            start = torch.stack(noise)
        x = start * scheduler.init_noise_sigma
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flow-matching Euler has none
        for t in scheduler.timesteps:
            x = scheduler.step(self.network(scale(x, t), t), t, x, return_dict=False)[0]
        return x

    def describe(self) -> dict[str, Any]:
        public = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return {"network": self.name, "shape": list(self.shape), "seed": self.seed, "dtype": str(self.dtype), "scheduler": public}


def mu_of(problem: Problem) -> float | None:
    """What ``set_timesteps`` is told as mu in this problem's runs: the picture's size, for flow models with dynamic shifting."""
    if not problem.config.get("use_dynamic_shifting"):
        return None
    scheduler: Any = DDIM.from_config(problem.config)
    set_timesteps, told = scheduler.set_timesteps, {}

    @functools.wraps(set_timesteps)  # pipelines look at its parameters
    def listening(*args: Any, **kwargs: Any) -> None:
        told.update(kwargs)
        set_timesteps(*args, **kwargs)

    scheduler.set_timesteps = listening
    with torch.no_grad():
        problem.ends(scheduler, [0], 1)
    return told.get("mu")


def key_of(content: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for ``content``, plain numbers and strings."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def sketch(network: nn.Module) -> str:
    """A hash of at most 1,024 evenly spaced numbers of each parameter: another checkpoint has others."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in network.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(name.encode() + flat[:: max(1, len(flat) // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
