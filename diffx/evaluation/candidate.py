"""Ways to sample one pipeline that stand side by side: samplers, calibrated tables, and students with weights of their own."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from torch import nn

from ..loading import CALL_KWARGS
from ..schedulers import Calibrated
from .samplers import folder_of, make_sampler, split_count

NETWORKS = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True)
class Candidate:
    """One way to sample a pipeline.

    ``call_kwargs`` are the number of steps and the guidance scale that it was made for, empty where any will do; ``weights`` is the
    folder of a student's, None where the pipeline's own are used.
    """

    scheduler: SchedulerMixin
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None

    @property
    def num_inference_steps(self) -> int | None:
        """The steps that it was made for; None where any number will do."""
        return self.call_kwargs.get("num_inference_steps")

    @contextmanager
    def in_place(self, pipe: Any) -> Iterator[None]:
        """``pipe`` with this scheduler and these weights; as it was when the block ends."""
        own, pipe.scheduler = pipe.scheduler, copy.deepcopy(self.scheduler)
        try:
            with _worn(pipe, self.weights):
                yield
        finally:
            pipe.scheduler = own


def make_candidate(word: str, pipe: Any) -> Candidate:
    """What ``word`` names, for this pipeline: a sampler as ``make_sampler`` takes it, or the folder of a student.

    A student is what ``diffx.distill`` saved, adapters or a whole pipeline: it brings its own weights, number of steps and guidance
    scale. "emoji_progressive_4" is the embedded model's.

    Raises:
        ValueError: as ``make_sampler``; a student of another kind of model, or the pipeline has adapters of its own.
    """
    scheduler, folder = make_sampler(word, pipe.scheduler.config), folder_of(word)
    if isinstance(scheduler, Calibrated):
        return Candidate(scheduler, {"num_inference_steps": scheduler.calibration.num_inference_steps})
    if not (folder / CALL_KWARGS).is_file():
        return Candidate(scheduler)
    if _whole(folder):
        made = json.loads((folder / "model_index.json").read_text())["_class_name"]
        if made != type(pipe).__name__:
            raise ValueError(f"{word!r} is a student in a {made}, the model is a {type(pipe).__name__}; give the student as --model")
    elif not isinstance(pipe, LoraBaseMixin):
        raise ValueError(f"{word!r} is a student made of adapters, which a {type(pipe).__name__} does not load")
    elif pipe.get_list_adapters():
        raise ValueError(f"{word!r} is a student made of adapters, and the pipeline has adapters of its own; give one without")
    return Candidate(scheduler, json.loads((folder / CALL_KWARGS).read_text()), folder)


def make_runs(words: Sequence[str], pipe: Any, common: Sequence[int]) -> tuple[dict[str, Candidate], list[tuple[str, int]]]:
    """(candidate of each word, (word, steps) of each run): at the common numbers of steps, at the one behind the word's "@", or at the
    one that the candidate was made for.

    Raises:
        ValueError: as ``make_candidate``; steps other than a candidate was made for, or the same run twice.
    """
    candidates: dict[str, Candidate] = {}
    runs: list[tuple[str, int]] = []
    for word, asked in map(split_count, words):
        candidates[word] = make_candidate(word, pipe)
        made = candidates[word].num_inference_steps
        if made and asked not in (None, made):
            raise ValueError(f"{word!r} was made for {made} steps alone, asked were {asked}; leave out '@{asked}', or make another one")
        for n in (common if asked is None else (asked,)) if made is None else (made,):
            if (word, n) in runs:
                raise ValueError(f"sampler {word!r} is listed twice at {n} steps")
            runs.append((word, n))
    return candidates, runs


def networks_of(pipe: Any) -> list[str]:
    """The names of the components that are called at every step."""
    return [name for name in NETWORKS if isinstance(pipe.components.get(name), nn.Module)]


@contextmanager
def _errors_only() -> Iterator[None]:
    """Diffusers without its warning that an adapter of the network has none of the text encoder."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _whole(folder: Path) -> bool:
    """It holds a whole pipeline, not an adapter."""
    return (folder / "model_index.json").is_file()


@contextmanager
def _worn(pipe: Any, weights: Path | None) -> Iterator[None]:
    """``pipe`` with a student's weights in its networks."""
    if weights is None:
        yield
    elif _whole(weights):
        own = {name: getattr(pipe, name) for name in networks_of(pipe)}
        try:
            for name, network in own.items():
                setattr(pipe, name, type(network).from_pretrained(weights, subfolder=name, torch_dtype=network.dtype).to(network.device))
            yield
        finally:
            for name, network in own.items():
                setattr(pipe, name, network)
    else:
        with _errors_only():
            pipe.load_lora_weights(weights)
        try:
            yield
        finally:
            pipe.unload_lora_weights()
