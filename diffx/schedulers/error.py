"""How far each step of a run is off, estimated at no network call: the first term of its expansion that a row leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .table import Row, Table, combine

MOST = 4  # x0 predictions that an estimate looks at
PLANNED_STD = 0.5  # of the normal data that a plan is made for: about that of pictures in -1 .. 1
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)  # exact to rounding for every step below 20 in lam


@dataclass(frozen=True)
class Tracker:
    """The estimates of a run so far, one per call done, and the x0 predictions that the next one looks at."""

    weights: tuple[tuple[float, ...] | None, ...]  # of every row, see ``error_weights``
    predictions: tuple[Tensor, ...] = ()  # newest first
    errors: tuple[Tensor | None, ...] = ()

    def after(self, x0: Tensor) -> "Tracker":
        """One network call later, which predicted ``x0`` (B, ...)."""
        predictions, weights = (x0, *self.predictions[: MOST - 1]), self.weights[len(self.errors)]
        return Tracker(self.weights, predictions, (*self.errors, None if weights is None else estimate(weights, predictions)))


def error_weights(table: Table) -> tuple[tuple[float, ...] | None, ...]:
    """Per row the weights of the x0 predictions, newest first, whose sum estimates the error of its step; or None.

    A row of p predictions is exact where x0 is a polynomial of degree p - 1 in lam = log(alpha / sigma). The next term of Newton's
    form is the estimate: alpha f[lam_k, ..., lam_(k-p)] times the integral of exp(-(h - u)) (u - u_0) ... (u - u_(p-1)) over the
    step h. Early in a run it is the highest term that the predictions allow, which errs on the high side. A step that starts from an
    anchor of its own has the predictions since then first; one that only repeats the step before (Heun's second call) is compared
    with what the first alone would have given, as in embedded Runge-Kutta pairs.

    None: a row without a second prediction, a step to infinite lam, or two predictions at one lam.
    """
    with np.errstate(divide="ignore"):
        lam = np.log(table.alpha) - np.log(table.sigma)
    made: list[tuple[float, ...] | None] = []
    start = 0  # call at whose level the anchor is
    for k, row in enumerate(table.rows):
        before = table.rows[k - 1] if k else None
        if before is None or before.anchor in (None, before.sample):
            start = k
        if start < k and lam[k] == lam[k + 1]:
            assert before is not None
            change = np.array(row.sample[1:])
            change[1 : len(before.sample)] -= before.sample[1:]
            made.append(tuple(change.tolist()))
        else:
            calls = [*range(start, k + 1), *range(start - 1, -1, -1)][:MOST]
            order = max(_order(row, before), k + 1 - start)  # of a group's predictions one may have no weight
            term = _next_term(lam[calls], lam[k + 1], float(table.alpha[k + 1]), order)
            made.append(None if term is None else tuple(term[np.argsort(calls[: len(term)])[::-1]].tolist()))
    return tuple(made)


def estimate(weights: Sequence[float], predictions: Sequence[Tensor]) -> Tensor:
    """(B,) float32 RMS per sample of the weighted sum of ``predictions`` (B, ...), newest first."""
    error = combine((0.0, *weights), predictions[0], predictions)
    return error.reshape(len(error), -1).square().mean(1).sqrt().float()


def planned_errors(table: Table) -> list[float | None]:
    """The estimate of every row on normal data of standard deviation 0.5, in units of the sample's own at the level it lands on.

    The exact flow multiplies the sample by the ratio of its standard deviations, so that everything is a number.
    """
    variance = PLANNED_STD**2
    std = np.sqrt(table.alpha**2 * variance + table.sigma**2)
    x0 = table.alpha * variance / std  # E[x0 | x] on the flow through one standard deviation
    return [
        None if weights is None else float(abs(np.dot(weights, x0[k + 1 - len(weights) : k + 1][::-1])) / std[k + 1])
        for k, weights in enumerate(error_weights(table))
    ]


def _order(row: Row, before: Row | None) -> int:
    """Predictions in the polynomial of ``row``; one more corrects the sample that ``before`` kept (UniPC)."""
    corrects = before is not None and before.anchor is not None
    return max(1, int(np.count_nonzero(row.sample[1:])) - corrects)


def _next_term(nodes: np.ndarray, end: float, alpha: float, order: int) -> np.ndarray | None:
    """Weights of the predictions at ``nodes`` (lam) in the term beyond the first ``order`` of them of the step from nodes[0] to ``end``."""
    nodes = nodes[np.isfinite(nodes)]
    q = min(order, MOST - 1, len(nodes) - 1)
    h = end - nodes[0] if len(nodes) else np.inf
    if q < 1 or not 0 < h < np.inf or np.any(np.diff(nodes[: q + 1]) == 0):
        return None
    u = 0.5 * h * (NODES + 1)
    integral = 0.5 * h * np.sum(WEIGHTS * np.exp(u - h) * np.prod([u + nodes[0] - node for node in nodes[:q]], axis=0))
    gaps = nodes[: q + 1, None] - nodes[None, : q + 1] + np.eye(q + 1)  # of the divided difference; 1 stands for its own gap
    return alpha * integral / gaps.prod(1)
