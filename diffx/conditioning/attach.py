"""ControlNets and IP-Adapters in ordinary pipelines, each with a weight per call and a region, attached and detached again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from ..guidance.hook import is_guided
from ..guidance.rule import Ramp
from ..guidance.run import Run, Walk

Picture = Image.Image | np.ndarray | Tensor
Weight = float | Ramp | Sequence[float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Condition:
    """When and where a condition acts.

    Args:
        weight: one for all calls, a ``Ramp``, or one for each call of a run; 0 is nothing at all, bit for bit.
        start, end: the share of the run in which it acts, as the pipelines' ``control_guidance_start`` and ``control_guidance_end``.
        mask: (H, W) of the picture that is made, in [0, 1]: how much it acts where; None is 1 everywhere, bit for bit.
    """

    weight: Weight = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Picture | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start={self.start}, end={self.end}: the share of a run has 0 <= start < end <= 1")

    def weight_at(self, run: Run, call: int) -> float:
        """The weight of that call; 0 outside the window.

        Raises:
            ValueError: there is one weight for each call, and the run has another number of calls.
        """
        if call / run.num_calls < self.start or (call + 1) / run.num_calls > self.end:
            return 0.0
        if isinstance(self.weight, Ramp):
            return self.weight.at(run.progress(call))
        if isinstance(self.weight, Sequence):
            if len(self.weight) != run.num_calls:
                raise ValueError(f"weight has {len(self.weight)} numbers and this run {run.num_calls} calls; give one for each, or a Ramp")
            return float(self.weight[call])
        return float(self.weight)


@dataclass(frozen=True, eq=False)
class Control(Condition):
    """A ControlNet and its control picture(s): of exactly the size that is made, one for all or one each; arrays and tensors in [0, 1].

    That of SD 3 reads them through the VAE, once a run, with noise of torch's global generator, as the stock pipeline does.
    """

    net: ControlNetModel | SD3ControlNetModel
    image: Picture | list[Picture] | tuple[Picture, ...]


@dataclass(frozen=True, eq=False)
class Reference(Condition):
    """An IP-Adapter that ``load_ip_adapter`` put into the pipeline, which is called with its pictures as always.

    Args:
        index: of the adapter, in the order of loading.

    The weight multiplies the scale of ``set_ip_adapter_scale``.
    """

    index: int = 0


def attach(pipe: Any, *conditions: Condition) -> Attached:
    """The conditions on any Stable Diffusion 1 to 3.5 or SDXL pipeline, inside ``with``; afterwards it is what it was.

    Several add up, in the order given and to what the pipeline has of its own. With ``diffx.guide``, attach outside and guide inside.

    Example:
        >>> with attach(pipe, Control(canny, edges, mask=left), Control(depth, distances, weight=Ramp(1.0, 0.0))):
        ...     image = pipe("red apple on blue").images[0]

    Raises:
        ValueError: another kind of network, a ControlNet of another width, no such IP-Adapter, a mask or picture out of range; sizes
            are refused at the first network call.
    """
    return Attached(pipe, conditions)


class Attached:
    """What ``attach`` gives; ``attach`` and ``detach`` do what ``with`` does."""

    def __init__(self, pipe: Any, conditions: Sequence[Condition]) -> None:
        self.pipe, self.network = pipe, pipe.components.get("unet") or pipe.components.get("transformer")
        if type(self.network) not in _READY:
            raise ValueError(
                f"{type(pipe).__name__} has a {type(self.network).__name__}; attach() knows Stable Diffusion 1 to 3.5 and SDXL"
            )
        ready = _READY[type(self.network)]
        self._controls = [ready(each, pipe, self.network) for each in conditions if isinstance(each, Control)]
        self._references = [each for each in conditions if isinstance(each, Reference)]
        if unknown := [each for each in conditions if not isinstance(each, Control | Reference)]:
            raise ValueError(f"{unknown[0]!r} is no condition; give Control(...) or Reference(...)")
        self._masks = {each.index: pixels(each.mask, "mask", 1) for each in self._references if each.mask is not None}
        _check_references(self._references, self.network)
        self._signature = inspect.signature(type(self.network).forward)
        self._walk = Walk(pipe)
        self._handle: Any = None
        self._scales: dict[Any, list[Any]] = {}  # of each attention, as they were

    def attach(self) -> Self:
        """Let the conditions act from now on.

        Raises:
            ValueError: ``diffx.guide`` is attached already.
        """
        if is_guided(self.network):
            raise ValueError("diffx.guide is attached to this network already; attach conditions outside of it, and guide inside")
        self._walk = Walk(self.pipe)
        self._scales = {each: each.scale for each in _image_attentions(self.network)} if self._references else {}
        self._handle = self.network.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def detach(self) -> None:
        """Leave the pipeline as it was."""
        if self._handle is not None:
            self._handle.remove()
        for attention, scale in self._scales.items():
            attention.scale = scale
        self._handle, self._scales = None, {}

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def _before(self, network: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        told = self._signature.bind(network, *args, **kwargs).arguments
        told.pop("self")
        run, call = self._walk.next(told["timestep"])
        sample = next(iter(told.values()))
        size = tuple(side * self.pipe.vae_scale_factor for side in sample.shape[-2:])
        if "skip_layers" in told:
            raise ValueError("skip_guidance_layers calls the network once more in a step, which attach() does not know; switch it off")
        for control in self._controls:
            control.check(size)
            if weight := control.condition.weight_at(run, call):
                for name, more in control.residuals(sample, told, weight, run).items():
                    told[name] = _added(told.get(name), more)
        if self._references:
            weights = {each.index: each.weight_at(run, call) for each in self._references}
            for attention, scale in self._scales.items():
                attention.scale = [_scaled(each, weights.get(i, 1.0)) for i, each in enumerate(scale)]
        if self._masks:
            told["cross_attention_kwargs"] = (told.get("cross_attention_kwargs") or {}) | {
                "ip_adapter_masks": self._image_masks(told, size)
            }
        return (), told

    def _image_masks(self, told: dict[str, Any], size: tuple[int, ...]) -> list[Tensor | None]:
        """As Diffusers' attentions take them: (1, pictures, H, W) of each IP-Adapter, None where it acts everywhere."""
        pictures = told["added_cond_kwargs"]["image_embeds"]
        for mask in self._masks.values():
            _same_size("mask", mask, size)
        masks = [self._masks.get(i) for i in range(len(pictures))]
        return [
            None if mask is None or bool((mask == 1).all()) else mask.expand(-1, each.shape[1], -1, -1).to(each)
            for mask, each in zip(masks, pictures)
        ]


