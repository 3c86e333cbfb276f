"""Stable Diffusion XL: ``UNet2DConditionModel`` on latents, told two text embeddings, a pooled one, and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .family import Condition, batched, need
from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """``StableDiffusionXLPipeline``; its condition is ``encoder_hidden_states``, ``text_embeds`` (pooled) and ``time_ids`` (sizes)."""

    control_pipeline = "StableDiffusionXLControlNetPipeline"

    @torch.no_grad()
    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        texts = list(need(texts, "a caption", self))
        embedded, _, pooled, _ = self.pipe.encode_prompt(texts, device=self.pipe.device, do_classifier_free_guidance=False)
        sizes = batched(self.size_condition(size), len(texts))
        return {"encoder_hidden_states": embedded.float(), "text_embeds": pooled.float(), **sizes}

    def size_condition(self, size: tuple[int, int], original: tuple[int, int] | None = None, crop: tuple[int, int] = (0, 0)) -> Condition:
        return {"time_ids": torch.tensor([[*(original or size), *crop, *size]], dtype=torch.float32, device=self.pipe.device)}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        texts = {name: value for name, value in self.encode_condition([""], None, size=size).items() if name != "time_ids"}
        zeros = self.pipe.config.force_zeros_for_empty_prompt
        return {name: torch.zeros_like(value) for name, value in texts.items()} if zeros else texts
