"""Adapters of the embedded model, trained on one core: followed more than by chance, on glyphs that no network ever saw. Resumable, by part.

    python benchmarks/conditioning.py controlnet ip-adapter
    python benchmarks/conditioning.py report

Each is measured as a user has it: exported, loaded by Diffusers alone, called on a new rendering of each of the 136 unseen glyphs.
Each part writes results/conditioning/parts/NAME.json; runs with checkpoints lie in outputs/conditioning. Minutes are CPU time of one
thread, measurements during training included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

import diffx
from diffx import glyphs
from diffx.conditioning import hints
from diffx.evaluation.report import write_atomically
from diffx.loading import load_pipeline
from diffx.objectives import Diffusion
from diffx.training.adherence import pairs

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "conditioning"
RUNS = ROOT / "outputs" / "conditioning"
RENDERINGS, SEED, CALLS, GUIDANCE, AT_ONCE = 8, 0, 50, 3.0, 34
COMMON: dict[str, Any] = dict(
    batch_size=48, lr_schedule="cosine", warmup_steps=100, save_every=100, evaluate_every=200, device="cpu", cache=RUNS / "cache"
)


def training_pictures() -> list[dict[str, Any]]:
    """Renderings of glyphs that the base model saw, too."""
    return [{"image": made.image(), "text": made.caption()} for made in glyphs.training_renderings(RENDERINGS, seed=SEED)]


def unseen(num: int | None = None) -> list[dict[str, Any]]:
    """One rendering of each unseen glyph, or of the first of them; their names are words that the model never read together."""
    chosen = sorted(glyphs.held_out())[:num]
    made = [glyphs.random_rendering(glyph, np.random.default_rng((SEED, 1, glyph))) for glyph in chosen]
    return [{"image": each.image(), "text": each.caption()} for each in made]


def draw(pipe: Any, asked: list[dict[str, Any]], inputs: Any, scale: str | None = None, **more: Any) -> list[Image.Image]:
    """A picture for each, from a noise of its own; ``inputs`` gives the arguments for some of them."""
    pipe.set_progress_bar_config(disable=True)
    made: list[Image.Image] = []
    for first in range(0, len(asked), AT_ONCE):
        part = range(first, min(first + AT_ONCE, len(asked)))
        generators = [torch.Generator().manual_seed(SEED + i) for i in part]
        call = dict(num_inference_steps=CALLS, guidance_scale=GUIDANCE, generator=generators, **inputs(part), **more)
        made += pipe([asked[i]["text"] for i in part], **call).images
    return made


def write_part(name: str, row: dict[str, Any], shown: list[Image.Image], made: list[Image.Image]) -> None:
    (FOLDER / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(FOLDER / "parts" / f"{name}.json", lambda out: out.write(json.dumps(row, indent=1).encode()))
    write_atomically(FOLDER / f"{name}.png", lambda out: pairs(shown, made).save(out, format="png"))
    shutil.copy(RUNS / name / "curve.png", FOLDER / f"{name}-curve.png")


def trained(name: str, adapter: Any, train_steps: int, lr: float, objective: Diffusion) -> dict[str, Any]:
    """Train an adapter, or go on with it; what it took."""
    options = COMMON | dict(train_steps=train_steps, lr=lr, output=RUNS / name)
    start = time.process_time()
    made = diffx.train(None, adapter, training_pictures(), objective=objective, held_out=unseen(32), **options)
    spent = RUNS / name / "minutes.json"  # over all calls that it took
    minutes = (time.process_time() - start) / 60 + (json.loads(spent.read_text()) if spent.exists() else 0.0)
    spent.write_text(json.dumps(minutes))
    return {"settings": {"train_steps": train_steps, "lr": lr}, "minutes": minutes, "report": made.report}


def likeness(shown: list[Any], made: list[Any], measure: Any) -> dict[str, float]:
    """How much each sample is like what it was shown, and like all that the others were shown."""
    table = np.array([[measure(one, two) for one in shown] for two in made])
    true, num = table.diagonal().mean(), len(made)
    shuffled = (table.sum() - table.trace()) / (num * (num - 1))
    return {"true": float(true), "shuffled": float(shuffled), "gain": float(true - shuffled), "retrieval": retrieval(table)}


def retrieval(table: np.ndarray) -> float:
    """The share of samples that are more like what they were shown than like anything that others were; ties do not count."""
    own = table.diagonal()[:, None]
    return float(np.mean((table >= own).sum(1) == 1))


def controlnet() -> None:
    row = trained("controlnet", diffx.ControlNet("canny"), 2000, 8e-4, Diffusion(condition_dropout=0.5, ema_decay=0.995))
    network = ControlNetModel.from_pretrained(RUNS / "controlnet" / "model")
    base = load_pipeline(device="cpu")
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=network, requires_safety_checker=False)
    asked, canny = unseen(), hints.get("canny")
    control = [canny(Image.fromarray(each["image"])) for each in asked]
    edges = [np.asarray(image.convert("L")) / 255 for image in control]

    def f1(made: list[Image.Image]) -> dict[str, float]:
        return likeness(edges, [np.asarray(canny(image).convert("L")) / 255 for image in made], hints.edge_f1)

    row["measures"] = {"base": f1(draw(base, asked, lambda part: {}))}
    for scale in (0.5, 1.0):
        made = draw(pipe, asked, lambda part: {"image": [control[i] for i in part]}, controlnet_conditioning_scale=scale)
        row["measures"][f"scale {scale:g}"] = f1(made)
    vae = load_pipeline(device="cpu").vae
    pixels = torch.from_numpy(np.stack([each["image"] for each in asked])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    levels = ((again.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    row["measures"]["autoencoder"] = f1([Image.fromarray(each) for each in levels])
    write_part("controlnet", row, control, made)


PARTS = {"controlnet": controlnet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*PARTS, "report"])
    for name in parser.parse_args().parts:
        PARTS[name]()


if __name__ == "__main__":
    main()
