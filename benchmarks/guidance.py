"""Guidance rules on the embedded model, and classifier guidance on digits: pictures, figures, network calls.

    python benchmarks/guidance.py rules classifier    # some minutes each, of one CPU thread
    python benchmarks/guidance.py report              # again, from what was measured

Rules: 128 prompts that the model was trained on, each rule and scale from the same noises, DDIM at 16 calls. Classifier: digits of an
unconditional model of 8x8 pixels; the classifier that guides saw one half of the real digits, the one that judges the other half.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import diffx
from diffx.evaluation.compare import noise_generator
from diffx.evaluation.emoji import GlyphEvaluator
from diffx.evaluation.metrics import halves
from diffx.guidance import (
    APG,
    CFG,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierGuidance,
    DynamicThresholding,
    Interval,
    Ramp,
    Rescale,
    Rule,
    train_classifier,
)
from diffx.loading import load_pipeline
from diffx.training.sheet import sheet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.digits import digits, distance, floor, load, quiet  # noqa: E402  # the folder is no installed package

FOLDER = ROOT / "benchmarks" / "results" / "guidance"
COUNT, CALLS, SEED, SHOWN = 128, 16, 0, 4
SCALES = (1.5, 3.0, 6.0, 12.0)
SHARES = (0.2, 0.4, 0.6, 0.8)  # of CFG++
RULES: dict[str, Callable[[float], Rule]] = {
    "CFG": CFG,
    "CFG, cosine ramp from 1": lambda scale: CFG(Ramp(1.0, scale, "cosine")),
    "CFG where 0.3 < sigma <= 5": lambda scale: Interval(CFG(scale), 0.3, 5.0),
    "Rescale(CFG), share 0.7": lambda scale: Rescale(CFG(scale)),
    "APG": APG,
    "APG, momentum -0.5": lambda scale: APG(scale, momentum=-0.5),
    "APG, norm_threshold 1": lambda scale: APG(scale, norm_threshold=1.0),
    "CFG-Zero*": CFGZeroStar,
    "DynamicThresholding(CFG), bound 2.5": lambda scale: DynamicThresholding(CFG(scale), bound=2.5),
    "CFG++": CFGPlusPlus,
}


def measure_rules() -> None:
    """FD, R-precision and calls of every rule at every scale, and a sheet of the same prompts."""
    from benchmarks.distillation import prompts

    pipe, asked, judge = quiet(load_pipeline(device="cpu")), prompts()[:COUNT], GlyphEvaluator()
    rows: dict[str, dict[str, Any]] = {}
    shown: dict[tuple[str, float], Tensor] = {}
    for name, rule in RULES.items():
        for scale in SHARES if rule is CFGPlusPlus else SCALES:
            with diffx.guide(pipe, rule(scale)) as guided:
                images = draw(pipe, asked)
            found = {m.name: {"value": m.value, "floor": m.floor} for m in judge.evaluate(images, asked)}
            saturated = float(((images < 0.02) | (images > 0.98)).float().mean())
            calls = {"calls": guided.calls, "uncond_calls": guided.uncond_calls}
            rows.setdefault(name, {})[f"{scale:g}"] = {"measures": found, "saturated": saturated} | calls
            shown[name, scale] = images[:SHOWN]
            print(name, scale, {key: round(each["value"], 3) for key, each in found.items()}, calls, flush=True)
    write("rules", rows)
    figure, axes = plt.subplots(len(RULES), len(SCALES), figsize=(12, 1.0 * len(RULES)), layout="constrained")
    for row, (name, rule) in zip(axes, RULES.items()):
        for axis, scale in zip(row, SHARES if rule is CFGPlusPlus else SCALES):
            axis.imshow(sheet(shown[name, scale].permute(0, 2, 3, 1).numpy(), columns=SHOWN), interpolation="nearest")
            axis.set_title(f"{name}: {scale:g}", fontsize=7)
            axis.axis("off")
    figure.savefig(FOLDER / "rules.png", dpi=110)
    plt.close(figure)


def draw(pipe: Any, asked: list[str]) -> Tensor:
    """(N, 3, 32, 32) pictures in [0, 1], picture i from noise i."""
    made = []
    for first in range(0, len(asked), 32):
        part = asked[first : first + 32]
        noises = [noise_generator(SEED, first + i) for i in range(len(part))]
        call = dict(num_inference_steps=CALLS, guidance_scale=2.0, output_type="np")  # any scale above 1
        made.append(torch.from_numpy(pipe(part, generator=noises, **call).images))
    return torch.cat(made).permute(0, 3, 1, 2).clamp(0, 1)


@functools.cache
def judge_of_digits() -> Callable[[Tensor], np.ndarray]:
    """Which digit pictures (N, 1, 8, 8) in [-1, 1] show, by a classifier of the second half of the real ones."""
    from sklearn.neural_network import MLPClassifier

    pictures, labels = digits()
    _, second = halves(len(labels), seed=SEED)
    fitted = MLPClassifier((64, 32), max_iter=400, random_state=0).fit(pictures[second].flatten(1).double().numpy(), labels[second])
    return lambda pictures: fitted.predict(pictures.clamp(-1, 1).flatten(1).double().numpy())


def guiding_classifier(train_steps: int = 800) -> Any:
    """A classifier of noisy digits, which saw the first half of the real ones."""
    pictures, labels = digits()
    first, _ = halves(len(labels), seed=SEED)
    return train_classifier(load("teacher"), pictures[first], torch.as_tensor(labels[first]), train_steps=train_steps)


def guided_digits(classifier: Any, scale: float, num_samples: int = 500) -> tuple[Tensor, np.ndarray]:
    """Pictures (N, 1, 8, 8) of the unconditional model in 16 calls, and the digit each was guided to."""
    pipe, wanted = load("teacher"), np.arange(num_samples) % 10
    call = dict(batch_size=num_samples, num_inference_steps=CALLS, output_type="np")
    with diffx.guide(pipe, ClassifierGuidance(classifier, wanted.tolist(), scale)):
        images = pipe(**call, generator=torch.Generator().manual_seed(SEED)).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, wanted


def measure_classifier() -> None:
    """The rate of digits that are what they were guided to, by the judge, against the scale; and what it costs in variety."""
    classifier, judge = guiding_classifier(), judge_of_digits()
    pictures, labels = digits()
    first, _ = halves(len(labels), seed=SEED)
    rows: dict[str, Any] = {"judge on the guide's half": float((judge(pictures[first]) == labels[first]).mean())}
    shown = []
    for scale in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        images, wanted = guided_digits(classifier, scale)
        rate = float((judge(images) == wanted).mean())
        spread = float(np.mean([images[wanted == digit].std(0).mean() for digit in range(10)]))
        rows[f"{scale:g}"] = {"rate": rate, "FD": distance(images), "spread within a digit": spread}
        shown.append(images[:20])
        print(scale, rows[f"{scale:g}"], flush=True)
    rows["real"] = {"FD": floor(), "spread within a digit": float(np.mean([pictures[labels == d].std(0).mean() for d in range(10)]))}
    write("classifier", rows)
    drawn = sheet((torch.cat(shown).permute(0, 2, 3, 1).numpy() + 1) / 2, columns=20)
    drawn.resize((2 * drawn.width, 2 * drawn.height), Image.Resampling.NEAREST).save(FOLDER / "classifier.png")


def write(name: str, rows: dict[str, Any]) -> None:
    """One part as json."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


