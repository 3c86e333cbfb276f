"""How a model was noised: betas, the (alpha, sigma) of each time, and every network output as x0 = a x + b out.

Frames (units of the sample): "vp" has alpha^2 + sigma^2 = 1, "ve" has alpha = 1, "flow" has alpha = 1 - sigma. A model with
betas runs in "vp" or "ve", whichever its Diffusers scheduler uses; a flow model always runs in "flow".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

Frame = Literal["vp", "ve", "flow"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
ZERO_SNR = 2.0**-24  # alphas_cumprod that stands for 0 where log SNR must stay finite; Diffusers' number


@dataclass(frozen=True)
class Process:
    """The noising process of a model, in the frame of the scheduler that samples it."""

    frame: Frame
    prediction_type: PredictionType
    num_train_timesteps: int
    edm_sigmas: np.ndarray | None  # (T,) float64 sigma / alpha of train time t, rising; None for flow
    zero_terminal_snr: bool = False  # the last train time is pure noise

    def levels(self, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma), float64, of grid values: ``edm_sigma`` for models with betas, sigma for flow."""
        if self.frame == "flow":
            return 1 - sigmas, sigmas
        if self.frame == "ve":
            return np.ones_like(sigmas), sigmas
        alpha = 1 / np.hypot(1.0, sigmas)
        with np.errstate(invalid="ignore"):  # inf is alpha = 0, sigma = 1: an exactly zero terminal SNR
            return alpha, np.where(np.isinf(sigmas), 1.0, sigmas * alpha)

    def sigma_at(self, t: np.ndarray) -> np.ndarray:
        """Grid values at train times ``t``, any real numbers in [0, T - 1] (flow: [0, T]); linear in between, as Diffusers."""
        if self.edm_sigmas is None:
            return t / self.num_train_timesteps
        table = self._whole_table(self.edm_sigmas)
        low = np.clip(np.floor(t).astype(int), 0, len(table) - 1)
        if np.array_equal(low, t):
            return table[low]  # np.interp turns an infinite last entry into NaN
        return np.interp(t, np.arange(len(table)), table)

    def t_at(self, sigmas: np.ndarray) -> np.ndarray:
        """Train times, real numbers, of grid values; linear in log sigma between two train times and clipped at the ends."""
        if self.edm_sigmas is None:
            return sigmas * self.num_train_timesteps
        table = self._whole_table(self.edm_sigmas)
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table)))

    def _whole_table(self, table: np.ndarray) -> np.ndarray:
        # Not checked at construction: Diffusers' own tests make schedulers of two betas, which never run.
        if len(table) != self.num_train_timesteps:
            raise ValueError(f"trained_betas has {len(table)} numbers, num_train_timesteps is {self.num_train_timesteps}; they must agree")
        return table

    def x0_weights(self, alpha: float, sigma: float) -> tuple[float, float]:
        """The pair (a, b) with x0 = a x + b out at a noise level of this frame; see ``x0_weights``.

        Raises:
            ValueError: "epsilon" at zero terminal SNR, where the noise says nothing about the picture.
        """
        if self.prediction_type == "epsilon" and self.zero_terminal_snr and alpha / math.hypot(alpha, sigma) <= ZERO_SNR**0.5 * (1 + 1e-6):
            raise ValueError(
                'prediction_type="epsilon" says nothing about the picture at zero terminal SNR (rescale_betas_zero_snr=True): '
                'use a "v_prediction" or "sample" model, or timestep_spacing="leading", which does not visit that time'
            )
        return x0_weights(self.prediction_type, alpha, sigma)


