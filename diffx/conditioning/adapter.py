"""What an adapter is: a small network that lets a large one, which stays as it is, listen to a picture."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..families import Condition, Family, LatentFamily

DESCRIPTION = "adapter.json"  # beside an exported adapter: what it was trained with
SHUFFLED = 4  # other pictures that each sample is compared with


@dataclass(frozen=True)
class Adapter(ABC):
    """An adapter to train: frozen numbers; ``diffx.train(model, adapter, data)`` trains it."""

    @abstractmethod
    def wrap(self, family: Family) -> AdaptedFamily:
        """The family with the adapter in the network's place, which changes nothing before training unless it says so.

        Raises:
            ValueError: the model cannot have this adapter.
        """

    def describe(self) -> dict[str, Any]:
        """All that the trained weights depend on, in plain values."""
        return {"name": type(self).__name__, **asdict(self)}


class AdaptedFamily(LatentFamily):
    """A family whose adapter is trained: data, prompts and process are the model's own, and what is trained is the adapter.

    Args:
        inner: the model's family; its network is frozen.
        adapter: that made this.
        base: the adapter's network before training.
    """

    column_is_cut: bool  # what the adapter is shown from a column has the picture's size, and is resized, cut and mirrored with it

    column_resampling: int = Image.Resampling.LANCZOS  # of what is resized so

    most_at_once: int | None = None  # samples of one call of the pipeline that can each be shown something; None is any number

    def __init__(self, inner: Family, adapter: Adapter, base: Any, column: str | None) -> None:
        self.inner, self.adapter, self._base, self.column = inner, adapter, base, column
        self.pipe, self.process = inner.pipe, inner.process
        self.network, self.guidable = inner.network, inner.guidable  # type: ignore[misc]  # of the class elsewhere
        inner.denoiser.requires_grad_(False).eval()

    # What the adapter is shown

    @abstractmethod
    def shown(self, picture: Image.Image, other: Image.Image | None) -> Image.Image:
        """What the adapter is shown of a training picture; ``other`` is the one in its column, where there is a column."""

    @abstractmethod
    def encode_shown(self, shown: Sequence[Image.Image]) -> Condition:
        """The same as the network takes it."""

    @abstractmethod
    def describe_shown(self) -> dict[str, Any]:
        """All that ``shown`` and ``encode_shown`` depend on besides the pictures, in plain values: the name of a cache."""

    @abstractmethod
    def inputs(self, shown: Sequence[Image.Image], call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the stock pipeline that let each sample be shown one of them, beside ``call_kwargs``."""

    @abstractmethod
    def likeness(self, shown: Sequence[Image.Image], made: Sequence[Image.Image]) -> np.ndarray:
        """(N, K) how much each of N samples follows what it was shown (column 0) and K - 1 others, shown to the samples after it."""

    # The result

    @abstractmethod
    def save(self, network: Any, folder: Path) -> dict[str, Any]:
        """Write the trained adapter as stock Diffusers reads it; returns how it is loaded, in plain values.

        Raises:
            ValueError: stock Diffusers would load it as something else.
        """

    def save_described(self, network: Any, folder: Path) -> None:
        """The same, with ``adapter.json`` beside: what was trained on which kind of model, and how it is loaded."""
        loaded = self.save(network, folder)
        model = {"pipeline": type(self.pipe).__name__, "prediction_type": self.process.prediction_type}
        told = {"adapter": self.adapter.describe(), "model": model, "load": loaded}
        (folder / DESCRIPTION).write_text(json.dumps(told, indent=1) + "\n")

    # The model's own

    @property
    def base(self) -> Any:
        return self._base

    @property
    def frozen(self) -> Sequence[Any]:
        return (self.inner.denoiser,)

    @property
    def patch(self) -> int:  # type: ignore[override]  # it depends on the network
        return getattr(self.inner, "patch", 1)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.inner.encode_images(images)

    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        return self.inner.encode_condition(texts, labels, size=size)

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return self.inner.null_condition(size=size)

    def size_condition(self, size: tuple[int, int], original: tuple[int, int] | None = None, crop: tuple[int, int] = (0, 0)) -> Condition:
        return self.inner.size_condition(size, original, crop)

    def sample_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return self.inner.sample_shape(size)

    def from_pipeline(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return self.inner.from_pipeline(latents, size)

    def call_kwargs(self, calls: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        return self.inner.call_kwargs(calls, guidance_scale)


def others(num: int) -> int:
    """How many others each of ``num`` samples is compared with."""
    return min(SHUFFLED, num - 1)
