"""Pictures between two prompts, noises or given pictures of a Stable Diffusion model; the noise of a given picture, and edits of it."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

FLOAT32 = 2e-7  # relative; nearer than that two float32 vectors hardly come
PARALLEL = 1e-4  # radians; below it a circle is a straight line to float32
OPPOSITE = math.pi - 1e-3  # beyond it the way round is a matter of rounding


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(..., D) the vectors a fraction ``t`` of the way from ``a`` to ``b``: angles at constant speed, lengths in between.

    ``t=0`` is ``a`` and ``t=1`` is ``b``, bit for bit. Noise stays noise: two long Gaussian vectors have one length and a
    right angle between them, and a straight line would pass through vectors too short by up to 1 / sqrt(2).

    Source: Shoemake 1985, "Animating rotation with quaternion curves".

    Raises:
        ValueError: ``t`` outside 0 .. 1, different shapes, or vectors that are zero or opposite.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t={t} must lie between 0 and 1")
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)}, b {tuple(b.shape)}; they must be equal")
    wide_a, wide_b = a.double(), b.double()
    length_a, length_b = (x.norm(dim=-1, keepdim=True) for x in (wide_a, wide_b))
    if not (length_a.all() and length_b.all()):
        raise ValueError("a zero vector has no direction")
    cosine = (wide_a * wide_b).sum(-1, keepdim=True) / (length_a * length_b)
    angle = cosine.clamp(-1, 1).acos()
    if (angle > OPPOSITE).any():
        raise ValueError("opposite vectors have no shortest way between them; choose another end")
    parallel = angle < PARALLEL
    turn = torch.where(parallel, 1.0, angle)
    length = (1 - t) * length_a + t * length_b
    weight_a = torch.where(parallel, 1 - t, ((1 - t) * turn).sin() / turn.sin()) * (length / length_a)
    weight_b = torch.where(parallel, t, (t * turn).sin() / turn.sin()) * (length / length_b)
    return (weight_a * wide_a + weight_b * wide_b).to(a.dtype)


@dataclass(frozen=True)
class Interpolation:
    """Pictures of one size, row by row: between the prompts down the rows, between the noises along the columns."""

    images: list[Image.Image]
    num_columns: int

    def grid(self, scale: int = 1) -> Image.Image:
        """All pictures on one sheet, each pixel ``scale`` pixels wide."""
        width, height = (side * scale for side in self.images[0].size)
        sheet = Image.new("RGB", (self.num_columns * width, len(self.images) // self.num_columns * height))
        for i, image in enumerate(self.images):
            large = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (i % self.num_columns * width, i // self.num_columns * height))
        return sheet

    def loop(self) -> list[Image.Image]:
        """Frames that can be played round and round: every second row backwards, so that neighbours follow, and all the way back."""
        rows = [self.images[i : i + self.num_columns] for i in range(0, len(self.images), self.num_columns)]
        there = [image for i, row in enumerate(rows) for image in (row[::-1] if i % 2 else row)]
        return there + there[-2:0:-1]

    def save_gif(self, file: str | Path, *, milliseconds: int = 100, scale: int = 1) -> None:
        """Write ``loop`` as an animated GIF, ``milliseconds`` a frame."""
        first, *others = [image.resize([side * scale for side in image.size], Image.Resampling.NEAREST) for image in self.loop()]
        first.save(file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


class LatentInterpolationPipeline(StableDiffusionPipeline):
    """A Stable Diffusion pipeline whose call draws what lies between two prompts and two noises."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        *,
        seed: Sequence[int] = (0, 1),
        latents: Sequence[Tensor] | None = None,
        num_rows: int = 5,
        num_columns: int = 5,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
    ) -> Interpolation:
        """A grid of pictures whose corners are those of ``StableDiffusionPipeline``, bit for bit.

        Prompt embeddings are interpolated token by token, noises as one long vector each. One picture is drawn at a time, so
        memory is that of one picture.

        Args:
            prompt: two texts, of the first and of the last row.
            seed: two seeds, of the first and of the last column: ``torch.Generator().manual_seed(seed)``.
            latents: two noises (1, C, h, w) with standard deviation 1 instead.
            num_rows, num_columns: 1 keeps to the first prompt, or noise.

        Raises:
            ValueError: not two prompts, two seeds or two noises, or a count below one.
        """
        if isinstance(prompt, str) or len(prompt) != 2:
            raise ValueError(f"prompt={prompt!r} must be two texts, such as ('rocket', 'ghost'); num_rows=1 keeps to the first")
        for name, count in (("num_rows", num_rows), ("num_columns", num_columns)):
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        options = {"height": height, "width": width, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        noises = self._noises(seed, height, width) if latents is None else tuple(latents)
        if len(noises) != 2:
            raise ValueError(f"latents holds {len(noises)} noises; two are needed")
        (first, uncondition), (last, _) = (self.encode_prompt(text, self._execution_device, 1, True, negative_prompt) for text in prompt)
        shape = noises[0].shape
        images = []
        for row in _fractions(num_rows):
            condition = slerp(first, last, row)
            for column in _fractions(num_columns):
                noise = slerp(noises[0].flatten(1), noises[1].flatten(1), column).reshape(shape)
                drawn = super().__call__(prompt_embeds=condition, negative_prompt_embeds=uncondition, latents=noise, **options)
                images += drawn.images
        return Interpolation(images, num_columns)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> Tensor:
        """(1, C, h, w) the latents of a picture: the mean of the autoencoder's posterior, so always the same."""
        pixels = self.image_processor.preprocess(image).to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        return latents.contiguous()  # sums of a convolution depend on the layout in their last bit

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Image.Image:
        """The picture of latents (1, C, h, w), as ``encode`` returns them."""
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return self.image_processor.postprocess(pixels, output_type="pil")[0]

    def between(self, first: Image.Image, last: Image.Image, num_columns: int = 5) -> Interpolation:
        """One row of pictures from ``first`` to ``last``, both as the autoencoder draws them; the network is not called.

        Raises:
            ValueError: pictures of different sizes, or a count below one.
        """
        if first.size != last.size:
            raise ValueError(f"the pictures have sizes {first.size} and {last.size}; they must be equal")
        if num_columns < 1:
            raise ValueError(f"num_columns={num_columns} must be at least 1")
        a, b = self.encode(first), self.encode(last)
        ways = (slerp(a.flatten(1), b.flatten(1), t).reshape(a.shape) for t in _fractions(num_columns))
        return Interpolation([self.decode(latents) for latents in ways], num_columns)

    @torch.no_grad()
    def invert(
        self,
        image: Image.Image | Tensor,
        prompt: str = "",
        *,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        num_iterations: int = 20,
    ) -> Tensor:
        """(1, C, h, w) the noise from which this pipeline draws ``image`` with these very options: DDIM backwards.

        A DDIM step is x' = a x + b out(x, t). Going back, x' is known and x is the fixed point of (x' - b out(x, t)) / a, which
        is iterated, with Anderson's acceleration. One iteration is the usual DDIM inversion: out(x', t) in place of out(x, t).

        Args:
            image: a picture, or latents as ``encode`` returns them.
            strength: in (0, 1], the part of the run that is taken back; below 1 the outcome is a noisy picture, for ``edit``.
            num_iterations: network calls per step, at most: fewer where x no longer moves.

        Source: Song et al. 2020 (arXiv:2010.02502); the iteration is that of Pan et al. 2023 (arXiv:2309.04907).

        Raises:
            ValueError: a scheduler that is not a plain DDIM, or numbers out of range.
        """
        x = self.encode(image) if isinstance(image, Image.Image) else image
        predict = self._predictor(prompt, guidance_scale, negative_prompt)
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} must be at least 1")
        for t in reversed(self._times(num_inference_steps, strength)):
            a, b = _coefficients(self.scheduler, t)
            goal = x
            x = _fixed_point(lambda x, t=t, a=a, b=b, goal=goal: (goal - b * predict(x, t)) / a, goal, num_iterations)
        return x

    @torch.no_grad()
    def edit(
        self,
        image: Image.Image,
        prompt: str,
        *,
        source_prompt: str = "",
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        source_guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        num_iterations: int = 20,
    ) -> Image.Image:
        """``image`` as ``prompt`` has it: inverted with ``source_prompt``, which says what it shows, and drawn again.

        With both prompts and scales equal it is the autoencoder's own picture of it, as exactly as the inversion is. Smaller
        ``strength`` keeps more of the picture; see ``invert`` for the other options.

        Raises:
            ValueError: see ``invert``.
        """
        options: dict[str, Any] = {"strength": strength, "num_inference_steps": num_inference_steps, "negative_prompt": negative_prompt}
        x = self.invert(image, source_prompt, guidance_scale=source_guidance_scale, num_iterations=num_iterations, **options)
        predict = self._predictor(prompt, guidance_scale, negative_prompt)
        for t in self._times(num_inference_steps, strength):
            x = self.scheduler.step(predict(x, t), t, x).prev_sample
        return self.decode(x)

    def _times(self, num_inference_steps: int, strength: float) -> Tensor:
        """The last part of a run, at least one call."""
        scheduler = self.scheduler
        if not isinstance(scheduler, DDIMScheduler) or scheduler.config.clip_sample or scheduler.config.thresholding:
            raise ValueError(
                f"{type(scheduler).__name__} cannot be inverted; set pipe.scheduler = DDIMScheduler.from_config("
                'pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False)'
            )
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength} must be above 0 and at most 1")
        scheduler.set_timesteps(num_inference_steps, self._execution_device)
        return scheduler.timesteps[-max(1, round(strength * num_inference_steps)) :]

    def _predictor(self, prompt: str, guidance_scale: float, negative_prompt: str | None) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, t) -> what the network predicts under guidance, computed as ``StableDiffusionPipeline`` does."""
        guided = guidance_scale > 1
        condition, uncondition = self.encode_prompt(prompt, self._execution_device, 1, guided, negative_prompt)
        both = torch.cat([uncondition, condition]) if guided else condition

        def predict(x: Tensor, t: Tensor) -> Tensor:
            out = self.unet(torch.cat([x, x]) if guided else x, t, encoder_hidden_states=both, return_dict=False)[0]
            if not guided:
                return out
            without, out = out.chunk(2)
            return without + guidance_scale * (out - without)

        return predict

    def _noises(self, seed: Sequence[int], height: int | None, width: int | None) -> tuple[Tensor, Tensor]:
        if isinstance(seed, int) or len(seed) != 2:
            raise ValueError(f"seed={seed!r} must be two whole numbers, such as (0, 1); num_columns=1 keeps to the first")
        side = self.unet.config.sample_size
        default_height, default_width = (side, side) if isinstance(side, int) else side
        rows = default_height if height is None else height // self.vae_scale_factor
        columns = default_width if width is None else width // self.vae_scale_factor
        shape = (1, self.unet.config.in_channels, rows, columns)
        device, dtype = self._execution_device, self.unet.dtype
        a, b = (randn_tensor(shape, generator=torch.Generator().manual_seed(each), device=device, dtype=dtype) for each in seed)
        return a, b

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """``model_index.json``, and beside it this file, which it names: a folder that loads with ``trust_remote_code=True``."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copy(__file__, save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The text of ``model_index.json``."""
        index = json.loads(super().to_json_string()) | {"_class_name": [Path(__file__).stem, type(self).__name__]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _fixed_point(step: Callable[[Tensor], Tensor], x: Tensor, num_iterations: int) -> Tensor:
    """Where ``step`` no longer moves ``x``, or ``num_iterations`` steps from it, each but the first led by the one before.

    Source: Anderson acceleration with a memory of one (Walker and Ni 2011, doi:10.1137/10078356X).
    """
    reached_before = moved_before = None
    for _ in range(num_iterations):
        reached = step(x)
        moved = reached - x
        if moved.norm() <= FLOAT32 * reached.norm():
            return reached
        x = reached
        if reached_before is not None and moved_before is not None:
            turn = moved - moved_before
            if turn.any():  # else nothing is learned, as where half precision goes round in a circle
                x = reached - (moved * turn).sum() / (turn * turn).sum() * (reached - reached_before)
        reached_before, moved_before = reached, moved
    return x


def _coefficients(scheduler: DDIMScheduler, t: Tensor) -> tuple[float, float]:
    """(a, b) of the step x' = a x + b out, read off it: all kinds of prediction are affine."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return tuple(scheduler.step(out, t, x).prev_sample.item() for x, out in ((one, zero), (zero, one)))


def _fractions(count: int) -> list[float]:
    """``count`` numbers from 0 to 1, both ends exact; 0 alone for one."""
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.0]
