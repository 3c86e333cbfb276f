"""A sampler is a table: after each network call, two short weighted sums say where to call next and what is known.

All coefficients are float64 numbers on the host, made before the run from (alpha, sigma) alone; ``advance`` is the one step
there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """What follows one network call: the next sample as a weighted sum of what is already known.

    Column 0 weighs the anchor (the solution so far), column k the k-th newest x0 prediction. With ``anchor=None`` the next
    anchor is the sample that is handed to the next call, so that edits in between count. A row with anchor weights of its own
    keeps that sum beyond the next call instead (Heun's interval); weights equal to ``sample`` keep the sample as it was
    returned, unedited (UniPC).
    """

    sample: tuple[float, ...]
    anchor: tuple[float, ...] | None = None
    noise: float = 0.0  # standard deviation of the fresh noise added to both


@dataclass(frozen=True)
class Table:
    """A whole sampling run: one row per network call, so ``len(table.rows)`` is the NFE.

    ``alpha[k], sigma[k]`` is the noise level of call k (x = alpha x0 + sigma eps); the last entry is the end point.

    Raises:
        ValueError: a row would leave the marginal when every x0 prediction is the same constant, by more than ``excess``;
            or lengths or numbers that cannot be a run.
    """

    alpha: np.ndarray  # (K + 1,) float64
    sigma: np.ndarray  # (K + 1,) float64
    rows: tuple[Row, ...]  # K
    excess: float = 1e-9  # larger only for methods that leave the marginal by their own definition

    def __post_init__(self) -> None:
        calls = len(self.rows)
        if calls < 1 or len(self.alpha) != calls + 1 or len(self.sigma) != calls + 1:
            raise ValueError(f"{calls} rows need {calls + 1} noise levels; got {len(self.alpha)} alphas and {len(self.sigma)} sigmas")
        mean, var = self.alpha[0], self.sigma[0] ** 2  # the anchor is mean * x0 + sqrt(var) * eps
        for k, row in enumerate(self.rows):
            landed = _marginal(row.sample, mean, var, row.noise)
            want = self.alpha[k + 1], self.sigma[k + 1] ** 2
            # "not (... <= ...)" so that a NaN coefficient is refused too; VE variances reach 5e5, so the bound is relative there.
            if not all(abs(a - b) <= self.excess * max(1.0, b) for a, b in zip(landed, want, strict=True)):
                raise ValueError(
                    f"row {k} lands on alpha={landed[0]:.9g}, sigma^2={landed[1]:.9g}; its grid says {want[0]:.9g}, {want[1]:.9g}"
                )
            mean, var = landed if row.anchor is None else _marginal(row.anchor, mean, var, row.noise)

    @cached_property
    def num_columns(self) -> int:
        """Width of the widest row: the anchor and as many x0 predictions as any row looks at."""
        return max(max(len(row.sample), len(row.anchor or ())) for row in self.rows)


def _marginal(weights: Sequence[float], mean: float, var: float, noise: float) -> tuple[float, float]:
    return weights[0] * mean + sum(weights[1:]), weights[0] ** 2 * var + noise**2


@dataclass(frozen=True, slots=True)
class State:
    """What a run remembers between two calls: an anchor if it keeps one, the x0 predictions newest first, and the count."""

    anchor: Tensor | None = None
    history: tuple[Tensor, ...] = ()
    call: int = 0


def advance(table: Table, state: State, x: Tensor, x0: Tensor, noise: Callable[[], Tensor]) -> tuple[Tensor, State]:
    """One network call later: the next point to evaluate, and the state after it.

    Args:
        x: (B, ...) the sample the network was just called on.
        x0: (B, ...) its prediction of the clean sample.
        noise: draws (B, ...) standard normal; called only by rows with noise.

    Raises:
        ValueError: the run is over (``table`` has no row left).
    """
    if state.call == len(table.rows):
        raise ValueError(f"all {len(table.rows)} rows are used; call set_timesteps() to start a new run")
    row = table.rows[state.call]
    history = (x0, *state.history[: table.num_columns - 2])
    start = x if state.anchor is None else state.anchor
    shake = noise() * row.noise if row.noise else None
    sample = combine(row.sample, start, history, shake)
    if row.anchor is None:
        anchor = None
    elif row.anchor == row.sample:
        anchor = sample.clone()  # the caller may edit the sample in place
    else:
        anchor = combine(row.anchor, start, history, shake)
    return sample, State(anchor, history, state.call + 1)


def combine(weights: Sequence[float], anchor: Tensor, history: Sequence[Tensor], extra: Tensor | None = None) -> Tensor:
    """weights[0] * anchor + sum_j weights[j + 1] * history[j] (+ extra): one kernel per non-zero weight, none for a lone 1.

    A lone 1 returns that tensor itself, not a copy.
    """
    total, ours = None, False  # ours: a new tensor, which may be added to in place
    for weight, column in zip(weights, (anchor, *history), strict=False):  # early rows see fewer predictions, and weigh no more
        if weight == 0.0:
            continue
        if total is None:
            total, ours = (column, False) if weight == 1.0 else (column * weight, True)
        elif ours:
            total.add_(column, alpha=weight)
        else:
            total, ours = torch.add(total, column, alpha=weight), True
    assert total is not None
    return total if extra is None else total + extra
