"""``diffx plan``: a whole run before it starts."""

import json
from typing import Annotated

import typer

from . import options


def plan(
    sampler: options.Sampler = "UniPC",
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", help="Steps; else what the sampler was made for, or 8.", show_default=False)
    ] = None,
    model: options.Model = "emoji",
    mu: Annotated[
        float | None, typer.Option("--mu", help="Shift of flow models that choose it by picture size.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Print every network call of a run: its t, its noise level and the weights that follow it.

    [bold]Example:[/bold] diffx plan --sampler UniPC:use_karras_sigmas=true --num-inference-steps 8

    Of the model only the scheduler config is read, no weights.
    """
    from diffx import Calibrated, TableScheduler
    from diffx.evaluation import make_sampler
    from diffx.loading import load_scheduler_config

    scheduler = make_sampler(sampler or "UniPC", load_scheduler_config(model))
    if not isinstance(scheduler, TableScheduler):
        raise ValueError(f"sampler {sampler!r} is {type(scheduler).__name__}, which has no table; only diffx samplers have a plan")
    made = scheduler.calibration.num_inference_steps if isinstance(scheduler, Calibrated) else 8
    scheduler.set_timesteps(made if num_inference_steps is None else num_inference_steps, mu=mu)
    typer.echo(json.dumps(scheduler.plan().to_dict(), indent=2) if as_json else str(scheduler.plan()))
