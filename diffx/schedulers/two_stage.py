"""Solvers that call the network twice per interval: Heun."""

from itertools import pairwise

import numpy as np

from .grid import Convention
from .scheduler import TableScheduler
from .table import Row, Table


def heun(sigma: np.ndarray) -> list[Row]:
    """2N - 1 rows for N intervals: in each an Euler step, then the mean of the slopes at both its ends. Order 2.

    The last interval, which may end at 0, is one Euler step. The slope is (x - x0) / sigma per unit of sigma, which holds at
    alpha = 1 and at alpha = 1 - sigma alike.

    Source: Karras et al. 2022 (arXiv:2206.00364) algorithm 1.

    Args:
        sigma: (N + 1,) the ends of the intervals.
    """
    rows = []
    for s0, s1 in pairwise(sigma[:-1]):
        keep, gain = s1 / s0, 0.5 * (s0 - s1) / s1  # gain: of the change of x0 across the interval
        rows.append(Row((keep, 1 - keep), anchor=(1.0, 0.0)))
        rows.append(Row((keep, gain, 1 - keep - gain)))
    keep = sigma[-1] / sigma[-2]
    return [*rows, Row((keep, 1 - keep))]


class Heun(TableScheduler, options=dict(beta_start=0.00085, beta_end=0.012, clip_sample=False, clip_sample_range=1.0)):
    """Heun (order 2, 2N - 1 network calls for N steps), the drop-in for ``HeunDiscreteScheduler`` and ``FlowMatchHeunDiscreteScheduler``.

    A run begins at the first call of an interval, which has an even index. What is done to the sample between the two calls
    of an interval reaches the solution through the second prediction only; edits after an interval count in full.
    Spaced times of a model with zero terminal SNR begin at sigma 4096, and the first interval multiplies the difference of its two
    predictions by hundreds: give such models ``use_karras_sigmas`` with a ``sigma_max`` of, say, 80, or another solver.
    """

    order = 2
    frame = "ve"
    convention = Convention(whole_t=False, karras_between="spaced")

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        self._refuse_mid_interval(begin)
        return Table(alpha[begin:], sigma[begin:], tuple(heun(np.append(sigma[begin::2], sigma[-1]))))
