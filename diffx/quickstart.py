"""The second half of ``diffx quickstart``: the shipped student in stock Diffusers, and its distillation a little further."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .evaluation import GlyphEvaluator, Measure, psnr
from .evaluation.candidate import make_candidate
from .evaluation.compare import lent, noise_generator
from .evaluation.emoji import seen_prompts
from .loading import EMBEDDED, EMBEDDED_STUDENT, load_pipeline
from .objectives import Progressive
from .training.api import distill

COUNT, SEED = 128, 2  # pictures that are measured, and their noises, which the student has not seen
METHOD = Progressive(start=8, end=4, guidance_scale=3.0)  # the last stage of the one that made it
TEACHER = {"num_inference_steps": 16, "guidance_scale": 3.0}
STOCK = """\
import json, sys
sys.modules["diffx"] = None  # an import of it fails from here on
import numpy, torch
from diffusers import DDIMScheduler, DiffusionPipeline

base, student, prompts, states, call_kwargs, file = json.loads(sys.argv[1])
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(student)
pipe.scheduler = DDIMScheduler.from_pretrained(student, subfolder="scheduler")
generators = [torch.Generator().manual_seed(state) for state in states]
numpy.save(file, pipe(prompts, generator=generators, output_type="np", **call_kwargs).images)
"""


@dataclass(frozen=True)
class Further:
    """What some updates more did to the student: the mean loss of the first and last tenth, and figures before and after."""

    updates: int
    seconds: float
    loss: tuple[float, float]
    measures: tuple[tuple[Measure, ...], tuple[Measure, ...]]
    psnr: tuple[float, float]  # dB, to the teacher's pictures from the same noise

    def __str__(self) -> str:
        rows = [("loss", *self.loss, None), ("PSNR to the teacher, dB", *self.psnr, None)]
        rows += [(one.name, one.value, two.value, one.floor) for one, two in zip(*self.measures)]
        lines = [f"{'':32s}{'before':>10s}{'after':>10s}{'real, real':>12s}"]
        lines += [f"{name:32s}{one:10.4g}{two:10.4g}" + ("" if floor is None else f"{floor:12.4g}") for name, one, two, floor in rows]
        return "\n".join(lines)


def differing_pixels(prompts: Sequence[str], seed: int) -> int:
    """How many values differ between the student's pictures here and those of a process that has only Diffusers; of 8 bits each.

    Raises:
        RuntimeError: that process failed; the message is its own.
    """
    pipe = load_pipeline(device="cpu")
    student = make_candidate(EMBEDDED_STUDENT.name, pipe)
    states = [noise_generator(seed, i).initial_seed() for i in range(len(prompts))]
    with lent(pipe), student.in_place(pipe):
        ours = _draw(pipe, list(prompts), seed, student.call_kwargs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pictures.npy"
        words = [str(EMBEDDED), str(EMBEDDED_STUDENT), list(prompts), states, dict(student.call_kwargs), str(file)]
        done = subprocess.run([sys.executable, "-c", STOCK, json.dumps(words)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"stock Diffusers did not load the student: {done.stderr.strip().splitlines()[-1]}")
        theirs = torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)
    return int((_bytes(ours) != _bytes(theirs)).sum())


def further(updates: int, output: str | Path, *, progress: bool = True) -> Further:
    """The shipped student distilled on, by the method that made it, with the run in ``output``: two minutes for 100 updates of 48."""
    pipe = load_pipeline(device="cpu")
    prompts = seen_prompts(COUNT, seed=SEED)
    evaluator, student = GlyphEvaluator(), make_candidate(EMBEDDED_STUDENT.name, pipe)
    with lent(pipe):
        goal = _draw(pipe, prompts, SEED, TEACHER)
        with student.in_place(pipe):
            before = _draw(pipe, prompts, SEED, student.call_kwargs)
    start = time.perf_counter()
    trained = distill(
        None, METHOD, lora_rank=8, lora_start=EMBEDDED_STUDENT, lr=5e-4, lr_schedule="linear", batch_size=48, train_steps=updates,
        save_every=updates, output=output, cache=Path(output) / "cache", device="cpu", progress=progress,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    with lent(trained.pipeline):
        after = _draw(trained.pipeline, prompts, SEED, trained.call_kwargs)
    log = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    loss = [entry["loss/student"] for entry in log if "loss/student" in entry]
    part = max(1, len(loss) // 10)
    return Further(
        updates, seconds, (float(np.mean(loss[:part])), float(np.mean(loss[-part:]))),
        (evaluator.evaluate(before, prompts), evaluator.evaluate(after, prompts)), (psnr(before, goal), psnr(after, goal)),
    )  # fmt: skip


def _draw(pipe: Any, prompts: list[str], seed: int, call_kwargs: Any) -> Tensor:
    """(N, 3, H, W) in [0, 1], picture i from noise i."""
    made = []
    for first in range(0, len(prompts), 32):
        part = prompts[first : first + 32]
        generators = [noise_generator(seed, first + i) for i in range(len(part))]
        made.append(torch.from_numpy(pipe(part, generator=generators, output_type="np", **call_kwargs).images).permute(0, 3, 1, 2))
    return torch.cat(made)


def _bytes(pictures: Tensor) -> Tensor:
    return pictures.mul(255).round().byte()
