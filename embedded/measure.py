"""Measure an embedded-model folder and write its measured.json, samples.png and model card.

    python embedded/measure.py --model diffx/assets/emoji --training "VAE 14 minutes on two cores, UNet 90 minutes on one"
    python embedded/measure.py --model diffx/assets/emoji --card-only

Every figure stands beside the same figure for real renderings that no prototype was made of. The card is made from
measured.json alone.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from train_unet import RENDERINGS_PER_GLYPH
from train_unet import SEED as TRAINING_SEED
from train_vae import held_out_images, psnr, to_tensor

from diffx import glyphs
from diffx.evaluation import (
    GlyphFeatures,
    all_prompts,
    frechet_distance,
    near_copy_share,
    precision_recall,
    prototypes,
    r_precision,
    render,
)
from diffx.evaluation.report import wrap_text, write_atomically

SEED = 0
COUNT = 200
STEPS = 50
GUIDANCE = 3.0  # chosen before any measurement; the others are reported for the seen prompts only
OTHER_GUIDANCE = (1.0, 2.0, 5.0)
PROTOTYPES, REAL, OTHER_REAL = 1000, 2000, 3000  # seeds of three disjoint sets of renderings
TITLES = {"seen": "seen prompts", "pairs": "unseen pairs: a seen glyph on a background it never had", "unseen": "unseen glyphs"}
BATCH = 50


def prompt_blocks() -> dict[str, list[str]]:
    """200 prompts drawn like the training captions, 200 unseen pairs, and the names of all unseen glyphs."""
    rng = np.random.default_rng(SEED)
    first, second = (rng.choice(glyphs.seen(), COUNT, replace=False) for _ in range(2))
    colours = list(glyphs.BACKGROUNDS)
    pairs = [glyphs.Rendering(int(g), next(c for c in colours if glyphs.is_held_out_pair(int(g), c))).caption() for g in second]
    return {
        "seen": [glyphs.random_rendering(int(g), rng).caption() for g in first],
        "pairs": pairs,
        "unseen": [glyphs.names()[g] for g in sorted(glyphs.held_out())],
    }


@torch.no_grad()
def sample(pipe, prompts: list[str], guidance_scale: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 32, 32) in [0, 1] and latents (N, 4, 8, 8) of the folder's own scheduler."""
    latents = []
    for i in range(0, len(prompts), BATCH):
        generators = [torch.Generator().manual_seed(SEED + i + k) for k in range(len(prompts[i : i + BATCH]))]
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
        latents.append(pipe(prompts[i : i + BATCH], generator=generators, **options).images)
    z = torch.cat(latents)
    return decode(pipe.vae, z), z


@torch.no_grad()
def decode(vae, z: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.decode(batch / vae.config.scaling_factor).sample for batch in z.split(128)]).div(2).add(0.5).clamp(0, 1)


@torch.no_grad()
def encode(vae, images: torch.Tensor) -> torch.Tensor:
    """(N, 3, 32, 32) in [0, 1] -> latents (N, 4, 8, 8)."""
    return torch.cat([vae.encode(batch * 2 - 1).latent_dist.mean for batch in images.split(256)]) * vae.config.scaling_factor


def block_measures(features, vae, prompts: list[str], images: torch.Tensor, everything: tuple[list[str], np.ndarray]) -> dict:
    """Each figure as {"value", "floor"}; "vae" is the floor after encoding and decoding, the best the model could do."""
    real, other = (render(prompts, seed=seed) for seed in (REAL, OTHER_REAL))
    sets = {"value": images, "floor": real, "vae": decode(vae, encode(vae, real))}
    found, goal = {name: features(x) for name, x in sets.items()}, features(other)
    names, table = everything
    own = [names.index(prompt) for prompt in prompts]
    measures = {
        "R-precision@1 among the block's prompts": {k: r_precision(f, table[own], range(len(own))) for k, f in found.items()},
        f"R-precision@1 among all {len(names)} prompts": {k: r_precision(f, table, own) for k, f in found.items()},
        f"FD ({features.name})": {k: frechet_distance(f, goal) for k, f in found.items()},
    }
    both = {k: precision_recall(goal, f) for k, f in found.items()}
    return measures | {"precision": {k: p for k, (p, _) in both.items()}, "recall": {k: r for k, (_, r) in both.items()}}


