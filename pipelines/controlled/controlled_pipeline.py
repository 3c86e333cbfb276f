"""Stable Diffusion under ControlNets and IP-Adapters, each in its region and its part of the run; soft inpainting and outpainting."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

EVERYWHERE = None  # a mask that is not there
IP_ADAPTERS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)


class RegionalControlNets(MultiControlNetModel):
    """Several ControlNets, each of which acts in its own region.

    Args:
        masks: (1, 1, H, W) in [0, 1], one per network, or None for everywhere.
    """

    def __init__(self, controlnets: Sequence[ControlNetModel], masks: Sequence[Tensor | None]) -> None:
        super().__init__(list(controlnets))
        self.masks = masks

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, conditioning_scale, **options) -> tuple:
        """What the networks add to the U-Net's blocks, in sum; each weighted by the mean of its mask over each place."""
        total = None
        for net, image, scale, mask in zip(self.nets, controlnet_cond, conditioning_scale, self.masks, strict=True):
            down, middle = net(sample, timestep, encoder_hidden_states, image, scale, **options)
            added = [x if mask is EVERYWHERE else x * interpolate(mask.to(x), x.shape[-2:], mode="area") for x in (*down, middle)]
            total = added if total is None else [a + b for a, b in zip(total, added, strict=True)]
        return total[:-1], total[-1]


@dataclass
class Course:
    """What changes in the course of one run: the scales of IP-Adapters, and where an inpainted picture is free."""

    num_steps: int
    processors: list[tuple[Any, list[Any]]]  # attention of IP-Adapters, and its scales where they act
    spans: list[tuple[float, float]]  # of each IP-Adapter, (start, end)
    change: Tensor | None = None  # in [0, 1], as large as the latents
    free: Tensor | None = None  # the mask that the stock pipeline reads; 1 is free

    def begin(self, step: int) -> None:
        """Before step ``step``."""
        done = [step / self.num_steps, (step + 1) / self.num_steps]
        acts = [1.0 - float(done[0] < start or done[1] > end) for start, end in self.spans]  # as stock ControlNets count
        for processor, scales in self.processors:
            processor.scale = [scaled(scale, act) for scale, act in zip(scales, acts, strict=True)]
        if self.change is not None and self.free is not None:
            last = step + 1 >= self.num_steps
            self.free.copy_(self.change > 0 if last else self.change >= 1 - done[1])  # Levin and Fried 2023 (arXiv:2306.00950)


def scaled(scale: Any, factor: float) -> Any:
    """A scale of an IP-Adapter, or a list of one per picture, times ``factor``."""
    return [each * factor for each in scale] if isinstance(scale, list) else scale * factor


