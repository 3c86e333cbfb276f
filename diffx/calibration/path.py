"""Stage (b): a grid by dynamic programming on recorded reference runs, without any further network call."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def best_grid(x: Tensor, x0: Tensor, alpha: np.ndarray, sigma: np.ndarray, calls: int, *, power: float = 0.0) -> list[int]:
    """Indices of the ``calls`` reference calls that a second-order multistep run should make, the first being 0.

    The cost of going from call i to call j, i' being the call before, is the mean square distance between where DPM-Solver++ 2M lands
    from the reference's own point and predictions and where the reference was, times sigma_j^-power; costs add up, and the cheapest
    path from call 0 to the end is found exactly. The last interval is first order, as in the solver.

    Source: dynamic programming over a finely sampled path is Watson et al. 2021 (arXiv:2106.03802) and Chen et al. 2024
    (arXiv:2405.11326, GITS); the second-order cost is ours.

    Args:
        x: (R + 1, B, ...) reference samples, the last being the end.
        x0: (R, B, ...) its x0 predictions.
        alpha, sigma: (R + 1,) its levels.
        calls: 2 .. R.
    """
    total = len(x0)
    vectors = torch.cat([x.flatten(1), x0.flatten(1)]).double()
    gram = (vectors @ vectors.T / vectors.shape[1]).numpy()
    lam = np.log(alpha[:-1] + 1e-12) - np.log(sigma[:-1])

    def square(columns: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> np.ndarray:
        """Mean square of sum_k weights[k] vectors[columns[k]]."""
        pairs = [(a, b, u * v) for a, u in zip(columns, weights) for b, v in zip(columns, weights)]
        return sum(gram[a, b] * w for a, b, w in pairs)  # type: ignore[return-value]

    j = np.arange(total)
    first = np.full((total, total), np.inf)  # cost of i -> j at first order
    second = np.full((total, total, total), np.inf)  # cost of i -> j at second order, by [i', i, j]
    for i in range(total):
        to = j[j > i]
        keep = sigma[to] / sigma[i]
        gain, weigh = alpha[to] - keep * alpha[i], sigma[to] ** -power
        first[i, to] = weigh * square((np.full_like(to, i), np.full_like(to, total + 1 + i), to), (keep, gain, -np.ones(len(to))))
        for before in range(i):
            slope = 0.5 * (lam[to] - lam[i]) / (lam[i] - lam[before])
            columns = (np.full_like(to, i), np.full_like(to, total + 1 + i), np.full_like(to, total + 1 + before), to)
            second[before, i, to] = weigh * square(columns, (keep, gain * (1 + slope), -gain * slope, -np.ones(len(to))))
    ends = np.array([square((np.array(total + 1 + i), np.array(total)), (alpha[-1], -np.ones(()))) for i in range(total)])
    ends = ends * max(float(sigma[-2]), 1e-12) ** -power

    cost = np.full((total, total), np.inf)  # cheapest way to stand at call j with i before it
    cost[0] = first[0]
    came: list[np.ndarray] = []
    for _ in range(calls - 2):
        ways = cost[:, :, None] + second  # [i', i, j]
        came.append(ways.argmin(0))
        cost = ways.min(0)
    i, last = np.unravel_index(int((cost + ends[None]).argmin()), cost.shape)
    indices = [int(last), int(i)]
    for step in reversed(came):
        indices.append(int(step[indices[-1], indices[-2]]))
    return indices[::-1]
