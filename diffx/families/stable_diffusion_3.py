"""Stable Diffusion 3 and 3.5: ``SD3Transformer2DModel`` on latents, told a joint text embedding and a pooled one; flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .family import REFERENCE, Condition, need
from .latent import LatentFamily

# As Diffusers' train_dreambooth_lora_sd3.py has them.
JOINT_ATTENTION_TARGETS = tuple(
    f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)


class StableDiffusion3(LatentFamily):
    """``StableDiffusion3Pipeline``; train times go to the network as they are, from 0 to 1000."""

    network = "transformer"
    lora_targets = JOINT_ATTENTION_TARGETS

    @property
    def patch(self) -> int:  # type: ignore[override]  # it depends on the network
        return self.base.config.patch_size

    @torch.no_grad()
    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        texts = list(need(texts, "a caption", self))
        embedded, _, pooled, _ = self.pipe.encode_prompt(texts, None, None, device=self.pipe.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embedded.float(), "pooled_projections": pooled.float()}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return self.encode_condition([""], None, size=size)

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        told: dict[str, Any] = dict(condition)
        if REFERENCE in told:
            told["joint_attention_kwargs"] = {"ip_adapter_image_embeds": told.pop(REFERENCE)}
        return network(x, timestep=t, **told, return_dict=False)[0]