def per_condition(name: str, value: Any, count: int) -> list[Any]:
    """``value`` for each of ``count`` conditions: a list is taken as it is, anything else for all of them."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} holds {len(value)} entries for {count} conditions; give one for each, or a single one for all")
    return list(value)


def _open_by_and_by(pipe: Any, course: Course) -> None:
    """Let ``course`` say at each step where the inpainting ``pipe`` is free, which reads one mask, of two values, all the time."""
    prepare = pipe.prepare_mask_latents
    pipe.mask_processor = VaeImageProcessor(pipe.vae_scale_factor, do_normalize=False, do_convert_grayscale=True)  # keeps greys

    def prepare_mask_latents(*args: Any, **kwargs: Any) -> tuple:
        course.free, masked_image = prepare(*args, **kwargs)
        course.change = course.free.clone()
        course.begin(0)
        return course.free, masked_image

    pipe.prepare_mask_latents = prepare_mask_latents


def extend(
    image: Image.Image, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, feather: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A larger picture whose new parts continue the edges, and the map of what is to be made: white there.

    Args:
        left, right, top, bottom: pixels that are added there.
        feather: pixels of the old picture, along the new parts, over which the map fades to black.

    Raises:
        ValueError: a negative number, or nothing to add.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom, "feather": feather}
    if negative := {name: pixels for name, pixels in sides.items() if pixels < 0}:
        raise ValueError(f"{negative} must not be negative")
    if not left + right + top + bottom:
        raise ValueError("nothing to add: give left, right, top or bottom, in pixels")
    old = np.asarray(image.convert("RGB"))
    canvas = np.pad(old, ((top, bottom), (left, right), (0, 0)), mode="edge")
    near = []  # along each axis: how far inside the old part, counted from 1; new parts have 0 and less
    for size, before, after in ((old.shape[0], top, bottom), (old.shape[1], left, right)):
        place = np.arange(before + size + after)
        near.append(np.minimum(place - before + 1 if before else np.inf, before + size - place if after else np.inf) + 0 * place)
    change = np.clip(1 - np.minimum(near[0][:, None], near[1]) / (feather + 1), 0, 1)
    return Image.fromarray(canvas), Image.fromarray((change * 255).round().astype(np.uint8))


class ControlledPipeline(StableDiffusionPipeline):
    """A Stable Diffusion pipeline that takes ControlNets, IP-Adapters with masks and pictures to change, all in one call."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        *,
        controlnet: ControlNetModel | Sequence[ControlNetModel] = (),
        control_image: Any = None,
        control_mask: Any = EVERYWHERE,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        ip_adapter_image: Any = None,
        ip_adapter_mask: Any = EVERYWHERE,
        ip_adapter_scale: float | list[float] | None = None,
        ip_adapter_start: float | list[float] = 0.0,
        ip_adapter_end: float | list[float] = 1.0,
        num_inference_steps: int = 50,
        strength: float = 1.0,
        callback_on_step_end: Callable | None = None,
        **options: Any,
    ) -> Any:
        """Pictures for a prompt under all conditions; with ``image`` and ``mask_image``, changes to that picture.

        The loop is that of the pipelines of Diffusers for ControlNets and inpainting: without masks, or with white ones,
        the outcome is theirs bit for bit.

        Args:
            mask_image: where ``image`` is changed: white is free all the time, grey is held at first and free for that
                fraction of the run, black is kept. A network made for inpainting (9 channels) takes black and white only.
            controlnet: networks, on the device of the pipeline.
            control_image: a picture for each.
            control_mask: where each acts: a picture, white where it does, grey in part; None is everywhere.
            controlnet_conditioning_scale, control_guidance_start, control_guidance_end: as in Diffusers.
            ip_adapter_image: a picture (or list of pictures) for each IP-Adapter that ``load_ip_adapter`` has loaded.
            ip_adapter_mask: where each acts, as above; a list for an adapter with a list of pictures.
            ip_adapter_scale: of each; None leaves what ``set_ip_adapter_scale`` has set.
            ip_adapter_start, ip_adapter_end: the part of the run in which each acts, as for ControlNets.
            strength: how much of the noise ``image`` gets.
            options: whatever else the pipelines of Diffusers take: guidance_scale, generator, height, output_type, ...

        Raises:
            ValueError: as many entries as there are conditions are wanted, or one for all; a picture without a mask;
            a picture for an IP-Adapter that is not loaded.
        """
        if (image is None) != (mask_image is None):
            raise ValueError("image and mask_image go together: the mask says what to change in the picture")
        nets = list(controlnet) if isinstance(controlnet, list | tuple) else [controlnet]
        options["num_inference_steps"] = num_inference_steps
        if image is None:
            stock: type = StableDiffusionControlNetPipeline if nets else StableDiffusionPipeline
            strength = 1.0
        else:
            stock = StableDiffusionControlNetInpaintPipeline if nets else StableDiffusionInpaintPipeline
            options |= {"image": image, "mask_image": mask_image, "strength": strength}
        components: dict[str, Any] = dict(self.components)
        if nets:
            masks = [self._mask(mask) for mask in per_condition("control_mask", control_mask, len(nets))]
            components["controlnet"] = RegionalControlNets(nets, masks)
            told = {
                "control_image": control_image,
                "controlnet_conditioning_scale": controlnet_conditioning_scale,
                "control_guidance_start": control_guidance_start,
                "control_guidance_end": control_guidance_end,
            }
            options |= {name: per_condition(name, value, len(nets)) for name, value in told.items()}
            if image is None:  # where the pipeline of Diffusers has another name for it
                options["image"] = options.pop("control_image")
        processors = [p for p in self.unet.attn_processors.values() if isinstance(p, IP_ADAPTERS)]
        before = [list(processor.scale) for processor in processors]
        count = len(before[0]) if before else 0
        if ip_adapter_image is not None and not count:
            raise ValueError("ip_adapter_image is given and no IP-Adapter is loaded: call pipe.load_ip_adapter first")
        starts, ends = per_condition("ip_adapter_start", ip_adapter_start, count), per_condition("ip_adapter_end", ip_adapter_end, count)
        if ip_adapter_image is not None:
            options["ip_adapter_image"] = ip_adapter_image
        if ip_adapter_mask is not EVERYWHERE:
            masks = self._regions(per_condition("ip_adapter_mask", ip_adapter_mask, count), options)
            options["cross_attention_kwargs"] = (options.get("cross_attention_kwargs") or {}) | {"ip_adapter_masks": masks}
        pipe: Any = stock(**components, requires_safety_checker=self.config.requires_safety_checker)  # on the same networks
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        try:
            if ip_adapter_scale is not None:
                self.set_ip_adapter_scale(per_condition("ip_adapter_scale", ip_adapter_scale, count))
            num_steps = max(1, int(num_inference_steps * strength)) * self.scheduler.order
            course = Course(num_steps, [(p, list(p.scale)) for p in processors], list(zip(starts, ends, strict=True)))
            if image is not None and self.unet.config.in_channels == self.vae.config.latent_channels:
                _open_by_and_by(pipe, course)
            course.begin(0)

            def after_step(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
                changed = given if callback_on_step_end is None else callback_on_step_end(pipe, step, t, given)
                course.begin(step + 1)
                return changed

            return pipe(prompt, callback_on_step_end=after_step, **options)
        finally:
            for processor, scale in zip(processors, before, strict=True):
                processor.scale = scale

    def outpaint(
        self,
        prompt: str | None,
        image: Image.Image,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        feather: int = 0,
        **options: Any,
    ) -> Any:
        """A larger picture with ``image`` in it: see ``extend`` for the sides, and the call for the options."""
        canvas, change = extend(image, left=left, right=right, top=top, bottom=bottom, feather=feather)
        return self(prompt, canvas, change, **({"height": canvas.height, "width": canvas.width} | options))

    def _mask(self, mask: Any) -> Tensor | None:
        """(1, 1, H, W) a mask with its greys."""
        return None if mask is EVERYWHERE else self._greys().preprocess(mask)

    def _regions(self, masks: list[Any], shown: dict[str, Any]) -> list[Tensor]:
        """(1, P, H, W) for each IP-Adapter: where each of the P pictures acts that it is shown."""
        images, embeds = shown.get("ip_adapter_image"), shown.get("ip_adapter_image_embeds")
        images = images if isinstance(images, list) else [images]
        given = [self._greys().preprocess(mask) if mask is not EVERYWHERE else None for mask in masks]
        size = next((mask.shape[-2:] for mask in given if mask is not None), (1, 1))
        counts = [each.shape[1] for each in embeds] if embeds else [len(each) if isinstance(each, list) else 1 for each in images]
        return [torch.ones(1, n, *size) if mask is None else mask.transpose(0, 1) for n, mask in zip(counts, given, strict=True)]

    def _greys(self) -> VaeImageProcessor:
        return VaeImageProcessor(self.vae_scale_factor, do_normalize=False, do_convert_grayscale=True)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """``model_index.json``, and beside it this file, which it names: a folder that loads with ``trust_remote_code=True``."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copy(__file__, save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The text of ``model_index.json``."""
        index = json.loads(super().to_json_string()) | {"_class_name": [Path(__file__).stem, type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"
