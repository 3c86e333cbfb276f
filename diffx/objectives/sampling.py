"""The stock schedulers of few-step students: what is trained on a scheduler's own grid is sampled by it."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler

from ..families import Family
from .objective import Inference

# from_config would take these of the teacher's scheduler, which may be for another grid. Neither sampler reads the last; pipelines of
# Stable Diffusion write 1 over anything else, and warn.
OWN = dict(clip_sample=False, set_alpha_to_one=True, steps_offset=1)


def deterministic(family: Family, calls: int, guidance_scale: float = 1.0) -> Inference:
    """DDIM on trailing times, or Euler on even flow times: from pure noise to clean data in ``calls`` steps of equal length.

    Raises:
        ValueError: Diffusers' DDIM would miss its own times, as it does where ``calls`` does not divide the train times.
    """
    if family.process.frame == "flow":
        scheduler: Any = FlowMatchEulerDiscreteScheduler(**even_flow(family, calls))
    else:
        check_divides(family, calls)
        scheduler = DDIMScheduler(**family.scheduler_config(timestep_spacing="trailing", **OWN))
    return Inference(scheduler, family.call_kwargs(calls, guidance_scale))


def stochastic(family: Family, calls: int, original_steps: int, guidance_scale: float = 1.0) -> Inference:
    """The consistency sampler: to clean data and back to the next noise level, on ``calls`` of ``original_steps`` times."""
    if family.process.frame == "flow":
        scheduler: Any = FlowMatchLCMScheduler(**even_flow(family, calls))
    else:
        check_divides(family, original_steps)
        scheduler = LCMScheduler(**family.scheduler_config(original_inference_steps=original_steps, timestep_scaling=10.0, **OWN))
    return Inference(scheduler, family.call_kwargs(calls, guidance_scale))


def even_flow(family: Family, calls: int) -> dict[str, Any]:
    """Config whose ``set_timesteps(calls)`` is 1, 1 - 1/calls, ..., 0, in pipelines that give sigmas and in those that do not.

    Without ``shift_terminal`` the last call would stand at 0.001, where there is nothing to do.
    """
    terminal = dict(shift_terminal=1 / calls) if calls > 1 else {}
    return dict(num_train_timesteps=family.process.num_train_timesteps, shift=1.0, **terminal)


def check_divides(family: Family, calls: int) -> None:
    """Refuse a number of calls whose trailing times Diffusers does not step between exactly."""
    steps = family.process.num_train_timesteps
    if family.process.frame != "flow" and steps % calls:
        exact = [n for n in range(1, 65) if steps % n == 0]
        raise ValueError(f"Diffusers' DDIM does not step exactly in {calls} calls at {steps} train times; it does in {exact}")
