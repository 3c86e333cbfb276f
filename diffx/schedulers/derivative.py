"""Solvers that extrapolate the derivative dx/dsigma = (x - x0) / sigma: Adams-Bashforth of orders 1 to 4, which Diffusers calls LMS."""

from collections.abc import Sequence

import numpy as np

from .grid import Convention
from .scheduler import TableScheduler
from .table import Row, Table


def adams_bashforth(sigma: np.ndarray, orders: Sequence[int]) -> list[Row]:
    """One row per interval: the polynomial in sigma through the latest derivatives, integrated exactly. Order p with p of them.

    The derivative holds at alpha = 1 and at alpha = 1 - sigma alike; each call keeps its own. Nothing is singular at sigma = 0.

    Source: the method is that of Bashforth and Adams 1883, on steps of any size.

    Args:
        sigma: (N + 1,) the noise levels.
        orders: (N,) 1 to 4; interval i has at most i + 1 derivatives to look at.

    Raises:
        ValueError: an order outside 1 .. 4 or beyond the derivatives there are.
    """
    rows = []
    for i, order in enumerate(orders):
        if not 1 <= order <= min(4, i + 1):
            raise ValueError(f"order {order} of interval {i} must lie between 1 and {min(4, i + 1)}")
        h = sigma[i + 1] - sigma[i]
        nodes = (sigma[i - np.arange(order)] - sigma[i]) / h  # in steps
        weights = h * np.linalg.solve(np.vander(nodes, increasing=True).T, 1 / (1 + np.arange(order)))
        rows.append(Row((1.0, *weights.tolist()), kept=(1 / sigma[i], -1 / sigma[i])))
    return rows


class LMS(TableScheduler, own=dict(solver_order=4)):
    """Linear multistep (Adams-Bashforth, order 4), the drop-in for ``LMSDiscreteScheduler``, and for flow. One network call per step.

    ``solver_order`` (1 to 4) is what Diffusers has as an argument of ``step``. Models with zero terminal SNR begin at sigma 4096 in
    spaced times, and float32 rounds there to 1e-3, which stays in the sum: give them ``use_karras_sigmas`` and a ``sigma_max``.
    """

    frame = "ve"
    convention = Convention(whole_t=False, karras_between="spaced")

    def _check_options(self) -> None:
        super()._check_options()
        if self._solver_order not in (1, 2, 3, 4):
            raise ValueError(f"solver_order={self._solver_order} must be 1, 2, 3 or 4")

    @property
    def _solver_order(self) -> int:
        return self.config.get("solver_order", 4)

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        alpha, sigma = alpha[begin:], sigma[begin:]
        orders = [min(self._solver_order, i + 1) for i in range(len(sigma) - 1)]
        return Table(alpha, sigma, tuple(adams_bashforth(sigma, orders)))