class _ReadyControl:
    """A ``Control`` whose pictures are tensors, checked against the network that it goes to."""

    kind: ClassVar[type]  # of the ControlNet
    same: ClassVar[tuple[str, ...]]  # of its config and the network's

    def __init__(self, control: Control, pipe: Any, network: Any) -> None:
        net: Any = control.net
        if not isinstance(net, self.kind):
            kinds = f"net={type(net).__name__} is no {self.kind.__name__}"
            raise ValueError(f"{kinds}; load one with its from_pretrained, and give several as a Control each")
        self.condition, self.net, self.pipe, self.network = control, net, pipe, network
        for name in self.same:
            if (has := net.config[name]) != (needs := network.config[name]):
                raise ValueError(f"this ControlNet has {name}={has} and the pipeline's network {needs}: it was trained for another model")
        given = control.image if isinstance(control.image, list | tuple) else [control.image]
        pictures = [pixels(each, "image", net.config.get("conditioning_channels", 3)) for each in given]
        if len({each.shape[-2:] for each in pictures}) != 1:
            raise ValueError("the control pictures have several sizes, or there is none; give at least one, all as large as what is made")
        self.image = torch.cat(pictures)
        self.mask = None if control.mask is None else pixels(control.mask, "mask", 1)

    def check(self, size: tuple[int, ...]) -> None:
        """Refuse pictures and masks of another size than (height, width)."""
        _same_size("control picture", self.image, size)
        if self.mask is not None:
            _same_size("mask", self.mask, size)

    def residuals(self, sample: Tensor, told: dict[str, Any], weight: float, run: Run) -> dict[str, Any]:
        """What the ControlNet adds, times the weight and the mask, as the network's arguments."""
        raise NotImplementedError

    def pictures(self, sample: Tensor) -> Tensor:
        """The control picture of each sample."""
        times, rest = divmod(len(sample), len(self.image))
        if rest or (times > 2 and len(self.image) > 1):
            raise ValueError(f"{len(self.image)} control pictures for a batch of {len(sample)}; give one, or one for each sample")
        return self.image.repeat(times, 1, 1, 1).to(sample)

    def masked(self, residual: Tensor, size: Sequence[int]) -> Tensor:
        """A residual (B, ..., height, width) or (B, height * width, ...) of that ``size``, times the mask."""
        if self.mask is None:
            return residual
        mask = torch.nn.functional.interpolate(self.mask, tuple(size), mode="area").to(residual)
        return residual * (mask if residual.ndim == 4 else mask.flatten(2).mT)


class _UNetControl(_ReadyControl):
    kind = ControlNetModel
    same = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")

    def residuals(self, sample: Tensor, told: dict[str, Any], weight: float, run: Run) -> dict[str, Any]:
        sized = {name: value for name, value in (told.get("added_cond_kwargs") or {}).items() if name in ("text_embeds", "time_ids")}
        down, middle = self.net(
            sample[:, : self.net.config.in_channels],
            told["timestep"],
            encoder_hidden_states=told["encoder_hidden_states"],
            controlnet_cond=self.pictures(sample),
            conditioning_scale=weight,
            added_cond_kwargs=sized or None,
            return_dict=False,
        )
        down, middle = [self.masked(each, each.shape[-2:]) for each in down], self.masked(middle, middle.shape[-2:])
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


