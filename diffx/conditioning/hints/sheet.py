"""Every control image of a picture, in files and on one sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from . import get
from .bridge import PREFIX, WITHOUT_WEIGHTS, installed
from .hint import Hint, to_image, to_pixels

COMPUTED = ("canny", "softedge", "scribble", "lineart", "regions", "tile", "colour", "shuffle")
NETWORKS = {"depth": "depth", "normals": "depth", "segmentation": "segmentation", "objects": "objects", "openpose": "openpose"}
COLUMNS, LEAST, LABEL = 4, 256, 14  # of a sheet; the sides of its pictures are enlarged to LEAST pixels at least


def available(
    only: Sequence[str] | None = None, networks: Mapping[str, str | Path] | None = None, *, device: str | None = None
) -> dict[str, Hint]:
    """The hints that can be drawn here, by name, each with its default options.

    Args:
        only: names; None is all that need no network, those whose network is given, and controlnet-aux's where it is installed.
        networks: folder or Hub id for "depth" (also of normals), "segmentation", "objects" and "openpose".
        device: where the networks run.

    Raises:
        ValueError: a name is unknown, its network is not given or cannot be one, or controlnet-aux is not installed.
    """
    networks = networks or {}
    names = list(only) if only is not None else [*COMPUTED, *(name for name, network in NETWORKS.items() if network in networks)]
    if only is None and installed():
        names += [PREFIX + detector for detector in WITHOUT_WEIGHTS]
    told: dict[str, dict[str, Any]] = {
        name: {"model": networks[network], "device": device} for name, network in NETWORKS.items() if network in networks
    }
    return {name: get(name, **told.get(name, {})) for name in names}


def read(file: str | Path) -> Image.Image:
    """The picture in a file, upright.

    Raises:
        ValueError: there is none, or it cannot be read to its end.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: broken chunks of a PNG
        raise ValueError(f"picture {str(file)!r} cannot be read ({error}); give a PNG, JPEG or WebP file") from error


def write(image: Image.Image, hints: Mapping[str, Hint], folder: str | Path, *, at: tuple[int, int] | None = None) -> list[Path]:
    """The files written: NAME.png of each control image, and sheet.png with the picture before them.

    A colon in a name is a hyphen in the file's.
    """
    folder = Path(folder)
    drawn = {name: hint(image, at=at) for name, hint in hints.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name.replace(':', '-')}.png" for name in drawn]
    for file, control in zip(files, drawn.values()):
        control.save(file)
    sheet({"picture": to_image(to_pixels(image)), **drawn}).save(folder / "sheet.png")
    return [*files, folder / "sheet.png"]


def sheet(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """The pictures in rows of four, each under its name, small ones enlarged; the last says the size of all."""
    size = list(pictures.values())[-1].size
    scale = max(1, -(-LEAST // max(size)))
    width, height = size[0] * scale, size[1] * scale
    rows = -(-len(pictures) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (width + 4) - 4, rows * (height + LABEL + 4) - 4), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (name, picture) in enumerate(pictures.items()):
        x, y = i % COLUMNS * (width + 4), i // COLUMNS * (height + LABEL + 4)
        pen.text((x + 2, y + 1), name.removeprefix(PREFIX), fill="black")
        how = Image.Resampling.NEAREST if picture.size == size else Image.Resampling.BICUBIC
        canvas.paste(picture.resize((width, height), how), (x, y + LABEL))
    return canvas
