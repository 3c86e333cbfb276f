"""Image features: a small shipped encoder for the embedded model's pictures, and any CLIP- or DINO-like one from transformers."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "assets" / "encoder"
BATCH = 32  # pictures or texts that a transformers model sees at once
TEXT_IMAGE = ("clip", "siglip")  # model types whose pictures and texts share a space
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class FeatureExtractor(Protocol):
    """Images (B, 3, H, W), float in [0, 1] -> features (B, D), float32. ``name`` goes into every report."""

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
    """Features of a transformers image model in a local folder or on the Hub: CLIP's or SigLIP's embedding, else the pooled or first token.

    Pictures are resized (squeezed to a square, bicubic, antialiased; no crop) to the size in the model's ``preprocessor_config.json``
    and normalised with the mean and standard deviation there (CLIP's where there is none). Only safetensors are read, and no code
    from the repository is run.

    Args:
        model: folder or Hub id.
        device: where the model runs; features come back on the host.

    Raises:
        ValueError: the model cannot be loaded, lacks weights, or has no image tower.
    """

    def __init__(self, model: str | Path, device: str = "cpu") -> None:
        from transformers import AutoModel, CLIPVisionModelWithProjection

        classes = {"clip_vision_model": CLIPVisionModelWithProjection}
        self._model = ImageModel(model, lambda config: classes.get(config.model_type, AutoModel), device)
        self.name = self._model.name
        self._tokenizer = _tokenizer(model) if self._model.config.model_type in TEXT_IMAGE else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        return np.concatenate([self._features(pixels) for pixels in self._model.pixels(images)])

    @property
    def reads_text(self) -> bool:
        """Whether ``texts`` works: the folder is of CLIP or SigLIP, tokenizer included."""
        return self._tokenizer is not None

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), D) float32: embeddings in the space of the pictures'; what is longer than the model reads is cut off.

        Raises:
            ValueError: the model has no text tower, or its folder no tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError(f"{self.name!r} reads no text; use a whole CLIP or SigLIP folder, tokenizer included")
        clip = self._model.config.model_type == "clip"  # SigLIP was trained to read its padding, without a mask
        length = self._model.config.text_config.max_position_embeddings
        options: dict[str, Any] = dict(padding="max_length", truncation=True, max_length=length, return_attention_mask=clip)
        found = []
        for first in range(0, len(texts), BATCH):
            tokens = self._tokenizer(list(texts[first : first + BATCH]), return_tensors="pt", **options).to(self._model.device)
            found.append(self._model.network.get_text_features(**tokens).pooler_output.float().cpu().numpy())
        return np.concatenate(found)

    def _features(self, pixels: Tensor) -> np.ndarray:
        network = self._model.network
        if self._model.config.model_type in TEXT_IMAGE:
            features = network.get_image_features(pixel_values=pixels).pooler_output
        else:
            output = network(pixel_values=pixels)
            features = output.get("image_embeds", None if self._model.no_pooler else output.get("pooler_output"))
            features = output["last_hidden_state"][:, 0] if features is None else features
        return features.flatten(1).float().cpu().numpy()


class TransformersClassifier:
    """Class probabilities (B, C) of pictures, by a transformers image classifier; loaded and fed as ``TransformersFeatures``."""

    def __init__(self, model: str | Path, device: str = "cpu") -> None:
        from transformers import AutoModelForImageClassification

        self._model = ImageModel(model, lambda config: AutoModelForImageClassification, device)
        if self._model.no_pooler:
            raise ValueError(f"{str(model)!r} lacks the weights of its pooler; use a folder of a whole classifier")
        self.name = self._model.name

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        logits = [self._model.network(pixel_values=pixels).logits.double().cpu() for pixels in self._model.pixels(images)]
        return torch.cat(logits).softmax(1).numpy()


class ImageModel:
    """A transformers network, and its pictures as it wants them.

    Args:
        choose: the class to load, by the model's config.

    Raises:
        ValueError: the model cannot be loaded, lacks weights, or is none of pictures.
    """

    def __init__(self, model: str | Path, choose: Callable[[Any], Any], device: str) -> None:
        from transformers import AutoConfig

        try:
            self.config: Any = AutoConfig.from_pretrained(model)
            options: dict[str, Any] = dict(use_safetensors=True, output_loading_info=True)
            network, info = choose(self.config).from_pretrained(model, **options)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights that do not fit the config
            raise ValueError(f"cannot load an image model from {str(model)!r}: {error}") from error
        missing = [key for key in info["missing_keys"] if not re.search(r"(^|\.)pooler\.", key)]
        if missing:  # transformers draws these at random, and every run would measure something else
            raise ValueError(f"{str(model)!r} lacks weights that {type(network).__name__} needs: {', '.join(sorted(missing)[:3])}")
        settings, vision = _preprocessor(model), getattr(self.config, "vision_config", self.config)
        size = settings.get("crop_size", settings.get("size", getattr(vision, "image_size", None)))
        foreign = getattr(self.config, "text_config", None) is not None and self.config.model_type not in TEXT_IMAGE
        if size is None or foreign:
            lacks = "not read here" if foreign else "without an image size"
            raise ValueError(f"{str(model)!r} is a {self.config.model_type!r} model {lacks}; use a CLIP, SigLIP, DINO or ViT model")
        self.name, self.device = Path(model).name, device
        self.network: Any = network.to(device).eval().requires_grad_(False)
        self.no_pooler = bool(info["missing_keys"])
        self._size = max(size.values()) if isinstance(size, dict) else int(np.max(size))
        self._mean = torch.tensor(settings.get("image_mean", CLIP_MEAN)).view(1, 3, 1, 1)
        self._std = torch.tensor(settings.get("image_std", CLIP_STD)).view(1, 3, 1, 1)

    def pixels(self, images: Tensor) -> Iterator[Tensor]:
        """Batches of ``images`` as the network wants them, on its device."""
        for batch in _checked(images).split(BATCH):
            yield ((resize(batch, self._size).clamp(0, 1) - self._mean) / self._std).to(self.device, self.network.dtype)


def resize(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size), bicubic and antialiased; untouched where the size is right already."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


def _preprocessor(model: str | Path) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(str(model))[0]
    except OSError:  # no preprocessor_config.json
        return {}


def _tokenizer(model: str | Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    # Asked first, because AutoTokenizer makes an empty tokenizer up where there are no files.
    if cached_file(str(model), "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    return AutoTokenizer.from_pretrained(model)


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images have shape {tuple(images.shape)} and dtype {images.dtype}; pass (B, 3, H, W), float in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (-1e-3 <= low and high <= 1 + 1e-3):  # also refuses NaN
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}]; pass values in [0, 1]")
    return images.detach().float().cpu()
