"""DiT: ``DiTTransformer2DModel`` on latents, told a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .family import Condition, need
from .latent import LatentFamily


class DiT(LatentFamily):
    """``DiTPipeline``, of one size; a learned variance, the second half of the output, is left out."""

    network = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @property
    def num_classes(self) -> int:
        """The class numbers are below it; the number itself means none of them."""
        return self.base.config.num_embeds_ada_norm

    def sample_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        side = self.base.config.sample_size * self.vae_scale
        if size != (side, side):
            raise ValueError(f"size={size}: this {type(self.pipe).__name__} makes pictures of {(side, side)} only")
        return super().sample_shape(size)

    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        return {"class_labels": need(labels, "a class", self)}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return {"class_labels": torch.tensor([self.num_classes], device=self.pipe.device)}

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        return network(x, timestep=t, **condition, return_dict=False)[0][:, : x.shape[1]]
