"""The flags that several commands share, each with one meaning."""

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option("--model", metavar="PATH_OR_ID", help="A pipeline folder or Hub id; 'emoji' is the embedded model.")]
Device = Annotated[str | None, typer.Option("--device", help="As torch spells it; cuda where there is one, else cpu.", show_default=False)]
Dtype = Annotated[
    str | None, typer.Option("--torch-dtype", help="float32, bfloat16 or float16; else what Diffusers loads.", show_default=False)
]
Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        metavar="SAMPLER",
        help="One of diffx's (UniPC), with options (DPMSolver:algorithm_type=sde-dpmsolver++), Diffusers' (diffusers:DDIMScheduler), "
        "or a folder or Hub id that holds one; emoji_calibrated_6 is the embedded model's table of 6 steps.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the initial noise.")]
ImagesPerPrompt = Annotated[int, typer.Option("--num-images-per-prompt", help="Pictures of each prompt.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Folder = Annotated[Path, typer.Option("--output", file_okay=False, help="Folder for pictures and report; made if it is not there.")]


def numbers(kind: type) -> Any:
    """A parser of comma-separated numbers: "4,8,16" -> (4, 8, 16)."""

    def parse(text: str | tuple) -> tuple:
        if isinstance(text, tuple):  # a default passes through here too
            return text
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a list of numbers like 4,8,16") from None

    return parse


StepsList = Annotated[tuple, typer.Option("--num-inference-steps", metavar="N,N,...", parser=numbers(int), help="Steps, comma-separated.")]
GuidanceList = Annotated[
    tuple, typer.Option("--guidance-scale", metavar="W,W,...", parser=numbers(float), help="Comma-separated; 1 is off.")
]