def measure(folder: Path, steps: int, training: str) -> dict:
    start = time.monotonic()
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    features, blocks = GlyphFeatures(), prompt_blocks()
    names = all_prompts()
    everything = names, prototypes(names, features, seed=PROTOTYPES, per_prompt=4)
    result = {
        "settings": {
            "seed": SEED, "steps": steps, "guidance_scale": GUIDANCE, "scheduler": type(pipe.scheduler).__name__,
            "threads": torch.get_num_threads(), "training": training,
            "parameters": {n: sum(p.numel() for p in pipe.components[n].parameters()) for n in ("unet", "text_encoder", "vae")},
        },
        "data": {"num_glyphs": len(glyphs.names()), "num_held_out": len(glyphs.held_out()), "per_glyph": RENDERINGS_PER_GLYPH},
        "vae_psnr": vae_psnr(pipe.vae), "blocks": {},
    }  # fmt: skip
    shown, seen_latents = {}, None
    for block, prompts in blocks.items():
        tick = time.monotonic()
        images, latents = sample(pipe, prompts, GUIDANCE, steps)
        seconds = time.monotonic() - tick
        measures = block_measures(features, pipe.vae, prompts, images, everything)
        result["blocks"][block] = {"count": len(prompts), "sampling_seconds": seconds, "measures": measures}
        shown[block] = list(zip(prompts, images))
        seen_latents = latents if block == "seen" else seen_latents
    result["near_copies"] = near_copies(pipe.vae, blocks["seen"], seen_latents)
    own = [names.index(prompt) for prompt in blocks["seen"]]
    result["guidance"] = {"3": result["blocks"]["seen"]["measures"]["R-precision@1 among the block's prompts"]["value"]}
    for scale in OTHER_GUIDANCE:
        found = features(sample(pipe, blocks["seen"], scale, steps)[0])
        result["guidance"][f"{scale:g}"] = r_precision(found, everything[1][own], range(len(own)))
    write_atomically(folder / "samples.png", lambda file: sample_grid(shown).save(file, format="png"))
    result["settings"]["wall_seconds"] = time.monotonic() - start
    return result


def vae_psnr(vae) -> dict:
    """In dB, over all pixels: held-out glyphs, and fresh renderings of every ninth seen glyph."""
    rng = np.random.default_rng(SEED + REAL)
    seen = to_tensor(np.stack([glyphs.random_rendering(g, rng).image() for g in glyphs.seen()[::9]]))
    held_out = held_out_images()
    return {"held_out": psnr(vae, held_out), "held_out_count": len(held_out), "seen": psnr(vae, seen), "seen_count": len(seen)}


def near_copies(vae, prompts: list[str], latents: torch.Tensor) -> dict:
    """Share of samples nearer, in latents, to a training rendering than 95 % of fresh real renderings of the same prompts are."""
    renderings = glyphs.training_renderings(RENDERINGS_PER_GLYPH, TRAINING_SEED)
    training = torch.cat([encode(vae, (to_tensor(np.stack([r.image() for r in renderings[i : i + 512]])) + 1) / 2)
                          for i in range(0, len(renderings), 512)])  # fmt: skip
    fresh = encode(vae, render(prompts, seed=REAL))
    share, threshold = near_copy_share(latents.flatten(1), training.flatten(1), fresh.flatten(1))
    return {"value": share, "floor": 0.05, "threshold": threshold, "count": len(prompts), "training_renderings": len(renderings)}


def sample_grid(shown: dict[str, list]) -> Image.Image:
    """The first twenty pictures of each block, unpicked, ten a row, at four times their size, each over its prompt."""
    cell, caption, columns, font = 128, 60, 10, ImageFont.load_default(14)
    rows = 2
    block_height = 30 + rows * (cell + caption)
    canvas = Image.new("RGB", (columns * (cell + 6) + 6, len(shown) * block_height), (236, 236, 236))
    draw = ImageDraw.Draw(canvas)
    for b, (block, pictures) in enumerate(shown.items()):
        draw.text((6, b * block_height + 6), TITLES[block], (0, 0, 0), ImageFont.load_default(18))
        for i, (prompt, image) in enumerate(pictures[: rows * columns]):
            x, y = 6 + i % columns * (cell + 6), b * block_height + 30 + i // columns * (cell + caption)
            pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
            canvas.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
            draw.multiline_text((x, y + cell + 2), "\n".join(wrap_text(prompt, font, cell).split("\n")[:3]), (40, 40, 40), font)
    return canvas


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags:
- diffusers
- text-to-image
- stable-diffusion
- emoji
- tiny-model
---

# The embedded emoji model

