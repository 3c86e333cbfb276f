"""Training methods, one file each: the mathematics on (alpha, sigma, x0, eps) alone."""

from .diffusion import Diffusion
from .objective import Inference, Loss, Objective
from .progressive import Progressive

__all__ = ["Diffusion", "Inference", "Loss", "Objective", "Progressive"]
