"""Judging pictures of the embedded model: what a prompt of its data should look like is known, because it can be rendered."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import glyphs
from ..loading import EMBEDDED, resolve
from .features import FeatureExtractor, GlyphFeatures
from .metrics import Measure, frechet_distance, r_precision
from .pictures import PictureTensor

RENDERINGS_PER_PROTOTYPE = 4
DISTRACTORS = 200


class Evaluator(Protocol):
    """What ``compare`` asks about the pictures of one run, beyond their distance to the reference."""

    def evaluate(self, images: Tensor, prompts: Sequence[str]) -> tuple[Measure, ...]:
        """Measures of ``images`` (N, 3, H, W), float in [0, 1], each drawn from the prompt at its place."""
        ...


class GlyphEvaluator:
    """R-precision of prompts, and the Frechet distance where there are more pictures than features, with real-versus-real floors.

    A prompt's prototype is the mean feature of four renderings; the candidates are the prompts asked about and 200 others of
    the same data. Floors are measured on fresh renderings of the same prompts, as many as there are pictures.

    Args:
        features: None is the shipped encoder.
        seed: of the renderings and of the choice of the other prompts.
    """

    def __init__(self, features: FeatureExtractor | None = None, seed: int = 0) -> None:
        self.features = features or GlyphFeatures()
        self.seed = seed
        self._real: dict[tuple[str, ...], Real] = {}  # the same for every run of a comparison

    def evaluate(self, images: Tensor, prompts: Sequence[str]) -> tuple[Measure, ...]:
        """Raises ValueError for a prompt that is not a caption of the data, naming the nearest that is."""
        key = tuple(prompts)
        if key not in self._real:
            self._real[key] = self._measure_real(key)
        real, found = self._real[key], self.features(images)
        settings = {"count": len(images), "seed": self.seed}
        score = r_precision(found, real.prototypes, real.own)
        measures = [Measure(name="R-precision@1", value=score, floor=real.r_precision, **settings)]
        if real.distance is not None:
            distance = frechet_distance(found, real.features)
            measures.append(Measure(name=f"FD ({self.features.name})", value=distance, floor=real.distance, **settings))
        return tuple(measures)

    def _measure_real(self, prompts: tuple[str, ...]) -> Real:
        table, own = candidates(prompts, self.features, seed=self.seed)
        one, two = (self.features(render(prompts, seed=self.seed + k)) for k in (1, 2))
        enough = len(prompts) > one.shape[1]  # of a Frechet distance, whose covariances would be singular otherwise
        return Real(table, own, r_precision(one, table, own), two, frechet_distance(one, two) if enough else None)


def evaluator_for(model: str | None, prompts: Sequence[str]) -> GlyphEvaluator | None:
    """A ``GlyphEvaluator`` where ``model`` is the embedded one and every prompt a caption of its data, else None."""
    if resolve(model) != str(EMBEDDED):
        return None
    return GlyphEvaluator() if are_captions(prompts) else None


@dataclass(frozen=True)
class Real:
    """What real renderings of some prompts look like, and how they score against each other."""

    prototypes: np.ndarray  # (P, D), the asked prompts first
    own: np.ndarray  # (N,) index of each prompt's prototype
    r_precision: float
    features: np.ndarray  # (N, D)
    distance: float | None  # None where there are too few pictures


def parse_prompt(prompt: str) -> tuple[int, str]:
    """The glyph's index and the background that a caption of the data names.

    Raises:
        ValueError: no rendering has this caption.
    """
    name, _, background = prompt.rpartition(" on ")
    if prompt in glyphs.names():
        return glyphs.names().index(prompt), "white"
    if name in glyphs.names() and background in glyphs.BACKGROUNDS:
        return glyphs.names().index(name), background
    close = max(glyphs.names(), key=lambda known: max(difflib.SequenceMatcher(None, known, part).ratio() for part in (prompt, name)))
    colours = ", ".join(colour for colour in glyphs.BACKGROUNDS if colour != "white")
    raise ValueError(
        f"prompt {prompt!r} is no caption of the embedded data; the nearest is {close!r}, alone or with ' on ' and one of {colours}"
    )


def are_captions(prompts: Sequence[str]) -> bool:
    """Whether every prompt is a caption of the data; a picture of anything else has no right answer to compare with."""
    try:
        for prompt in prompts:
            parse_prompt(prompt)
    except ValueError:
        return False
    return True


def all_prompts() -> list[str]:
    """Every caption of the data: 1,360 names on six backgrounds, seen and unseen."""
    return [glyphs.Rendering(glyph, background).caption() for glyph in range(len(glyphs.names())) for background in glyphs.BACKGROUNDS]


def seen_prompts(count: int, *, seed: int) -> list[str]:
    """``count`` different captions of glyphs and backgrounds that the embedded model was trained on."""
    shown = []
    for prompt in all_prompts():
        glyph, background = parse_prompt(prompt)
        if glyph not in glyphs.held_out() and not glyphs.is_held_out_pair(glyph, background):
            shown.append(prompt)
    return [shown[i] for i in np.random.default_rng(seed).permutation(len(shown))[:count]]


def render(prompts: Sequence[str], *, seed: int, per_prompt: int = 1) -> Tensor:
    """(len(prompts) * per_prompt, 3, 32, 32) in [0, 1]: random renderings of each prompt, prompt by prompt.

    A picture depends on seed, prompt and its number among the equal prompts so far, not on the other prompts.
    """
    images, used = [], dict.fromkeys(prompts, 0)
    for prompt in prompts:
        glyph, background = parse_prompt(prompt)
        for _ in range(per_prompt):
            rng = np.random.default_rng((seed, zlib.crc32(prompt.encode()), used[prompt]))
            used[prompt] += 1
            images.append(glyphs.random_rendering(glyph, rng, background).image())
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def random_pictures(count: int, *, seed: int) -> PictureTensor:
    """``count`` random renderings of random seen glyphs and their captions: the distribution that the model was trained on."""
    rng = np.random.default_rng((seed, len(glyphs.names())))  # training pictures are keyed by (seed, index of a glyph, ...)
    drawn = [glyphs.random_rendering(int(rng.choice(glyphs.seen())), rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([rendering.image() for rendering in drawn])).permute(0, 3, 1, 2).float() / 255
    return PictureTensor(images, [rendering.caption() for rendering in drawn], "renderings of the embedded model's glyphs")


def candidates(prompts: Sequence[str], features: FeatureExtractor, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prototypes (P, D) of the prompts asked about and of 200 others of the data, and each prompt's own index (N,) among them."""
    asked = list(dict.fromkeys(prompts))
    others = [prompt for prompt in all_prompts() if prompt not in set(asked)]
    chosen = np.random.default_rng(seed).choice(len(others), DISTRACTORS, replace=False)
    table = prototypes(asked + [others[i] for i in chosen], features, seed=seed)
    return table, np.array([asked.index(prompt) for prompt in prompts])


def prototypes(prompts: Sequence[str], features: FeatureExtractor, *, seed: int, per_prompt: int = RENDERINGS_PER_PROTOTYPE) -> np.ndarray:
    """(len(prompts), D): the mean feature of ``per_prompt`` renderings of each prompt."""
    found = features(render(prompts, seed=seed, per_prompt=per_prompt))
    return found.reshape(len(prompts), per_prompt, -1).mean(1)
