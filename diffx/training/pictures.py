"""How pictures become arrays of one size: opened, resized to cover that size, cut, mirrored."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..families import Family
from ..families.latent import LatentFamily

Size = tuple[int, int]  # (height, width) in pixels
MAX_ASPECT = 2.0  # of the longest bucket; longer pictures are cut
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


class Cut(NamedTuple):
    """One example of a picture: it is mirrored or not, then resized, then cut to ``size`` with its top left at ``corner``."""

    size: Size
    resized: Size
    corner: tuple[int, int]
    flip: bool


def open_picture(value: Any) -> Image.Image:
    """The upright picture behind a file name, a Pillow picture, an array, or what ``datasets`` holds: its bytes or path.

    Args:
        value: arrays are (H, W) or (H, W, C), uint8, or floats in [0, 1], of which the nearest 1/255 is kept.

    Raises:
        ValueError: it is none of these, or does not decode.
    """
    match value:
        case Image.Image():
            picture = value
        case np.ndarray():
            picture = _of_array(value)
        case str() | Path():
            picture = _decoded(value)
        case {"bytes": bytes(content)}:
            picture = _decoded(io.BytesIO(content))
        case {"path": str(path)}:
            picture = _decoded(path)
        case _:
            raise ValueError(f"is a {type(value).__name__}; a Pillow picture, an array (H, W, C) or a file name is needed")
    if picture.mode[0] in "IF":
        raise ValueError(f"has pixels of mode {picture.mode!r}; 8 bits a channel are needed")
    return ImageOps.exif_transpose(picture)


def _decoded(source: str | Path | io.BytesIO) -> Image.Image:
    try:
        with Image.open(source) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
        raise ValueError(f"does not open as a picture ({error})") from error


def _of_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in MODES):
        raise ValueError(f"is an array {array.shape}; (H, W) or (H, W, C) with 1, 3 or 4 channels is needed")
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN fails, too
            raise ValueError(f"is an array of floats from {pixels.min():g} to {pixels.max():g}; they must lie in [0, 1]")
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"is an array of {pixels.dtype}; uint8 or floats in [0, 1] are needed")
    return Image.fromarray(pixels)


def pixels_of(picture: Image.Image, cut: Cut, channels: int) -> Tensor:
    """(C, H, W) float32 in [-1, 1] of one cut; what is transparent shows white where the model has no alpha channel."""
    array = np.array(cut_of(picture, cut, MODES[channels]), np.float32).reshape(*cut.size, channels)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def cut_of(
    picture: Image.Image, cut: Cut, mode: str, *, of: tuple[int, int] | None = None, resample: int = Image.Resampling.LANCZOS
) -> Image.Image:
    """One cut of a picture, in Pillow's ``mode``; what is transparent shows white in a mode without an alpha channel.

    Args:
        of: (width, height) of the picture that the cut was made for, where this is one that belongs to it.

    Raises:
        ValueError: this one has another size.
    """
    if of is not None and picture.size != of:
        raise ValueError(f"it has {picture.width} x {picture.height} pixels, and its picture {of[0]} x {of[1]}; they must be the same")
    if mode != "RGBA" and picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    picture = picture.convert(mode)
    if cut.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = cut.resized
    if picture.size != (width, height):
        picture = picture.resize((width, height), resample)  # type: ignore[arg-type]  # of Pillow's enum
    (top, left), (height, width) = cut.corner, cut.size
    return picture.crop((left, top, left + width, top + height))


def cuts_of(original: Size, sizes: Sequence[Size], num: int, *, center: bool, flip: bool, rng: np.random.Generator) -> list[Cut]:
    """``num`` cuts of a picture to the one of ``sizes`` whose shape is nearest.

    The picture is made just large enough to cover it; the cut lies in the middle or anywhere. With ``flip`` every second cut is
    mirrored, beginning with a random one.
    """
    size = min(sizes, key=lambda size: abs(_log_aspect(size) - _log_aspect(original)))
    scale = max(size[0] / original[0], size[1] / original[1])
    resized = max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))
    room = resized[0] - size[0], resized[1] - size[1]
    first = int(rng.integers(2))
    cuts = []
    for k in range(num):
        corner = (room[0] // 2, room[1] // 2) if center else (int(rng.integers(room[0] + 1)), int(rng.integers(room[1] + 1)))
        cuts.append(Cut(size, resized, corner, flip and (first + k) % 2 == 1))
    return cuts


def picture_size(family: Family, resolution: int | Size | None) -> Size:
    """(height, width) that a model is trained at; None is the size of the model's own samples.

    Raises:
        ValueError: the model cannot have pictures of that size, or says of no size that it is its own.
    """
    if resolution is None:
        sample = family.denoiser.config.get("sample_size") or getattr(family.pipe, "default_sample_size", None)
        if sample is None:
            raise ValueError(f"{type(family.denoiser).__name__} names no size of its own; give resolution")
        sides = (sample, sample) if isinstance(sample, int) else tuple(sample)
        scale = family.vae_scale if isinstance(family, LatentFamily) else 1
        resolution = sides[0] * scale, sides[1] * scale
    size = (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1])
    step = side_multiple(family)
    if any(side % step for side in size):
        near = tuple(max(1, round(side / step)) * step for side in size)
        raise ValueError(f"resolution={size}: this {type(family.denoiser).__name__} takes multiples of {step}, such as {near}")
    family.sample_shape(size)  # which refuses what else there is to refuse
    return size


def side_multiple(family: Family) -> int:
    """What a picture's sides must divide by: the VAE's factor and the network's patches, or what a network of pixels halves."""
    if isinstance(family, LatentFamily):
        return family.vae_scale * family.patch
    return 2 ** (len(family.denoiser.config.block_out_channels) - 1)


def buckets(size: Size, multiple: int) -> list[Size]:
    """``size``, and the shapes from 1:2 to 2:1 of at most as many pixels, their sides whole multiples of ``multiple``.

    Steps are a sixteenth of a square's side (64 pixels at 1024, as SDXL was trained), so that there are not many more shapes
    than batches.
    """
    area = size[0] * size[1]
    step = multiple * max(1, round(math.sqrt(area) / 16 / multiple))
    found = {size}
    for longer in range(step, math.isqrt(int(area * MAX_ASPECT)) + 1, step):
        shorter = min(longer, area // longer // step * step)
        if shorter and longer / shorter <= MAX_ASPECT and longer * (shorter + step) > area:
            found |= {(longer, shorter), (shorter, longer)}
    return sorted(found)


def channels_of(family: Family) -> int:
    """Of the pictures that a model is trained on.

    Raises:
        ValueError: no kind of picture has as many.
    """
    channels = (family.pipe.components.get("vae") or family.denoiser).config.in_channels
    if channels not in MODES:
        raise ValueError(f"the model has pictures of {channels} channels, and files have {', '.join(map(str, MODES))}")
    return channels


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])
