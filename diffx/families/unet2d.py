"""Pixel models without text: ``UNet2DModel``, told a class or nothing."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .family import Condition, Family, need

UNET_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip  # as Diffusers' train_lcm_distill_lora_sdxl.py has them, as far as networks without text have such layers


class UNet2D(Family):
    """``DDPMPipeline`` with a ``UNet2DModel``; one with classes is sampled by hand or by ``ConsistencyModelPipeline``."""

    lora_targets = UNET_TARGETS
    guidable = False  # no class of these networks means "any"

    @property
    def num_classes(self) -> int | None:
        """The class numbers are below it; None where there are none."""
        return self.base.config.num_class_embeds

    def sample_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (self.base.config.in_channels, *size)

    def call_kwargs(self, calls: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        return {"num_inference_steps": calls}

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        return {} if self.num_classes is None else {"class_labels": need(labels, "a class", self)}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return None

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        return network(x, t, **condition, return_dict=False)[0]
