"""A sampler is a table: after each network call, two short weighted sums say where to call next and what is known.

All coefficients are float64 numbers on the host, made before the run from (alpha, sigma) alone; ``advance`` is the one step
there is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

KEEP_X0 = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Row:
    """What follows one network call: the next sample as a weighted sum of what is already known.

    Column 0 weighs the anchor (the solution so far), column k what the k-th newest call kept, which is its x0 prediction, or
    with ``kept`` any direction seen from its own sample (the noise, a derivative). With ``anchor=None`` the next
    anchor is the sample that is handed to the next call, so that edits in between count. A row with anchor weights of its own
    keeps that sum beyond the next call instead (Heun's interval); weights equal to ``sample`` keep the sample as it was
    returned, unedited (UniPC).
    """

    sample: tuple[float, ...]
    anchor: tuple[float, ...] | None = None
    noise: float = 0.0  # standard deviation of the fresh noise added to both
    kept: tuple[float, float] = KEEP_X0  # weights of (the sample called on, its x0 prediction) in what this call keeps


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
    known: int = 0  # x0 predictions that were made before this table, which continues a run

    def __post_init__(self) -> None:
        calls = len(self.rows)
        if calls < 1 or len(self.alpha) != calls + 1 or len(self.sigma) != calls + 1:
            raise ValueError(f"{calls} rows need {calls + 1} noise levels; got {len(self.alpha)} alphas and {len(self.sigma)} sigmas")
        # On data that is one point everything is a vector over (that point, the first noise, each draw).
        x0, first, *draws = np.eye(2 + sum(row.noise != 0 for row in self.rows))
        anchor = x = self.alpha[0] * x0 + self.sigma[0] * first
        history = [x0] * self.known
        for k, row in enumerate(self.rows):
            if row.kept != KEEP_X0 and not (len(row.kept) == 2 and any(row.kept) and all(map(math.isfinite, row.kept))):
                raise ValueError(f"row {k} keeps {row.kept}; kept is two finite numbers, not both 0: weights of the sample and of its x0")
            history = [x0 if row.kept == KEEP_X0 else row.kept[0] * x + row.kept[1] * x0, *history[: self.num_columns - 2]]
            x = _weighed(row.sample, anchor, history)
            anchor = x if row.anchor is None else _weighed(row.anchor, anchor, history)
            if row.noise:
                draw = row.noise * draws.pop()
                x, anchor = x + draw, anchor + draw
            landed, want = (float(x[0]), float(x[1:] @ x[1:])), (float(self.alpha[k + 1]), float(self.sigma[k + 1]) ** 2)
            # "not (... <= ...)" so that a NaN coefficient is refused too; VE variances reach 5e5, so the bound is relative there.
            if not all(abs(a - b) <= self.excess * max(1.0, b) for a, b in zip(landed, want, strict=True)):
                raise ValueError(
                    f"row {k} lands on alpha={landed[0]:.9g}, sigma^2={landed[1]:.9g}; its grid says {want[0]:.9g}, {want[1]:.9g}"
                )

    @cached_property
    def num_columns(self) -> int:
        """Width of the widest row: the anchor and as many calls as any row looks back at."""
        return max(max(len(row.sample), len(row.anchor or ())) for row in self.rows)


def _weighed(weights: Sequence[float], anchor: np.ndarray, history: Sequence[np.ndarray]) -> np.ndarray:
    total = weights[0] * anchor
    for weight, column in zip(weights[1:], history, strict=False):
        total += weight * column
    return total


@dataclass(frozen=True, slots=True)
class State:
    """What a run remembers between two calls: an anchor if it keeps one, what calls kept, newest first, and the count."""

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
    kept = x0 if row.kept == KEEP_X0 else combine(row.kept, x, (x0,))
    if kept is x:
        kept = x.clone()  # the caller may edit the sample in place
    history = (kept, *state.history[: table.num_columns - 2])
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
