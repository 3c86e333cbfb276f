"""Control images: ``get("canny")(picture)`` draws one, and ``get("canny").error(control_image, other)`` says how far a picture is from it.

Every hint is one call, ``hint(image, *, at=None) -> image``: PIL in, PIL (RGB) out, as large as the picture or ``at``, the same
each time.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from .bridge import DETECTORS, PREFIX, Bridge
from .hint import Hint, spelled_like, to_pixels
from .metrics import edge_f1

__all__ = ["Hint", "edge_f1", "get", "names", "to_pixels"]

# Name -> its file and class. Imported on first use, so that a hint costs what it needs itself.
_HINTS = {
    "canny": ("edges", "Canny"),
    "softedge": ("edges", "SoftEdge"),
    "scribble": ("edges", "Scribble"),
    "lineart": ("edges", "LineArt"),
    "regions": ("regions", "Regions"),
    "segmentation": ("regions", "Segmentation"),
    "objects": ("regions", "Objects"),
    "depth": ("depth", "Depth"),
    "normals": ("depth", "Normals"),
    "openpose": ("pose", "OpenPose"),
    "tile": ("colours", "Tile"),
    "colour": ("colours", "Colour"),
    "shuffle": ("colours", "Shuffle"),
}


def names() -> tuple[str, ...]:
    """The names that ``get`` knows: our own, and controlnet-aux's detectors, installed or not."""
    return (*_HINTS, *(PREFIX + detector for detector in DETECTORS))


def get(name: str, **options: Any) -> Hint:
    """The hint of that name.

    Args:
        name: one of ``names()``.
        options: fields of its class, ``get("canny", sigma=0.5)``; for a detector of controlnet-aux weights, device, and whatever its
            own class takes.

    Raises:
        ValueError: there is no such hint or option, the message names the nearest; or an option has a value that is not allowed.
    """
    if name.startswith(PREFIX):
        return Bridge(name.removeprefix(PREFIX), **options)
    if name not in _HINTS:
        raise ValueError(
            f"unknown hint {name!r}; the nearest is {spelled_like(name, names())!r}; there are {', '.join(_HINTS)}, "
            f"and controlnet-aux's as {PREFIX}ClassName"
        )
    module, cls = _HINTS[name]
    kind: type[Hint] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    known = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]  # every hint is a dataclass
    for option in options:
        if option not in known:
            raise ValueError(
                f"the hint {name!r} has no option {option!r}; the nearest is {spelled_like(option, known)!r}; it has {', '.join(known)}"
            )
    return kind(**options)
