"""``diffx evaluate``: pictures against real pictures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .compare import split_samplers


def evaluate(
    model: options.Model = "emoji",
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Measure this folder of pictures instead of a model.", show_default=False)
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option("--real", help="Folder of real pictures, captions in .txt files beside them; else the glyphs.", show_default=False),
    ] = None,
    samplers: Annotated[
        str, typer.Option("--samplers", metavar="A,B,...", help="As --sampler of `diffx sample`, comma-separated.")
    ] = "UniPC,diffusers:DPMSolverMultistepScheduler",
    num_inference_steps: options.StepsList = (4, 8, 16),
    guidance_scale: options.GuidanceList = (3.0,),
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A text file, one prompt a line; else the captions of real pictures.", show_default=False),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", help="Of each run; half of the real ones, at most 256.", show_default=False)
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="PATH_OR_ID",
            help="Image encoder of transformers (CLIP, SigLIP, DINOv2, ViT); else the shipped one, which knows emoji only.",
            show_default=False,
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option("--classifier", metavar="PATH_OR_ID", help="Image classifier of transformers: adds its IS.", show_default=False),
    ] = None,
    measures: Annotated[
        str, typer.Option("--measures", metavar="A,B,...", help="FD needs more pictures than the encoder has features.")
    ] = "FD,KID,precision,recall,density,coverage",
    resolution: Annotated[
        int | None, typer.Option("--resolution", help="Cut and resize all pictures to squares of so many pixels.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures at once, sampled or measured.")] = 16,
    seed: options.Seed = 0,
    output: options.Folder = Path("outputs/evaluate"),
    device: options.Device = None,
    torch_dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Measure a model, or a folder of pictures, against real pictures: steps against quality, each figure beside its floor.

    [bold]Example:[/bold] diffx evaluate --model PATH_OR_ID --real photos --features facebook/dinov2-base --samplers UniPC --num-images 1000

    FD, KID: distance to the real pictures, smaller is better. precision, density: are the pictures like real ones? recall, coverage:
    are all kinds of real ones among them? R-precision (shipped encoder), alignment (CLIP, SigLIP): do they show what the prompts say?

    Half of the real pictures is measured against the other half: that row, *real*, is the floor, and figures mean something beside it
    only. Few pictures make every FD larger, so compare figures of equal counts and encoders.
    Writes report.md, report.json, pictures.png and, for models, quality.png.
    """
    from diffx.evaluation import TransformersClassifier, TransformersFeatures, evaluate, evaluate_pictures
    from diffx.loading import load_pipeline, read_prompts, resolve_device

    where = resolve_device(device)
    shared: dict[str, Any] = dict(
        features=TransformersFeatures(features, where) if features else None,
        classifier=TransformersClassifier(classifier, where) if classifier else None,
        measures=[name.strip() for name in measures.split(",") if name.strip()],
        resolution=resolution, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    if pictures is None:
        evaluation = evaluate(
            load_pipeline(model, device=device, torch_dtype=torch_dtype), real, samplers=split_samplers(samplers),
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, prompts=read_prompts(prompts) if prompts else None,
            num_images=num_images, **shared,
        )  # fmt: skip
    else:
        evaluation = evaluate_pictures(pictures, real, **shared)
    files = evaluation.save(output)
    if as_json:
        typer.echo(evaluation.to_json())
    else:
        typer.echo(evaluation.markdown())
        typer.echo("written: " + ", ".join(map(str, files)))
