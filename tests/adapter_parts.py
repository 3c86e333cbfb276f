"""Adapters small enough to be trained many times: tiny image encoders, examples, and a few updates."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

import diffx
from diffx.conditioning.adapter import AdaptedFamily, Adapter
from diffx.families import family_of
from diffx.objectives import Diffusion
from diffx.testing import IMAGE_SIZE, call_inputs, tiny_flux, tiny_sd3, tiny_sd35, tiny_sdxl, tiny_stable_diffusion
from diffx.testing.parts import weights_from
from diffx.training.config import TrainConfig
from diffx.training.loop import Training
from diffx.training.networks import Networks

SIZE = (IMAGE_SIZE, IMAGE_SIZE)
VISION: dict[str, Any] = dict(
    hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE_SIZE, patch_size=8
)
# Widths of embeddings, hidden layers and text tokens all differ: whoever mixes them up is seen.
IP_CASES = {
    "SD plain": (tiny_stable_diffusion, "plain"),
    "SD plus": (tiny_stable_diffusion, "plus"),
    "SDXL plain": (tiny_sdxl, "plain"),
    "SDXL plus": (tiny_sdxl, "plus"),
    "Flux": (tiny_flux, "plain"),
    "SD3": (tiny_sd3, "plus"),
    "SD3.5": (tiny_sd35, "plus"),
}


def clip(**more):
    with weights_from(0):
        return CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=10, **{**VISION, **more})).eval()


def siglip():
    with weights_from(0):
        return SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()


def save_encoders(folder):
    """Folders of encoders by the name of a family's kind."""
    clip().save_pretrained(folder / "clip")
    siglip().save_pretrained(folder / "siglip")
    return folder


def picture(i: int, side: int = IMAGE_SIZE) -> Image.Image:
    """A picture of coarse coloured squares: it has edges."""
    coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST)


def ip_adapter(name: str, encoders, **options) -> diffx.IPAdapter:
    kind = IP_CASES[name][1]
    return diffx.IPAdapter(kind, image_encoder=encoders / ("siglip" if name.startswith("SD3") else "clip"), **options)


@dataclass
class Shown:
    """Examples of random samples, with the pipeline's own conditions, each shown a picture of its own."""

    family: AdaptedFamily
    group_sizes = (4,)

    def read(self, indices):
        x0 = torch.randn(4, *self.family.sample_shape(SIZE), generator=torch.Generator().manual_seed(0))[indices]
        told = call_inputs(self.family.pipe, batch_size=4)
        condition = dict(self.family.encode_condition([told["prompt"][i] for i in indices], None, size=SIZE))
        return x0, condition | dict(self.family.encode_shown([self.family.shown(picture(i), None) for i in indices]))


def training(pipe, adapter: Adapter, objective: Diffusion | None = None, **options) -> Training:
    """One that has not begun."""
    family = adapter.wrap(family_of(pipe))
    nets = Networks(family, objective or Diffusion(ema_decay=0.0), None, size=SIZE)
    config = TrainConfig(**(dict(train_steps=2, batch_size=2, lr=0.02) | options))
    return Training(nets, Shown(family), config, Accelerator(cpu=True))
