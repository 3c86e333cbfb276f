"""What an IP-Adapter sees of a reference picture: the embedding of a vision network, as Diffusers' pipelines compute it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, SiglipImageProcessor, SiglipVisionModel

from ..calibration.problem import sketch
from ..evaluation.features import ImageModel
from ..loading import EMBEDDED

GLYPHS = EMBEDDED.with_name("image_encoder")  # of the embedded model, for pictures of 32 x 32 pixels
AT_ONCE = 64  # pictures


class ImageEncoder:
    """A vision network of transformers and what makes pictures ready for it.

    Args:
        source: folder or Hub id of CLIP, SigLIP, DINO or another; or the network itself.
        dtype: of the network, where it is loaded here: Diffusers loads it in its pipeline's.
        processor: None is what Diffusers' pipelines would take: CLIP's own for CLIP, else the one in the folder.

    Raises:
        ValueError: the network cannot be loaded, lacks weights, or nothing says how its pictures are made ready.
    """

    def __init__(self, source: Any, processor: Any = None, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> None:
        if isinstance(source, str | Path):
            source_network = ImageModel(source, _class_of, str(device)).network.to(dtype)
        else:
            source_network = source
        self.network: Any = source_network.to(device).eval().requires_grad_(False)
        self.processor: Any = processor or _processor(self.network, source)

    @property
    def size(self) -> int:
        """Pixels of a picture's side, as the network reads it."""
        return self.network.config.image_size

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, 3, H, W) as the network takes them."""
        made = self.processor([picture.convert("RGB") for picture in pictures], return_tensors="pt").pixel_values
        return made.to(self.network.device, self.network.dtype)

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, D) one embedding of each picture."""
        found = self._run(pixels)
        return torch.cat([part["image_embeds"] if "image_embeds" in part else part["pooler_output"] for part in found])

    def hidden(self, pixels: Tensor) -> Tensor:
        """(B, T, D) one embedding for each part of each picture: what the last layer but one says."""
        return torch.cat([part["hidden_states"][-2] for part in self._run(pixels)])

    @torch.no_grad()
    def _run(self, pixels: Tensor) -> list[Any]:
        return [self.network(part, output_hidden_states=True) for part in pixels.split(AT_ONCE)]

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(B, D) embeddings of length 1."""
        found = self.pooled(self.pixels(pictures)).float().cpu().numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def save(self, folder: Path) -> None:
        """Write the network and what makes pictures ready, as transformers reads them."""
        self.network.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def describe(self) -> dict[str, Any]:
        """All that embeddings depend on, in plain values."""
        config = {
            key: value for key, value in self.network.config.to_dict().items() if not key.startswith("_") and key != "transformers_version"
        }
        public = {key: value for key, value in self.processor.to_dict().items() if isinstance(value, str | int | float | list | dict)}
        return {"weights": sketch(self.network), "dtype": str(self.network.dtype), "config": config, "processor": public}


def _class_of(config: Any) -> Any:
    kinds = {"clip": CLIPVisionModelWithProjection, "siglip": SiglipVisionModel}
    return kinds.get(config.model_type.removesuffix("_vision_model"), transformers.AutoModel)


def _processor(network: Any, source: Any) -> Any:
    size = network.config.image_size
    if isinstance(network, CLIPVisionModelWithProjection):
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})  # as Diffusers makes it
    if isinstance(source, str | Path):
        try:
            return transformers.AutoImageProcessor.from_pretrained(source, use_fast=False)
        except (OSError, ValueError) as error:
            if not isinstance(network, SiglipVisionModel):
                raise ValueError(
                    f"{str(source)!r} has no preprocessor_config.json, which says how pictures are made ready for it"
                ) from error
    if isinstance(network, SiglipVisionModel):
        return SiglipImageProcessor(size={"height": size, "width": size})
    raise ValueError(f"nothing says how pictures are made ready for a {type(network).__name__}; give its folder")
