"""What latent models share: a VAE with its scales, and sizes that divide."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .family import Family


class LatentFamily(Family):
    """A network on the latents of ``pipe.vae``."""

    patch: ClassVar[int] = 1  # the sides of latents are its multiples

    @property
    def vae_scale(self) -> int:
        """Pixels to a latent, along a side."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    def sample_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        multiple = self.vae_scale * self.patch
        if any(side % multiple for side in size):
            raise ValueError(f"size={size}: {type(self.pipe).__name__} makes pictures whose sides are multiples of {multiple}")
        return (self.pipe.vae.config.latent_channels, size[0] // self.vae_scale, size[1] // self.vae_scale)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae, config = self.pipe.vae, self.pipe.vae.config
        kept = vae.dtype
        upcast = config.force_upcast and kept != torch.float32
        if upcast:  # in half precision these overflow; there and back again changes no weight
            vae.to(torch.float32)
        # The mean, not a sample: the posterior is narrow, and a cache of means is the same for every seed.
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean.float()
        if upcast:
            vae.to(kept)
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (config.latents_mean, config.latents_std))
            return (latents - mean) / std * config.scaling_factor
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor
