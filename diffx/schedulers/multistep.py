"""Exponential multistep solvers that look back at earlier predictions: DPM-Solver and DPM-Solver++ of orders 1 to 3, ODE and SDE."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .grid import Convention
from .scheduler import TableScheduler
from .table import Row, Table

PURE_NOISE = math.log(1e-3)  # lam: zero terminal SNR, where stock has alpha = 2^-12, is below; every published beta table above
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")


def dpmpp(
    alpha: np.ndarray,
    sigma: np.ndarray,
    orders: Sequence[int],
    *,
    eta: float = 0.0,
    solver_type: str = "midpoint",
    stock_third_order: bool = False,
) -> list[Row]:
    """One row per interval of DPM-Solver++(1M/2M/3M), of its SDE form, or of one in between.

    The x0 predictions are a polynomial in the half-log-SNR lam, integrated exactly against the linear part (order 2
    "midpoint" replaces psi_2 by psi_1 / 2). With "heun" this is also what is called RES (2M, 3M): the same exact integrals.

    Source: Lu et al. 2022 (arXiv:2211.01095) algorithm 2 and, for the SDE, its section on SDE-DPM-Solver++.

    Args:
        alpha, sigma: (N + 1,) the noise levels; sigma may end in 0 and alpha may start at 0.
        orders: (N,) 1, 2 or 3; interval i has at most i + 1 predictions to look at.
        eta: share of the noise: 0 is the ODE, 1 the SDE; any eta >= 0 has the same noise levels.
        stock_third_order: weigh the second difference as Diffusers does: half of it, which leaves order 2 (and with the wrong
            sign of 1/2 in the SDE form). Only for comparison.

    Raises:
        ValueError: an order outside 1 .. 3 or beyond the predictions there are, or an unknown ``solver_type``.
    """
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    rate = 1 + eta
    rows = []
    for i, order in enumerate(orders):
        _check(i, order, solver_type)
        if sigma[i + 1] == 0:
            rows.append(Row((0.0, alpha[i + 1])))
            continue
        h = lam[i + 1] - lam[i]
        psi_1, psi_2, psi_3 = psi(rate * h)
        keep = sigma[i + 1] / sigma[i] * (math.exp(-eta * h) if eta else 1.0)  # h may be infinite
        noise = sigma[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
        integrals = psi_1, psi_2, psi_3 - eta if stock_third_order else psi_3
        weights = alpha[i + 1] * polynomial_weights(lam[i::-1][:order], lam[i + 1], integrals, solver_type, stock_third_order)
        rows.append(Row((keep, *weights.tolist()), noise=noise))
    return rows


def dpm(
    alpha: np.ndarray,
    sigma: np.ndarray,
    orders: Sequence[int],
    *,
    stochastic: bool = False,
    solver_type: str = "midpoint",
    stock_third_order: bool = False,
) -> list[Row]:
    """One row per interval of DPM-Solver(1/2/3) in multistep form, or of its SDE form.

    It is ``dpmpp`` with x0 and eps, alpha and sigma in each other's place, so that lam changes sign: the noise predictions are the
    polynomial, and each call keeps its own. A step to sigma = 0 and one from alpha = 0 take the limit of order 1, which is x0's.

    Source: Lu et al. 2022 (arXiv:2206.00927) and, for the SDE, Lu et al. 2022 (arXiv:2211.01095).

    Args:
        alpha, sigma, orders, solver_type, stock_third_order: as for ``dpmpp``.
        stochastic: the SDE, which keeps the noise levels of its grid only as steps go to 0: on data that is one point a first
            step of h in lam lands on 1 + 2 (e^h - 1)^2 times the variance.

    Raises:
        ValueError: as for ``dpmpp``, or the SDE from pure noise, where its first step has infinite variance.
    """
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    if stochastic and lam[0] < PURE_NOISE:
        raise ValueError(
            f"the noise of sde-dpmsolver grows without bound from pure noise (the run begins at alpha/sigma={math.exp(lam[0]):.3g}); "
            'use algorithm_type="sde-dpmsolver++", or a grid that begins with some signal'
        )
    rate = 2 if stochastic else 1
    rows = []
    for i, order in enumerate(orders):
        _check(i, order, solver_type)
        (a0, a1), (s0, s1) = alpha[i : i + 2].tolist(), sigma[i : i + 2].tolist()
        if s1 == 0 or a0 == 0:
            rows.append(Row((s1 / s0, a1 - s1 / s0 * a0)))
            continue
        h = lam[i + 1] - lam[i]
        weights = rate * s1 * polynomial_weights(lam[i::-1][:order], lam[i + 1], psi(-h), solver_type, stock_third_order)
        noise = s1 * math.sqrt(math.expm1(2 * h)) if stochastic else 0.0
        rows.append(Row((a1 / a0, *weights.tolist()), noise=noise, kept=(1 / s0, -a0 / s0)))
    return rows


def dpm_excess(sigma: np.ndarray, rows: Sequence[Row]) -> float:
    """A bound on how far rows that keep eps leave the variances of their grid, on data that is one point.

    There the kept eps has no part of the point, and the standard deviation of a sum is at most the sum of them.
    """
    stds, most = [1.0], 0.0  # of eps, newest first
    for row, s0, s1 in zip(rows, sigma, sigma[1:], strict=False):
        if s1 > 0:
            own, *older = row.sample[1:]
            drift = abs(row.sample[0] * s0 + own) * stds[0] + sum(abs(w) * std for w, std in zip(older, stds[1:], strict=False))
            variance = drift**2 + row.noise**2
            most = max(most, variance - s1**2, s1**2 - row.noise**2)
            stds.insert(0, math.sqrt(variance) / s1)
    return float(most) * (1 + 1e-9) + 1e-9  # rounding


def _check(i: int, order: int, solver_type: str) -> None:
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type={solver_type!r} is not one of midpoint, heun")
    if not 1 <= order <= min(3, i + 1):
        raise ValueError(f"order {order} of interval {i} must lie between 1 and {min(3, i + 1)}")


def polynomial_weights(
    nodes: np.ndarray, end: float, integrals: tuple[float, float, float], solver_type: str, stock_third_order: bool = False
) -> np.ndarray:
    """(order,) weights of predictions at ``nodes`` in the integral, from the first node to ``end``, of the polynomial through them.

    Args:
        nodes: (order,) lam, on either side of the first.
        integrals: of the first prediction, of the slope there times h and of the second derivative times h^2; h is the step.
    """
    order, h = len(nodes), end - nodes[0]
    psi_1, psi_2, psi_3 = integrals
    # Weights of m0, m1, m2 in: the first prediction, its slope times h, its second derivative times h^2.
    now, slope, bend = np.array([1.0, 0, 0]), np.zeros(3), np.zeros(3)
    if order >= 2:
        r0 = (nodes[0] - nodes[1]) / h if h > 0 else math.inf
        slope = first = np.array([1, -1, 0]) / r0
    if order == 3:
        r1 = (nodes[1] - nodes[2]) / h if h > 0 else math.inf
        second = np.array([0, 1, -1]) / r1
        slope = first + (first - second) * (1 / (1 + r1 / r0) if math.isfinite(r0) else 0.0)
        bend = 2 * (first - second) / (r0 + r1)
    if order == 2 and solver_type == "midpoint":
        psi_2 = psi_1 / 2
    if order == 3 and stock_third_order:
        bend = bend / 2
    return (psi_1 * now + psi_2 * slope + psi_3 * bend)[:order]


def solver_type_of(config: Mapping[str, Any]) -> str:
    """The solver_type that is meant: ``from_config`` may bring another class's word, which Diffusers reads as midpoint too."""
    return "midpoint" if config["solver_type"] in ("logrho", "bh1", "bh2") else config["solver_type"]


