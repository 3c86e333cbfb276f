"""Every training method on the embedded model, beside its teacher: FD, R-precision, same-noise PSNR, minutes. Resumable, by part.

    python benchmarks/distillation.py progressive-8 progressive-4 lcm-lora
    python benchmarks/distillation.py report

Students are measured as a user has them: exported, loaded by Diffusers, called with their call arguments, on 200 prompts that the
teacher was trained on, from the noises of the teacher's 50-call guided run. Each part writes results/distillation/parts/NAME.json;
runs with checkpoints lie in outputs/distillation. Seconds are of one CPU thread, on whatever machine it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffx.training.api
from diffx.evaluation.compare import noise_generator
from diffx.evaluation.emoji import GlyphEvaluator, seen_prompts
from diffx.evaluation.metrics import psnr
from diffx.evaluation.report import write_atomically
from diffx.loading import load_pipeline
from diffx.objectives import DMD2, LCM, PCM, Objective, Progressive
from diffx.training.sheet import sheet

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "distillation"
RUNS = ROOT / "outputs" / "distillation"
GUIDANCE, SEED, COUNT = 3.0, 0, 200
FIXED = (GUIDANCE, GUIDANCE)


@dataclass(frozen=True)
class Student:
    """How one student is made; ``after`` names the one that teaches it, else the embedded model does."""

    method: Objective
    train_steps: int
    options: dict[str, Any] = field(default_factory=dict)
    after: str | None = None


STUDENTS = {
    "progressive-8": Student(Progressive(start=16, end=8, guidance_scale=GUIDANCE), 350, dict(lr=3e-4, lr_schedule="linear")),
    "progressive-4": Student(Progressive(start=8, end=4), 350, dict(lr=3e-4, lr_schedule="linear"), "progressive-8"),
    "progressive-2": Student(Progressive(start=4, end=2), 350, dict(lr=3e-4, lr_schedule="linear"), "progressive-4"),
    "progressive-1": Student(Progressive(start=2, end=1), 500, dict(lr=3e-4, lr_schedule="linear"), "progressive-2"),
    "progressive-lora": Student(
        Progressive(start=16, end=4, guidance_scale=GUIDANCE), 700, dict(lr=1e-3, lora_rank=8, lr_schedule="linear")
    ),
    "lcm": Student(LCM(calls=4, guidance_range=(2.0, 5.0), guidance_scale=GUIDANCE), 450, dict(lr=2e-4)),
    "lcm-lora": Student(LCM(calls=4, guidance_range=FIXED, guidance_scale=GUIDANCE), 600, dict(lr=5e-4, lora_rank=8, lr_schedule="cosine")),
    "pcm": Student(PCM(calls=4, guidance_range=FIXED, guidance_scale=GUIDANCE, embed_guidance=False), 500, dict(lr=2e-4)),
    "dmd2": Student(DMD2(calls=1, guidance_scale=GUIDANCE, fake_steps=3), 800, dict(lr=5e-5, adam_betas=(0.0, 0.999))),
}


def draw(pipe: Any, call_kwargs: dict[str, Any]) -> torch.Tensor:
    """(COUNT, 3, 32, 32) pictures in [0, 1], picture i from noise i."""
    pipe.set_progress_bar_config(disable=True)
    asked, made = seen_prompts(COUNT, seed=SEED), []
    for first in range(0, COUNT, 25):
        part = asked[first : first + 25]
        generators = [noise_generator(SEED, first + i) for i in range(len(part))]
        made.append(torch.from_numpy(pipe(part, generator=generators, output_type="np", **call_kwargs).images))
    return torch.cat(made).permute(0, 3, 1, 2).clamp(0, 1)


def measure(pipe: Any, call_kwargs: dict[str, Any], goal: torch.Tensor | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures of a pipeline's pictures, and the pictures; ``goal`` are those of the teacher from the same noises."""
    start = time.perf_counter()
    images = draw(pipe, call_kwargs)
    seconds = (time.perf_counter() - start) / COUNT
    found = {m.name: {"value": m.value, "floor": m.floor} for m in GlyphEvaluator().evaluate(images, seen_prompts(COUNT, seed=SEED))}
    if goal is not None:
        found["PSNR"] = {"value": psnr(images, goal)}
    return {"call_kwargs": call_kwargs, "seconds_per_picture": seconds, "measures": found}, images


def teacher_pictures() -> torch.Tensor:
    """Of the teacher at 50 calls, made once."""
    file = RUNS / "teacher.npy"
    if not file.exists():
        write_part("teacher-50", measure(load_pipeline(device="cpu"), dict(num_inference_steps=50, guidance_scale=GUIDANCE), None), file)
    return torch.from_numpy(np.load(file))


