"""IP-Adapters: attention layers of their own, beside those for the text, that read a reference picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection, IPAdapterTimeImageProjection
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

from ..families import Condition, Family, batched, remade
from ..families.family import REFERENCE
from ..loading import EMBEDDED
from .adapter import AdaptedFamily, Adapter, others
from .image_encoders import GLYPHS, ImageEncoder
from .ip_layouts import DEPTH, HEAD_WIDTH, LAYOUTS, TOKENS, Layout, State, projection_to_file, split

Kind = Literal["plain", "plus"]
Init = Literal["zero", "text"]
WEIGHTS = "ip_adapter.safetensors"
ENCODER = "image_encoder"  # a folder beside it
PLUS_TOKENS = 16


@dataclass(frozen=True)
class IPAdapter(Adapter):
    """Train an IP-Adapter: the model stays as it is, and new attention layers beside those for the text read a reference picture.

    Training and stock inference are one path: the layers are Diffusers' own, put in by its own loader.

    Args:
        kind: "plain" reads one embedding of the reference, "plus" one for each part of it; SD and SDXL have both, Flux "plain" alone,
            SD 3 "plus" alone.
        image_encoder: folder or Hub id of the network that reads references: CLIP for SD, SDXL and Flux, SigLIP for SD 3; with another
            (DINO, ...) pipelines must be given embeddings; None is the pipeline's own, and for the embedded model one that comes with it.
        reference_column: the data's column of reference pictures; None shows every training picture itself.
        init: "zero" changes nothing before training (but in SD 3, whose layers attend to the picture itself once more, whatever they
            are shown); "text" begins as the layers for the text, as the authors' code does.
        num_tokens: that a reference becomes; None is 4 for "plain", 16 for "plus".
        width: of the resampler of "plus", a multiple of 64; None is that of the model's text tokens.
        image_dropout: share of samples that are shown nothing, besides those that ``condition_dropout`` tells and shows nothing.
        text_dropout: share of samples that are told nothing, besides those.

    Source: Ye et al. 2023 (arXiv:2308.06721) section 3.2.
    """

    kind: Kind = "plain"
    image_encoder: str | Path | None = None
    reference_column: str | None = None
    init: Init = "zero"
    num_tokens: int | None = None
    width: int | None = None
    image_dropout: float = 0.05
    text_dropout: float = 0.05

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("init", Init)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(get_args(allowed))}")
        for name in ("image_dropout", "text_dropout"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1")
        if self.width is not None and (self.kind == "plain" or self.width < HEAD_WIDTH or self.width % HEAD_WIDTH):
            raise ValueError(f'width={self.width} is of the resampler of kind "plus", and a multiple of {HEAD_WIDTH}')
        if self.num_tokens is not None and self.num_tokens < 1:
            raise ValueError(f"num_tokens={self.num_tokens} must be at least 1")

    def describe(self) -> dict[str, Any]:
        made = super().describe()
        return made | {"image_encoder": None if self.image_encoder is None else str(self.image_encoder)}

    def wrap(self, family: Family) -> ImagePromptFamily:
        denoiser, pipe = family.denoiser, family.pipe
        if type(denoiser).__name__ not in LAYOUTS:
            raise ValueError(
                f"an IP-Adapter is trained for Stable Diffusion 1, 2, XL and 3 and for Flux, and this is a {type(pipe).__name__}"
            )
        layout: Layout = LAYOUTS[type(denoiser).__name__](denoiser)
        if self.kind not in layout.kinds:
            raise ValueError(f"kind={self.kind!r}: stock Diffusers loads only {layout.kinds[0]!r} into a {type(denoiser).__name__}")
        if getattr(denoiser, layout.projection, None) is not None:
            raise ValueError("the model has an IP-Adapter already: call pipe.unload_ip_adapter() first")
        encoder = self._encoder(pipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = self._initial(layout, encoder)
        layout.load(state)
        processors = denoiser.attn_processors
        network = ImagePrompt([processors[name] for name in layout.layers], getattr(denoiser, layout.projection))
        return ImagePromptFamily(family, self, network, layout, encoder)

    def _encoder(self, pipe: Any) -> ImageEncoder:
        own = pipe.components.get("image_encoder")
        source = self.image_encoder or own or (GLYPHS if str(pipe.name_or_path) == str(EMBEDDED) else None)
        if source is None:
            raise ValueError(
                f"the {type(pipe).__name__} has no image encoder; give the folder or Hub id of one, "
                'such as image_encoder="openai/clip-vit-large-patch14"'
            )
        return ImageEncoder(source, pipe.components.get("feature_extractor"), pipe.device, pipe.dtype)

    def _initial(self, layout: Layout, encoder: ImageEncoder) -> State:
        projection = self._projection(layout, encoder)
        state: State = {"image_proj": projection_to_file(layout, projection), "ip_adapter": {}}
        for i, name in enumerate(layout.layers):
            keys, values = layout.text_weights(name)
            made = layout.new_layer(name, self._width(layout))
            made |= {f"to_k_ip.{part}": value for part, value in keys.items()}
            made |= {f"to_v_ip.{part}": value if self.init == "text" else torch.zeros_like(value) for part, value in values.items()}
            state["ip_adapter"] |= {f"{layout.first + layout.step * i}.{part}": value.detach().clone() for part, value in made.items()}
        return state

    def _projection(self, layout: Layout, encoder: ImageEncoder) -> nn.Module:
        read = encoder.pixels([Image.new("RGB", (encoder.size, encoder.size))])
        width, tokens = layout.token_width, self.num_tokens
        if self.kind == "plain":
            return ImageProjection(encoder.pooled(read).shape[-1], width, tokens or TOKENS)
        inner, tokens = self._width(layout), tokens or PLUS_TOKENS
        sizes: dict[str, Any] = dict(depth=DEPTH, dim_head=HEAD_WIDTH, heads=inner // HEAD_WIDTH, num_queries=tokens)
        seen = encoder.hidden(read).shape[-1]
        if layout.projection == "image_proj":
            return IPAdapterTimeImageProjection(embed_dim=seen, output_dim=width, hidden_dim=inner, **sizes)
        return IPAdapterPlusImageProjection(embed_dims=seen, output_dims=width, hidden_dims=inner, **sizes)

    def _width(self, layout: Layout) -> int:
        return self.width or max(1, layout.token_width // HEAD_WIDTH) * HEAD_WIDTH


class ImagePrompt(nn.Module):
    """The trained part of a network with an IP-Adapter: its own attention layers and projection, Diffusers' classes.

    Several share one network: whoever is called puts itself in.
    """

    def __init__(self, layers: Sequence[nn.Module], projection: nn.Module) -> None:
        super().__init__()
        self.layers, self.projection = nn.ModuleList(layers), projection

    def forward(self, layout: Layout, call: Callable[[Any], Tensor]) -> Tensor:
        """``call`` of the network with this adapter in it."""
        self.put_into(layout)
        return call(layout.network)

    def put_into(self, layout: Layout) -> None:
        """Make the network of ``layout`` act with this adapter."""
        if getattr(layout.network, layout.projection) is self.projection:
            return
        setattr(layout.network, layout.projection, self.projection)
        for name, layer in zip(layout.layers, self.layers):
            layout.network.get_submodule(name.removesuffix(".processor")).processor = layer

    def enable_gradient_checkpointing(self) -> None:
        """Nothing: what can be computed again is the network that it is in."""


class ImagePromptFamily(AdaptedFamily):
    """A family whose IP-Adapter is trained; the condition has the references' embeddings as "reference"."""

    adapter: IPAdapter
    column_is_cut = False
    most_at_once = 1  # pipelines repeat all embeddings for each prompt: every sample of a call would see them all

    def __init__(self, inner: Family, adapter: IPAdapter, base: ImagePrompt, layout: Layout, encoder: ImageEncoder) -> None:
        super().__init__(inner, adapter, base, adapter.reference_column)
        self.layout, self.encoder = layout, encoder

    @property
    def dropouts(self) -> Mapping[str, tuple[float, Callable[[str], bool]]]:
        adapter = self.adapter
        return {
            "text": (adapter.text_dropout, lambda name: name != REFERENCE),
            "image": (adapter.image_dropout, lambda name: name == REFERENCE),
        }

    def shown(self, picture: Image.Image, other: Image.Image | None) -> Image.Image:
        return picture if other is None else other.convert("RGB")

    def encode_shown(self, shown: Sequence[Image.Image]) -> Condition:
        return {REFERENCE: self._embedded(self.encoder.pixels(shown))}

    def describe_shown(self) -> dict[str, Any]:
        return {"encoder": self.encoder.describe(), "kind": self.adapter.kind, "layout": type(self.layout).__name__}

    def null_condition(self, *, size: tuple[int, int]) -> Condition | None:
        return {**(self.inner.null_condition(size=size) or {}), REFERENCE: self._nothing()}

    def _embedded(self, pixels: Tensor) -> Tensor:
        """(B, ...) as the network takes it."""
        found = (self.encoder.hidden(pixels) if self.adapter.kind == "plus" else self.encoder.pooled(pixels)).float()
        return found if isinstance(self.pipe, StableDiffusion3Pipeline) else found[:, None]  # elsewhere several pictures may be shown

    def _nothing(self) -> Tensor:
        """(1, ...) what stands for no reference in the pipeline's own guidance."""
        black = self.encoder.pixels([Image.new("RGB", (self.encoder.size, self.encoder.size))])
        if isinstance(self.pipe, FluxPipeline):
            return self._embedded(black)
        if self.adapter.kind == "plus" and not isinstance(self.pipe, StableDiffusion3Pipeline):
            return self._embedded(torch.zeros_like(black))
        return torch.zeros_like(self._embedded(black))

    def inputs(self, shown: Sequence[Image.Image], call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        embedded = self.encode_shown(shown)[REFERENCE].to(self.pipe.dtype)
        nothing = batched({REFERENCE: self._nothing().to(embedded)}, len(shown))[REFERENCE]
        if isinstance(self.pipe, FluxPipeline):
            return {"ip_adapter_image_embeds": [embedded], "negative_ip_adapter_image_embeds": [nothing]}
        told_scale = self.layout.network.config.get("time_cond_proj_dim") is not None
        if call_kwargs.get("guidance_scale", 1.0) > 1 and not told_scale:
            embedded = torch.cat([nothing, embedded])
        return {"ip_adapter_image_embeds": embedded if isinstance(self.pipe, StableDiffusion3Pipeline) else [embedded]}

    def likeness(self, shown: Sequence[Image.Image], made: Sequence[Image.Image]) -> np.ndarray:
        """Cosines of embeddings by the adapter's own image encoder."""
        asked, found, num = self.encoder.features(shown), self.encoder.features(made), len(shown)
        return np.array([[asked[(i + k) % num] @ found[i] for k in range(1 + others(num))] for i in range(num)])

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        return network(self.layout, lambda denoiser: self.inner.forward(denoiser, x, t, condition, guidance))

    def pipeline(self, network: Any, scheduler: Any) -> Any:
        network.put_into(self.layout)
        encoder = {"image_encoder": self.encoder.network, "feature_extractor": self.encoder.processor} if self._is_stock() else {}
        return remade(self.pipe, scheduler=scheduler, **encoder)

    def _is_stock(self) -> bool:
        """Whether the pipeline itself can encode references."""
        kind = SiglipVisionModel if isinstance(self.pipe, StableDiffusion3Pipeline) else CLIPVisionModelWithProjection
        return isinstance(self.encoder.network, kind)

    def save(self, network: ImagePrompt, folder: Path) -> dict[str, Any]:
        tensors = {f"image_proj.{name}": value for name, value in self._projection_to_file(network).items()}
        for i, layer in enumerate(network.layers):
            number = self.layout.first + self.layout.step * i
            tensors |= {f"ip_adapter.{number}.{name}": value for name, value in self.layout.layer_to_file(layer).items()}
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        check_reload(self.layout, network, folder / WEIGHTS)
        if not self._is_stock():
            return self._load_words(None)
        self.encoder.save(folder / ENCODER)
        return self._load_words(ENCODER)

    def _projection_to_file(self, network: ImagePrompt) -> dict[str, Tensor]:
        several: Any = network.projection  # of as many adapters as are loaded: one
        return projection_to_file(self.layout, several if self.layout.projection == "image_proj" else several.image_projection_layers[0])

    def _load_words(self, encoder: str | None) -> dict[str, Any]:
        """Arguments of ``pipe.load_ip_adapter(folder, ...)``."""
        if isinstance(self.pipe, FluxPipeline):
            place = {"image_encoder_pretrained_model_name_or_path": encoder and "{folder}", "image_encoder_subfolder": ENCODER}
            return {"weight_name": WEIGHTS, **place}
        if isinstance(self.pipe, StableDiffusion3Pipeline):  # its loader looks for the encoder at that very path, not in the folder
            return {"subfolder": "", "weight_name": WEIGHTS, "image_encoder_folder": encoder and "{folder}/" + encoder}
        return {"subfolder": "", "weight_name": WEIGHTS, "image_encoder_folder": encoder}


def check_reload(layout: Layout, network: ImagePrompt, file: Path) -> None:
    """Read a file as stock Diffusers does, strictly.

    Raises:
        ValueError: it is not bit for bit the adapter that was trained.
    """
    layers, projection = layout.reloaded(split(load_file(file)))
    own: Any = network.projection
    pairs = [(own if layout.projection == "image_proj" else own.image_projection_layers[0], projection), *zip(network.layers, layers)]
    for mine, theirs in pairs:
        one, two = mine.state_dict(), theirs.state_dict()
        different = sorted(set(one) ^ set(two)) or [
            name for name in one if not torch.equal(one[name].cpu(), two[name].cpu().to(one[name].dtype))
        ]
        if different:
            raise ValueError(f"{file}: stock Diffusers reads {', '.join(different[:3])} of {type(mine).__name__} as something else")
