"""Formulas that place N noise levels between two ends, or N times in a range."""

import numpy as np
from diffusers.schedulers import AysSchedules

AYS = {"ays_sd": "StableDiffusionSigmas", "ays_sdxl": "StableDiffusionXLSigmas", "ays_svd": "StableDiffusionVideoSigmas"}
OWN_SPACINGS = ("quadratic", *AYS)  # the words that Diffusers lacks


def karras_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """(N,) noise levels from ``sigma_max`` down to ``sigma_min``, spaced evenly in sigma^(1/rho).

    Source: Karras et al. 2022 (arXiv:2206.00364) eq. 5.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max < inf and num_steps >= 1.
    """
    _check_range("karras", num_steps, sigma_min, sigma_max)
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho


def exponential_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float) -> np.ndarray:
    """(N,) noise levels from ``sigma_max`` down to ``sigma_min``, spaced evenly in log sigma: at alpha = 1, and in VP, evenly in lam.

    Source: Lu et al. 2022 (arXiv:2206.00927), uniform logSNR steps. Diffusers has the same numbers under ``use_lu_lambdas``.
    """
    _check_range("exponential", num_steps, sigma_min, sigma_max)
    return np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), num_steps))


def beta_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, shape: float = 0.6) -> np.ndarray:
    """(N,) noise levels from ``sigma_max`` down to ``sigma_min`` at even quantiles of the symmetric beta distribution.

    Source: Lee et al. 2024 (arXiv:2407.12173); the shape is Diffusers'.
    """
    _check_range("beta", num_steps, sigma_min, sigma_max)
    return sigma_min + beta_quantile(1 - np.linspace(0, 1, num_steps), shape) * (sigma_max - sigma_min)


def beta_quantile(u: np.ndarray, shape: float) -> np.ndarray:
    """x with I_x(a, a) = u for a = ``shape``, where I is the regularised incomplete beta function; ``u`` in [0, 1].

    Bisection on its power series at 0. By symmetry it is needed up to x = 1/2 only, where a term is half the one before, and where
    the value 1/2 is known and stands for the constant.
    """
    n = np.arange(60)
    series = np.cumprod(np.append(1.0, (n[:-1] + 1 - shape) / (n[:-1] + 1))) / (shape + n)  # (1 - a)_n / n! / (a + n)

    def integral(x: np.ndarray) -> np.ndarray:
        return x**shape * (x[..., None] ** n @ series)

    lower = np.minimum(u, 1 - u)
    left, right = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(60):
        middle = (left + right) / 2
        below = integral(middle) < 2 * lower * integral(np.array(0.5))
        left, right = np.where(below, middle, left), np.where(below, right, middle)
    x = np.where(lower > 0, (left + right) / 2, 0.0)
    return np.where(u > 0.5, 1 - x, x)


def ays_sigmas(num_steps: int, name: str) -> np.ndarray:
    """(N,) noise levels of "Align Your Steps" for SD 1.5 ("ays_sd"), SDXL ("ays_sdxl") or SVD ("ays_svd").

    The published ones are for 10 steps; other counts take them at even positions, linear in log sigma.

    Source: Sabour et al. 2024 (arXiv:2404.14507); the numbers are Diffusers' ``AysSchedules``.
    """
    published = np.log(AysSchedules[AYS[name]][:-1])  # the last one is 0
    return np.exp(np.interp(np.linspace(0, 1, num_steps), np.linspace(0, 1, len(published)), published))


def quadratic_timesteps(num_steps: int, last: int) -> np.ndarray:
    """(N,) whole train times, falling from ``last`` - 1, the i-th from below at (i / (N - 1))^2 of it: most of them at low noise.

    Small ones are pushed up where two would be equal.

    Source: Song et al. 2021 (arXiv:2010.02502) appendix D.2, quadratic selection of the trajectory.
    """
    i = np.arange(num_steps)
    t = np.floor((last - 1) * (i / max(1, num_steps - 1)) ** 2 + 0.5) if num_steps > 1 else np.array([last - 1.0])
    return np.maximum(t, i)[::-1].astype(np.float64)


def _check_range(word: str, num_steps: int, sigma_min: float, sigma_max: float) -> None:
    if not (0 < sigma_min < sigma_max < np.inf and num_steps >= 1):
        raise ValueError(f"{word} sigmas need 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max} for {num_steps} steps")
