"""Stable Diffusion 1 and 2: ``UNet2DConditionModel`` on latents, told one text embedding."""

from collections.abc import Sequence

import torch
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import LatentConsistencyModelPipeline
from torch import Tensor

from .family import Condition, Family, need

UNET_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class StableDiffusion(Family):
    """``StableDiffusionPipeline``, epsilon or v, and the networks that are told the guidance scale (``time_cond_proj_dim``)."""

    lora_targets = UNET_TARGETS
    takes_guidance = True

    def sample_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        return (self.base.config.in_channels, size[0] // scale, size[1] // scale)

    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean.float() * vae.config.scaling_factor

    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        embedded, _ = self.pipe.encode_prompt(
            list(need(texts, "a caption", self)), self.pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embedded.float()}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return self.encode_condition([""], None, size=size)

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        told = None if guidance is None else guidance_embedding(guidance, self.base.config.time_cond_proj_dim or GUIDANCE_WIDTH)
        return network(x, t, **condition, timestep_cond=told, return_dict=False)[0]


GUIDANCE_WIDTH = 256  # of the embedding of the guidance scale in networks that are made here


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """(B, width) sines and cosines of guidance scales (B,), the same as pipelines tell networks with ``time_cond_proj_dim``.

    Source: Luo et al. 2023 (arXiv:2310.04378) section 4.3, whose w is the scale - 1.
    """
    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, guidance.float() - 1, embedding_dim=width, dtype=torch.float32)
