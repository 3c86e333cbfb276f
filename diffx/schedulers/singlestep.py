"""Exponential solvers that start every group of calls afresh and look at nothing before it: DPM-Solver and DPM-Solver++ 2S and 3S."""

from collections.abc import Sequence

import numpy as np

from .grid import Convention
from .multistep import polynomial_weights, psi, solver_type_of
from .scheduler import TableScheduler
from .table import KEEP_X0, Row, Table

ALGORITHMS = ("dpmsolver++", "dpmsolver")
WIDEST = 10.0  # step in lam of a group on noise predictions, which multiplies the rounding of its first sample by exp(2 h)


def dpm_singlestep(
    alpha: np.ndarray, sigma: np.ndarray, orders: Sequence[int], *, algorithm_type: str = "dpmsolver++", solver_type: str = "midpoint"
) -> list[Row]:
    """One row per call of DPM-Solver++(2S/3S): the q-th call of a group carries the group's first sample to the next level. Order 2, 3.

    The x0 predictions of the group, or with "dpmsolver" its noise predictions, are a polynomial in the half-log-SNR lam, integrated
    exactly against the linear part. "midpoint" replaces psi_2 by psi_1 / 2 in the second call and leaves the second prediction out
    of the third. Order 3 needs groups whose three steps are even in lam; on others the weight of the second call's point, which is
    known to order 1 only, leaves order 2.

    Source: Lu et al. 2022 (arXiv:2211.01095) algorithm 1 for 2S; Lu et al. 2022 (arXiv:2206.00927) for singlestep DPM-Solver-2 and -3.

    Args:
        alpha, sigma: (N + 1,) the noise levels; sigma may end in 0 and alpha may start at 0, with calls of order 1 there.
        orders: (N,) each call's place in its group: 1 begins one, then 2, then 3.

    Raises:
        ValueError: an order that does not follow the one before, a group of several calls from pure noise or to sigma = 0, where lam
            is infinite, a group on noise predictions that is too wide for rounding, or an unknown ``algorithm_type`` or ``solver_type``.
    """
    for name, given, known in (("algorithm_type", algorithm_type, ALGORITHMS), ("solver_type", solver_type, ("midpoint", "heun"))):
        if given not in known:
            raise ValueError(f"{name}={given!r} is not one of {', '.join(known)}")
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    on_noise = algorithm_type == "dpmsolver"
    rows = []
    for i, order in enumerate(orders):
        if order != 1 and not (i and 1 < order == orders[i - 1] + 1 <= 3):
            raise ValueError(f"order {order} of call {i} must be 1, or one more than that of the call before and at most 3")
        start = i + 1 - order
        a0, s0, a1, s1 = alpha[start], sigma[start], alpha[i + 1], sigma[i + 1]
        goes_on = i + 1 < len(orders) and orders[i + 1] > 1
        if order == 1 and not goes_on:  # DDIM's step, which holds at any level
            rows.append(Row((s1 / s0, a1 - s1 / s0 * a0)))
            continue
        if a0 == 0 or s1 == 0:
            raise ValueError(
                f"call {i} is in a group that begins at pure noise or ends at sigma = 0, where lam is infinite; let it be alone"
            )
        anchor = (1.0,) if goes_on else None  # the group's first sample
        h = lam[i + 1] - lam[start]
        if on_noise and order > 1 and h > WIDEST:
            raise ValueError(
                f"the group that ends with call {i} spans {h:.3g} in log(alpha / sigma), and on noise predictions {WIDEST:g} is the most "
                'that rounding allows; use algorithm_type="dpmsolver++", or more steps'
            )
        weights = _weights(lam[start : i + 1], lam[i + 1], psi(-h if on_noise else h), solver_type)[::-1]
        if on_noise:
            rows.append(Row((a1 / a0, *(s1 * weights).tolist()), anchor, kept=(1 / sigma[i], -alpha[i] / sigma[i])))
        else:
            rows.append(Row((s1 / s0, *(a1 * weights).tolist()), anchor, kept=KEEP_X0))
    return rows


def _weights(nodes: np.ndarray, end: float, integrals: tuple[float, float, float], solver_type: str) -> np.ndarray:
    """(order,) weights of a group's predictions, oldest first."""
    if len(nodes) == 3 and solver_type == "midpoint":
        first, last = polynomial_weights(nodes[::2], end, integrals, "heun")
        return np.array([first, 0.0, last])
    return polynomial_weights(nodes, end, integrals, solver_type)


class DPMSolverSinglestep(
    TableScheduler,
    options=dict(
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=False,
        thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0, variance_type=None,
    ),
):  # fmt: skip
    """DPM-Solver++ and DPM-Solver 2S and 3S; the drop-in for ``DPMSolverSinglestepScheduler``. N network calls for N steps.

    Calls come in groups of ``solver_order``, and only a group's last one is a solution of that order. As in Diffusers, the last call
    is of order 1 where the run ends at zero, and with ``lower_order_final`` also where the groups come out even; and a run that begins
    in the middle of a group takes what is left of it as a group. A first call at pure noise, as flow models have it, is a step of its
    own, and the groups begin after it. What is done to the sample inside a group reaches the solution through predictions only.

    ``algorithm_type="dpmsolver"`` works on the noise predictions, also on flow models and to a last sigma of zero. There is no
    "sde-dpmsolver++": in Diffusers' the noise of every call but a group's last does not stay in the sample.
    """

    convention = Convention(ends_on_point=True)

    def _check_options(self) -> None:
        super()._check_options()
        config = self.config
        if config.algorithm_type.startswith("sde"):
            raise ValueError(f"algorithm_type={config.algorithm_type!r} has noise, which groups of calls cannot keep; use DPMSolver")
        if config.algorithm_type not in (*ALGORITHMS, "deis"):  # the twin reads DEIS's word as dpmsolver++
            raise ValueError(f"algorithm_type={config.algorithm_type!r} is not one of {', '.join(ALGORITHMS)}")
        if config.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order={config.solver_order} must be 1, 2 or 3")

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        config, alone = self.config, int(alpha[0] == 0)  # no group can begin at pure noise
        algorithm_type = "dpmsolver" if config.algorithm_type == "dpmsolver" else "dpmsolver++"
        grouped = len(sigma) - 1 - alone
        orders = [1] * alone + [1 + i % config.solver_order for i in range(grouped)]
        if sigma[-1] == 0 or (config.lower_order_final and grouped % config.solver_order == 0):
            orders[-1] = 1
        rows = dpm_singlestep(
            alpha[begin:],
            sigma[begin:],
            [min(order, i + 1) for i, order in enumerate(orders[begin:])],
            algorithm_type=algorithm_type,
            solver_type=solver_type_of(config),
        )
        # On noise predictions the widest group leaves exp(20) roundings of float64, a few times 1e-8.
        return Table(alpha[begin:], sigma[begin:], tuple(rows), excess=1e-6 if algorithm_type == "dpmsolver" else 1e-9)
