"""The files of IP-Adapters: which layers of a network have a part in one, under which names, and what stock Diffusers reads wrongly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection, IPAdapterTimeImageProjection
from torch import Tensor, nn

State = dict[str, dict[str, Tensor]]  # "image_proj" and "ip_adapter", as Diffusers' loaders take it
TOKENS, DEPTH, HEAD_WIDTH = 4, 4, 64  # that stock Diffusers takes for granted: of a plain projection, and of a resampler
FLUX_TOKENS, FLUX_ROWS = 16, 65536  # a plain projection of Flux with so many rows is read as one of so many tokens


class Layout(ABC):
    """How one kind of network has its IP-Adapter.

    Args:
        network: a UNet2DConditionModel, FluxTransformer2DModel or SD3Transformer2DModel.
    """

    kinds: ClassVar[tuple[str, ...]]
    projection: ClassVar[str] = "encoder_hid_proj"  # the network's attribute that turns embeddings into tokens
    first, step = 0, 1  # numbers of the layers in a file

    def __init__(self, network: Any) -> None:
        self.network = network

    @property
    def layers(self) -> list[str]:
        """Names of the attention processors that have a part in it, in the file's order."""
        own = f"{self.projection}."  # a resampler has attention, too
        return [name for name in self.network.attn_processors if self.takes_part(name) and not name.startswith(own)]

    def takes_part(self, name: str) -> bool:
        """Whether the attention processor of that name does."""
        return True

    @property
    @abstractmethod
    def token_width(self) -> int:
        """Of the tokens that an image becomes."""

    @abstractmethod
    def text_weights(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What makes keys and what makes values of the text tokens in a layer, so shaped that they could take image tokens."""

    def new_layer(self, name: str, width: int) -> dict[str, Tensor]:
        """All other weights of a layer, as stock Diffusers makes them; ``width`` is that of the projection."""
        return {}

    def load(self, state: State) -> None:
        """Put an adapter into the network, by stock Diffusers' own strict loader."""
        self.network._load_ip_adapter_weights(self.told(state), low_cpu_mem_usage=False)

    def reloaded(self, state: State) -> tuple[list[nn.Module], nn.Module]:
        """(layers, projection) that stock Diffusers makes of an adapter, strictly; the network stays as it is."""
        network, own = self.network, getattr(self.network, self.projection)
        setattr(network, self.projection, None)  # as the loader does it: a resampler's attention is not the network's
        try:
            processors = network._convert_ip_adapter_attn_to_diffusers(self.told(state, "ip_adapter"), low_cpu_mem_usage=False)
        finally:
            setattr(network, self.projection, own)
        projection = network._convert_ip_adapter_image_proj_to_diffusers(state["image_proj"], low_cpu_mem_usage=False)
        return [processors[name] for name in self.layers], projection

    def told(self, state: State, part: str | None = None) -> Any:
        """An adapter, or a part of it, as the network's loaders take it: a list of several."""
        return [state]

    def layer_to_file(self, layer: nn.Module) -> dict[str, Tensor]:
        """A layer's weights under their names in a file."""
        return {name.replace("_ip.0.", "_ip."): value for name, value in layer.state_dict().items()}

    def plain_to_file(self, projection: ImageProjection) -> dict[str, Tensor]:
        """A plain projection's weights under their names in a file.

        Raises:
            ValueError: it makes another number of tokens than stock Diffusers reads.
        """
        if projection.num_image_text_embeds != TOKENS:
            raise ValueError(
                f"a plain IP-Adapter with {projection.num_image_text_embeds} tokens: stock Diffusers reads every one as {TOKENS} tokens; "
                f'use num_tokens={TOKENS}, or kind "plus", whose tokens are counted'
            )
        return {name.replace("image_embeds", "proj"): value for name, value in projection.state_dict().items()}


class UNetLayout(Layout):
    """Stable Diffusion 1, 2 and XL: every cross-attention, numbered 1, 3, 5, ... in the network's order (down, up, middle)."""

    kinds = ("plain", "plus")
    first, step = 1, 2

    def takes_part(self, name: str) -> bool:
        return not name.endswith("attn1.processor") and "motion_modules" not in name

    @property
    def token_width(self) -> int:
        return self.network.config.cross_attention_dim

    def text_weights(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        attention = self.network.get_submodule(name.removesuffix(".processor"))
        return {"weight": attention.to_k.weight}, {"weight": attention.to_v.weight}


class FluxLayout(Layout):
    """Flux: every double-stream block, numbered from 0; the text's keys and values are read through the text embedder."""

    kinds = ("plain",)

    def takes_part(self, name: str) -> bool:
        return not name.startswith("single_transformer_blocks")

    @property
    def token_width(self) -> int:
        return self.network.config.joint_attention_dim

    def text_weights(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        attention, before = self.network.get_submodule(name.removesuffix(".processor")), self.network.context_embedder
        return _after(before, attention.add_k_proj), _after(before, attention.add_v_proj)

    def plain_to_file(self, projection: ImageProjection) -> dict[str, Tensor]:
        rows = projection.image_embeds.weight.shape[0]
        if projection.num_image_text_embeds == FLUX_TOKENS and rows == FLUX_ROWS:
            return {name.replace("image_embeds", "proj"): value for name, value in projection.state_dict().items()}
        if rows == FLUX_ROWS:
            raise ValueError(
                f"a plain IP-Adapter of Flux with {projection.num_image_text_embeds} tokens and {rows} rows: stock Diffusers reads "
                f"so many rows as {FLUX_TOKENS} tokens; use num_tokens={FLUX_TOKENS}"
            )
        return super().plain_to_file(projection)


class SD3Layout(Layout):
    """Stable Diffusion 3: every attention, numbered from 0; tokens depend on the noise level, too."""

    kinds = ("plus",)
    projection = "image_proj"

    @property
    def token_width(self) -> int:
        return self.network.inner_dim

    def text_weights(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        attention = self.network.get_submodule(name.removesuffix(".processor"))
        if attention.added_kv_proj_dim is None:  # the second attention of SD 3.5's blocks sees no text, and no image either
            return {"weight": attention.to_k.weight}, {"weight": attention.to_v.weight}
        return {"weight": attention.add_k_proj.weight}, {"weight": attention.add_v_proj.weight}

    def new_layer(self, name: str, width: int) -> dict[str, Tensor]:
        inner, head = self.network.inner_dim, self.network.config.attention_head_dim
        made = SD3IPAdapterJointAttnProcessor2_0(hidden_size=inner, ip_hidden_states_dim=inner, head_dim=head, timesteps_emb_dim=width)
        return made.state_dict()

    def told(self, state: State, part: str | None = None) -> Any:
        return state[part] if part else state

    def layer_to_file(self, layer: nn.Module) -> dict[str, Tensor]:
        return dict(layer.state_dict())


LAYOUTS = {"UNet2DConditionModel": UNetLayout, "FluxTransformer2DModel": FluxLayout, "SD3Transformer2DModel": SD3Layout}


def projection_to_file(layout: Layout, projection: nn.Module) -> dict[str, Tensor]:
    """A projection's weights under their names in a file, those of the IP-Adapter's authors.

    Raises:
        ValueError: stock Diffusers would read them as another network, without a word.
    """
    if isinstance(projection, ImageProjection):
        return layout.plain_to_file(projection)
    assert isinstance(projection, IPAdapterPlusImageProjection | IPAdapterTimeImageProjection)
    if (depth := len(projection.layers)) != DEPTH:
        raise ValueError(f"an IP-Adapter Plus with {depth} layers: stock Diffusers reads {DEPTH}, and drops the others or fails")
    for layer in projection.layers:
        attention: Any = layer.attn  # type: ignore[union-attr]  # as every layer has one
        if (width := attention.to_q.weight.shape[0] // attention.heads) != HEAD_WIDTH:
            raise ValueError(
                f"an IP-Adapter Plus with heads {width} wide: stock Diffusers reads heads {HEAD_WIDTH} wide, and computes something else"
            )
    state = projection.state_dict()
    if isinstance(projection, IPAdapterTimeImageProjection):
        return state  # Diffusers' names are the only ones for it
    made = {}
    for name, value in state.items():
        if name.endswith("attn.to_v.weight"):
            continue
        if name.endswith("attn.to_k.weight"):
            name, value = name.replace("to_k", "to_kv"), torch.cat([value, state[name.replace("to_k", "to_v")]])
        for ours, theirs in PLUS_NAMES.items():
            name = name.replace(ours, theirs)
        made[name] = value
    return made


PLUS_NAMES = {
    ".ln0.": ".0.norm1.", ".ln1.": ".0.norm2.", ".attn.to_out.0.": ".0.to_out.", ".attn.": ".0.", ".ff.0.": ".1.0.",
    ".ff.1.net.0.proj.": ".1.1.", ".ff.1.net.2.": ".1.3.",
}  # fmt: skip


def _after(before: Any, layer: Any) -> dict[str, Tensor]:
    """The one linear layer that does what two do, one after the other."""
    weight = layer.weight @ before.weight
    return {"weight": weight, "bias": layer.weight @ before.bias + layer.bias}


def split(tensors: Mapping[str, Tensor]) -> State:
    """The tensors of a file as Diffusers' loaders take them."""
    made: State = {"image_proj": {}, "ip_adapter": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        made[part][rest] = value
    return made
