"""Image features: a small shipped encoder for the embedded model's pictures, and any CLIP- or DINO-like one from transformers."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "assets" / "encoder"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class FeatureExtractor(Protocol):
    """Images (B, 3, H, W), float in [0, 1] -> features (B, D), float32. ``name`` goes into every table: "FD (name)"."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> np.ndarray: ...


class GlyphEncoder(nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> (B, 64): 48 numbers that tell the glyph, 16 the background, each part of length sqrt(1/2).

    The two parts are trained apart and joined, so that neither can drown the other: a right glyph on a wrong background is
    as far away as a wrong glyph on the right one.
    """

    GLYPH, BACKGROUND = 48, 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 4, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())  # 16 x 16
        self.stages = nn.Sequential(_block(48, 48, 1), _block(48, 96, 2), _block(96, 128, 2), _block(128, 128, 1))  # 4 x 4
        self.head = nn.Linear(128 * 4 * 4, self.GLYPH + self.BACKGROUND)

    def forward(self, images: Tensor) -> Tensor:
        glyph, background = self.head(self.stages(self.stem(images)).flatten(1)).split([self.GLYPH, self.BACKGROUND], dim=1)
        return torch.cat([F.normalize(glyph, dim=1), F.normalize(background, dim=1)], dim=1) * 0.5**0.5


def _block(num_in: int, num_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())


class GlyphFeatures:
    """The shipped encoder: 64 unit-length features of emoji-like pictures on plain backgrounds.

    Pictures of another size are resized to 32 x 32 pixels, which is all that this encoder ever saw: it says nothing about
    photographs or fine detail. For other models use ``TransformersFeatures``.

    Raises:
        ValueError: ``folder`` holds no ``encoder.safetensors``.
    """

    name = "glyph encoder"

    def __init__(self, folder: Path | str = FOLDER) -> None:
        file = Path(folder) / "encoder.safetensors"
        if not file.exists():
            raise ValueError(f"no encoder.safetensors in {str(folder)!r}; leave folder= out to use the shipped encoder")
        encoder = GlyphEncoder()
        weights = {key: value.float() for key, value in load_file(file).items()}
        missing, unexpected = encoder.load_state_dict(weights, strict=False)  # BatchNorm's call counters are not saved
        if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
            raise ValueError(f"{file} is for another network: it lacks {missing[:3]} and has {unexpected[:3]}")
        self._encoder = encoder.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> np.ndarray:
        small = resize(_checked(images), 32) * 2 - 1
        return torch.cat([self._encoder(batch) for batch in small.split(256)]).numpy()


class TransformersFeatures:
    """Features of a transformers image model in a local folder or on the Hub: CLIP's image embedding, else the pooled or first token.

    Pictures are resized (squeezed to a square, bicubic, antialiased; no crop) to the model's own size and normalised with the mean and
    standard deviation of its ``preprocessor_config.json`` (CLIP's where there is none). No code from the repository is run.

    Args:
        model: folder or Hub id.
        device: where the model runs; features come back on the host.

    Raises:
        ValueError: the model cannot be loaded, or has no image tower.
    """

    def __init__(self, model: str | Path, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

        try:
            config = AutoConfig.from_pretrained(model)
            clip = config.model_type in ("clip", "clip_vision_model")
            network: Any = (CLIPVisionModelWithProjection if clip else AutoModel).from_pretrained(model)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights that do not fit the config
            raise ValueError(f"cannot load an image model from {str(model)!r}: {error}") from error
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        if size is None:
            raise ValueError(f"{str(model)!r} is a {config.model_type!r} model without an image size; use a CLIP, DINO or ViT model")
        self.name = Path(model).name
        self._network = network.to(device).eval().requires_grad_(False)
        self._device, self._size = device, size if isinstance(size, int) else max(size)
        mean, std = _statistics(model)
        self._mean, self._std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        return np.concatenate([self._features(batch) for batch in _checked(images).split(32)])

    def _features(self, images: Tensor) -> np.ndarray:
        pixels = ((resize(images, self._size).clamp(0, 1) - self._mean) / self._std).to(self._device, self._network.dtype)
        output = self._network(pixel_values=pixels)
        features = output.get("image_embeds", output.get("pooler_output"))
        if features is None:
            features = output["last_hidden_state"][:, 0]
        return features.flatten(1).float().cpu().numpy()


def resize(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size), bicubic and antialiased; untouched where the size is right already."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


def _statistics(model: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(model))
    except OSError:  # no preprocessor_config.json
        settings = {}
    return tuple(settings.get("image_mean", CLIP_MEAN)), tuple(settings.get("image_std", CLIP_STD))


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images have shape {tuple(images.shape)} and dtype {images.dtype}; pass (B, 3, H, W), float in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (-1e-3 <= low and high <= 1 + 1e-3):  # also refuses NaN
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}]; pass values in [0, 1]")
    return images.detach().float().cpu()
