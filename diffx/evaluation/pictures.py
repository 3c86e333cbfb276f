"""Sets of pictures to measure: a folder of files, read piece by piece, or pictures in memory; with captions where there are any."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .features import resize

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Pictures(Protocol):
    """``len`` pictures of one size; ``captions`` has one text for each, or is None."""

    @property
    def name(self) -> str: ...

    @property
    def captions(self) -> Sequence[str] | None: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), 3, H, W), float in [0, 1]."""
        ...


@dataclass(frozen=True)
class PictureTensor:
    """Pictures (N, 3, H, W) in memory, float in [0, 1]."""

    images: Tensor
    captions: Sequence[str] | None = None
    name: str = "pictures in memory"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        return self.images[torch.as_tensor(np.asarray(indices), dtype=torch.long)]


class PictureFolder:
    """The pictures in a folder and below it, in the order of their paths; the caption of name.png is the text of name.txt beside it.

    Transparent parts are put on white.

    Args:
        resolution: None leaves pictures as they are, which asks for one size of all; a number makes them squares of so many pixels
            (the middle square, bicubic, antialiased).

    Raises:
        ValueError: no such folder, no picture in it, a file that is no picture, or pictures of two sizes; the message names the file.
    """

    def __init__(self, folder: str | Path, resolution: int | None = None) -> None:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ValueError(f"picture folder {str(folder)!r} is no folder here")
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self.files:
            raise ValueError(f"picture folder {str(folder)!r} holds no picture ({', '.join(SUFFIXES)})")
        self.name, self._resolution = str(folder), resolution
        sizes = [_header(file) for file in self.files]
        for file, size in zip(self.files, sizes):
            if resolution is None and size != sizes[0]:
                raise ValueError(
                    f"{str(file)!r} has {size[0]} x {size[1]} pixels and {str(self.files[0])!r} {sizes[0][0]} x {sizes[0][1]}; "
                    f"give a resolution (for instance {min(sizes[0])}), to which all are cut and resized"
                )
        texts = [file.with_suffix(".txt") for file in self.files]
        whole = all(text.is_file() for text in texts)
        self.captions = [_caption(text) for text in texts] if whole else None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), 3, H, W), float in [0, 1]; raises ValueError with the name of a file that cannot be read to its end."""
        return torch.cat([square(_pixels(self.files[i]), self._resolution) for i in indices])


def square(images: Tensor, resolution: int | None) -> Tensor:
    """The middle square of (B, 3, H, W), resized to ``resolution`` pixels; everything, untouched, where that is None."""
    if resolution is None:
        return images
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(images[..., top : top + side, left : left + side], resolution).clamp(0, 1)


def _header(file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:  # reads no pixels
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(file, error) from error


def _pixels(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise _unreadable(file, error) from error
    canvas = Image.new("RGBA", upright.size, "white")
    canvas.alpha_composite(upright)
    return torch.from_numpy(np.array(canvas.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def _caption(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"caption {str(file)!r} cannot be read ({error}); save it as UTF-8") from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"picture {str(file)!r} cannot be read ({error}); remove it or save it again")