def psi(h: float) -> tuple[float, float, float]:
    """Integrals over one step of exp(-(h - u)) times 1, u / h and (u / h)^2 / 2, u from 0 to h; ``h`` may be infinite, or negative."""
    if abs(h) < 1e-2:  # the closed forms lose digits: four terms of the series leave a relative error below 1e-10
        psi_3 = h / 6 - h**2 / 24 + h**3 / 120 - h**4 / 720
        psi_2 = h * (0.5 - psi_3)
        return h * (1 - psi_2), psi_2, psi_3
    psi_1 = -math.expm1(-h)
    psi_2 = 1 - psi_1 / h
    return psi_1, psi_2, 0.5 - psi_2 / h


class DPMSolver(
    TableScheduler,
    options=dict(
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True, euler_at_final=False,
        thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0, variance_type=None,
    ),
    own=dict(stock_third_order=False, eta=1.0),
):  # fmt: skip
    """DPM-Solver++ and DPM-Solver of order 1, 2 (2M) or 3 (3M), ODE or SDE; the drop-in for ``DPMSolverMultistepScheduler``.

    ``algorithm_type`` is "dpmsolver++" or "sde-dpmsolver++"; with the latter ``eta`` is the share of its noise, from 0 (the ODE) over
    1 (the SDE, as in Diffusers) to more. "dpmsolver" and "sde-dpmsolver" extrapolate the noise instead of x0; they serve flow models
    and ``final_sigmas_type="zero"`` as well, where the last step is that of order 1. Order 3 has the coefficient that makes it order 3;
    ``stock_third_order=True`` reproduces Diffusers'.
    """

    convention = Convention(ends_on_point=True)

    def _check_options(self) -> None:
        super()._check_options()
        config = self.config
        if config.algorithm_type not in (*ALGORITHMS, "deis"):  # the twin reads DEIS's word as dpmsolver++
            raise ValueError(f"algorithm_type={config.algorithm_type!r} is not one of {', '.join(ALGORITHMS)}")
        if config.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order={config.solver_order} must be 1, 2 or 3")

        eta = config.get("eta", 1.0)
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta={eta} must be a finite share of the noise, at least 0")
        if eta != 1 and config.algorithm_type != "sde-dpmsolver++":
            raise ValueError(f'eta={eta} needs algorithm_type="sde-dpmsolver++"; {config.algorithm_type!r} has no such share')

    def _method(self) -> tuple[str, str]:
        """The algorithm_type and solver_type that are meant."""
        return self.config.algorithm_type, solver_type_of(self.config)

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        config, calls = self.config, len(sigma) - 1
        lowered = config.lower_order_final and calls < 15  # the twin's rule, decided by the full length
        orders = [min(config.solver_order, i + 1) for i in range(calls - begin)]
        if config.euler_at_final or lowered or config.final_sigmas_type == "zero":
            orders[-1] = 1
        if lowered and len(orders) > 1:
            orders[-2] = min(orders[-2], 2)
        algorithm_type, solver_type = self._method()
        alpha, sigma, stochastic = alpha[begin:], sigma[begin:], algorithm_type.startswith("sde")
        shape: dict[str, Any] = dict(solver_type=solver_type, stock_third_order=bool(config.get("stock_third_order")))
        if algorithm_type.endswith("dpmsolver"):
            rows = dpm(alpha, sigma, orders, stochastic=stochastic, **shape)
            return Table(alpha, sigma, tuple(rows), excess=dpm_excess(sigma, rows) if stochastic else 1e-9)
        rows = dpmpp(alpha, sigma, orders, eta=config.get("eta", 1.0) if stochastic else 0.0, **shape)
        return Table(alpha, sigma, tuple(rows))


class DEIS(DPMSolver, options=dict(algorithm_type="deis", solver_type="logrho", final_sigmas_type="sigma_min")):
    """DEIS of order 1, 2 or 3, the drop-in for ``DEISMultistepScheduler``; on flow models it ends at zero, which Diffusers' does not.

    Its polynomial of the noise in log(sigma / alpha) is one in lam, so that it is DPM-Solver with every integral exact:
    ``dpm(..., solver_type="heun")``. By default the last sigma is that of the first train time, as in Diffusers.

    Source: Zhang and Chen 2022 (arXiv:2204.13902).
    """

    def _check_options(self) -> None:
        super()._check_options()
        if self.config.algorithm_type.startswith("sde"):
            raise ValueError(f"algorithm_type={self.config.algorithm_type!r} has noise, and DEIS is an ODE's; use DPMSolver")
        if self.config.get("stock_third_order"):
            raise ValueError("stock_third_order=True is for DPMSolver; Diffusers' third order of DEIS is right")

    def _method(self) -> tuple[str, str]:
        return "dpmsolver", "heun"