def write_part(name: str, found: tuple[dict[str, Any], torch.Tensor], file: Path | None = None) -> None:
    row, images = found
    (FOLDER / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(FOLDER / "parts" / f"{name}.json", lambda out: out.write(json.dumps(row, indent=1).encode()))
    drawn = sheet(images[:16].permute(0, 2, 3, 1).numpy(), columns=8)
    write_atomically(FOLDER / f"{name}.png", lambda out: drawn.save(out, format="png"))
    if file:
        RUNS.mkdir(parents=True, exist_ok=True)
        np.save(file, images.numpy())


def load(folder: Path) -> Any:
    """An exported student, as its user loads it."""
    if (folder / "model_index.json").exists():
        return DiffusionPipeline.from_pretrained(folder)
    pipe = load_pipeline(device="cpu")
    pipe.load_lora_weights(folder)
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipe.scheduler = getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler")
    return pipe


def train(name: str) -> None:
    """Make a student, or go on with it, and measure it."""
    student = STUDENTS[name]
    teacher = str(RUNS / student.after / "model") if student.after else None
    start = time.process_time()
    options = dict(batch_size=48, train_steps=student.train_steps, save_every=100, cache=RUNS / "cache", device="cpu") | student.options
    data = None if teacher is None else diffx.training.api.embedded_pictures()
    trained = diffx.distill(teacher, student.method, data, output=RUNS / name, **options)
    minutes = (time.process_time() - start) / 60
    row, images = measure(load(RUNS / name / "model"), trained.call_kwargs, teacher_pictures())
    log = [json.loads(line) for line in (RUNS / name / "log.jsonl").read_text().splitlines()]
    loss = [entry["loss/student"] for entry in log if "loss/student" in entry]
    settings = {"method": type(student.method).__name__, **asdict(student.method), **student.options, "train_steps": student.train_steps}
    row |= {"settings": settings, "after": student.after, "minutes": round(minutes, 1), "loss": [round(x, 6) for x in loss]}
    write_part(name, (row, images))


def report() -> str:
    """The table of all parts, and the plot beside it."""
    order = ["teacher-50", *(f"teacher-{n}" for n in (16, 8, 4, 2, 1)), *STUDENTS]
    parts = {
        name: json.loads((FOLDER / "parts" / f"{name}.json").read_text()) for name in order if (FOLDER / "parts" / f"{name}.json").exists()
    }
    distance = next(name for name in next(iter(parts.values()))["measures"] if name.startswith("FD"))
    base = parts["teacher-50"]["measures"]
    lines = [
        "# Students of the embedded model",
        "",
        f"`python benchmarks/distillation.py`: {COUNT} prompts that the teacher was trained on, seed {SEED}, guidance {GUIDANCE:g} in the "
        f"teacher. Floors, real against real: FD {base[distance]['floor']:.3f}, R-precision@1 {base['R-precision@1']['floor']:.3f}. "
        "PSNR is to the teacher's 50-call pictures from the same noise. *Pairs* says whether every call is a guided pair, twice the "
        "cost. Minutes are of one CPU thread for training and caching, without those of the student that teaches.",
        "",
        "| model | calls | pairs | FD | times the teacher's | R-precision@1 | PSNR, dB | ms a picture | updates of 48 | minutes |",
        "|:---|---:|:---|" + "---:|" * 7,
    ]
    for name, part in parts.items():
        found, calls = part["measures"], part["call_kwargs"]["num_inference_steps"]
        fd = found[distance]["value"]
        near = f"{found['PSNR']['value']:.1f}" if "PSNR" in found else ""
        settings = part.get("settings", {})
        lines.append(
            f"| {name} | {calls} | {'yes' if name.startswith('teacher') else 'no'} | {fd:.3f} | {fd / base[distance]['value']:.2f} "
            f"| {found['R-precision@1']['value']:.3f} | {near} | {1000 * part['seconds_per_picture']:.0f} "
            f"| {settings.get('train_steps', '')} | {part.get('minutes', '')} |"
        )
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for name, part in parts.items():
        if "loss" in part:
            width = max(1, len(part["loss"]) // 40)
            smooth = np.convolve(part["loss"], np.ones(width) / width, "valid")
            axis.semilogy(np.arange(len(smooth)) + width / 2, smooth, label=name, linewidth=1)
    axis.set(xlabel="updates of the student", ylabel="loss, running mean")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "loss.png", dpi=100)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["teachers", *STUDENTS, "report"])
    for name in parser.parse_args().parts:
        if name == "report":
            (FOLDER / "report.md").write_text(report())
        elif name == "teachers":
            goal = teacher_pictures()
            for calls in (16, 8, 4, 2, 1):
                found = measure(load_pipeline(device="cpu"), dict(num_inference_steps=calls, guidance_scale=GUIDANCE), goal)
                write_part(f"teacher-{calls}", found)
        else:
            train(name)


if __name__ == "__main__":
    main()
