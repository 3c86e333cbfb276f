"""Adapters of the embedded model, trained on one core, and how far they are followed on glyphs that no network ever saw. Resumable.

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
from diffx.evaluation.features import GlyphFeatures
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


def draw(pipe: Any, asked: list[dict[str, Any]], inputs: Any, **more: Any) -> list[Image.Image]:
    """A picture for each, from a noise of its own; ``inputs`` gives the arguments for some of them."""
    pipe.set_progress_bar_config(disable=True)
    made: list[Image.Image] = []
    for first in range(0, len(asked), AT_ONCE):
        part = range(first, min(first + AT_ONCE, len(asked)))
        generators = [torch.Generator().manual_seed(SEED + i) for i in part]
        call = dict(num_inference_steps=CALLS, guidance_scale=GUIDANCE) | dict(generator=generators, **inputs(part), **more)
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
    """Edge-F1 of samples with the Canny edges that they were shown."""
    objective = Diffusion(condition_dropout=0.5, ema_decay=0.995)
    first = trained("controlnet-first", diffx.ControlNet("canny"), 2000, 8e-4, objective)
    row = trained("controlnet", diffx.ControlNet("canny", start=RUNS / "controlnet-first" / "model"), 3000, 1e-3, objective)
    row["minutes"] += first["minutes"]
    network = ControlNetModel.from_pretrained(RUNS / "controlnet" / "model")
    base = load_pipeline(device="cpu")
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=network, requires_safety_checker=False)
    asked, canny = unseen(), hints.get("canny")
    control = [canny(Image.fromarray(each["image"])) for each in asked]
    edges = [np.asarray(image.convert("L")) / 255 for image in control]

    def f1(made: list[Image.Image]) -> dict[str, float]:
        return likeness(edges, [np.asarray(canny(image).convert("L")) / 255 for image in made], hints.edge_f1)

    shown = lambda part: {"image": [control[i] for i in part]}  # noqa: E731  # a word for what follows
    row["measures"] = {"base, guidance 1": f1(draw(base, asked, lambda part: {}, guidance_scale=1.0))}
    row["measures"]["base, guidance 3"] = f1(draw(base, asked, lambda part: {}, guidance_scale=3.0))
    for scale in (0.5, 1.5):
        row["measures"][f"scale {scale:g}, guidance 1"] = f1(
            draw(pipe, asked, shown, guidance_scale=1.0, controlnet_conditioning_scale=scale)
        )
    row["measures"]["scale 1, guidance 3"] = f1(draw(pipe, asked, shown, guidance_scale=3.0))
    made = draw(pipe, asked, shown, guidance_scale=1.0)
    row["measures"]["scale 1, guidance 1"] = f1(made)
    row["measures"]["autoencoder"] = f1(through_autoencoder(base, asked))
    write_part("controlnet", row, control, made)


def ip_adapter() -> None:
    """Features of samples beside those of the references that they were shown, by judges that the adapter does not read with."""
    adapter = diffx.IPAdapter("plus", text_dropout=0.5)
    row = trained("ip-adapter", adapter, 2000, 1e-3, Diffusion(condition_dropout=0.05, ema_decay=0.99))
    pipe: Any = load_pipeline(device="cpu")
    asked = unseen()
    references = [Image.fromarray(each["image"]) for each in asked]
    row["measures"] = {"base": judged(references, draw(pipe, asked, lambda part: {}))}
    pipe.load_ip_adapter(RUNS / "ip-adapter" / "model", subfolder="", weight_name="ip_adapter.safetensors")
    with torch.no_grad():
        given, nothing = pipe.encode_image(references, "cpu", 1, True)

    def shown(part: range) -> dict[str, Any]:
        return {"ip_adapter_image_embeds": [torch.cat([nothing[part.start : part.stop], given[part.start : part.stop]])[:, None]]}

    for scale in (0.5, 1.0):
        pipe.set_ip_adapter_scale(scale)
        made = draw(pipe, asked, shown)
        row["measures"][f"scale {scale:g}"] = judged(references, made)
    row["measures"]["scale 1, without captions"] = judged(references, draw(pipe, [{"text": ""} for _ in asked], shown))
    row["measures"]["autoencoder"] = judged(references, through_autoencoder(pipe, asked))
    write_part("ip-adapter", row, references, made)


def judged(references: list[Image.Image], made: list[Image.Image]) -> dict[str, dict[str, float]]:
    """Cosines by the encoder that measures the embedded model, and by histograms of oriented gradients, which nobody trained."""
    found = {}
    for name, features in (("glyph encoder", glyph_features), ("gradients", gradients)):
        found[name] = likeness(list(features(references)), list(features(made)), lambda one, two: float(one @ two))
    return found


def glyph_features(images: list[Image.Image]) -> np.ndarray:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    return GlyphFeatures()(pixels)


def gradients(images: list[Image.Image]) -> np.ndarray:
    from skimage.feature import hog

    found = np.stack([hog(np.asarray(image), pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1) for image in images])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@torch.no_grad()
def through_autoencoder(pipe: Any, asked: list[dict[str, Any]]) -> list[Image.Image]:
    """The pictures themselves, encoded and decoded: what no sample can be more like."""
    pixels = torch.from_numpy(np.stack([each["image"] for each in asked])).permute(0, 3, 1, 2) / 127.5 - 1
    again = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return [Image.fromarray(each) for each in ((again + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]


def report() -> None:
    """Write report.md of the parts that there are."""
    lines = [
        "# Adapters of the embedded model",
        "",
        f"`python benchmarks/conditioning.py`: {len(glyphs.held_out())} glyphs that no network ever saw, one rendering each, {CALLS} "
        f"calls, seed {SEED}. *True* is the mean likeness of samples to what they were shown, *shuffled* to what all others were, "
        f"*retrieval* the share that is more like its own than any other (chance {1 / len(glyphs.held_out()):.4f}). *Base* is the model "
        "without the adapter, *autoencoder* the shown pictures themselves, encoded and decoded.",
    ]
    for name, (title, _) in PARTS.items():
        file = FOLDER / "parts" / f"{name}.json"
        if not file.exists():
            continue
        part = json.loads(file.read_text())
        settings, ended = part["settings"], part["report"]
        lines += [
            "",
            f"## {title}",
            "",
            f"{settings['train_steps']} updates of {COMMON['batch_size']}, lr {settings['lr']:g}, {part['minutes']:.0f} CPU-minutes with "
            f"all measurements; kept step {ended['kept_step']}; begins to follow at step {ended['converged_step']}.",
            "",
            f"![Shown and made]({name}.png)",
            "",
            f"![Curve]({name}-curve.png)",
            "",
            "| | judge | true | shuffled | gain | retrieval |",
            "|:---|:---|---:|---:|---:|---:|",
        ]
        for what, found in part["measures"].items():
            for judge, row in found.items() if "true" not in found else [("edge-F1, same pixels", found)]:
                lines.append(
                    f"| {what} | {judge} | {row['true']:.3f} | {row['shuffled']:.3f} | {row['gain']:.3f} | {row['retrieval']:.3f} |"
                )
    (FOLDER / "report.md").write_text("\n".join(lines) + "\n")


PARTS = {"controlnet": ("Canny ControlNet", controlnet), "ip-adapter": ("IP-Adapter Plus", ip_adapter)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*PARTS, "report"])
    for name in parser.parse_args().parts:
        report() if name == "report" else PARTS[name][1]()


if __name__ == "__main__":
    main()
