"""Train the embedded model's AutoencoderKL on renderings of the seen glyphs, by time budget, resumable.

    python embedded/train_vae.py --minutes 15 --state runs/vae

The saved autoencoder has per-channel mean 0 and standard deviation 1 on the training renderings: the statistics are folded
into ``quant_conv`` and ``post_quant_conv``, so ``scaling_factor`` is 1 and stock pipelines need no shift.
The budget is wall-clock time, so a second run is alike, not equal.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from diffx import glyphs

BATCH = 32
SEED = 0


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=glyphs.SIZE, block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(vae: AutoencoderKL, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """L1 and L2 at full size, L1 at quarter size (colours before outlines), and a weak pull of the latents to N(0, 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.mean + posterior.std * noise.to(posterior.mean.dtype)).sample.float()
    coarse = F.l1_loss(F.avg_pool2d(out, 4), F.avg_pool2d(x, 4))
    kl = posterior.kl().float().mean() / noise[0].numel()
    return F.l1_loss(out, x) + F.mse_loss(out, x) + 0.5 * coarse + 1e-4 * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, x: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the reconstructions of ``x``, over all pixels together."""
    out = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample.clamp(-1, 1) for b in x.split(64)])
    return float(10 * torch.log10(4 / F.mse_loss(out, x)))


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, x: torch.Tensor) -> None:
    """Change ``vae`` in place so that its latents of ``x`` have mean 0 and standard deviation 1, its output unchanged."""
    z = torch.cat([vae.encode(b).latent_dist.mean for b in x.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    enc, dec = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    enc.bias[:channels] = (enc.bias[:channels] - mean) / std
    enc.weight[:channels] /= std[:, None, None, None]
    enc.bias[channels:] -= 2 * std.log()  # the second half is the log variance
    dec.bias += dec.weight[:, :, 0, 0] @ mean
    dec.weight *= std[None, :, None, None]


def held_out_images() -> torch.Tensor:
    rng = np.random.default_rng(1)
    return to_tensor(np.stack([glyphs.random_rendering(g, rng, b).image() for g in sorted(glyphs.held_out()) for b in ("white", "blue")]))


def main(minutes: float, state_folder: Path) -> None:
    torch.manual_seed(SEED)
    state_folder.mkdir(parents=True, exist_ok=True)
    images = to_tensor(np.stack([r.image() for r in glyphs.training_renderings(12, SEED)]))
    held_out = held_out_images()
    vae = make_vae()
    ema = copy.deepcopy(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=1e-3)
    latest, step = state_folder / "state.pt", 0
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        vae.load_state_dict(saved["vae"]), ema.load_state_dict(saved["ema"]), optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    start, log = time.monotonic(), (state_folder / "log.jsonl").open("a")
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rng = torch.Generator().manual_seed(SEED + step)
        x = images[torch.randint(0, len(images), (BATCH,), generator=rng)]
        noise = torch.randn(BATCH, 4, glyphs.SIZE // 4, glyphs.SIZE // 4, generator=rng)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 200) * max(0.01, 1 - done)
        loss = reconstruction_loss(vae, x, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - min(0.998, step / (step + 10)))
        if step % 250 == 0:
            log.write(
                json.dumps({"step": step, "minutes": minutes * done, "loss": loss.item(), "held_out_psnr": psnr(ema, held_out)}) + "\n"
            )
            log.flush()
        if step % 1000 == 0:
            save_state(latest, vae, ema, optimizer, step)
    save_state(latest, vae, ema, optimizer, step)
    normalise_latents(ema, images[::5])
    ema.save_pretrained(state_folder / "vae")
    print(f"{step} steps, held-out PSNR {psnr(ema, held_out):.2f} dB, seen {psnr(ema, images[::37]):.2f} dB")


def save_state(path: Path, vae, ema, optimizer, step: int) -> None:
    part = path.with_suffix(".part")
    torch.save({"vae": vae.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)
    part.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock budget; the learning rate falls to zero over it")
    parser.add_argument("--state", type=Path, required=True, help="folder for the training state, outside git")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    main(args.minutes, args.state)
