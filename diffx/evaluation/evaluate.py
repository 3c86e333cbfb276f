"""Pictures against real pictures: of a model at several numbers of steps, or from a folder, each figure beside its floor."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .candidate import make_runs
from .compare import _check, _counted, _run, lent
from .emoji import are_captions, candidates, random_pictures
from .features import FeatureExtractor, GlyphFeatures, TransformersClassifier, TransformersFeatures
from .metrics import (
    Measure,
    alignment,
    density_coverage,
    frechet_distance,
    halves,
    inception_score,
    kernel_distance,
    precision_recall,
    r_precision,
)
from .pictures import PictureFolder, Pictures, PictureTensor, square
from .quality import Column, Evaluation, Score
from .samplers import is_control

MEASURES = ("FD", "KID", "precision", "recall", "density", "coverage")
NUM_IMAGES = 256  # more than the shipped encoder's 64 features by a margin, and minutes on two cores
SHOWN = 8  # pictures of each row in the grid
MIN_COUNT = 6  # density asks for more than k = 5

# Names of what one function of (real, generated, seed) returns.
FAMILIES: dict[tuple[str, ...], Callable[[np.ndarray, np.ndarray, int], tuple[float, ...]]] = {
    ("FD",): lambda real, generated, seed: (frechet_distance(generated, real),),
    ("KID", "KID sd"): lambda real, generated, seed: kernel_distance(generated, real, subset_size=min(1000, len(real) // 2), seed=seed),
    ("precision", "recall"): lambda real, generated, seed: precision_recall(real, generated),
    ("density", "coverage"): lambda real, generated, seed: density_coverage(real, generated),
}


def evaluate(
    pipe: Any,
    real: str | Path | Tensor | Pictures | None = None,
    *,
    samplers: Sequence[str],
    num_inference_steps: Sequence[int] = (4, 8, 16),
    guidance_scale: Sequence[float] = (3.0,),
    prompts: Sequence[str] | None = None,
    num_images: int | None = None,
    features: FeatureExtractor | None = None,
    classifier: TransformersClassifier | None = None,
    measures: Sequence[str] = MEASURES,
    resolution: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    **call_kwargs: Any,
) -> Evaluation:
    """Every sampler at every number of steps and guidance scale, measured against real pictures; rows[0] is real against real.

    The real pictures are parted at random into two halves: one is what everything is measured against, the other, measured the same
    way, gives the floors and, where there are captions, the prompts. So a perfect model scores what the floor scores, and both with
    the same number of pictures. Text-image alignment is measured too where the features know texts and the real pictures have
    captions: R-precision by the shipped encoder, CLIP-S / 2.5 by CLIP and SigLIP.

    Args:
        pipe: any Diffusers text-to-image pipeline; in other cases make a folder of pictures and use ``evaluate_pictures``.
        real: a folder (see ``PictureFolder``), a tensor (N, 3, H, W) in [0, 1] or other ``Pictures``; None draws renderings of the
            embedded model's glyphs.
        samplers: as ``make_candidate`` takes them, or with steps of their own, as ``compare`` takes them: a student brings its own.
        prompts: None takes the captions of the real pictures; a list is repeated until there are ``num_images``.
        num_images: pictures of each run; None is half of the real ones, at most 256.
        features: None is the shipped encoder, which knows emoji only; ``TransformersFeatures(...)`` for everything else.
        classifier: adds the Inception Score by the classes of this model.
        measures: of ``MEASURES``. FD asks for more pictures than there are features.
        resolution: makes all pictures squares of so many pixels before the encoder sees them.
        seed: of the halves, the noise, KID's subsets and the renderings.
        call_kwargs: passed to every call of the pipeline, for instance height, width, negative_prompt.

    Raises:
        ValueError: too few pictures (the message says how many are needed), pictures of two sizes, an unreadable one, no prompts,
            or what ``compare`` refuses.
        FloatingPointError: a sampler produced NaN or infinity; the message names it.
    """
    if isinstance(samplers, str) or isinstance(prompts, str):
        raise ValueError("prompts and samplers are lists of strings, not one string")
    steps, scales = tuple(num_inference_steps), tuple(float(scale) for scale in guidance_scale)
    counts = (*steps, batch_size, NUM_IMAGES if num_images is None else num_images, 1)  # 1: pictures of each prompt
    _check(pipe, tuple(samplers), tuple(prompts or ("",)), counts, scales, call_kwargs)
    ways, runs = make_runs(samplers, pipe, steps)  # all errors before the first run
    found = _real_pictures(real, 2 * (num_images or NUM_IMAGES), resolution, seed)
    count = min(len(found) // 2, NUM_IMAGES) if num_images is None else num_images
    ruler = Ruler(
        found, count, features=features, classifier=classifier, measures=measures, resolution=resolution, seed=seed, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    wanted = [prompts[i % len(prompts)] for i in range(count)] if prompts else ruler.captions
    if wanted is None:
        raise ValueError(f"{found.name} has no captions (name.txt beside name.png, for every picture), so prompts are needed")

    rows = [ruler.reference_row()]
    images: dict[Column, np.ndarray] = {(REAL, None, None): ruler.shown}
    batches = range(0, count, batch_size)
    total = len(scales) * len(batches) * sum(n for _, n in runs)
    with lent(pipe), tqdm(total=total, unit="call", disable=not progress) as bar:
        for scale, (spec, n) in itertools.product(scales, runs):
            label = f"{spec} at {n} steps and guidance {scale:g}"
            bar.set_description(label)
            arguments = {"num_inference_steps": n, "guidance_scale": scale, **ways[spec].call_kwargs, **call_kwargs}
            seconds, nfe, seen, shown = 0.0, 0, [], []
            with ways[spec].in_place(pipe), _counted(pipe, bar.update) as meter:
                for first in batches:  # measured at once, so that only a few pictures stay in memory
                    batch = wanted[first : first + batch_size]
                    run = _run(pipe, meter, batch, seed, batch_size, arguments, label, first)
                    pictures = run.images.mul(255).round().div(255)  # as a file would hold them
                    seen.append(ruler.see(pictures))
                    shown.append(as_bytes(pictures[: max(0, SHOWN - first)]))
                    seconds, nfe = seconds + run.seconds * len(batch), run.nfe
            images[spec, n, scale] = np.concatenate(shown)
            measured = ruler.measure(Seen.join(seen), wanted)
            run_settings: dict[str, Any] = dict(guidance_scale=scale, num_inference_steps=n, nfe=nfe, seconds=seconds / count)
            rows.append(Score(role="control" if is_control(spec) else "sampler", sampler=spec, measures=measured, **run_settings))
    settings = ruler.settings | {
        "generated": f"{len(ways)} samplers on {type(pipe).__name__}",
        "device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "call_kwargs": {key: repr(value) for key, value in call_kwargs.items()},
    }  # fmt: skip
    return Evaluation(tuple(rows), images, tuple(wanted[:SHOWN]), settings)


def evaluate_pictures(
    pictures: str | Path | Tensor | Pictures,
    real: str | Path | Tensor | Pictures | None = None,
    *,
    features: FeatureExtractor | None = None,
    classifier: TransformersClassifier | None = None,
    measures: Sequence[str] = MEASURES,
    resolution: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Evaluation:
    """A folder of pictures against a folder of real ones, whoever made them; arguments, floors and errors as ``evaluate``.

    As many pictures are used as there are in the folder or in half of the real ones, whichever is fewer, chosen at random. Captions
    of the pictures (name.txt beside name.png) are what text-image alignment holds them against.
    """
    made = _pictures(pictures, resolution)
    found = _real_pictures(real, 2 * len(made), resolution, seed)
    count = min(len(made), len(found) // 2)
    ruler = Ruler(
        found, count, features=features, classifier=classifier, measures=measures, resolution=resolution, seed=seed, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    chosen = sorted(np.random.default_rng(seed).permutation(len(made))[:count].tolist())
    captions = None if made.captions is None else [made.captions[int(i)] for i in chosen]
    score = Score(role="pictures", sampler=made.name, measures=ruler.measure(ruler.see_all(made, chosen), captions))
    images: dict[Column, np.ndarray] = {(REAL, None, None): ruler.shown}
    images[made.name, None, None] = as_bytes(square(made.read(chosen[:SHOWN]), resolution))
    return Evaluation((ruler.reference_row(), score), images, ("",) * min(SHOWN, count), ruler.settings | {"generated": made.name})


REAL = "real pictures"


@dataclass(frozen=True)
class Seen:
    """What the encoder, and the classifier where there is one, made of some pictures: (N, D), and (N, C) or None."""

    features: np.ndarray
    probabilities: np.ndarray | None

    @staticmethod
    def join(parts: Sequence["Seen"]) -> "Seen":
        """The parts one after another."""
        probabilities = [part.probabilities for part in parts if part.probabilities is not None]
        return Seen(np.concatenate([part.features for part in parts]), np.concatenate(probabilities) if probabilities else None)


class Ruler:
    """What pictures are held against: features of one half of the real pictures, and what the other half scores by them (the floors).

    Raises:
        ValueError: too few real pictures for ``count`` in each half, or too few for a measure.
    """

    def __init__(
        self,
        real: Pictures,
        count: int,
        *,
        features: FeatureExtractor | None,
        classifier: TransformersClassifier | None,
        measures: Sequence[str],
        resolution: int | None,
        seed: int,
        batch_size: int,
        progress: bool,
    ) -> None:
        if unknown := [name for name in measures or ("",) if name not in MEASURES]:
            raise ValueError(f"measure {unknown[0]!r} is not one of {', '.join(MEASURES)}; at least one is needed")
        for name, value in (("batch_size", batch_size), ("resolution", resolution)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not MIN_COUNT <= count <= len(real) // 2:
            raise ValueError(
                f"{count} pictures to measure and {len(real)} real ones ({real.name}): at least {MIN_COUNT} are needed, and twice as many "
                f"real ones, half of them for the floor"
            )
        self._features, self._classifier = features or GlyphFeatures(), classifier
        self._measures, self._resolution, self._seed, self._batch_size = tuple(measures), resolution, seed, batch_size
        first, other = (sorted(half[:count].tolist()) for half in halves(len(real), seed))
        sample = square(real.read(first[:1]), resolution)
        self._size, width = tuple(sample.shape[-2:]), self._features(sample).shape[1]
        if "FD" in measures and count <= width:
            raise ValueError(
                f"FD of {width} features needs at least {width + 1} pictures in each set, there are {count}: "
                f"give {width + 1} or more, and {2 * width + 2} real ones, or leave FD out: measures {','.join(MEASURES[1:])}"
            )
        self._progress = progress
        self._candidates: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}  # seconds to render, the same for every run
        self._reference = self.see_all(real, first).features
        self.captions = None if real.captions is None else [real.captions[int(i)] for i in other]
        self.shown = as_bytes(square(real.read(other[:SHOWN]), resolution))
        self._floors = dict(self._values(self.see_all(real, other), self.captions))
        self.settings = {
            "count": count, "num_real": len(real), "real": real.name, "seed": seed, "features": self._features.name, "width": width,
            "classifier": classifier.name if classifier else None, "resolution": resolution, "notes": self._notes(real),
        }  # fmt: skip

    def reference_row(self) -> Score:
        """The floors as a row of their own."""
        measures = [Measure(name=name, value=floor, floor=floor, **self._counted()) for name, floor in self._floors.items()]
        return Score(role="reference", sampler=REAL, measures=tuple(measures))

    def measure(self, seen: Seen, prompts: Sequence[str] | None) -> tuple[Measure, ...]:
        """What the floors are of, for pictures drawn from the prompts at their places; no alignment where the encoder cannot know them."""
        known = [(name, value) for name, value in self._values(seen, prompts) if name in self._floors]
        return tuple(Measure(name=name, value=value, floor=self._floors[name], **self._counted()) for name, value in known)

    def see(self, images: Tensor) -> Seen:
        """The features of (B, 3, H, W) in [0, 1]; raises ValueError where H, W are not those of the real pictures."""
        images = square(images, self._resolution)
        if tuple(images.shape[-2:]) != self._size:
            (height, width), (h, w) = images.shape[-2:], self._size
            raise ValueError(
                f"pictures to measure have {width} x {height} pixels, the real ones {w} x {h}; "
                f"give a resolution (for instance {min(height, width, h, w)}), or real pictures of that size"
            )
        return Seen(self._features(images), self._classifier(images) if self._classifier else None)

    def see_all(self, pictures: Pictures, indices: Sequence[int]) -> Seen:
        """The features of the pictures at these places, read batch by batch."""
        parts = []
        with tqdm(total=len(indices), desc=pictures.name, unit="picture", leave=False, disable=not self._progress) as bar:
            for start in range(0, len(indices), self._batch_size):
                batch = indices[start : start + self._batch_size]
                parts.append(self.see(pictures.read(batch)))
                bar.update(len(batch))
        return Seen.join(parts)

    def _values(self, seen: Seen, prompts: Sequence[str] | None) -> list[tuple[str, float]]:
        values = []
        for names, function in FAMILIES.items():
            if any(name in self._measures for name in names):
                results = zip(names, function(self._reference, seen.features, self._seed))
                values += [(name, value) for name, value in results if name in self._measures or name not in MEASURES]
        if self._classifier and seen.probabilities is not None:
            values.append((f"IS ({self._classifier.name})", inception_score(seen.probabilities)))
        if prompts is not None and self.captions is not None:  # without captions there is no floor
            values += self._alignment(seen.features, prompts)
        return values

    def _alignment(self, found: np.ndarray, prompts: Sequence[str]) -> list[tuple[str, float]]:
        if isinstance(self._features, TransformersFeatures) and self._features.reads_text:
            return [("alignment", alignment(found, self._features.texts(prompts)))]
        if isinstance(self._features, GlyphFeatures) and are_captions(prompts):
            key = tuple(prompts)
            if key not in self._candidates:
                self._candidates[key] = candidates(prompts, self._features, seed=self._seed)
            return [("R-precision@1", r_precision(found, *self._candidates[key]))]
        return []

    def _counted(self) -> dict[str, int]:
        return {"count": len(self._reference), "seed": self._seed}

    def _notes(self, real: Pictures) -> list[str]:
        notes = []
        if isinstance(self._features, GlyphFeatures) and self._size != (32, 32):
            notes.append(
                "The glyph encoder sees 32 x 32 pixels and knows emoji only: for other pictures give the features of another model."
            )
        if isinstance(self._features, TransformersFeatures) and self._features.reads_text and real.captions is None:
            notes.append("No text-image alignment: the real pictures have no captions, so it would have no floor.")
        return notes


def as_bytes(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _real_pictures(real: str | Path | Tensor | Pictures | None, count: int, resolution: int | None, seed: int) -> Pictures:
    return random_pictures(count, seed=seed) if real is None else _pictures(real, resolution)


def _pictures(pictures: str | Path | Tensor | Pictures, resolution: int | None) -> Pictures:
    if isinstance(pictures, str | Path):
        return PictureFolder(pictures, resolution)
    return PictureTensor(pictures) if isinstance(pictures, Tensor) else pictures
