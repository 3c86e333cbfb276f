"""How exactly ``pipelines/latent_interpolation`` inverts pictures that the embedded model never saw: the table of its card.

    python benchmarks/inversion.py

Every sixth held-out glyph on white, its name as the prompt: back to noise by DDIM, and drawn again by ``StableDiffusionPipeline``.
Error is relative, of latents; PSNR compares with the picture itself, and the autoencoder alone is its ceiling.
"""

from itertools import product
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from diffx import glyphs
from diffx.loading import EMBEDDED

FOLDER = Path(__file__).parent.parent / "pipelines" / "latent_interpolation"


def psnr(a: Image.Image, b: Image.Image) -> float:
    square = (np.asarray(a, float) - np.asarray(b, float)) ** 2
    return float(10 * np.log10(255**2 / square.mean()))


def main() -> None:
    pipe = DiffusionPipeline.from_pretrained(EMBEDDED, custom_pipeline=str(FOLDER), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    shown = [(glyphs.names()[i], Image.fromarray(glyphs.Rendering(i).image())) for i in sorted(glyphs.held_out())[::6]]
    ceiling = np.mean([psnr(pipe.decode(pipe.encode(picture)), picture) for _, picture in shown])
    print(f"{len(shown)} pictures; the autoencoder alone: {ceiling:.2f} dB\n")
    print("| calls of the run | guidance | calls per step, at most | on average | error, median | error, largest | PSNR |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for num_inference_steps, guidance_scale, num_iterations in product((20, 50), (1.0, 3.0), (1, 5, 20)):
        run = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        calls, errors, quality = [], [], []
        for prompt, picture in shown:
            latents = pipe.encode(picture)
            counter = pipe.unet.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023  # used up before the next round
            noise = pipe.invert(latents, prompt, num_iterations=num_iterations, **run)
            counter.remove()
            drawn = StableDiffusionPipeline.__call__(pipe, prompt, latents=noise, output_type="latent", **run).images
            errors.append(((drawn - latents).norm() / latents.norm()).item())
            quality.append(psnr(pipe.decode(drawn), picture))
        average = len(calls) / len(shown) / num_inference_steps
        print(
            f"| {num_inference_steps} | {guidance_scale:g} | {num_iterations} | {average:.1f} "
            f"| {np.median(errors):.1e} | {max(errors):.1e} | {np.mean(quality):.2f} dB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
