"""The one seam between training and a kind of model: what it eats, how it is called, what "nothing" is, where adapters go."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..schedulers.process import Process, is_flow, make_process

Condition = Mapping[str, Tensor]  # what the network is told of each sample, by the name of its keyword; each (B, ...)
REFERENCE = "reference"  # name of the embedding of a reference picture in the condition of networks with an IP-Adapter
STOCK_KEYS: dict[str, Any] = dict(
    prediction_type="epsilon", num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None,
    rescale_betas_zero_snr=False,
)  # fmt: skip


class Family(ABC):
    """One kind of stock pipeline, seen from training.

    Args:
        pipe: whose components are used as they are; nothing in it is changed.
    """

    network: ClassVar[str] = "unet"  # the component that is trained
    lora_targets: ClassVar[Sequence[str]] = ()  # ends of the names of the layers that adapters go to
    guidable: ClassVar[bool] = True  # it can be told nothing, for classifier-free guidance

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe: Any = pipe
        self.process: Process = process_of(self.pipe.scheduler)

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, ...) what the network denoises, of pictures (B, C, H, W) in [-1, 1]."""

    @abstractmethod
    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        """What the network is told of captions or class numbers (B,), for pictures of ``size`` (height, width).

        Raises:
            ValueError: the family needs the one that is None.
        """

    @abstractmethod
    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        """What the network is told of one sample about which nothing is said; None where it is told nothing anyway.

        Names that it leaves out, such as a size, stay as the sample has them.
        """

    def size_condition(self, size: tuple[int, int], original: tuple[int, int] | None = None, crop: tuple[int, int] = (0, 0)) -> Condition:
        """What the network is told of one sample's ``size``, its ``original`` one before scaling (None: the same) and the (top, left) of
        its crop; most are told nothing. ``encode_condition`` includes it for pictures that were neither scaled nor cropped.
        """
        return {}

    @property
    def dropouts(self) -> Mapping[str, tuple[float, Callable[[str], bool]]]:
        """Parts of the condition that training also drops alone, by a word for each: (share of samples, which names are of the part)."""
        return {}

    @abstractmethod
    def forward(self, network: Any, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        """(B, ...) the network's output, of the shape of ``x`` and the type that ``process.prediction_type`` names.

        Args:
            t: (B,) in train times.
            guidance: (B,) guidance scales that it is told; only where ``takes_guidance``. None is 1, off, to a network that is told one.
        """

    @property
    def takes_guidance(self) -> bool:
        """``forward`` understands ``guidance`` of networks that ``with_guidance_embedding`` gave."""
        return False

    def with_guidance_embedding(self, network: Any) -> Any:
        """The network, able to be told a guidance scale, which changes nothing before training.

        One that is able already comes back as it is; a new one shares all other weights and is frozen.

        Raises:
            ValueError: Diffusers has no such networks of this kind.
        """
        raise ValueError(f"{type(network).__name__} cannot be told a guidance scale; distil one fixed scale instead")

    def sample_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Of one clean sample as the network sees it, for a picture of ``size``."""
        raise NotImplementedError

    def from_pipeline(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Samples as the network sees them, of what the stock pipeline's loop ends with for pictures of ``size``: mostly the same."""
        return latents

    def call_kwargs(self, calls: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        """What a pipeline is called with for that many network calls; guidance scale 1 is off."""
        return {"num_inference_steps": calls, "guidance_scale": guidance_scale}

    @property
    def loads_lora(self) -> bool:
        """The stock pipeline has ``load_lora_weights``."""
        return isinstance(self.pipe, LoraBaseMixin)

    @property
    def denoiser(self) -> Any:
        """The network that denoises, a component of the pipeline."""
        return getattr(self.pipe, self.network)

    @property
    def base(self) -> Any:
        """What is trained, as it stands before: the denoiser, unless an adapter of it is."""
        return self.denoiser

    @property
    def frozen(self) -> Sequence[Any]:
        """Networks that ``forward`` calls besides the trained one."""
        return ()

    def scheduler_config(self, **changes: Any) -> dict[str, Any]:
        """The keys of the model's scheduler that say how it was noised, for a scheduler of another class."""
        kept = {key: value for key, value in dict(self.pipe.scheduler.config).items() if key in STOCK_KEYS}
        return kept | changes

    def pipeline(self, network: Any, scheduler: SchedulerMixin) -> Any:
        """A stock pipeline with that network and scheduler; everything else is shared with ``pipe``."""
        return remade(self.pipe, **{self.network: network, "scheduler": scheduler})


def process_of(scheduler: Any) -> Process:
    """How the model that a scheduler samples was noised, in the units that its network sees: VP, or flow."""
    config = dict(scheduler.config)
    known = STOCK_KEYS | {"prediction_type": "flow_prediction"} if is_flow(config) else STOCK_KEYS
    # Zero terminal SNR is exactly zero, as for DDIM; no log of it is taken here.
    return make_process(known | {k: v for k, v in config.items() if k in known}, "vp", zero_snr=0.0)


def remade(pipe: Any, kind: Any = None, **components: Any) -> Any:
    """A pipeline of the same class or of class ``kind`` with other components, whose types stay as they are (``from_pipe`` casts them)."""
    kind = kind or type(pipe)
    takes = inspect.signature(kind.__init__).parameters
    made = kind(**{name: value for name, value in {**pipe.config, **pipe.components, **components}.items() if name in takes})
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def config_of(network: Any) -> Any:
    """The config of a network, bare or wrapped for a process group."""
    return getattr(network, "module", network).config


def need(value: Any, what: str, family: Family) -> Any:
    """``value``, or an error that names what this model is trained on."""
    if value is None:
        raise ValueError(f"{type(family.pipe).__name__} is told {what} of every picture, and the data has none")
    return value


def batched(condition: Condition, num: int) -> dict[str, Tensor]:
    """The condition of one sample, for ``num`` samples."""
    return {name: value.expand(num, *value.shape[1:]) for name, value in condition.items()}


def joined(one: Condition, two: Condition) -> dict[str, Tensor]:
    """Two conditions as one batch."""
    return {name: torch.cat([one[name], two[name]]) for name in one}
