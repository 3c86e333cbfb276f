"""Formulas that place N noise levels between two ends, or N times in a range."""

from collections.abc import Callable

import numpy as np
from diffusers.schedulers import AysSchedules

AYS = {"ays_sd": "StableDiffusionSigmas", "ays_sdxl": "StableDiffusionXLSigmas", "ays_svd": "StableDiffusionVideoSigmas"}


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


def polyexponential_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, rho: float = 1.0) -> np.ndarray:
    """(N,) noise levels from ``sigma_max`` down to ``sigma_min``, whose log is a power ``rho`` of an even ramp; 1 is exponential.

    Larger ``rho`` puts more of them at low noise.

    Source: ``get_sigmas_polyexponential`` of k-diffusion (Crowson, https://github.com/crowsonkb/k-diffusion).

    Raises:
        ValueError: as for the others, and rho not above 0.
    """
    _check_range("polyexponential", num_steps, sigma_min, sigma_max)
    if not 0 < rho < np.inf:
        raise ValueError(f"spacing_rho={rho} must be above 0; 1 is exponential, more puts more levels at low noise")
    low, high = np.log(sigma_min), np.log(sigma_max)
    return np.exp(low + np.linspace(1, 0, num_steps) ** rho * (high - low))


def logsnr_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float) -> np.ndarray:
    """(N,) noise levels of a flow model, alpha = 1 - sigma, from ``sigma_max`` down to ``sigma_min``, spaced evenly in lam.

    Source: as ``exponential_sigmas``, which is the same at alpha = 1 and in VP.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max < 1; pure noise has lam = -inf.
    """
    if not 0 < sigma_min < sigma_max < 1:
        raise ValueError(f"logsnr sigmas of flow models need 0 < sigma_min < sigma_max < 1, got {sigma_min} and {sigma_max}")
    ratio = exponential_sigmas(num_steps, sigma_min=sigma_min / (1 - sigma_min), sigma_max=sigma_max / (1 - sigma_max))
    return ratio / (1 + ratio)


def beta_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """(N,) noise levels from ``sigma_max`` down to ``sigma_min`` at even quantiles of the beta distribution with shapes a and b.

    Shapes below 1 put levels at the ends, a < b more of them at low noise.

    Source: Lee et al. 2024 (arXiv:2407.12173); the default shapes are Diffusers'.

    Raises:
        ValueError: as for the others, and shapes outside 0 .. 10.
    """
    _check_range("beta", num_steps, sigma_min, sigma_max)
    for name, shape in (("spacing_alpha", a), ("spacing_beta", b)):
        if not 0 < shape <= 10:  # more would cost the series below its digits
            raise ValueError(f"{name}={shape} must lie between 0 and 10, without 0; 0.6 is Diffusers'")
    return sigma_min + beta_quantile(1 - np.linspace(0, 1, num_steps), a, b) * (sigma_max - sigma_min)


def beta_quantile(u: np.ndarray, a: float, b: float) -> np.ndarray:
    """x with I_x(a, b) = u, where I is the regularised incomplete beta function; ``u`` in [0, 1].

    Bisection on its power series at 0, which is needed up to x = 1/2 only, where a term is half the one before: I_x(a, b) is
    1 - I_(1-x)(b, a).
    """
    below, above = _incomplete_beta(a, b), _incomplete_beta(b, a)
    half = np.array(0.5)
    whole = below(half) + above(half)
    return np.where(u <= below(half) / whole, _solved(below, u * whole), 1 - _solved(above, (1 - u) * whole))


def _incomplete_beta(a: float, b: float) -> Callable[[np.ndarray], np.ndarray]:
    """The integral of t^(a-1) (1-t)^(b-1) from 0 to x, for x up to 1/2."""
    n = np.arange(60)
    series = np.cumprod(np.append(1.0, (n[:-1] + 1 - b) / (n[:-1] + 1))) / (a + n)  # (1 - b)_n / n! / (a + n)
    return lambda x: x**a * (x[..., None] ** n @ series)


def _solved(rising: Callable[[np.ndarray], np.ndarray], target: np.ndarray) -> np.ndarray:
    """x between 0 and 1/2 where ``rising`` is ``target``."""
    left, right = np.zeros_like(target), np.full_like(target, 0.5)
    for _ in range(60):
        middle = (left + right) / 2
        below = rising(middle) < target
        left, right = np.where(below, middle, left), np.where(below, right, middle)
    return np.where(target > 0, (left + right) / 2, 0.0)


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
