"""Train the small image encoder that measures the embedded model, by time budget, resumable.

    python embedded/train_encoder.py --vae runs/vae/vae --minutes 7 --state runs/encoder --output diffx/assets/encoder

It sees renderings of the seen glyphs only, and never an unseen glyph-background pair. The loss is a normalised softmax over
one learned direction per class (Zhai & Wu 2018, arXiv:1811.12649), once over glyphs and once over backgrounds. Half of the
pictures went through the autoencoder, since that is what the pictures to be judged went through.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from diffx import glyphs
from diffx.evaluation.features import GlyphEncoder

BATCH, LEARNING_RATE = 96, 3e-3
TEMPERATURE = 1 / 16
RENDERINGS_PER_GLYPH = 16
SEED = 7  # not the UNet's: the encoder's pictures are not the ones it will find in samples


@torch.no_grad()
def pictures(vae: AutoencoderKL, file: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Renderings, every second one through the autoencoder, (N, 3, 32, 32) uint8; their glyph and background classes (N,)."""
    if not file.exists():
        renderings = glyphs.training_renderings(RENDERINGS_PER_GLYPH, SEED)
        images = torch.from_numpy(np.stack([r.image() for r in renderings])).permute(0, 3, 1, 2).contiguous()
        for i in range(0, len(images), 512):
            x = images[i : i + 512 : 2].float() / 127.5 - 1
            x = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            images[i : i + 512 : 2] = ((x + 1) * 127.5).round().to(torch.uint8)
        colours = list(glyphs.BACKGROUNDS)
        backgrounds = torch.tensor([colours.index(r.background) for r in renderings])
        torch.save((images, torch.tensor([r.glyph for r in renderings]), backgrounds), file)
    return torch.load(file, weights_only=True)


def augment(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mild blur of a random strength, a little noise and a shift of tone, all smaller than a background's distance to the next."""
    batch = len(x)
    blur = torch.rand(batch, 1, 1, 1, generator=rng) * 0.7
    x = torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), blur)
    x = x + 0.04 * torch.rand(batch, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)
    return x + 0.03 * torch.randn(batch, 3, 1, 1, generator=rng)


class Proxies(torch.nn.Module):
    """One direction per class; ``forward`` is the per-example loss of features (B, D) against classes (B,)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(num_classes, dim))

    def forward(self, features: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        cosines = F.normalize(features, dim=1) @ F.normalize(self.weight, dim=1).T
        return F.cross_entropy(cosines / TEMPERATURE, classes, reduction="none")


def main(vae_folder: Path, minutes: float, state: Path, output: Path) -> None:
    torch.manual_seed(SEED)
    state.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    images, glyph, background = pictures(vae, state / "pictures.pt")
    encoder = GlyphEncoder().to(memory_format=torch.channels_last)
    trained = torch.nn.ModuleList(
        [encoder, Proxies(len(glyphs.names()), encoder.GLYPH), Proxies(len(glyphs.BACKGROUNDS), encoder.BACKGROUND)]
    )
    optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    latest, step = state / "state.pt", 0
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        trained.load_state_dict(saved["trained"]), optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    start, log, first_step = time.monotonic(), (state / "log.jsonl").open("a"), step
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rng = torch.Generator().manual_seed(SEED + step)
        pick = torch.randint(0, len(images), (BATCH,), generator=rng)
        x = augment(images[pick].float() / 127.5 - 1, rng).contiguous(memory_format=torch.channels_last)
        features = encoder(x)
        glyph_loss = trained[1](features[:, : encoder.GLYPH], glyph[pick]).mean()
        background_loss = trained[2](features[:, encoder.GLYPH :], background[pick]).mean()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step - first_step + 1) / 100) * max(0.01, 1 - done)
        optimizer.zero_grad()
        (glyph_loss + 0.3 * background_loss).backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            losses = {"glyph": glyph_loss.item(), "background": background_loss.item()}
            log.write(json.dumps({"step": step, "minutes": minutes * done} | losses) + "\n")
            log.flush()
    part = latest.with_suffix(".part")
    torch.save({"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)
    part.replace(latest)
    output.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in encoder.state_dict().items() if v.is_floating_point()}
    save_file(weights, output / "encoder.safetensors", metadata={"steps": str(step), "seed": str(SEED)})
    print(f"{step} steps; encoder in {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock budget; the learning rate falls to zero over it")
    parser.add_argument("--state", type=Path, required=True, help="folder for the training state, outside git")
    parser.add_argument("--output", type=Path, required=True, help="folder for encoder.safetensors")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    main(args.vae, args.minutes, args.state, args.output)
