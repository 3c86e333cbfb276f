"""What Diffusers looks for in the folder of a custom pipeline; the pipeline itself is in latent_interpolation_pipeline.py."""

import sys

from .latent_interpolation_pipeline import LatentInterpolationPipeline

__all__ = ["LatentInterpolationPipeline"]

# Diffusers runs the pipeline.py of every local folder in one module, and wants one pipeline in it: leave none for the next folder.
sys.modules.pop(__name__, None)
