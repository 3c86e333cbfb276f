"""``diffx attention``: which attention kernels a model would use here."""

import dataclasses
import json
from typing import Annotated

import typer

from . import options

Kernel = Annotated[str, typer.Option("--kernel", help="auto, or Diffusers' name of one: flash, flash_hub, sage, xformers, native, ...")]


def attention(
    model: options.Model = "emoji",
    kernel: Kernel = "auto",
    device: options.Device = None,
    torch_dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Print which attention kernel each part of a model would use here, and why not another.

    [bold]Example:[/bold] diffx attention --model PATH_OR_ID --torch-dtype bfloat16

    Nothing is set, and nothing downloaded but the model. diffx.set_attention(pipe, kernel) sets it, --attention in a training.
    """
    from diffx.acceleration import choose_attention
    from diffx.loading import load_pipeline

    choices = choose_attention(load_pipeline(model, device=device, torch_dtype=torch_dtype), kernel)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(choice) for choice in choices], indent=2))
        return
    for choice in choices:
        typer.echo(str(choice))