A complete `StableDiffusionPipeline` that draws 32 x 32 pixel emoji from their Unicode names on one of six plain backgrounds. It is
small enough to sit in a package and to run on a CPU in seconds, and real enough to measure samplers, distillation and conditioning on.
Parameters: U-Net {unet:,}, text encoder {text_encoder:,}, autoencoder {vae:,}. It predicts v over 1,024 steps, with zero terminal SNR.

![Samples](samples.png)

The first twenty prompts of each kind, not picked: seed {seed}, {scheduler}, {steps} calls, guidance scale {guidance_scale:g}.

## Use

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe("red apple on blue", num_inference_steps=50, guidance_scale=3.0).images[0]
image.resize((256, 256), 0).save("apple.png")
```

Prompts are lower-case Unicode names, alone (white background) or followed by " on gray", " on pink", " on yellow", " on green" or
" on blue".

## Data

{num_glyphs:,} single-code-point glyphs of Noto Color Emoji (SIL Open Font License 1.1), each in {per_glyph} random renderings: scaled,
shifted, mirrored where that does not contradict the name, half of them on white. Every tenth glyph ({num_held_out}) was never shown to
any network, neither picture nor name, and every seen glyph lacks one of the five colours as a background. The weights are under
Apache-2.0; the glyphs, and the repository's sheet of them, stay under their own licence.

## Training

From scratch on a CPU, with `embedded/train_vae.py` and `embedded/train_unet.py`. {training}

## Measured

Seed {seed}, {steps} calls of the folder's own {scheduler}, guidance scale {guidance_scale:g} (chosen before measuring). All that follows
took {wall_seconds:.0f} s (CPU threads: {threads}). *Real* is the same figure for real renderings that no prototype was made of;
*autoencoder* is the figure of those renderings after encoding and decoding, which the model can hardly pass.

| prompts | count | figure | model | autoencoder | real |
|:---|---:|:---|---:|---:|---:|
{table}

- Autoencoder PSNR: {held_out:.2f} dB on {held_out_count} renderings of unseen glyphs, {seen:.2f} dB on {seen_count} of seen glyphs.
- Near-copies: {copies:.1%} of {copies_count} samples of seen prompts lie nearer, in latents, to one of the {training_renderings:,} training
  renderings than 95 % of fresh real renderings of the same prompts do (so 5 % of real ones do, by construction).
- R-precision@1 among the {copies_count} seen prompts, by guidance scale: {guidance}.

R-precision@1 is the share of pictures whose nearest prototype (mean of four renderings, in the features of a small encoder that was
trained on renderings of the seen glyphs) is that of their own prompt. FD is the Frechet distance in those features: it is no FID, and
biased at these counts, so compare it within its row only. Precision and recall use three nearest neighbours.

## Limits

It knows these glyphs and nothing else; a name it never saw gets a mixture of what its words resemble. At 32 pixels faces and letters are
coarse. It is for measuring methods, not for making pictures; what helps here need not help a large model.
"""


def card(measured: dict) -> str:
    """The model card, from measured.json alone."""
    table = [
        f"| {TITLES[block]} | {content['count']} | {name} | " + " | ".join(f"{figure[k]:.3f}" for k in ("value", "vae", "floor")) + " |"
        for block, content in measured["blocks"].items()
        for name, figure in content["measures"].items()
    ]
    scales = sorted(measured["guidance"].items(), key=lambda item: float(item[0]))
    settings, copies = dict(measured["settings"]), measured["near_copies"]
    return CARD.format(
        **settings.pop("parameters"), **settings, **measured["data"], **measured["vae_psnr"],
        copies=copies["value"], copies_count=copies["count"], training_renderings=copies["training_renderings"],
        table="\n".join(table), guidance=", ".join(f"{value:.3f} at {scale}" for scale, value in scales),
    )  # fmt: skip


def main(folder: Path, steps: int, training: str, card_only: bool) -> None:
    file = folder / "measured.json"
    if not card_only:
        measured = measure(folder, steps, training)
        write_atomically(file, lambda f: f.write((json.dumps(measured, indent=2) + "\n").encode()))
    text = card(json.loads(file.read_text()))
    write_atomically(folder / "README.md", lambda f: f.write(text.encode()))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder; the results are written into it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--training", default="", help="one or two sentences on the cost of training, for the card")
    parser.add_argument("--card-only", action="store_true", help="write the card again from measured.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    main(args.model, args.steps, args.training, args.card_only)
