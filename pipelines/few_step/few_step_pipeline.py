"""Stable Diffusion in few network calls: text to image, image to image and inpainting, with exactly the calls that are asked for."""

import inspect
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline

LCM_GUIDANCE_SCALE = 8.5  # the default of LatentConsistencyModelPipeline


def set_times(scheduler: Any, num_inference_steps: int, strength: float, device: Any = None) -> None:
    """Let a run have exactly ``num_inference_steps`` network calls, of which the first is at ``strength`` of all noise levels.

    With T training times they are at multiples of strength * T / num_inference_steps, less one. Where strength is
    num_inference_steps / N these are the last times of a run of N calls with "trailing" spacing. A scheduler that knows of
    strength itself (LCM, TCD) chooses among the times that it was trained on.

    Args:
        strength: in (0, 1]; 1 is pure noise.

    Raises:
        ValueError: a scheduler that cannot be told where to begin, or calls the network more than once per step;
            or fewer training times than calls.
    """
    name, takes = type(scheduler).__name__, inspect.signature(scheduler.set_timesteps).parameters
    if scheduler.order != 1:
        raise ValueError(f"{name} calls the network {scheduler.order} times per step; take one that calls it once, such as DDIMScheduler")
    if "strength" in takes:
        scheduler.set_timesteps(num_inference_steps, device, strength=strength)
        return
    num_train_timesteps = scheduler.config.num_train_timesteps
    if strength * num_train_timesteps < num_inference_steps:
        raise ValueError(
            f"strength={strength} leaves fewer than num_inference_steps={num_inference_steps} of {num_train_timesteps} training times"
        )
    gap = round(
        strength * num_train_timesteps / num_inference_steps, 9
    )  # so that .5 is .5, and rounds as NumPy rounds it in the schedulers
    times = [round(gap * left) - 1 for left in range(num_inference_steps, 0, -1)]
    if "timesteps" in takes:
        scheduler.set_timesteps(timesteps=times, device=device)
    elif isinstance(scheduler, DDIMScheduler):
        scheduler.set_timesteps(num_inference_steps, device)
        scheduler.timesteps = torch.tensor(times, device=device)
        # Its step leads to t - num_train_timesteps // num_inference_steps.
        scheduler.num_inference_steps = Fraction(num_train_timesteps, int(gap))
    else:
        raise ValueError(f"{name} cannot be told where to begin; take LCMScheduler, DDIMScheduler or EulerDiscreteScheduler")


class FewStepPipeline(StableDiffusionPipeline):
    """A Stable Diffusion pipeline for distilled models, whose call does what it is given the pictures for."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        *,
        num_inference_steps: int = 4,
        strength: float | None = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Any:
        """Pictures for a prompt; changed ones of ``image``; or those, changed only where ``mask_image`` is white.

        What Diffusers does with the same noise levels comes out bit for bit: this calls ``StableDiffusionPipeline``,
        ``StableDiffusionImg2ImgPipeline`` or ``StableDiffusionInpaintPipeline``, and sets the times.

        Args:
            num_inference_steps: network calls that are made, whatever the strength is.
            strength: in (0, 1], how much of the noise ``image`` gets; 0.8 without a mask, 1.0 with one.
            guidance_scale: 1.0, no guidance, one row per call. A network that is told the scale
                (``time_cond_proj_dim``) is told it instead, 8.5 if none is given.
            options: whatever else the pipeline of Diffusers takes: negative_prompt, generator, height, output_type, ...

        Raises:
            ValueError: a mask or a strength without a picture, numbers out of range, or a scheduler that does not fit.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
        if guidance_scale is None:
            guidance_scale = 1.0 if self.unet.config.time_cond_proj_dim is None else LCM_GUIDANCE_SCALE
        options |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        if image is None:
            for name, value in (("mask_image", mask_image), ("strength", strength)):
                if value is not None:
                    raise ValueError(f"{name} says what to change in a picture, and none is given: pass image= too")
            return super().__call__(prompt, **options)
        if strength is None:
            strength = 0.8 if mask_image is None else 1.0
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must be above 0 and at most 1")
        if mask_image is None:
            stock = StableDiffusionImg2ImgPipeline
        else:
            stock, options = StableDiffusionInpaintPipeline, options | {"mask_image": mask_image}
        pipe: Any = stock(**self.components, requires_safety_checker=self.config.requires_safety_checker)  # the same networks
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))

        def get_timesteps(num_inference_steps: int, strength: float, device: Any) -> tuple[torch.Tensor, int]:
            # Diffusers cuts int(num_inference_steps * strength) calls from a full run: 4 calls at 0.7 are 2, at 0.2 none.
            set_times(self.scheduler, num_inference_steps, strength, device)
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(0)
            return self.scheduler.timesteps, num_inference_steps

        pipe.get_timesteps = get_timesteps
        return pipe(prompt, image=image, strength=strength, **options)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """``model_index.json``, and beside it this file, which it names: a folder that loads with ``trust_remote_code=True``."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copy(__file__, save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The text of ``model_index.json``."""
        index = json.loads(super().to_json_string()) | {"_class_name": [Path(__file__).stem, type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"
