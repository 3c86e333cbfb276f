"""Train the image encoder that IP-Adapters of the embedded model read, a tiny CLIP vision tower, by CPU-time budget, resumable.

    python embedded/train_image_encoder.py --vae VAE --minutes 12 --state runs/image_encoder --output diffx/assets/image_encoder

Data and proxies are those of ``train_encoder.py``, with another seed: seen glyphs only, so that what it says of unseen ones is measured.
Besides, the autoencoder's latent must be a linear function of the embedding: to tell seen glyphs apart is no reason to see the layout and
colours of one never seen.
The result is a stock ``CLIPVisionModelWithProjection``, which Diffusers' pipelines load from the folder of an IP-Adapter.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from train_encoder import Proxies, augment, pictures
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffx import glyphs
from diffx.evaluation.features import CLIP_MEAN, CLIP_STD

BATCH, LEARNING_RATE, WARMUP = 64, 1.5e-3, 200
GLYPH_WEIGHT, BACKGROUND_WEIGHT = 0.05, 0.02  # beside the loss of the latents
SEED = 11
CONFIG = dict(
    hidden_size=96, intermediate_size=288, projection_dim=128, num_hidden_layers=4, num_attention_heads=3, image_size=32, patch_size=4
)


def main(vae_folder: Path, minutes: float, state: Path, output: Path) -> None:
    torch.manual_seed(SEED)
    state.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    images, glyph, background = pictures(vae, state / "pictures.pt")
    latent = latents(vae, images)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**CONFIG)).train()
    width = encoder.config.projection_dim
    heads = [Proxies(len(glyphs.names()), width), Proxies(len(glyphs.BACKGROUNDS), width), torch.nn.Linear(width, latent.shape[1])]
    trained = torch.nn.ModuleList([encoder, *heads])
    optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    latest, step, before = state / "state.pt", 0, 0.0
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        trained.load_state_dict(saved["trained"]), optimizer.load_state_dict(saved["optimizer"])
        step, before = saved["step"], saved["minutes"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    start, log = time.process_time(), (state / "log.jsonl").open("a")

    def save() -> None:
        part = latest.with_suffix(".part")
        told = {"step": step, "minutes": minutes * done}
        torch.save({"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), **told}, part)
        part.replace(latest)

    while (done := (before + (time.process_time() - start) / 60) / minutes) < 1:
        rng = torch.Generator().manual_seed(SEED + step)
        pick = torch.randint(0, len(images), (BATCH,), generator=rng)
        x = (augment(images[pick].float() / 127.5 - 1, rng) + 1) / 2
        features = encoder((x - mean) / std).image_embeds
        glyph_loss, background_loss = trained[1](features, glyph[pick]).mean(), trained[2](features, background[pick]).mean()
        latent_loss = torch.nn.functional.mse_loss(trained[3](features), latent[pick])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.zero_grad()
        (latent_loss + GLYPH_WEIGHT * glyph_loss + BACKGROUND_WEIGHT * background_loss).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            losses = {"latent": latent_loss.item(), "glyph": glyph_loss.item(), "background": background_loss.item()}
            log.write(json.dumps({"step": step, "minutes": minutes * done} | losses) + "\n")
            log.flush()
            save()
    save()
    encoder.half().eval().save_pretrained(output)
    print(f"{step} steps; encoder in {output}")


@torch.no_grad()
def latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """What the autoencoder makes of the pictures, as they are before any change, one row each of mean 0 and overall variance 1."""
    found = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mode().flatten(1) for part in images.split(512)])
    found -= found.mean(0)
    return found / found.std()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--minutes", type=float, required=True, help="of CPU time, over all calls")
    parser.add_argument("--state", type=Path, required=True, help="folder for the state; an older one goes on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the encoder")
    arguments = parser.parse_args()
    main(arguments.vae, arguments.minutes, arguments.state, arguments.output)
