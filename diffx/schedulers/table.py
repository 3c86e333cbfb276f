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

    Column 0 weighs the anchor (the solution so far), column k the k-th newest x0 prediction. A row may first move the anchor
    by weights of its own and keep it beyond the next call (Heun's interval, UniPC's corrector); ``sample`` then starts from the
    moved anchor. With ``anchor=None`` the next anchor is the sample that is handed to the next call, so that edits count.
    """

    sample: tuple[float, ...]
    anchor: tuple[float, ...] | None = None
    noise: float = 0.0  # standard deviation of the fresh noise added to the sample; not for a row that keeps an anchor


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
            if row.anchor is not None:
                if row.noise:
                    raise ValueError(f"row {k} keeps an anchor and adds noise={row.noise}, which the anchor would miss")
                mean, var = _marginal(row.anchor, mean, var)
            landed = _marginal(row.sample, mean, var, row.noise)
            want = self.alpha[k + 1], self.sigma[k + 1] ** 2
            # "not (... <= ...)" so that a NaN coefficient is refused too; VE variances reach 5e5, so the bound is relative there.
            if not all(abs(a - b) <= self.excess * max(1.0, b) for a, b in zip(landed, want, strict=True)):
                raise ValueError(
                    f"row {k} lands on alpha={landed[0]:.9g}, sigma^2={landed[1]:.9g}; its grid says {want[0]:.9g}, {want[1]:.9g}"
                )
            if row.anchor is None:
                mean, var = landed

    @cached_property
    def num_columns(self) -> int:
        """Width of the widest row: the anchor and as many x0 predictions as any row looks at."""
        return max(max(len(row.sample), len(row.anchor or ())) for row in self.rows)


def _marginal(weights: Sequence[float], mean: float, var: float, noise: float = 0.0) -> tuple[float, float]:
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
    start, anchor = x if state.anchor is None else state.anchor, None
    if row.anchor is not None:
        start = anchor = combine(row.anchor, start, history)
    sample = combine(row.sample, start, history)
    if row.noise:
        sample = torch.add(sample, noise(), alpha=row.noise)
    return sample, State(anchor, history, state.call + 1)


def combine(weights: Sequence[float], anchor: Tensor, history: Sequence[Tensor]) -> Tensor:
    """weights[0] * anchor + sum_j weights[j + 1] * history[j]: one kernel per non-zero weight, none for a lone weight of 1.

    A lone 1 returns that tensor itself, not a copy.
    """
    total, ours = (None, False) if weights[0] == 0.0 else (anchor, False) if weights[0] == 1.0 else (anchor * weights[0], True)
    for weight, column in zip(weights[1:], history, strict=False):  # early rows see fewer predictions, and weigh no more
        if weight == 0.0:
            continue
        if ours:
            total.add_(column, alpha=weight)
        elif total is not None:
            total, ours = torch.add(total, column, alpha=weight), True
        else:
            total, ours = (column, False) if weight == 1.0 else (column * weight, True)
    assert total is not None
    return total
