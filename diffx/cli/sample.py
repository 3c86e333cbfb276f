"""``diffx sample``: pictures from prompts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options

DEFAULTS = {"num_inference_steps": 16, "guidance_scale": 3.0}


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One or more prompts.")],
    model: options.Model = "emoji",
    sampler: options.Sampler = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--num-inference-steps", help="Steps; else what the sampler was made for, or 16.", show_default=False),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="1 is off; else what the sampler was made for, or 3.", show_default=False)
    ] = None,
    seed: options.Seed = 0,
    num_images_per_prompt: options.ImagesPerPrompt = 1,
    output: Annotated[Path, typer.Option("--output", help="Picture file; several pictures are numbered.")] = Path("outputs/sample.png"),
    device: options.Device = None,
    torch_dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Make pictures from prompts.

    [bold]Example:[/bold] diffx sample "red apple on blue" "rocket" --sampler UniPC --num-inference-steps 8

    Without --sampler the model's own is used. Pictures count up from --seed; each file's seed is printed and gives the same picture again.
    """
    from diffx.evaluation.candidate import Candidate, make_candidate
    from diffx.loading import load_pipeline
    from diffx.sampling import picture_files, sample

    files = picture_files(output, len(prompts) * num_images_per_prompt)
    pipe = load_pipeline(model, device=device, torch_dtype=torch_dtype)
    candidate = Candidate(pipe.scheduler) if sampler is None else make_candidate(sampler, pipe)
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    chosen = {**DEFAULTS, **candidate.call_kwargs, **{name: value for name, value in given.items() if value is not None}}
    with candidate.in_place(pipe):
        pictures = sample(pipe, prompts, **chosen, seed=seed, num_images_per_prompt=num_images_per_prompt)
    for picture, file in zip(pictures, files):
        picture.image.save(file)
    if as_json:
        typer.echo(json.dumps([{"prompt": p.prompt, "seed": p.seed, "file": str(file)} for p, file in zip(pictures, files)], indent=2))
    else:
        for picture, file in zip(pictures, files):
            typer.echo(f"{file}  seed {picture.seed}  {picture.prompt}")
