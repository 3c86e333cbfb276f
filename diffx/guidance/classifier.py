"""A classifier of noisy samples, trained by the project's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..families import Condition, Family, family_of
from ..objectives.level import Level, noised
from ..objectives.objective import Batch, Loss, Moment, Objective

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

TIME_WIDTH = 32


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Logits (B, ``num_classes``) of samples x (B, ``in_channels``, H, W) at a ``Level``; saved and loaded like Diffusers' models.

    It sees alpha x / (alpha^2 + sigma^2), the best linear guess of data of variance 1: the gradient then fades as alpha does, as the
    true one, and clean samples move by a bounded amount at every level.

    Args:
        channels: of each stage; all but the first halve the sides.
    """

    @register_to_config
    def __init__(self, in_channels: int, num_classes: int, channels: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.stages = nn.ModuleList(_Stage(one, two, stride=1 + bool(i)) for i, (one, two) in enumerate(zip(widths, channels)))
        self.norm = nn.GroupNorm(8, channels[-1])
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor, level: Level) -> Tensor:
        alpha, sigma = level.columns(x)
        time = torch.as_tensor(level.t, dtype=torch.float32, device=x.device)
        told = get_timestep_embedding(time, TIME_WIDTH).to(x.dtype)
        hidden = self.stem(x * (alpha / (alpha**2 + sigma**2)).to(x.dtype))
        for stage in self.stages:
            hidden = stage(hidden, told)
        return self.head(nn.functional.silu(self.norm(hidden)).mean((2, 3)))


class _Stage(nn.Module):
    """Two convolutions around a shift and a scale that depend on the time."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, in_channels), nn.GroupNorm(8, channels)])
        self.convs = nn.ModuleList([nn.Conv2d(in_channels, channels, 3, stride, 1), nn.Conv2d(channels, channels, 3, 1, 1)])
        self.time = nn.Linear(TIME_WIDTH, 2 * channels)
        self.skip = nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale = self.time(told)[..., None, None].chunk(2, dim=1)
        hidden = self.convs[0](nn.functional.silu(self.norms[0](x)))
        hidden = self.norms[1](hidden) * (1 + scale) + shift
        return self.skip(x) + self.convs[1](nn.functional.silu(hidden))


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Train a classifier of noisy samples at all levels, beside a model that stays as it is; the data name each sample's "label"."""

    trains: ClassVar[tuple[str, ...]] = ("classifier",)
    has_teacher: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3

    classifier: nn.Module

    def modules(self, family: Family) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def losses(self, nets: Any, batch: Batch, now: Moment) -> dict[str, Loss]:
        level = nets.times.between(batch.draws.uniform("time"))
        logits = nets.wrapped["classifier"](noised(batch.x0, batch.draws.normal("noise", batch.x0), level), level)
        label = batch.condition["label"]
        right = (logits.argmax(1) == label).float().mean()
        return {"classifier": Loss(nn.functional.cross_entropy(logits, label, reduction="none"), {"accuracy": right})}


@dataclass(frozen=True)
class _Labelled:
    samples: Tensor
    labels: Tensor

    @property
    def group_sizes(self) -> list[int]:
        return [len(self.samples)]

    def read(self, indices: list[int]) -> tuple[Tensor, Condition]:
        return self.samples[indices], {"label": self.labels[indices]}


def train_classifier(
    model: DiffusionPipeline | Family,
    samples: Tensor,
    labels: Tensor,
    *,
    classifier: nn.Module | None = None,
    train_steps: int = 1000,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> Any:
    """A classifier of samples as noisy as ``model`` makes them, by default a new ``NoisyClassifier``, ready for ``ClassifierGuidance``.

    Args:
        model: whose noise levels are used.
        samples: (N, C, H, W) clean, as its network sees them: pixels in [-1, 1], or ``family_of(pipe).encode_images`` of them.
        labels: (N,) whole numbers from 0.

    Raises:
        ValueError: other shapes, or no samples.
    """
    from accelerate import Accelerator

    from ..training.config import TrainConfig
    from ..training.loop import Training
    from ..training.networks import Networks

    if not len(samples) or labels.shape != (len(samples),):
        raise ValueError(f"samples {tuple(samples.shape)} need labels ({len(samples)},), of at least one sample; got {tuple(labels.shape)}")
    if classifier is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = NoisyClassifier(samples.shape[1], int(labels.max()) + 1)
    family = model if isinstance(model, Family) else family_of(model)
    objective = Classification(classifier=classifier)
    nets = Networks(family, objective, None, size=tuple(samples.shape[-2:]))  # type: ignore[arg-type]  # two numbers
    config = TrainConfig(train_steps=train_steps, batch_size=batch_size, lr=lr, lr_schedule="linear", seed=seed)
    for _ in Training(nets, _Labelled(samples.float(), labels.long()), config, Accelerator()).steps():
        pass
    return classifier.requires_grad_(False)
