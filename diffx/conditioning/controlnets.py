"""ControlNets: a copy of a U-Net's encoder that reads a control image and adds to the U-Net's own features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..families import Condition, Family, remade
from ..families.stable_diffusion import StableDiffusion
from . import hints
from .adapter import AdaptedFamily, Adapter, others
from .hints import Hint, to_pixels

HINT = "hint"  # name of the control images in a condition
PLAIN = str | int | float | bool | None
WIDTHS = (16, 32, 96, 256, 512)  # of the layers that read a control image, each but the first halving its sides


@dataclass(frozen=True)
class ControlNet(Adapter):
    """Train a ControlNet: the model stays as it is, and a copy of its encoder learns to follow control images.

    Its first and last layers begin as zeros, so that it changes nothing before training.

    Args:
        hint: the control image, drawn of every training picture as it is cut: a name of ``diffx.conditioning.hints.names()``, or a
            hint with options of its own; with ``hint_column`` it says what adherence is measured by.
        hint_column: the data's column of ready control images, as large as the pictures; None draws them.
        start: folder or Hub id of a ControlNet to train further; None is a new one.

    Source: Zhang et al. 2023 (arXiv:2302.05543) section 3.
    """

    hint: str | Hint = "canny"
    hint_column: str | None = None
    start: str | Path | None = None

    def __post_init__(self) -> None:
        self.drawn_by()

    def drawn_by(self) -> Hint:
        """The hint itself."""
        return hints.get(self.hint) if isinstance(self.hint, str) else self.hint

    def describe(self) -> dict[str, Any]:
        hint: Any = self.drawn_by()
        name = self.hint if isinstance(self.hint, str) else hint.name
        options = asdict(hint) if is_dataclass(self.drawn_by()) else {}  # controlnet-aux's are none
        return {
            "name": type(self).__name__,
            "hint": {"name": name, **{name: value if isinstance(value, PLAIN) else str(value) for name, value in options.items()}},
            "hint_column": self.hint_column,
            "start": None if self.start is None else str(self.start),
        }

    def wrap(self, family: Family) -> ControlledFamily:
        if not isinstance(family, StableDiffusion):
            raise ValueError(
                f"a ControlNet is trained for Stable Diffusion 1, 2 and XL, and this is a {type(family.pipe).__name__}; "
                "an IPAdapter can be trained for SD 3 and Flux, too"
            )
        unet = family.denoiser
        if unet.encoder_hid_proj is not None:
            raise ValueError("the U-Net has an IP-Adapter, which a ControlNet cannot copy: call pipe.unload_ip_adapter() first")
        network = self._begun() if self.start else self._new(family)
        for name in ("in_channels", "cross_attention_dim", "block_out_channels", "addition_embed_type"):
            mine, model = (list(value) if isinstance(value, tuple) else value for value in (network.config[name], unet.config[name]))
            if mine != model:
                raise ValueError(f"the ControlNet {str(self.start)!r} has {name}={mine}, and the model {model}: it is another model's")
        network = network if network.dtype == unet.dtype else network.to(unet.dtype)
        return ControlledFamily(family, self, network.eval(), self.hint_column)

    def _new(self, family: StableDiffusion) -> Any:
        halvings = round(math.log2(family.vae_scale)) if family.pipe.components.get("vae") else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return diffusers.ControlNetModel.from_unet(family.denoiser, conditioning_embedding_out_channels=WIDTHS[: halvings + 1])

    def _begun(self) -> Any:
        try:
            return diffusers.ControlNetModel.from_pretrained(str(self.start), use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"start={str(self.start)!r} did not load as a ControlNet ({type(error).__name__}: {error})") from error


class ControlledFamily(AdaptedFamily):
    """A U-Net's family whose ControlNet is trained; the condition has the control images as "hint", (B, 3, H, W) uint8."""

    inner: StableDiffusion
    adapter: ControlNet
    column_is_cut = True

    @property
    def column_resampling(self) -> int:  # type: ignore[override]  # lines and labels have nothing between them
        exact = self.adapter.drawn_by().values in ("binary", "labels")
        return Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS

    def shown(self, picture: Image.Image, other: Image.Image | None) -> Image.Image:
        hint = self.adapter.drawn_by()
        if other is None:
            return hint(picture)
        hint.check(other, picture.size)
        return other.convert("RGB")

    def encode_shown(self, shown: Sequence[Image.Image]) -> Condition:
        return {HINT: torch.from_numpy(np.stack([np.asarray(image) for image in shown])).permute(0, 3, 1, 2).contiguous()}

    def describe_shown(self) -> dict[str, Any]:
        return self.adapter.describe()

    def inputs(self, shown, call_kwargs) -> dict[str, Any]:
        return {"image": list(shown)}

    def likeness(self, shown: Sequence[Image.Image], made: Sequence[Image.Image]) -> np.ndarray:
        hint, num = self.adapter.drawn_by(), len(shown)
        asked, drawn = [to_pixels(image) for image in shown], [to_pixels(hint(image)) for image in made]
        return np.array([[1 - hint.distance(asked[(i + k) % num], drawn[i]) for k in range(1 + others(num))] for i in range(num)])

    def forward(self, network, x: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None = None) -> Tensor:
        told = {name: value for name, value in condition.items() if name != HINT}
        hint = condition[HINT].to(x.dtype) / 255
        down, mid = network(x, t, controlnet_cond=hint, **self.inner.keywords(told), return_dict=False)
        more = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        return self.inner.forward(self.inner.denoiser, x, t, told, guidance, **more)

    def pipeline(self, network: Any, scheduler: Any) -> Any:
        return remade(self.pipe, getattr(diffusers, self.inner.control_pipeline), controlnet=network, scheduler=scheduler)

    def save(self, network: Any, folder: Path) -> dict[str, Any]:
        network.save_pretrained(folder)
        return {"class": type(network).__name__, "pipeline": self.inner.control_pipeline}