def x0_weights(prediction_type: PredictionType, alpha: float, sigma: float) -> tuple[float, float]:
    """The pair (a, b) with x0 = a x + b out, for a network that outputs ``prediction_type``; x = alpha x0 + sigma eps.

    The network was trained in VP units, so its v is (alpha eps - sigma x0) / r with r^2 = alpha^2 + sigma^2: r is 1 in the
    VP frame and sqrt(1 + sigma^2) in the VE frame. Flow outputs u = eps - x0.

    Source: epsilon is Ho et al. 2020 (arXiv:2006.11239); v is Salimans and Ho 2022 (arXiv:2202.00512) appendix D.

    Raises:
        ValueError: unknown prediction type; the message lists the known ones.
    """
    r = math.hypot(alpha, sigma)
    match prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "sample":
            return 0.0, 1.0
        case "v_prediction":
            return alpha / r**2, -sigma / r
        case "flow_prediction":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise ValueError(f"prediction_type={prediction_type!r} is not one of {', '.join(get_args(PredictionType))}")


def make_process(config: Mapping[str, Any], frame: Frame, *, zero_snr: float = ZERO_SNR) -> Process:
    """The process a Diffusers scheduler config describes.

    Args:
        frame: of the class for models with betas; a flow config is in the "flow" frame whatever is asked.
        zero_snr: alphas_cumprod of the last time under ``rescale_betas_zero_snr``; 0 only where no log SNR is needed.
    """
    prediction_type, steps = config["prediction_type"], config["num_train_timesteps"]
    if prediction_type not in get_args(PredictionType):
        raise ValueError(f"prediction_type={prediction_type!r} is not one of {', '.join(get_args(PredictionType))}")
    if is_flow(config):
        if prediction_type != "flow_prediction":
            raise ValueError(f'use_flow_sigmas=True contradicts prediction_type={prediction_type!r}; flow models have "flow_prediction"')
        return Process("flow", prediction_type, steps, None)
    alphas_cumprod = cumulative_alphas(make_betas(config)).double().numpy().copy()
    if config["rescale_betas_zero_snr"]:
        alphas_cumprod[-1] = zero_snr
    with np.errstate(divide="ignore"):
        edm_sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    return Process(frame, prediction_type, steps, edm_sigmas, config["rescale_betas_zero_snr"])


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config, ours or Diffusers', in memory or from a file, describes a flow model.

    Diffusers' flow schedulers say so by their class only, and an in-memory config does not hold its class: they are the ones
    that have shifts (the LTX ancestral one: a noise factor) and no betas.
    """
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return True
    return "beta_schedule" not in config and "trained_betas" not in config and not {"shift", "invert_sigmas", "s_noise"}.isdisjoint(config)


def make_betas(config: Mapping[str, Any]) -> torch.Tensor:
    """(T,) float32 variances of the forward steps, the same bits as Diffusers computes.

    Source: linear and cosine are Ho et al. 2020 and Nichol and Dhariwal 2021 (arXiv:2102.09672) eq. 17; sigmoid is Xu et al. 2022
    (arXiv:2203.02923, GeoDiff); the zero-SNR rescale is Lin et al. 2023 (arXiv:2305.08891) algorithm 1.

    Raises:
        ValueError: unknown ``beta_schedule``.
    """
    start, end, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        betas = torch.tensor(np.asarray(config["trained_betas"]), dtype=torch.float32)
    else:
        match config["beta_schedule"]:
            case "linear":
                betas = torch.linspace(start, end, steps, dtype=torch.float32)
            case "scaled_linear":
                betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
            case "squaredcos_cap_v2":
                betas = _cosine_betas(steps)
            case "sigmoid":
                betas = torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
            case unknown:
                known = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
                raise ValueError(f"beta_schedule={unknown!r} is not one of {known}")
    if not config["rescale_betas_zero_snr"]:
        return betas
    root = cumulative_alphas(betas).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def cumulative_alphas(betas: torch.Tensor) -> torch.Tensor:
    """(T,) float32 ``alphas_cumprod``: alpha^2 of each train time. The float32 product is part of every checkpoint's definition."""
    return torch.cumprod(1.0 - betas, dim=0)


def _cosine_betas(steps: int) -> torch.Tensor:
    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)], dtype=torch.float32)
