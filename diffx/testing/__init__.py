"""Tiny real Diffusers pipelines with random weights: the same classes, calls and files as the large ones, in milliseconds.

They are built from configurations alone (no network, no files), always with the same weights for the same ``seed``, in float32.
Images are 16 x 16 pixels, latents 8 x 8 (VAE factor 2). Those that take prompts have real (tiny) text encoders, but AudioLDM2,
which is called with embeddings.

``LocalHub`` is a Hub on this machine, to push to and to pull from without a network.

Example:
    >>> pipe = tiny_flux()
    >>> pipe.scheduler = diffx.UniPC.from_config(pipe.scheduler.config)
    >>> latents = pipe(**call_inputs(pipe), num_inference_steps=6, output_type="latent").images
"""

from .calls import call_inputs, denoise, end_of, sample_of
from .hub import LocalHub
from .parts import IMAGE_SIZE, MAX_TOKENS, WIDTH
from .pipelines import (
    tiny_audioldm2,
    tiny_controlnet,
    tiny_dit,
    tiny_flux,
    tiny_latent_consistency,
    tiny_latent_upscale,
    tiny_pixart,
    tiny_sd3,
    tiny_sd35,
    tiny_sdxl,
    tiny_stable_diffusion,
    tiny_svd,
)

__all__ = [
    "IMAGE_SIZE",
    "MAX_TOKENS",
    "WIDTH",
    "LocalHub",
    "call_inputs",
    "denoise",
    "end_of",
    "sample_of",
    "tiny_audioldm2",
    "tiny_controlnet",
    "tiny_dit",
    "tiny_flux",
    "tiny_latent_consistency",
    "tiny_latent_upscale",
    "tiny_pixart",
    "tiny_sd3",
    "tiny_sd35",
    "tiny_sdxl",
    "tiny_stable_diffusion",
    "tiny_svd",
]