class _SD3Control(_ReadyControl):
    kind = SD3ControlNetModel
    same = ("in_channels", "patch_size", "num_attention_heads", "attention_head_dim", "pooled_projection_dim")

    def __init__(self, control: Control, pipe: Any, network: Any) -> None:
        super().__init__(control, pipe, network)
        if channels := self.net.config.extra_conditioning_channels:
            raise ValueError(
                f"this ControlNet reads {channels} more channels than a picture has (a mask to fill in?); attach() gives it none"
            )
        self._run: Run | None = None
        self._latents = self.image  # of the pictures, in that run

    def residuals(self, sample: Tensor, told: dict[str, Any], weight: float, run: Run) -> dict[str, Any]:
        net, config = self.net, self.net.config
        if self._run is not run:
            self._run, self._latents = run, self._encoded(self.pictures(sample))
        pooled = told["pooled_projections"]
        (added,) = net(
            sample if net.pos_embed is not None else self.network.pos_embed(sample),  # as the stock pipeline lends it
            self._latents,
            conditioning_scale=weight,
            encoder_hidden_states=told["encoder_hidden_states"] if config.joint_attention_dim is not None else None,
            pooled_projections=torch.zeros_like(pooled) if config.force_zeros_for_pooled_projection else pooled,
            timestep=told["timestep"],
            return_dict=False,
        )
        size = [side // config.patch_size for side in sample.shape[-2:]]
        # One for each block: those of another ControlNet may be fewer.
        return {"block_controlnet_hidden_states": _spread([self.masked(each, size) for each in added], self.network.config.num_layers)}

    @torch.no_grad()
    def _encoded(self, pictures: Tensor) -> Tensor:
        vae = self.pipe.vae
        shift = 0 if self.net.config.force_zeros_for_pooled_projection else vae.config.shift_factor
        return (vae.encode(2 * pictures - 1).latent_dist.sample() - shift) * vae.config.scaling_factor


_READY: dict[type, type[_ReadyControl]] = {UNet2DConditionModel: _UNetControl, SD3Transformer2DModel: _SD3Control}


def _spread(residuals: list[Tensor], num: int) -> list[Tensor]:
    """As many as ``num``, each for several blocks in turn, as SD 3 spreads them itself."""
    return [residuals[int(i / (num / len(residuals)))] for i in range(num)]


def _added(one: Any, two: Any) -> Any:
    """The sum of residuals, or of lists of them; None is nothing."""
    if one is None:
        return two
    return [each + other for each, other in zip(_spread(one, len(two)), two)] if isinstance(two, list) else one + two


def pixels(picture: Picture, what: str, channels: int) -> Tensor:
    """(B, ``channels``, H, W) float32 in [0, 1] of a picture, an array (H, W[, C]) or a tensor ([[B,] C,] H, W).

    Raises:
        ValueError: another shape, or values outside of [0, 1].
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(np.ascontiguousarray(picture if picture.ndim == 2 else picture.transpose(2, 0, 1)))
    found = picture.float()
    while found.ndim < 4:
        found = found[None]
    if found.ndim != 4 or found.shape[1] != channels or not found.numel():
        raise ValueError(f"{what} has the shape {tuple(picture.shape)}; {channels} channels of height and width are needed")
    low, high = float(found.min()), float(found.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{what} has values from {low:g} to {high:g}; they must lie between 0 and 1")
    return found


def _same_size(what: str, found: Tensor, size: tuple[int, ...]) -> None:
    if tuple(found.shape[-2:]) != size:
        (height, width), (h, w) = size, found.shape[-2:]
        raise ValueError(f"the {what} has {w} x {h} pixels and what is made {width} x {height}; resize it to that")


def _check_references(references: Sequence[Reference], network: Any) -> None:
    if not references:
        return
    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(
            f"Reference acts in Stable Diffusion 1, 2 and SDXL; a {type(network).__name__} has one scale for all, and no masks"
        )
    attentions = _image_attentions(network)
    if not attentions:
        raise ValueError("the pipeline has no IP-Adapter; put one in with pipe.load_ip_adapter first")
    there, asked = len(attentions[0].scale), [each.index for each in references]
    if not set(asked) <= set(range(there)):
        raise ValueError(f"index={max(asked)}: the pipeline has {there} IP-Adapters, numbered from 0")
    if len(set(asked)) < len(asked):
        raise ValueError(f"there are several references to IP-Adapter {max(asked, key=asked.count)}; give one, with one weight and mask")


def _image_attentions(network: Any) -> list[Any]:
    kinds = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
    return [each for each in network.attn_processors.values() if isinstance(each, kinds)]


def _scaled(scale: Any, weight: float) -> Any:
    return [each * weight for each in scale] if isinstance(scale, list) else scale * weight
