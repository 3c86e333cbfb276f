"""Every number of a training's config does what its explanation says, and nothing else."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from accelerate.state import AcceleratorState
from training_parts import CASES, Both, relative, training, weights_of

from diffx.objectives import Diffusion
from diffx.objectives.objective import Moment, Objective
from diffx.training.config import TrainConfig
from diffx.training.networks import Lora

BASE: dict[str, Any] = dict(train_steps=4, batch_size=8, lr=1e-2)
PLAIN = Diffusion(ema_decay=0)
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def of_its_own_precision() -> Iterator[None]:
    """Accelerate keeps one precision for a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def trained(objective: Objective = PLAIN, lora: Lora | None = None, **options: Any) -> tuple[Weights, list]:
    """(weights at the end, what each step said)."""
    made = training(objective, lora, **(BASE | options))
    steps = list(made.steps())
    return weights_of(made), steps


def start() -> Weights:
    return weights_of(training(PLAIN, **BASE))


def step_of(role: str, before: Weights, after: Weights) -> torch.Tensor:
    """All that an update moved in the weights of a role, one after the other, in float64."""
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in before if name.startswith(f"weights/{role}/")])


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_a_clipped_step_has_the_length_that_was_asked_for_and_the_direction_it_had(share):
    sgd = dict(train_steps=1, lr=1.0, optimizer="sgd")
    before = weights_of(training(Both(), **sgd))
    free, (said,) = trained(Both(), **sgd, grad_clip=math.inf)
    clip = share * min(said.grad_norms.values())
    clipped, (also_said,) = trained(Both(), **sgd, grad_clip=clip)
    assert also_said.grad_norms == said.grad_norms, "they are those before clipping"
    for role, norm in said.grad_norms.items():
        whole, cut = step_of(role, before, free), step_of(role, before, clipped)
        # Steps of about 1e-4 a weight are added to float32 weights of about 0.1; over 40,000 weights the roundings cancel to 1e-6.
        assert float(whole.norm()) == pytest.approx(norm, rel=1e-5)
        assert float(cut.norm()) == pytest.approx(clip, rel=1e-5)
        assert float(torch.nn.functional.cosine_similarity(whole, cut, dim=0)) == pytest.approx(1, abs=1e-5)


def test_a_gradient_that_is_short_enough_is_left_as_it_is():
    free, _ = trained(grad_clip=math.inf)
    longer, _ = trained(grad_clip=1e6)
    assert all(torch.equal(free[name], longer[name]) for name in free)


CHANGES = {
    "train_steps": 5, "batch_size": 4, "lr": 2e-2, "lr_schedule": "cosine", "warmup_steps": 2, "optimizer": "sgd", "weight_decay": 0.1,
    "adam_betas": (0.5, 0.9), "grad_clip": 1e-2, "mixed_precision": "bf16", "seed": 1,
}  # fmt: skip
SAME = (  # they change no result, or its last bits
    "attention", "gradient_accumulation_steps", "gradient_checkpointing", "save_every", "evaluate_every", "patience",
)  # fmt: skip


def test_every_field_is_one_or_the_other():
    assert sorted([*CHANGES, *SAME]) == sorted(field.name for field in dataclasses.fields(TrainConfig))


@pytest.fixture(scope="module")
def base() -> Weights:
    return trained()[0]


@pytest.mark.parametrize("name", CHANGES)
def test_the_field_changes_what_is_trained(base, name):
    weights, _ = trained(**{name: CHANGES[name]})
    assert relative(weights, base) > 1e-5  # two orders above a rounding
    assert all(value.dtype == torch.float32 for value in weights.values())


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        (dict(lr_schedule="constant", warmup_steps=2), [0.5, 1, 1, 1]),
        (dict(lr_schedule="linear"), [1, 0.75, 0.5, 0.25]),
        (dict(lr_schedule="cosine"), [0.5 + 0.5 * math.cos(math.pi * share) for share in (0, 0.25, 0.5, 0.75)]),
        (dict(lr_schedule="linear", warmup_steps=4), [0.25, 0.5 * 0.75, 0.75 * 0.5, 0.25]),
    ],
)
def test_the_rate_of_every_step_is_its_schedule_and_the_one_that_is_taken(options, factors):
    made = training(PLAIN, **BASE, **options, optimizer="sgd", grad_clip=math.inf)
    before = weights_of(made)
    for said, factor in zip(made.steps(), factors, strict=True):
        assert said.lr == pytest.approx(BASE["lr"] * factor, rel=1e-12)
        after = weights_of(made)
        # The steps are 1e-5 a weight or less, of float32 weights that are rounded at 1e-8 and cancel as above.
        assert float(step_of("student", before, after).norm()) == pytest.approx(said.lr * said.grad_norms["student"], rel=1e-3)
        before = after


def test_decay_takes_its_share_of_the_weights_besides_the_step():
    one, decayed = (trained(train_steps=1, weight_decay=decay)[0] for decay in (0.0, 0.5))
    expected = {name: one[name] - BASE["lr"] * 0.5 * value for name, value in start().items()}
    assert relative(decayed, expected) < 1e-6  # float32, in another order


def test_adam_follows_its_two_betas():
    """Two steps by hand in float64, each with the gradient that the loop has."""
    made = training(PLAIN, **BASE, adam_betas=(0.5, 0.9), grad_clip=math.inf)
    weights = made.nets.parameters("student")
    hand = {name: weight.detach().double().clone() for name, weight in weights.items()}
    mean, square = ({name: torch.zeros_like(value) for name, value in hand.items()} for _ in range(2))
    for step in (1, 2):
        made._accumulate(Moment(step - 1, 0))
        for name, weight in weights.items():
            gradient = cast(Any, weight.grad).double()
            mean[name] = 0.5 * mean[name] + 0.5 * gradient
            square[name] = 0.9 * square[name] + 0.1 * gradient**2
            hand[name] -= BASE["lr"] * (mean[name] / (1 - 0.5**step)) / ((square[name] / (1 - 0.9**step)).sqrt() + 1e-8)
        made._update("student", BASE["lr"])
    # A gradient that is almost 0 leaves its direction to rounding.
    assert relative({name: weight.detach() for name, weight in weights.items()}, hand) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_batch_make_the_gradient_of_the_batch(case):
    def gradients(parts):
        made = training(*CASES[case], **BASE, gradient_accumulation_steps=parts)
        made._accumulate(Moment(0, 0))
        weights = {f"{role}/{name}": weight for role in made.optimizers for name, weight in made.nets.parameters(role).items()}
        return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}

    whole = gradients(1)
    for parts in (2, 8):
        assert relative(gradients(parts), whole) <= 1e-5  # float32 sums in another order, through a few layers


@pytest.mark.parametrize("case", CASES)
def test_checkpointed_layers_run_again_and_train_to_the_same_bits(case):
    weights, calls = {}, {True: 0, False: 0}
    for checkpointing in calls:
        made = training(*CASES[case], **BASE, gradient_checkpointing=checkpointing)

        def count(*_, checkpointing=checkpointing):
            calls[checkpointing] += 1

        made.nets.modules["student"].get_submodule("down_blocks.0.resnets.0").register_forward_pre_hook(count)
        list(made.steps())
        weights[checkpointing] = weights_of(made)
    assert calls[True] > calls[False]
    assert [name for name, value in weights[True].items() if not torch.equal(value, weights[False][name])] == []
