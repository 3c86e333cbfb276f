"""``diffx quickstart`` and ``diffx compare``: samplers side by side on one model."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ..loading import EMBEDDED_STUDENT, EMBEDDED_TABLE
from . import options

PROMPTS = (
    "grinning face",
    "red apple on blue",
    "rocket",
    "soccer ball on green",
    "panda face",
    "tulip on yellow",
    "sailboat on blue",
    "ghost on pink",
)
CONTROLS = ("diffusers:DDIMScheduler", "diffusers:DPMSolverMultistepScheduler", "diffusers:UniPCMultistepScheduler")
SAMPLERS = (EMBEDDED_STUDENT.name, EMBEDDED_TABLE.name, "DDIM", "Euler", "DPMSolver", "UniPC", *CONTROLS)


def quickstart(
    output: options.Folder = Path("outputs/quickstart"),
    seed: options.Seed = 2,  # the noises of 0 and 1 are those that the calibrated table was learned from and chosen by
    train_steps: Annotated[int, typer.Option("--train-steps", help="Updates that the student is distilled on; 0 leaves that out.")] = 100,
    as_json: options.Json = False,
) -> None:
    """Compare every sampler on the embedded model, and distil its student a little further: no network, four minutes on two cores.

    [bold]Example:[/bold] diffx quickstart --output outputs/quickstart

    Eight prompts, 4 to 16 network calls, diffx's samplers beside Diffusers' own, all from the same noise as a 100-call reference;
    emoji_calibrated_6 is a table of 6 calls that was learned for this model, emoji_progressive_4 a student of it (an adapter) that
    makes 4 unguided calls. The student is loaded in a process that has only Diffusers, and distilled on for --train-steps updates.
    Writes compare.png, error.png, report.md, report.json, and the run in student/. With --json: the comparison alone.
    """
    compare(
        samplers=",".join(SAMPLERS), num_inference_steps=(4, 6, 8, 16), num_images_per_prompt=4, output=output, seed=seed, as_json=as_json
    )
    if not as_json:
        _student(output, seed, train_steps)
        typer.echo('next:     diffx sample "rocket on blue" --sampler UniPC --num-inference-steps 8')
        typer.echo("between:  python pipelines/latent_interpolation/demo.py  (in a clone of the repository)")
        typer.echo("your own: diffx compare --model PATH_OR_ID --samplers UniPC,diffusers:DPMSolverMultistepScheduler")


def _student(output: Path, seed: int, train_steps: int) -> None:
    from ..quickstart import differing_pixels, further

    different = differing_pixels(PROMPTS, seed)
    same = "identical pixels" if not different else f"{different} values differ"
    typer.echo(f"student:  {EMBEDDED_STUDENT.name} in a process that has only Diffusers: {same}")
    if train_steps:
        found = further(train_steps, output / "student")
        typer.echo(f"          distilled on for {found.updates} updates, {found.seconds:.0f} s:\n{found}")


def compare(
    model: options.Model = "emoji",
    samplers: Annotated[
        str,
        typer.Option(
            "--samplers",
            metavar="A,B,...",
            help="As --sampler of `diffx sample`, comma-separated. Heun@3 runs at 3 steps instead of --num-inference-steps, "
            "a calibrated table at its own number alone.",
        ),
    ] = "UniPC,DPMSolver,diffusers:DPMSolverMultistepScheduler",
    num_inference_steps: options.StepsList = (4, 8, 16),
    guidance_scale: options.GuidanceList = (3.0,),
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Give it again for more; eight of ours otherwise.", show_default=False)
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.", show_default=False)] = None,
    num_images_per_prompt: options.ImagesPerPrompt = 1,
    reference: Annotated[
        str, typer.Option("--reference", metavar="SAMPLER", help="What the pictures are measured against.")
    ] = "diffusers:DDIMScheduler",
    reference_steps: Annotated[int, typer.Option("--reference-steps", help="Its steps.")] = 100,
    seed: options.Seed = 0,
    output: options.Folder = Path("outputs/compare"),
    device: options.Device = None,
    torch_dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Compare samplers on a model: distance to a many-step reference from the same noise, and pictures side by side.

    [bold]Example:[/bold] diffx compare --model PATH_OR_ID --samplers UniPC,diffusers:DDIMScheduler --num-inference-steps 4,8

    Writes compare.png, error.png, report.md and report.json.
    """
    from diffx.evaluation import compare, evaluator_for
    from diffx.loading import load_pipeline, read_prompts

    wanted = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())] or PROMPTS
    comparison = compare(
        load_pipeline(model, device=device, torch_dtype=torch_dtype),
        split_samplers(samplers),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        prompts=wanted,
        seed=seed,
        num_images_per_prompt=num_images_per_prompt,
        reference=reference,
        reference_steps=reference_steps,
        evaluator=evaluator_for(model, wanted),
    )
    comparison.save(output)
    if as_json:
        typer.echo(comparison.to_json())
    else:
        typer.echo(comparison.markdown())
        typer.echo(f"pictures: {output / 'compare.png'}, {output / 'error.png'}")
        typer.echo(f"report:   {output / 'report.md'}, {output / 'report.json'}")


def split_samplers(text: str) -> list[str]:
    """The samplers in a comma-separated list; a bare KEY=VALUE belongs to the sampler before it."""
    samplers: list[str] = []
    for part in text.split(","):
        if samplers and re.match(r"\s*\w+\s*=", part):
            samplers[-1] += "," + part
        else:
            samplers.append(part.strip())
    return samplers
