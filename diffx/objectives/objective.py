"""What a training method is: who is trained, what is lost, and how the result is sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..families import Condition, Family
    from ..training.draws import Draws
    from ..training.networks import Networks


@dataclass(frozen=True)
class Loss:
    """``per_example`` (B,) float32, unreduced; ``logs`` are means to look at."""

    per_example: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What one update sees.

    ``x0`` (B, ...) clean samples, ``condition`` what the network is told of each, ``draws`` all randomness, a function of
    (seed, step, place in the batch of all processes).
    """

    x0: Tensor
    condition: Condition
    draws: Draws

    def __len__(self) -> int:
        return len(self.x0)


class Moment(NamedTuple):
    """Where a training stands: ``stage`` of the objective's stages, and ``step`` of all optimizer steps."""

    step: int
    stage: int


@dataclass(frozen=True)
class Inference:
    """How a trained network is sampled: a stock scheduler, and the pipeline's call arguments."""

    scheduler: SchedulerMixin
    call_kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A training method: frozen numbers and the mathematics on them; all that changes during training is in ``Networks``.

    A method fills in ``losses`` and ``inference``; the rest has defaults that fit one trained network.

    Args:
        ema_decay: per step, of the average of the student that is exported and is the role "target"; 0 keeps no average, and None
            leaves the choice to ``settled``.
    """

    trains: ClassVar[tuple[str, ...]] = ("student",)  # roles, each with an optimizer of its own
    has_teacher: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-4

    ema_decay: float | None = 0.0

    @property
    def stages(self) -> int:
        """Parts of equal length, each with an optimizer and a learning-rate schedule of its own; the student of one teaches the next."""
        return 1

    @property
    def period(self) -> int:
        """Steps after which the trained roles have had their turns."""
        return 1

    def settled(self, family: Family, lora: bool) -> Self:
        """The method with every choice made that it leaves to the model or to ``lora``; what is trained and exported goes by it.

        Raises:
            ValueError: the method cannot train this model, or not so.
        """
        self.check(family)
        return self

    def check(self, family: Family) -> None:
        """Refuse, by name, a model that the method cannot train."""
        if "sigma_data" in family.pipe.scheduler.config:
            raise ValueError(
                f"{type(self).__name__} trains models with betas and flow models; {type(family.pipe.scheduler).__name__} says that this "
                "network is preconditioned as EDM's, which ConsistencyTraining trains"
            )
        if family.process.prediction_type == "epsilon" and family.process.zero_terminal_snr:
            raise ValueError(
                'prediction_type="epsilon" says nothing about the data at zero terminal SNR (rescale_betas_zero_snr=True), where sampling '
                'begins; a "v_prediction" model does'
            )

    def build(self, family: Family, network: Any) -> Any:
        """The network that a trained role begins as, given the teacher's and free to change it: most methods change nothing."""
        return network

    def modules(self, family: Family) -> Mapping[str, nn.Module]:
        """Trained roles that are not networks of the family's kind, such as a discriminator; ``Networks.wrapped`` has them to call."""
        return {}

    def losses(self, nets: Networks, batch: Batch, now: Moment) -> dict[str, Loss]:
        """What each role that is trained at this step loses; a role left out rests."""
        raise NotImplementedError

    def inference(self, family: Family) -> Inference:
        """How the exported network is sampled."""
        raise NotImplementedError
