"""Per-example weights of a loss on x0, and distances: what several objectives share."""

import numpy as np
from torch import Tensor


def truncated_snr(snr: np.ndarray) -> np.ndarray:
    """(B,) weights max(SNR, 1) of a squared error of x0: the larger of the errors of x0 and of the noise.

    Source: Salimans and Ho 2022 (arXiv:2202.00512) section 4.
    """
    return np.maximum(snr, 1.0)


def squared(difference: Tensor) -> Tensor:
    """(B,) mean square of each sample."""
    return difference.float().square().flatten(1).mean(1)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """(B,) mean over entries of sqrt(d^2 + c^2) - c: quadratic below ``c``, linear above.

    Source: Song and Dhariwal 2023 (arXiv:2310.14189) section 3.3, entry by entry as latent consistency models have it.
    """
    return ((difference.float().square() + c**2).sqrt() - c).flatten(1).mean(1)


def absolute(difference: Tensor) -> Tensor:
    """(B,) mean absolute entry of each sample."""
    return difference.float().abs().flatten(1).mean(1)
