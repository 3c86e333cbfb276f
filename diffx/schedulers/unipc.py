"""UniPC: a multistep predictor, and a corrector that uses the next call's prediction at no extra cost."""

import math
from collections.abc import Collection, Sequence

import numpy as np

from .grid import Convention
from .scheduler import TableScheduler
from .table import Row, Table


def unipc(
    alpha: np.ndarray, sigma: np.ndarray, orders: Sequence[int], *, solver_type: str = "bh2", uncorrected: Collection[int] = ()
) -> list[Row]:
    """One row per call: correct the point just evaluated, then predict the next. Order p + 1 for predictor order p.

    Source: Zhao et al. 2023 (arXiv:2302.04867), UniPC with data prediction and B(h) = h ("bh1") or e^h - 1 ("bh2").

    Args:
        alpha, sigma: (N + 1,) the noise levels; sigma may end in 0 and alpha may start at 0.
        orders: (N,) predictor orders; interval i has at most i + 1 predictions to look at.
        uncorrected: calls k whose point is left as predicted, besides call 0.

    Raises:
        ValueError: an order below 1 or beyond the predictions there are, or an unknown ``solver_type``.
    """
    if solver_type not in ("bh1", "bh2"):
        raise ValueError(f"solver_type={solver_type!r} is not one of bh1, bh2")
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    # A node at infinity (alpha = 0) carries no slope: leave it out of the polynomial.
    orders = [min(order, int(np.isfinite(lam[: i + 1]).sum()) or 1) for i, order in enumerate(_checked(orders))]
    rows: list[Row] = []
    before = np.zeros(0)  # predictor weights of the interval that led here
    for i, order in enumerate(orders):
        predict = _update(alpha, sigma, lam, i, order, solver_type, corrector=False)
        if i == 0 or i in uncorrected:
            sample = predict
        else:
            # Both updates keep the same share of the anchor, so the corrected point is the predicted one, which is the
            # anchor here, plus a difference of x0 weights. The newest prediction came after the predictor.
            correct = _update(alpha, sigma, lam, i - 1, orders[i - 1], solver_type, corrector=True)
            width = max(len(correct), len(predict))
            shift = _padded(correct[1:], width - 1) - _padded([0.0, *before[1:]], width - 1)
            sample = np.concatenate([predict[:1], predict[0] * shift + _padded(predict[1:], width - 1)])
        weights = tuple(sample.tolist())
        rows.append(Row(weights, weights if i + 1 < len(orders) and i + 1 not in uncorrected else None))
        before = predict
    return rows


def _update(alpha, sigma, lam, i: int, order: int, solver_type: str, *, corrector: bool) -> np.ndarray:
    """Weights of (anchor, newest x0, older ...) that carry the anchor from level i to level i + 1.

    The newest prediction is the one at level i for the predictor and the one at level i + 1 for the corrector.
    """
    if sigma[i + 1] == 0:
        return np.array([0.0, alpha[i + 1]])
    h = lam[i + 1] - lam[i]
    if h == 0:  # karras sigmas that end on sigma_min repeat it
        return np.array([1.0, 0.0])
    nodes = np.array([(lam[i - q] - lam[i]) / h for q in range(1, order)] + ([1.0] if corrector else []))
    # From pure noise (alpha = 0) h is infinite, and B(h) = h with it.
    shape_factor = -h if solver_type == "bh1" and math.isfinite(h) else math.expm1(-h)
    if len(nodes) == 1 and (not corrector or order == 1):
        rho = np.array([0.5])  # the paper's choice: with one node B(h) cancels to first order
    else:
        moments, factorial, phi = [], 1.0, math.expm1(-h) / -h - 1
        for q in range(1, len(nodes) + 1):
            moments.append(phi * factorial / shape_factor)
            factorial *= q + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve(np.vander(nodes, increasing=True).T, moments) if len(nodes) else np.zeros(0)
    slopes = -alpha[i + 1] * shape_factor * rho / nodes  # weight of (prediction at the node - prediction at level i)
    at_level_i = -alpha[i + 1] * math.expm1(-h) - slopes.sum()
    keep = sigma[i + 1] / sigma[i]
    return np.array([keep, slopes[-1], at_level_i, *slopes[:-1]] if corrector else [keep, at_level_i, *slopes])


def _checked(orders: Sequence[int]) -> Sequence[int]:
    for i, order in enumerate(orders):
        if not 1 <= order <= i + 1:
            raise ValueError(f"order {order} of interval {i} must lie between 1 and {i + 1}")
    return orders


def _padded(weights: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    return np.pad(np.asarray(weights, dtype=np.float64), (0, width - len(weights)))


class UniPC(
    TableScheduler,
    options=dict(
        solver_order=2, solver_type="bh2", lower_order_final=True, disable_corrector=[], predict_x0=True, solver_p=None,
        thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0,
    ),
):  # fmt: skip
    """UniPC with predictor order 1 to 3; the drop-in for ``UniPCMultistepScheduler``. One network call per step."""

    convention = Convention(ends_on_point=True)

    def _check_options(self) -> None:
        super()._check_options()
        config = self.config
        if config.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order={config.solver_order} must be 1, 2 or 3")
        for option, only in {"predict_x0": True, "solver_p": None}.items():
            if config[option] != only:
                raise ValueError(f"{option}={config[option]!r} is not supported; only {only} is")

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        config, calls = self.config, len(sigma) - 1
        last = [calls - k if config.lower_order_final else config.solver_order for k in range(begin, calls)]
        orders = [min(config.solver_order, i + 1, most) for i, most in enumerate(last)]
        uncorrected = {k + 1 - begin for k in config.disable_corrector}  # the twin names the interval before the call
        # from_config may bring another class's word, which the twin reads as bh2 too.
        solver_type = "bh2" if config.solver_type in ("midpoint", "heun", "logrho") else config.solver_type
        rows = unipc(alpha[begin:], sigma[begin:], orders, solver_type=solver_type, uncorrected=uncorrected)
        return Table(alpha[begin:], sigma[begin:], tuple(rows))
