"""Solvers that extrapolate the derivative: Adams-Bashforth in dx/dsigma, which Diffusers calls LMS, and gradient estimation in eps."""

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


def gradient_estimation(alpha: np.ndarray, sigma: np.ndarray, gamma: float) -> list[Row]:
    """One row per interval of DDIM on gamma * eps_new + (1 - gamma) * eps_old; ``gamma=1`` is DDIM.

    Calls keep eps = (x - alpha x0) / sigma for the next one; the first keeps x0, since pure noise (alpha = 0) says nothing of it.

    Source: Permenter and Yuan 2023 (arXiv:2306.04848), the gradient-estimation sampler; gamma = 2 is its authors' value.
    """
    if not 1 <= gamma <= 3:
        raise ValueError(f"gamma={gamma} must lie between 1 (DDIM) and 3; 2 is its authors' value")
    rows = [Row((sigma[1] / sigma[0], alpha[1] - sigma[1] / sigma[0] * alpha[0]))]
    for k, (a0, s0, a1, s1) in enumerate(zip(alpha[1:], sigma[1:], alpha[2:], sigma[2:], strict=False)):
        scale, gain = a1 / a0, s1 - a1 / a0 * s0  # DDIM is scale * x + gain * eps
        old = gain * (1 - gamma)
        # The first step was DDIM's own, so that its eps is (x - a0 * x0_old) / s0 here, too.
        weights = (scale, gain * gamma, old) if k else (scale + old / s0, gain * gamma, -old * a0 / s0)
        rows.append(Row(weights, kept=(1 / s0, -a0 / s0)))
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
