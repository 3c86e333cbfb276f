"""The detectors of controlnet-aux, where that is installed, behind the call of our own hints.

controlnet-aux is no longer maintained, and imports all of its 18 detectors, with torchvision, timm and OpenCV, to give one. Here each is
imported alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from .hint import Hint, Values, spelled_like
from .metrics import codes, covering, depth_error, edge_f1, mean_iou, normal_error, palette_difference

PREFIX = "controlnet-aux:"
PACKAGE = "controlnet_aux"
SIDE = 64  # its detectors resize pictures to multiples of so many pixels
# Class -> its module and what its control images show.
DETECTORS: Mapping[str, tuple[str, Literal["lines", "depth", "normals", "people", "objects", "colours"]]] = {
    "AnylineDetector": ("anyline", "lines"),
    "CannyDetector": ("canny", "lines"),
    "ContentShuffleDetector": ("shuffle", "colours"),
    "DWposeDetector": ("dwpose", "people"),
    "HEDdetector": ("hed", "lines"),
    "LeresDetector": ("leres", "depth"),
    "LineartAnimeDetector": ("lineart_anime", "lines"),
    "LineartDetector": ("lineart", "lines"),
    "LineartStandardDetector": ("lineart_standard", "lines"),
    "MLSDdetector": ("mlsd", "lines"),
    "MediapipeFaceDetector": ("mediapipe_face", "people"),
    "MidasDetector": ("midas", "depth"),
    "NormalBaeDetector": ("normalbae", "normals"),
    "OpenposeDetector": ("open_pose", "people"),
    "PidiNetDetector": ("pidi", "lines"),
    "SamDetector": ("segment_anything", "objects"),
    "TEEDdetector": ("teed", "lines"),
    "ZoeDetector": ("zoe", "depth"),
}
WITHOUT_WEIGHTS = ("CannyDetector", "ContentShuffleDetector", "LineartStandardDetector")  # that also run with today's packages


class Bridge(Hint):
    """A detector of controlnet-aux: ``get("controlnet-aux:CannyDetector", low_threshold=50)``.

    The picture is padded to the sides that the detector wants, and its answer cut, so that nothing is resized; noise that it draws
    from NumPy's global generator is the same each time, and that generator is left as it was. Weights are read by controlnet-aux,
    from the files it knows.

    Args:
        detector: name of the class.
        weights: folder or Hub id for its ``from_pretrained``, for instance lllyasviel/Annotators; None for those that have no weights.
        device: as torch spells it; None leaves it where the detector loads it.
        options: of its ``from_pretrained`` (or its constructor) and of its call.

    Raises:
        ValueError: controlnet-aux is not installed or cannot import the detector, there is no such detector or option (the message
            names the nearest), or weights are missing or not wanted.
    """

    name: ClassVar[str] = "controlnet-aux"
    values: ClassVar[Values] = "colour"

    def __init__(self, detector: str, *, weights: str | Path | None = None, device: str | None = None, **options: Any) -> None:
        if detector not in DETECTORS:
            near = spelled_like(detector, DETECTORS)
            raise ValueError(f"controlnet-aux has no {detector!r}; the nearest is {near!r}; it has {', '.join(DETECTORS)}")
        module, self.shows = DETECTORS[detector]
        cls = _import(module, detector)
        load = getattr(cls, "from_pretrained", None)
        if load and weights is None:
            raise ValueError(f"{detector} needs weights=, a folder or Hub id, for instance lllyasviel/Annotators")
        if not load and weights is not None:
            raise ValueError(f"{detector} has no weights; leave weights= out")
        making, self._takes = _parameters(load or cls.__init__), _parameters(cls.__call__)
        known = sorted({*making, *self._takes} - {"input_image"})
        for option in options:
            if option not in known:
                near = spelled_like(option, known)
                raise ValueError(f"{detector} has no option {option!r}; the nearest is {near!r}; it has {', '.join(known)}")
        made = {key: value for key, value in options.items() if key in making}
        self._called = {key: value for key, value in options.items() if key not in making}
        try:
            found = load(str(weights), **made) if load else cls(**made)
            self._detector = found.to(device) if device else found
        except Exception as error:  # whatever misses a file or a package of its own: NameError, OSError, AttributeError, ...
            raise ValueError(f"controlnet-aux cannot make its {detector} ({type(error).__name__}: {error})") from error

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        height, width = pixels.shape[:2]
        padded = np.pad(pixels, ((0, -height % SIDE), (0, -width % SIDE), (0, 0)), mode="edge")
        sides = {key: min(padded.shape[:2]) for key in ("detect_resolution", "image_resolution") if key in self._takes}
        with _the_same_noise():
            drawn = self._detector(
                Image.fromarray(np.rint(padded * 255).astype(np.uint8)), **{**sides, "output_type": "pil", **self._called}
            )
        if not isinstance(drawn, Image.Image):
            raise ValueError(f"{type(self._detector).__name__} gave {type(drawn).__name__}, no picture, with {self._called}")
        return np.asarray(drawn.convert("RGB").crop((0, 0, width, height)), np.float32) / 255

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """That of our own hint which shows the same."""
        match self.shows:
            case "lines":
                return 1 - edge_f1(one.mean(-1), two.mean(-1))
            case "depth":
                return depth_error(one.mean(-1), two.mean(-1))
            case "normals":
                return normal_error(one * 2 - 1, two * 2 - 1)
            case "people":
                return 1 - mean_iou(codes(one), codes(two), ignore=0)
            case "objects":
                return 1 - covering(codes(one), codes(two))
            case _:  # "colours"
                return palette_difference(one, two)


def installed() -> bool:
    """Whether controlnet-aux is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def _import(module: str, detector: str) -> Any:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ValueError(
            f"the hint {PREFIX + detector!r} needs controlnet-aux, which is not installed; "
            "the README's section on hints says how to install it, in an environment of its own"
        )
    stands_in = PACKAGE not in sys.modules
    if stands_in:  # a package that knows where its modules are, but has not run: it would import all detectors
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        return getattr(importlib.import_module(f"{PACKAGE}.{module}"), detector)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        raise ValueError(f"controlnet-aux cannot import its {detector}: {error}") from error
    finally:
        if stands_in:
            del sys.modules[PACKAGE]


def _parameters(function: Any) -> set[str]:
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if p.kind is p.KEYWORD_ONLY or p.kind is p.POSITIONAL_OR_KEYWORD} - {"self"}


@contextmanager
def _the_same_noise() -> Iterator[None]:
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)
