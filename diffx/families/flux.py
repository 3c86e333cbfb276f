"""Flux: ``FluxTransformer2DModel`` on packed latents, told a T5 text embedding, a pooled one and positions; flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from .family import REFERENCE, Condition, config_of, need
from .latent import LatentFamily
from .stable_diffusion_3 import JOINT_ATTENTION_TARGETS


class Flux(LatentFamily):
    """``FluxPipeline``. Samples are latents (B, C, H, W); packing, positions and the unit of time, t / 1000, are ``forward``'s affair."""

    network = "transformer"
    patch = 2
    # As Diffusers' train_dreambooth_lora_flux.py has them.
    lora_targets = (*JOINT_ATTENTION_TARGETS, *(f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")))

    @property
    def takes_guidance(self) -> bool:
        return self.base.config.guidance_embeds

    @torch.no_grad()
    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        embedded, pooled, _ = self.pipe.encode_prompt(list(need(texts, "a caption", self)), None, device=self.pipe.device)
        return {"encoder_hidden_states": embedded.float(), "pooled_projections": pooled.float()}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return self.encode_condition([""], None, size=size)

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        if config_of(network).guidance_embeds and guidance is None:
            guidance = x.new_ones(len(x), dtype=torch.float32)
        height, width = x.shape[-2:]
        told: dict[str, Any] = dict(condition)
        if REFERENCE in told:
            told["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [told.pop(REFERENCE)]}  # of the one IP-Adapter
        packed = network(
            FluxPipeline._pack_latents(x, len(x), x.shape[1], height, width),
            timestep=t / 1000,
            guidance=guidance,
            txt_ids=x.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, x.dtype),
            **told,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)

    def from_pipeline(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        _, height, width = self.sample_shape(size)
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor=1)

    def with_guidance_embedding(self, network: Any) -> Any:
        return network if network.config.guidance_embeds else super().with_guidance_embedding(network)

    def call_kwargs(self, calls: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        made = super().call_kwargs(calls, guidance_scale)
        if guidance_scale > 1 and not self.takes_guidance:
            # A network that is told no scale is guided by a second call, which the pipeline makes only if given a negative prompt.
            made |= {"guidance_scale": 1.0, "true_cfg_scale": guidance_scale, "negative_prompt": ""}
        return made
