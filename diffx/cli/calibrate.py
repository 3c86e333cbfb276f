"""``diffx calibrate``: a sampler made for one model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .compare import PROMPTS


def calibrate(
    num_inference_steps: Annotated[int, typer.Option("--num-inference-steps", help="Network calls of the sampler to be made.")] = 6,
    model: options.Model = "emoji",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Give it again for more; eight of ours otherwise.", show_default=False)
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.", show_default=False)] = None,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale", help="At which the model will be used; 1 is off.")] = 3.0,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Noises to learn from; more is better, and dearer.")] = 64,
    num_held_out: Annotated[int, typer.Option("--num-held-out", help="Noises that decide which stage's table is kept.")] = 32,
    reference_steps: Annotated[int, typer.Option("--reference-steps", help="Network calls of the runs to be reproduced.")] = 64,
    iterations: Annotated[int, typer.Option("--iterations", help="Gauss-Newton steps; 0 only searches.")] = 6,
    time_budget: Annotated[
        float | None, typer.Option("--time-budget", help="Seconds after which no new step is begun.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", file_okay=False, help="Where reference runs are kept; else ~/.cache/diffx.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    output: Annotated[Path, typer.Option("--output", file_okay=False, help="Folder of the sampler.")] = Path("outputs/calibrated"),
    device: options.Device = None,
    torch_dtype: options.Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost in network calls, and stop.")] = False,
    as_json: options.Json = False,
) -> None:
    """Make a sampler for one model, number of calls and guidance scale: where its calls lie and what they weigh is learned.

    [bold]Example:[/bold] diffx calibrate --model PATH_OR_ID --prompts prompts.txt --num-inference-steps 6 --guidance-scale 5

    The folder it writes is a sampler: diffx sample --sampler outputs/calibrated --num-inference-steps 6. An interrupted call goes on.
    """
    from diffx.calibration import calibrate, cost
    from diffx.loading import load_pipeline, read_prompts

    wanted = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())] or list(PROMPTS)
    settings: dict[str, Any] = dict(
        num_samples=num_samples, num_held_out=num_held_out, reference_steps=reference_steps, iterations=iterations,
        time_budget=time_budget, seed=seed,
    )  # fmt: skip
    pipe = load_pipeline(model, device=device, torch_dtype=torch_dtype)
    if dry_run:
        spent = cost(pipe, num_inference_steps=num_inference_steps, **settings)
        typer.echo(json.dumps({**asdict(spent), "total": spent.total}, indent=2) if as_json else f"network calls\n{spent}")
        return
    scheduler = calibrate(
        pipe, num_inference_steps=num_inference_steps, prompts=wanted, guidance_scale=guidance_scale, cache=cache, **settings
    )
    scheduler.save_pretrained(output)
    stages = scheduler.calibration.made_with["stages"]
    if as_json:
        typer.echo(json.dumps({"output": str(output), "stages": stages}, indent=2))
        return
    typer.echo(f"{'stage':<8} {'error':>8} {'held out':>9} {'calls':>9} {'seconds':>8}  sampler")
    for s in stages:
        typer.echo(f"{s['name']:<8} {s['error']:>8.4f} {s['held_out_error']:>9.4f} {s['calls']:>9,} {s['seconds']:>8.1f}  {s['sampler']}")
    typer.echo(f"sampler: {output}  (the stage with the smallest error on held-out prompts and noises)")
