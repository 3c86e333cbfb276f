"""Stable Diffusion 1 and 2: ``UNet2DConditionModel`` on latents, told one text embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import LatentConsistencyModelPipeline
from torch import Tensor, nn

from .family import REFERENCE, Condition, config_of, need
from .latent import LatentFamily
from .unet2d import UNET_TARGETS


class StableDiffusion(LatentFamily):
    """``StableDiffusionPipeline``, epsilon or v, and the networks that are told the guidance scale (``time_cond_proj_dim``)."""

    lora_targets = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", *UNET_TARGETS)
    control_pipeline: ClassVar[str] = "StableDiffusionControlNetPipeline"  # Diffusers' class for a ControlNet beside such a model
    takes_guidance = True  # type: ignore[assignment]  # a property that is always so

    @torch.no_grad()
    def encode_condition(self, texts: Sequence[str] | None, labels: Tensor | None, *, size: tuple[int, int]) -> Condition:
        embedded, _ = self.pipe.encode_prompt(
            list(need(texts, "a caption", self)), self.pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embedded.float()}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return self.encode_condition([""], None, size=size)

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None, **more: Any) -> Tensor:
        """As any family's; ``more`` goes to the network as it is."""
        told, width = None, config_of(network).time_cond_proj_dim
        if width is not None:
            told = guidance_embedding(x.new_ones(len(x)) if guidance is None else guidance, width)
        else:
            assert guidance is None, "with_guidance_embedding() makes networks that are told a guidance scale"
        return network(x, t, **self.keywords(condition), timestep_cond=told, **more, return_dict=False)[0]

    def keywords(self, condition: Condition) -> dict[str, Any]:
        """The condition as the network takes it."""
        made: dict[str, Any] = {"encoder_hidden_states": condition["encoder_hidden_states"]}
        added: dict[str, Any] = {name: value for name, value in condition.items() if name not in made}
        if REFERENCE in added:
            added["image_embeds"] = [added.pop(REFERENCE)]  # of the one IP-Adapter
        return made | ({"added_cond_kwargs": added} if added else {})

    def with_guidance_embedding(self, network: Any) -> Any:
        if network.config.time_cond_proj_dim is not None:
            return network
        with torch.device("meta"):
            made = type(network).from_config(network.config, time_cond_proj_dim=GUIDANCE_WIDTH)
        made.load_state_dict(network.state_dict(), strict=False, assign=True)
        projection = made.time_embedding.cond_proj
        projection.weight = nn.Parameter(torch.zeros(projection.weight.shape, device=network.device, dtype=network.dtype))
        return made.requires_grad_(False).train(network.training)


GUIDANCE_WIDTH = 256  # of the embedding of the guidance scale in networks that are made here


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """(B, width) sines and cosines of guidance scales (B,), the same as pipelines tell networks with ``time_cond_proj_dim``.

    Source: Luo et al. 2023 (arXiv:2310.04378) section 4.3, whose w is the scale - 1.
    """
    embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding  # a method that does not use itself
    return embed(None, guidance.float() - 1, embedding_dim=width, dtype=torch.float32)