def write_report() -> None:
    """Both parts as tables."""
    rules, classifier = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("rules", "classifier"))
    floors = {name: each["floor"] for name, each in rules["CFG"]["3"]["measures"].items()}
    lines = [
        "# Guidance",
        "",
        "`python benchmarks/guidance.py rules classifier`",
        "",
        "## Rules on the embedded model",
        "",
        f"{COUNT} prompts that the model was trained on, DDIM at {CALLS} calls, every rule and scale from the same noises "
        f"([rules.png](rules.png)). Real against real: {', '.join(f'{name} {floor:.3f}' for name, floor in floors.items())}. "
        "*Saturated* is the share of colour values at either end; *halves* are the unconditional predictions made, of one for each call.",
        "",
        f"| rule | scale | {' | '.join(floors)} | saturated | halves |",
        f"|:---|---:|{'---:|' * len(floors)}---:|---:|",
    ]
    for name, row in rules.items():
        for scale, found in row.items():
            values = " | ".join(f"{each['value']:.3f}" for each in found["measures"].values())
            share = found["uncond_calls"] / found["calls"]
            lines.append(f"| {name} | {scale} | {values} | {found['saturated']:.3f} | {share:.0%} |")
    real = classifier["real"]
    lines += [
        "",
        "## Classifier guidance on digits",
        "",
        f"500 samples of an unconditional model, 16 calls of DDIM, each guided to a digit of its own ([classifier.png](classifier.png): "
        "scales from top to bottom). *Rate*: what an independent judge takes for that digit; the judge is right on "
        f"{classifier['judge on the guide' + chr(39) + 's half']:.3f} of real digits that it never saw. FD is from all real digits "
        f"(real against real: {real['FD']:.2f}), *spread* the standard deviation of pixels within a digit (real: "
        f"{real['spread within a digit']:.3f}).",
        "",
        "| scale | rate | FD | spread |",
        "|---:|---:|---:|---:|",
    ]
    for scale, found in classifier.items():
        if isinstance(found, dict) and "rate" in found:
            lines.append(f"| {scale} | {found['rate']:.3f} | {found['FD']:.2f} | {found['spread within a digit']:.3f} |")
    (FOLDER / "report.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["rules", "classifier", "report"])
    chosen = parser.parse_args().parts
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    for part, run in (("rules", measure_rules), ("classifier", measure_classifier)):
        if part in chosen:
            run()
    write_report()


if __name__ == "__main__":
    main()
