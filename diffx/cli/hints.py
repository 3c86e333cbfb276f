"""``diffx hints``: control images of a picture."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options


def hints(
    image: Annotated[Path, typer.Argument(help="A picture.", show_default=False)],
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="A,B,...", help="These hints, by name; else all that are available.", show_default=False),
    ] = None,
    at: Annotated[
        tuple[int, int] | None,
        typer.Option("--at", metavar="HEIGHT WIDTH", help="Size of the control images; else the picture's.", show_default=False),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            "--depth", metavar="PATH_OR_ID", help="Network for depth and normals: Depth Anything, DPT, ZoeDepth.", show_default=False
        ),
    ] = None,
    segmentation: Annotated[
        str | None,
        typer.Option("--segmentation", metavar="PATH_OR_ID", help="Network for classes: SegFormer, Mask2Former.", show_default=False),
    ] = None,
    objects: Annotated[
        str | None, typer.Option("--objects", metavar="PATH_OR_ID", help="Network for objects: SAM.", show_default=False)
    ] = None,
    openpose: Annotated[
        str | None, typer.Option("--openpose", metavar="PATH_OR_ID", help="Network for people: ViTPose.", show_default=False)
    ] = None,
    device: options.Device = None,
    output: options.Folder = Path("outputs/hints"),
    as_json: options.Json = False,
) -> None:
    """Draw the control images of a picture, for ControlNets, and all of them on one sheet.

    [bold]Example:[/bold] diffx hints photo.png --only canny,softedge,depth --depth depth-anything/Depth-Anything-V2-Small-hf

    Without a network: canny, softedge, scribble, lineart, regions, tile, colour, shuffle; and controlnet-aux's Canny, shuffle and
    standard line art where that package is installed. With one: depth, normals, segmentation, objects, openpose.
    Writes NAME.png of each, and sheet.png.
    """
    from diffx.conditioning.hints import sheet

    chosen = [name.strip() for name in only.split(",") if name.strip()] if only else None
    networks: dict[str, Any] = dict(depth=depth, segmentation=segmentation, objects=objects, openpose=openpose)
    drawn = sheet.available(chosen, {name: model for name, model in networks.items() if model}, device=device)
    files = sheet.write(sheet.read(image), drawn, output, at=at)
    if as_json:
        typer.echo(json.dumps({"image": str(image), "hints": list(drawn), "files": [str(file) for file in files]}, indent=2))
    else:
        typer.echo("written: " + ", ".join(map(str, files)))
