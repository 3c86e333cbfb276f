"""One file per kind of model, and nothing else in the package knows a kind: ``family_of(pipe)`` finds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .family import Condition, Family, batched, joined, need, process_of, remade
from .latent import LatentFamily

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

__all__ = ["Condition", "Family", "LatentFamily", "batched", "family_of", "joined", "need", "process_of", "remade"]


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline, by the class of its network.

    Raises:
        ValueError: no family here knows that network.
    """
    from .dit import DiT
    from .flux import Flux
    from .stable_diffusion import StableDiffusion
    from .stable_diffusion_3 import StableDiffusion3
    from .stable_diffusion_xl import StableDiffusionXL
    from .unet2d import UNet2D

    known: dict[str, type[Family]] = {
        "UNet2DModel": UNet2D,
        "UNet2DConditionModel": StableDiffusion,
        "UNet2DConditionModel with text_time": StableDiffusionXL,
        "DiTTransformer2DModel": DiT,
        "SD3Transformer2DModel": StableDiffusion3,
        "FluxTransformer2DModel": Flux,
    }
    components: dict[str, Any] = pipe.components
    network = components.get("unet") or components.get("transformer")
    name = type(network).__name__
    if network is not None and (added := network.config.get("addition_embed_type")):
        name = f"{name} with {added}"
    if name not in known:
        raise ValueError(f"{type(pipe).__name__} has a {name}, and training knows {', '.join(known)}; CONTRIBUTING.md shows how to add one")
    return known[name](pipe)
