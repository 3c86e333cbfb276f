"""Every training method on real data in minutes of one core: 8x8 digits, sampled through stock pipelines, with Frechet distances.

    python benchmarks/digits.py teacher                  # trains the teacher that the tests and the other parts load
    python benchmarks/digits.py progressive lcm --seeds 3
    python benchmarks/digits.py report                   # table of all parts so far

A distance is that of 1,024 samples from all 1,797 digits in the 32 features of a small classifier; the floor is real half against
real half. Seconds are of one CPU thread. Each part writes benchmarks/results/digits/parts/NAME.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor

from diffx.evaluation.metrics import frechet_distance, halves
from diffx.families import Condition, family_of
from diffx.objectives import Diffusion, Inference, Objective
from diffx.training.config import TrainConfig
from diffx.training.loop import Training
from diffx.training.networks import Networks

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "tests" / "data" / "digits"
RESULTS = ROOT / "benchmarks" / "results" / "digits"
NUM_SAMPLES = 1024
BATCH = 64


@functools.cache
def digits() -> tuple[Tensor, np.ndarray]:
    """(1797, 1, 8, 8) float32 in [-1, 1], and which digit each is."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), labels


@functools.cache
def _classifier() -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.neural_network import MLPClassifier

    pictures, labels = digits()
    fitted = MLPClassifier((64, 32), max_iter=400, random_state=0).fit(pictures.flatten(1).double().numpy(), labels)
    return list(zip(fitted.coefs_, fitted.intercepts_))[:-1]


def features(pictures: Tensor) -> np.ndarray:
    """(N, 32) of pictures (N, 1, 8, 8) in [-1, 1]: the last hidden layer of a classifier of digits."""
    hidden = pictures.clamp(-1, 1).flatten(1).double().numpy()
    for weight, bias in _classifier():
        hidden = np.maximum(hidden @ weight + bias, 0)
    return hidden


@functools.cache
def _real() -> np.ndarray:
    return features(digits()[0])


def distance(pictures: Tensor) -> float:
    """Frechet distance of pictures from all real digits."""
    return frechet_distance(features(pictures), _real())


def floor() -> float:
    """The same of one half of the real digits from the other."""
    one, two = halves(len(_real()), seed=0)
    return frechet_distance(_real()[one], _real()[two])


class Digits:
    """The digits as training reads them, told nothing."""

    def __len__(self) -> int:
        return len(digits()[0])

    def read(self, indices: list[int]) -> tuple[Tensor, Condition]:
        return digits()[0][indices], {}


def untrained(scheduler: Any, seed: int = 0) -> DDPMPipeline:
    """A stock pipeline around a network of 160,000 random weights."""
    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    return quiet(DDPMPipeline(network, scheduler))


def vp_scheduler(**changes: Any) -> DDIMScheduler:
    """1,024 train times, which halve exactly; cosine betas; v."""
    options = dict(num_train_timesteps=1024, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return DDIMScheduler(**(options | dict(timestep_spacing="trailing", clip_sample=False) | changes))  # type: ignore[arg-type]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_teacher() -> DDPMPipeline:
    """The committed teacher."""
    return quiet(DDPMPipeline.from_pretrained(TEACHER))


@torch.no_grad()
def sample(pipe: Any, inference: Inference, *, num_samples: int = NUM_SAMPLES, seed: int = 1) -> Tensor:
    """(N, 1, 8, 8) pictures in [-1, 1], by the stock pipeline's own call."""
    made = quiet(type(pipe)(pipe.unet, inference.scheduler))
    generator = torch.Generator().manual_seed(seed)
    pictures = made(batch_size=num_samples, generator=generator, output_type="np", **inference.call_kwargs).images
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * 2 - 1


@dataclass(frozen=True)
class Trained:
    """A student in a stock pipeline, how to call it, and what it cost in seconds of one thread."""

    pipe: Any
    inference: Inference
    seconds: float


def train(pipe: Any, objective: Objective, *, watch: Callable[[Any], None] | None = None, **config: Any) -> Trained:
    """Train on the digits with the project's own loop."""
    family = family_of(pipe)
    objective.check(family)
    start = time.process_time()
    nets = Networks(family, objective, None, size=(8, 8))
    training = Training(nets, Digits(), TrainConfig(batch_size=BATCH, **config), Accelerator(cpu=True))
    for progress in training.steps():
        if watch:
            watch(progress)
    inference = nets.objective.inference(family)
    student: Any = nets.modules[nets.exported()]
    return Trained(quiet(family.pipeline(student, inference.scheduler)), inference, time.process_time() - start)


def make_teacher(pipe: DDPMPipeline, *, train_steps: int = 1500, seed: int = 0, **objective: Any) -> Trained:
    """Ordinary training from random weights: the pilot's recipe."""
    recipe = Diffusion(**(dict(ema_decay=0.998, condition_dropout=0.0) | objective))
    return train(pipe, recipe, train_steps=train_steps, lr=1e-3, lr_schedule="linear", seed=seed)


def ladder(pipe: Any, calls: Sequence[int] = (1, 2, 4, 8, 16, 64)) -> dict[str, float]:
    """Distances of a teacher by number of calls, through its own scheduler."""
    return {str(n): distance(sample(pipe, Inference(pipe.scheduler, {"num_inference_steps": n}))) for n in calls}
