"""Guidance by a gradient: of a classifier of noisy samples, or of a loss of clean ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..objectives.level import Level, column
from .around import Around
from .cfg import CONDITIONAL
from .moment import Moment
from .rule import Rule, Scale, scale_at


@dataclass(frozen=True, eq=False)
class ClassifierGuidance(Around):
    """``rule``'s prediction, its noise less ``scale`` sigma times the gradient of log p(``label`` | x), by a classifier of noisy samples.

    Args:
        classifier: of x (B, ...), as the network sees it, and its level: (B, K) logits. ``train_classifier`` makes one.
        label: of all samples, or one each.
        scale: 0 is ``rule`` itself, bit for bit.
        rule: by default the prediction told the condition, which is all that a model told nothing has.

    Source: Dhariwal and Nichol 2021 (arXiv:2105.05233) algorithm 2.

    Differs from the paper: nothing is moved where alpha is 0 (zero terminal SNR), since such a sample shows no class.
    """

    classifier: Callable[[Tensor, Level], Tensor]
    label: int | Sequence[int]
    scale: Scale = 1.0
    rule: Rule = CONDITIONAL

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        base, scale = self.rule(cond, uncond, moment), scale_at(self.scale, moment)
        return moment.moved(base, scale * _by_score(self.gradient(moment), moment.level)) if scale else base

    def gradient(self, moment: Moment) -> Tensor:
        """(B, ...) float32, of each sample's log p(label | x)."""
        label = torch.as_tensor(self.label, device=moment.x.device)
        if label.ndim and len(label) != len(moment.x):
            raise ValueError(f"label has {len(label)} entries for {len(moment.x)} samples; give one each, or one number")

        def log_p(x: Tensor) -> Tensor:
            logits = self.classifier(x, moment.level).log_softmax(-1)
            return logits.gather(1, label.expand(len(x))[:, None]).sum()

        return _gradient(log_p, moment.x.float())


@dataclass(frozen=True, eq=False)
class LossGuidance(Around):
    """``rule``'s prediction, its clean samples moved down the gradient of a loss of them.

    Args:
        loss: of clean samples (B, ...), as the network sees them: decode latents in it. (B,), or their sum.
        scale: 0 is ``rule`` itself, bit for bit.
        rule: by default the prediction told the condition.
        through_network: the gradient is that of the noisy sample, through a second call of the network told the condition, and moves the
            noise; for the price of a call and of its backward pass the change keeps to what the model finds likely.

    Source: through the network, Bansal et al. 2023 (arXiv:2302.07121), forward guidance; else He et al. 2023 (arXiv:2311.16424).

    Differs from the papers: no optimization of the clean samples, no repeated steps; nothing is moved through the network at alpha = 0.
    """

    loss: Callable[[Tensor], Tensor]
    scale: Scale = 1.0
    rule: Rule = CONDITIONAL
    through_network: bool = False

    def __call__(self, cond: Tensor, uncond: Tensor | None, moment: Moment) -> Tensor:
        base, scale = self.rule(cond, uncond, moment), scale_at(self.scale, moment)
        if not scale:
            return base
        if not self.through_network:
            return moment.moved(base, -scale * _gradient(lambda x0: self.loss(x0).sum(), moment.x0(base)))
        return moment.moved(base, -scale * _by_score(self.gradient(moment), moment.level))

    def gradient(self, moment: Moment) -> Tensor:
        """(B, ...) float32, of each noisy sample's loss, through the network."""

        def loss(x: Tensor) -> Tensor:
            return self.loss(moment.at(x).x0(moment.network(x.to(moment.x.dtype)))).sum()

        return _gradient(loss, moment.x.float())


def _gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """(B, ...) of a scalar function; pipelines run without gradients, so they are switched on for it."""
    with torch.enable_grad():
        x = at.detach().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]


def _by_score(score: Tensor, level: Level) -> Tensor:
    """How far clean samples move where the score of x, which is -eps / sigma, changes by ``score``."""
    factor = np.divide(level.sigma**2, level.alpha, out=np.zeros_like(level.alpha), where=level.alpha > 0)
    return column(factor, score) * score
