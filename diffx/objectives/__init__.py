"""Training methods, one file each: the mathematics on (alpha, sigma, x0, eps) alone."""

from .consistency import LCM, PCM
from .diffusion import Diffusion
from .dmd import DMD2
from .ect import ConsistencyTraining
from .guidance import Guidance
from .objective import Inference, Loss, Objective
from .progressive import Progressive

__all__ = ["DMD2", "LCM", "PCM", "ConsistencyTraining", "Diffusion", "Guidance", "Inference", "Loss", "Objective", "Progressive"]
