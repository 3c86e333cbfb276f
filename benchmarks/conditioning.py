"""Adapters of the embedded model, trained on one core, and how far they are followed on glyphs that no network ever saw. Resumable.

    python benchmarks/conditioning.py controlnet ip-adapter ip-adapter-plus
    python benchmarks/conditioning.py sweep report

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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.embeddings import ImageProjection
from PIL import Image

import diffx
from diffx import glyphs
from diffx.conditioning import hints
from diffx.evaluation.emoji import candidates, seen_prompts
from diffx.evaluation.features import GlyphFeatures
from diffx.evaluation.metrics import r_precision
from diffx.evaluation.report import write_atomically
from diffx.loading import load_pipeline
from diffx.objectives import Diffusion
from diffx.training.sheet import sheet

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "conditioning"
RUNS = ROOT / "outputs" / "conditioning"
RENDERINGS, SEED, CALLS, GUIDANCE, AT_ONCE, CHOOSING = 8, 0, 50, 3.0, 34, 32
SCALES, GUIDANCES, SWEPT, FEWER_CALLS, ON_SHEET = (0.0, 0.5, 1.0, 1.5), (1.0, 2.0, 3.0, 5.0), 34, 20, 3
COMMON: dict[str, Any] = dict(
    batch_size=48, lr_schedule="cosine", warmup_steps=100, save_every=100, evaluate_every=500, device="cpu", cache=RUNS / "cache"
)


def training_pictures() -> list[dict[str, Any]]:
    """Renderings of glyphs that the base model saw, too."""
    return [{"image": made.image(), "text": made.caption()} for made in glyphs.training_renderings(RENDERINGS, seed=SEED)]


def turned_pictures() -> list[dict[str, Any]]:
    """As many renderings again, of other sizes and places, turned and mirrored: some are as new to the base model as unseen glyphs."""
    made = []
    for one in glyphs.training_renderings(RENDERINGS, seed=SEED + 1):
        rng = np.random.default_rng((SEED, 2, len(made)))
        moved = replace(one, scale=float(rng.uniform(0.7, 1.7)), shift=tuple(rng.uniform(-6, 6, 2).tolist()))
        image = np.rot90(moved.image(), rng.integers(4))
        made.append({"image": np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image), "text": one.caption()})
    return made


def unseen(num: int | None = None) -> list[dict[str, Any]]:
    """One rendering of each unseen glyph, or of the first of them; their names are words that the model never read together."""
    chosen = sorted(glyphs.held_out())[:num]
    made = [glyphs.random_rendering(glyph, np.random.default_rng((SEED, 1, glyph))) for glyph in chosen]
    return [{"image": each.image(), "text": each.caption()} for each in made]


def captioned(asked: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """With their captions and without any, by what a row says of it."""
    return {"": asked, ", without captions": [{"text": ""} for _ in asked]}


def draw(pipe: Any, asked: list[dict[str, Any]], inputs: Any, **more: Any) -> list[Image.Image]:
    """A picture for each, from a noise of its own; ``inputs`` gives the arguments for some of them."""
    pipe.set_progress_bar_config(disable=True)
    made: list[Image.Image] = []
    at_once = AT_ONCE if pipe.unet.encoder_hid_proj is None else 1  # with an IP-Adapter, each sample of a call sees all references
    for first in range(0, len(asked), at_once):
        part = range(first, min(first + at_once, len(asked)))
        generators = [torch.Generator().manual_seed(SEED + i) for i in part]
        call = dict(num_inference_steps=CALLS, guidance_scale=GUIDANCE) | dict(generator=generators, **inputs(part), **more)
        made += pipe([asked[i]["text"] for i in part], **call).images
    return made


def write_part(name: str, row: dict[str, Any], columns: dict[str, list[Image.Image]]) -> None:
    """Figures, the curve, and a sheet of the columns, four times side by side."""
    row["columns"] = list(columns)
    write_json(name, row)
    write_sheet(name, [image for images in list(zip(*columns.values()))[:20] for image in images], 4 * len(columns))
    shutil.copy(RUNS / name / "curve.png", FOLDER / f"{name}-curve.png")


def write_json(name: str, row: dict[str, Any]) -> None:
    (FOLDER / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(FOLDER / "parts" / f"{name}.json", lambda out: out.write(json.dumps(row, indent=1).encode()))


def write_sheet(name: str, images: list[Image.Image], columns: int) -> None:
    large = [np.asarray(image.convert("RGB"), np.float32).repeat(2, 0).repeat(2, 1) / 255 for image in images]
    drawn = sheet(np.stack(large), columns)
    write_atomically(FOLDER / f"{name}.png", lambda out: drawn.save(out, format="png"))


def trained(name: str, adapter: Any, data: list[dict[str, Any]], train_steps: int, lr: float, objective: Diffusion) -> dict[str, Any]:
    """Train an adapter, or go on with it; what it took."""
    options = COMMON | dict(train_steps=train_steps, lr=lr, output=RUNS / name)
    start = time.process_time()
    made = diffx.train(None, adapter, data, objective=objective, held_out=unseen(CHOOSING), **options)
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
    row = trained("controlnet", diffx.ControlNet("canny"), training_pictures() + turned_pictures(), 5000, 1e-3, objective)
    network = ControlNetModel.from_pretrained(RUNS / "controlnet" / "model")
    base = load_pipeline(device="cpu")
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=network, requires_safety_checker=False)
    asked, canny = unseen(), hints.get("canny")
    references = [Image.fromarray(each["image"]) for each in asked]
    control = [canny(picture) for picture in references]
    edges = [np.asarray(image.convert("L")) / 255 for image in control]

    def f1(made: list[Image.Image]) -> dict[str, float]:
        return likeness(edges, [np.asarray(canny(image).convert("L")) / 255 for image in made], hints.edge_f1)

    shown = lambda part: {"image": [control[i] for i in part]}  # noqa: E731  # a word for what follows
    row["measures"] = {"base, guidance 1": f1(draw(base, asked, lambda part: {}, guidance_scale=1.0))}
    row["measures"]["base, guidance 3"] = f1(draw(base, asked, lambda part: {}, guidance_scale=3.0))
    row["measures"]["scale 1, guidance 3"] = f1(draw(pipe, asked, shown, guidance_scale=3.0))
    made: dict[str, list[Image.Image]] = {"edges": control}
    for words, texts in captioned(asked).items():
        for scale in (0.5, 1.0, 1.5):
            what = f"scale {scale:g}, guidance 1{words}"
            images = draw(pipe, texts, shown, guidance_scale=1.0, controlnet_conditioning_scale=scale)
            row["measures"][what] = f1(images)
            if scale == 1:
                made[what] = images
    row["measures"]["autoencoder"] = f1(through_autoencoder(base, asked))
    write_part("controlnet", row, {**made, "picture": references})


def ip_adapter(name: str, kind: Any, train_steps: int, lr: float) -> None:
    """Features of samples beside those of the references that they were shown, by judges that the adapter does not read with."""
    adapter = diffx.IPAdapter(kind, text_dropout=0.5)
    row = trained(name, adapter, training_pictures(), train_steps, lr, Diffusion(condition_dropout=0.05, ema_decay=0.99))
    pipe: Any = load_pipeline(device="cpu")
    asked = unseen()
    references = [Image.fromarray(each["image"]) for each in asked]
    row["measures"] = {
        f"base, guidance {GUIDANCE:g}{words}": judged(references, draw(pipe, texts, lambda part: {}, num_inference_steps=FEWER_CALLS))
        for words, texts in captioned(asked).items()
    }
    call = shown_references(pipe, name, references)
    made: dict[str, list[Image.Image]] = {"reference": references}
    for words, texts in captioned(asked).items():
        for scale, guidance in ((0.5, GUIDANCE), (1.0, GUIDANCE), (1.0, 1.0)):
            what = f"scale {scale:g}, guidance {guidance:g}{words}"
            images = call(texts, scale, guidance)
            row["measures"][what] = judged(references, images)
            if (scale, guidance) == (1.0, GUIDANCE):
                made[what] = images
    row["measures"]["autoencoder"] = judged(references, through_autoencoder(pipe, asked))
    write_part(name, row, made)


def shown_references(pipe: Any, name: str, references: list[Image.Image]) -> Any:
    """A call by texts, scale and guidance of the pipeline with a trained IP-Adapter."""
    pipe.load_ip_adapter(RUNS / name / "model", subfolder="", weight_name="ip_adapter.safetensors")
    pooled = isinstance(pipe.unet.encoder_hid_proj.image_projection_layers[0], ImageProjection)
    with torch.no_grad():
        given, nothing = pipe.encode_image(references, "cpu", 1, not pooled)

    def call(asked: list[dict[str, Any]], scale: float, guidance: float) -> list[Image.Image]:
        pipe.set_ip_adapter_scale(scale)

        def inputs(part: range) -> dict[str, Any]:
            both = [nothing, given] if guidance > 1 else [given]
            return {"ip_adapter_image_embeds": [torch.cat([each[part.start : part.stop] for each in both])[:, None]]}

        return draw(pipe, asked, inputs, guidance_scale=guidance, num_inference_steps=FEWER_CALLS)

    return call


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


def sweep() -> None:
    """Image scale and text guidance apart, on what contradicts itself: each sample is shown one glyph, an unseen one, and told another."""
    asked = [{"text": text} for text in seen_prompts(SWEPT, seed=SEED)]
    pictures = [Image.fromarray(each["image"]) for each in unseen(SWEPT)]
    for name, make in {"controlnet": swept_controlnet, "ip-adapter": swept_ip_adapter}.items():
        if not (RUNS / name / "model").is_dir():
            print(f"{name}: not trained yet, left out")
            continue
        start = time.process_time()
        shown, call, follows = make(pictures)
        made = {(scale, guidance): call(asked, scale, guidance) for scale in SCALES for guidance in GUIDANCES}
        cells = [
            {"scale": scale, "guidance": guidance, "shown": follows(images), "told": told(images, [each["text"] for each in asked])}
            for (scale, guidance), images in made.items()
        ]
        row = {"minutes": (time.process_time() - start) / 60, "texts": [each["text"] for each in asked[:ON_SHEET]], "cells": cells}
        write_json(f"sweep-{name}", row)
        rows = [[shown[i], *(made[scale, guidance][i] for guidance in GUIDANCES)] for i in range(ON_SHEET) for scale in SCALES]
        write_sheet(f"sweep-{name}", [image for images in rows for image in images], 1 + len(GUIDANCES))


def swept_controlnet(pictures: list[Image.Image]) -> tuple[list[Image.Image], Any, Any]:
    """(control images, a call by scale and guidance, how much samples follow)."""
    network = ControlNetModel.from_pretrained(RUNS / "controlnet" / "model")
    pipe = StableDiffusionControlNetPipeline(**load_pipeline(device="cpu").components, controlnet=network, requires_safety_checker=False)
    canny = hints.get("canny")
    control = [canny(picture) for picture in pictures]

    def call(asked: list[dict[str, Any]], scale: float, guidance: float) -> list[Image.Image]:
        more: dict[str, Any] = {"controlnet_conditioning_scale": scale, "guidance_scale": guidance, "num_inference_steps": FEWER_CALLS}
        return draw(pipe, asked, lambda part: {"image": [control[i] for i in part]}, **more)

    def follows(made: list[Image.Image]) -> dict[str, float]:
        edges, drawn = ([np.asarray(image.convert("L")) / 255 for image in images] for images in (control, map(canny, made)))
        return likeness(edges, drawn, hints.edge_f1)

    return control, call, follows


def swept_ip_adapter(pictures: list[Image.Image]) -> tuple[list[Image.Image], Any, Any]:
    """The same of an IP-Adapter and its references."""
    call = shown_references(load_pipeline(device="cpu"), "ip-adapter", pictures)
    return pictures, call, lambda made: judged(pictures, made)["glyph encoder"]


def told(made: list[Image.Image], texts: list[str]) -> dict[str, float]:
    """The share of samples nearest to their own text of all that are asked and 200 others, and the cosine with it."""
    features = GlyphFeatures()
    table, own = candidates(texts, features, seed=SEED)
    found = glyph_features(made)
    return {"r_precision": r_precision(found, table, own), "cosine": float((found * table[own]).sum(1).mean())}


def swept_lines(name: str, title: str) -> list[str]:
    """The section of a sweep, if there is one."""
    file = FOLDER / "parts" / f"sweep-{name}.json"
    if not file.exists():
        return []
    part = json.loads(file.read_text())
    measure = "Edge-F1" if name == "controlnet" else "Cosine by the glyph encoder"
    lines = [
        "",
        f"### {title}: image scale and text guidance",
        "",
        f"{SWEPT} samples a cell from the same noise, {FEWER_CALLS} calls, {part['minutes']:.1f} CPU-minutes. Each was shown an unseen "
        "glyph and told the caption of another one, seen in training. On the sheet, for "
        f"{', '.join(part['texts'])}: in the first column what was shown, then guidance {_listed(GUIDANCES)}; rows are scale "
        f"{_listed(SCALES)}.",
        "",
        f"![Swept](sweep-{name}.png)",
    ]
    tables = {
        f"{measure} with what was shown, less that with what others were (and retrieval, chance 1/{SWEPT})": lambda cell: (
            f"{cell['shown']['gain']:.3f} ({cell['shown']['retrieval']:.2f})"
        ),
        "Cosine with the text's renderings by the glyph encoder (and R-precision, of all asked and 200 others)": lambda cell: (
            f"{cell['told']['cosine']:.3f} ({cell['told']['r_precision']:.2f})"
        ),
    }
    cells = {(cell["scale"], cell["guidance"]): cell for cell in part["cells"]}
    for what, shown in tables.items():
        lines += ["", f"{what}:", "", "| scale | " + " | ".join(f"guidance {each:g}" for each in GUIDANCES) + " |"]
        lines += ["|---:|" + "---:|" * len(GUIDANCES)]
        lines += [f"| {scale:g} | " + " | ".join(shown(cells[scale, each]) for each in GUIDANCES) + " |" for scale in SCALES]
    return lines


def _listed(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{each:g}" for each in numbers)


def _began(step: int | None) -> str:
    return "no sudden beginning to follow" if step is None else f"begins to follow at step {step}"


def report() -> None:
    """Write report.md of the parts that there are."""
    lines = [
        "# Adapters of the embedded model",
        "",
        f"`python benchmarks/conditioning.py`: {len(glyphs.held_out())} glyphs that no network ever saw, one rendering each; "
        f"{CALLS} calls with a ControlNet, {FEWER_CALLS} with an IP-Adapter, which takes one sample a call; seed {SEED}. *True* is the "
        "mean likeness of samples to what they were shown, *shuffled* to what all others were, "
        f"*retrieval* the share that is more like its own than any other (chance {1 / len(glyphs.held_out()):.4f}). *Base* is the model "
        f"without the adapter, *autoencoder* the shown pictures themselves, encoded and decoded. The first {CHOOSING} of the glyphs chose "
        "the step that was kept of each run; no training saw any.",
    ]
    for name, (title, _) in PARTS.items():
        file = FOLDER / "parts" / f"{name}.json"
        if not file.exists():
            lines += swept_lines(name, title)
            continue
        part = json.loads(file.read_text())
        settings, ended = part["settings"], part["report"]
        lines += [
            "",
            f"## {title}",
            "",
            f"{settings['train_steps']} updates of {COMMON['batch_size']}, lr {settings['lr']:g}, {part['minutes']:.0f} CPU-minutes with "
            f"all measurements; kept step {ended['kept_step']}; {_began(ended['converged_step'])}.",
            "",
            f"Four times side by side: {'; '.join(part['columns'])}.",
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
        lines += swept_lines(name, title)
    (FOLDER / "report.md").write_text("\n".join(lines) + "\n")


PARTS: dict[str, tuple[str, Callable[[], None]]] = {
    "controlnet": ("Canny ControlNet", controlnet),
    "ip-adapter": ("IP-Adapter", partial(ip_adapter, "ip-adapter", "plain", 6000, 2e-3)),
    "ip-adapter-plus": ("IP-Adapter Plus", partial(ip_adapter, "ip-adapter-plus", "plus", 3000, 1e-3)),
}

COMMANDS = {**{name: run for name, (_, run) in PARTS.items()}, "sweep": sweep, "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[*COMMANDS])
    for name in parser.parse_args().parts:
        COMMANDS[name]()


if __name__ == "__main__":
    main()
