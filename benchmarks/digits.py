"""Every training method on real data in minutes of one core: 8x8 digits, sampled through stock pipelines, with Frechet distances.

    python benchmarks/digits.py lcm pcm --seeds 0 1 2 --minutes 30
    python benchmarks/digits.py report           # the table of all parts so far
    python benchmarks/digits.py make-teachers    # again: the two networks that the tests and the other parts load

A distance is that of 1,024 samples from all 1,797 digits in the 32 features of a small classifier; the floor is real half against
real half. Seconds are of one CPU thread. Each part writes benchmarks/results/digits/parts/NAME.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from diffx.evaluation.metrics import frechet_distance, halves
from diffx.families import Condition, family_of, remade
from diffx.families.stable_diffusion import StableDiffusion
from diffx.objectives import DMD2, LCM, PCM, ConsistencyTraining, Diffusion, Guidance, Inference, Objective, Progressive
from diffx.training.config import TrainConfig
from diffx.training.loop import Training
from diffx.training.networks import Networks

ROOT = Path(__file__).parent.parent
TEACHERS = ROOT / "tests" / "data" / "digits"
RESULTS = ROOT / "benchmarks" / "results" / "digits"
NUM_SAMPLES = 1024


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
    """(N, 32) of pictures (N, C, 8, 8) in [-1, 1]: the last hidden layer of a classifier of digits."""
    hidden = pictures.mean(1).clamp(-1, 1).flatten(1).double().numpy()  # those of three channels are grey
    for weight, bias in _classifier():
        hidden = np.maximum(hidden @ weight + bias, 0)
    return hidden


@functools.cache
def _real() -> np.ndarray:
    return features(digits()[0])


def distance(pictures: Tensor) -> float:
    """Frechet distance of pictures from all real digits."""
    return frechet_distance(features(pictures), _real())


def floor(num_splits: int = 5) -> float:
    """The same of one half of the real digits from the other, averaged over splits."""
    splits = (halves(len(_real()), seed=seed) for seed in range(num_splits))
    return float(np.mean([frechet_distance(_real()[one], _real()[two]) for one, two in splits]))


@dataclass(frozen=True)
class Digits:
    """The digits as training reads them: of one or three equal channels, told nothing or which digit each is."""

    channels: int = 1
    told: bool = False

    def __len__(self) -> int:
        return len(digits()[0])

    @property
    def group_sizes(self) -> list[int]:
        return [len(self)]

    def read(self, indices: list[int]) -> tuple[Tensor, Condition]:
        pictures, labels = digits()
        condition = {"encoder_hidden_states": embedded(labels[indices])} if self.told else {}
        return pictures[indices].expand(-1, self.channels, -1, -1), condition


def embedded(labels: np.ndarray) -> Tensor:
    """(N, 1, 16) what stands for the text of each digit; zeros say nothing."""
    return torch.eye(16)[torch.as_tensor(labels)][:, None] * 4


class ToldDigits(StableDiffusion):
    """A text-conditional pipeline on the pixels themselves, whose ten prompts come as embeddings."""

    def null_condition(self, *, size: tuple[int, int]) -> Condition:
        return {"encoder_hidden_states": torch.zeros(1, 1, 16)}


ABSENT: dict[str, Any] = dict(vae=None, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None)
BLOCKS: dict[str, Any] = dict(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8)


def untrained(scheduler: Any, seed: int = 0) -> Any:
    """A stock pipeline around a network of 160,000 random weights."""
    torch.manual_seed(seed)
    edm = isinstance(scheduler, CMStochasticIterativeScheduler)
    channels = 3 if edm else 1  # ConsistencyModelPipeline draws noise of three channels whatever its network has
    network = UNet2DModel(
        in_channels=channels, out_channels=channels, add_attention=False, **BLOCKS,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return quiet((ConsistencyModelPipeline if edm else DDPMPipeline)(network, scheduler))


def untrained_told(seed: int = 0) -> Any:
    """The same told which digit, in a pipeline that guides."""
    torch.manual_seed(seed)
    network = UNet2DConditionModel(
        in_channels=1, out_channels=1, cross_attention_dim=16, attention_head_dim=8, **BLOCKS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = vp_scheduler(steps_offset=1)  # which StableDiffusionPipeline asks for; trailing times have no use for it
    return quiet(StableDiffusionPipeline(unet=network, scheduler=scheduler, requires_safety_checker=False, **ABSENT))  # type: ignore[arg-type]


def vp_scheduler(**changes: Any) -> DDIMScheduler:
    """1,024 train times, which halve exactly; cosine betas; v."""
    options = dict(num_train_timesteps=1024, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return DDIMScheduler(**(options | dict(timestep_spacing="trailing", clip_sample=False) | changes))  # type: ignore[arg-type]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(pipe: Any, inference: Inference, *, num_samples: int = NUM_SAMPLES, seed: int = 1) -> Tensor:
    """(N, C, 8, 8) pictures in [-1, 1], by the stock pipeline's own call."""
    generator = torch.Generator().manual_seed(seed)
    made = quiet(remade(pipe, scheduler=inference.scheduler))
    if isinstance(pipe, StableDiffusionPipeline):
        told = embedded(np.arange(num_samples) % 10)
        prompts = dict(prompt_embeds=told, negative_prompt_embeds=torch.zeros_like(told))
        return made(**prompts, **inference.call_kwargs, height=64, width=64, generator=generator, output_type="latent").images
    pictures = made(batch_size=num_samples, generator=generator, output_type="np", **inference.call_kwargs).images
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * 2 - 1


@dataclass(frozen=True)
class Trained:
    """A student in a stock pipeline, how it is called, and what it cost in seconds of one thread."""

    pipe: Any
    inference: Inference
    seconds: float

    def distance(self, calls: int | None = None) -> float:
        """From the real digits, at its own number of calls or another."""
        more = {} if calls is None else {"num_inference_steps": calls}
        return distance(sample(self.pipe, replace(self.inference, call_kwargs=self.inference.call_kwargs | more)))


def train(pipe: Any, objective: Objective, *, batch_size: int = 64, **config: Any) -> Trained:
    """Train on the digits with the project's own loop."""
    told = isinstance(pipe, StableDiffusionPipeline)
    family = ToldDigits(pipe) if told else family_of(pipe)
    start = time.process_time()
    nets = Networks(family, objective, None, size=(8, 8))
    data = Digits(pipe.unet.config.in_channels, told)
    training = Training(nets, data, TrainConfig(batch_size=batch_size, **config), Accelerator(cpu=True))
    for _ in training.steps():
        pass
    student, call_kwargs = training.result()
    return Trained(quiet(student), Inference(student.scheduler, call_kwargs), time.process_time() - start)


def train_teacher(pipe: Any, *, train_steps: int = 1500, seed: int = 0, **objective: Any) -> Trained:
    """Ordinary training from random weights, by the pilot's recipe."""
    recipe = Diffusion(**({"ema_decay": 0.998, "condition_dropout": 0.0} | objective))
    return train(pipe, recipe, train_steps=train_steps, lr=1e-3, lr_schedule="linear", seed=seed)


def load(name: str) -> Any:
    """A committed teacher: "teacher", or "told" which digit."""
    absent = ABSENT if name == "told" else {}
    return quiet(DiffusionPipeline.from_pretrained(TEACHERS / name, **absent))


# The parts: what each measures for one seed of training. Distances of the teacher are of its own sampler, DDIM on trailing times.


def teacher_ladder(seed: int) -> dict[str, float]:
    pipe = load("teacher")
    calls = (1, 2, 4, 8, 16, 64)
    return {f"@{n}": distance(sample(pipe, Inference(pipe.scheduler, {"num_inference_steps": n}), seed=seed + 1)) for n in calls}


def progressive(seed: int, end: int, train_steps: int) -> dict[str, float]:
    recipe = Progressive(start=16, end=end)
    made = train(load("teacher"), recipe, train_steps=train_steps, lr=3e-4, lr_schedule="linear", seed=seed)
    return {f"@{end}": made.distance(), "seconds": made.seconds}


def lcm(seed: int, train_steps: int = 600) -> dict[str, float]:
    made = train(load("teacher"), LCM(), train_steps=train_steps, lr=3e-4, warmup_steps=100, seed=seed)
    return {f"@{n}": made.distance(n) for n in (1, 2, 4, 8)} | {"seconds": made.seconds}


def pcm(seed: int) -> dict[str, float]:
    made = train(load("teacher"), PCM(calls=4), train_steps=600, lr=3e-4, warmup_steps=100, seed=seed)
    return {"@4": made.distance(), "seconds": made.seconds}


def dmd2(seed: int, calls: int = 1) -> dict[str, float]:
    recipe = DMD2(calls=calls, fake_steps=3)
    made = train(load("teacher"), recipe, train_steps=800, lr=1e-4, adam_betas=(0.0, 0.999), seed=seed)
    return {f"@{calls}": made.distance(), "seconds": made.seconds}


def guidance(seed: int) -> dict[str, float]:
    """Distances from the guided teacher's samples at 16 calls of two networks each; the student makes 16 calls of one.

    Those of the student and of the teacher again, the floor, are means over the same two seeds of sampling.
    """
    teacher, scale = load("told"), 3.0
    by_teacher = Inference(teacher.scheduler, {"num_inference_steps": 16, "guidance_scale": scale})
    off = replace(by_teacher, call_kwargs=by_teacher.call_kwargs | {"guidance_scale": 1.0})
    goal = features(sample(teacher, by_teacher, seed=1))
    made = train(teacher, Guidance(guidance_scale=scale, calls=16), train_steps=1000, lr=1e-3, lr_schedule="linear", seed=seed)

    def from_goal(pipe: Any, inference: Inference, seeds: tuple[int, ...]) -> float:
        return float(np.mean([frechet_distance(features(sample(pipe, inference, seed=seed)), goal) for seed in seeds]))

    found = {"student": from_goal(made.pipe, made.inference, (2, 3)), "floor": from_goal(teacher, by_teacher, (2, 3))}
    return found | {"unguided": from_goal(teacher, off, (2,)), "seconds": made.seconds}


def consistency_training(seed: int, train_steps: int = 1200) -> dict[str, float]:
    start = untrained(CMStochasticIterativeScheduler(), seed)
    before = distance(sample(start, Inference(start.scheduler, {"num_inference_steps": 2})))
    recipe = ConsistencyTraining(halve_every=train_steps // 6, ema_decay=0.99)
    made = train(start, recipe, train_steps=train_steps, lr=1e-3, seed=seed)
    return {"untrained@2": before, "@2": made.distance(2), "@1": made.distance(1), "seconds": made.seconds}


def ablation(seed: int, scheduler: Callable[[], Any] = lambda: vp_scheduler(), told: bool = False, **objective: Any) -> dict[str, float]:
    """A teacher trained otherwise, for a third of the time."""
    made = train_teacher(untrained_told(seed) if told else untrained(scheduler(), seed), train_steps=500, seed=seed, **objective)
    calls = {} if told else {"@16": 16, "@64": 64}
    found = {name: made.distance(n) for name, n in calls.items()}
    if told:
        for scale in (1.0, 3.0):
            guided = Inference(made.pipe.scheduler, {"num_inference_steps": 16, "guidance_scale": scale})
            found[f"@16, guidance {scale:g}"] = distance(sample(made.pipe, guided))
    return found | {"seconds": made.seconds}


PARTS: dict[str, Callable[[int], dict[str, float]]] = {
    "teacher": teacher_ladder,
    "progressive-1": lambda seed: progressive(seed, 1, 1600),
    "progressive-2": lambda seed: progressive(seed, 2, 1200),
    "lcm": lcm,
    "pcm": pcm,
    "dmd2": dmd2,
    "dmd2-4": lambda seed: dmd2(seed, 4),
    "guidance": guidance,
    "consistency-training": consistency_training,
    "ablation-base": ablation,
    "ablation-l1": lambda seed: ablation(seed, distance="l1"),
    "ablation-linear-betas": lambda seed: ablation(seed, lambda: vp_scheduler(beta_schedule="linear")),
    "ablation-gaussian-times": lambda seed: ablation(seed, times="gaussian"),
    "ablation-epsilon": lambda seed: ablation(seed, lambda: vp_scheduler(prediction_type="epsilon")),
    "ablation-flow": lambda seed: ablation(seed, FlowMatchEulerDiscreteScheduler),
    "ablation-dropout-0": lambda seed: ablation(seed, told=True),
    "ablation-dropout-10": lambda seed: ablation(seed, told=True, condition_dropout=0.1),
}


ABLATED = {
    "ablation-l1": ("L1 instead of squared distance", "ablation-base"),
    "ablation-linear-betas": ("linear betas instead of cosine", "ablation-base"),
    "ablation-gaussian-times": ("times drawn around the middle instead of evenly", "ablation-base"),
    "ablation-epsilon": ("epsilon instead of v", "ablation-base"),
    "ablation-flow": ("flow instead of v", "ablation-base"),
    "ablation-dropout-10": ("told nothing of a tenth of the examples", "ablation-dropout-0"),
}


def ablations(parts: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Lines of a table: what each change does to the distances of the same seeds, and in how many of them it helps."""
    lines = []
    for name, (change, base) in ABLATED.items():
        if name not in parts or base not in parts:
            continue
        for key in [key for key in next(iter(parts[name].values())) if key != "seconds"]:
            differences = [run[key] - parts[base][seed][key] for seed, run in parts[name].items()]
            better = sum(difference < 0 for difference in differences)
            base_mean = np.mean([run[key] for run in parts[base].values()])
            lines.append(f"| {change} | {key} | {base_mean:.1f} | {np.mean(differences):+.1f} | {better} of {len(differences)} |")
    return lines


def write_report() -> None:
    """One table of all parts on the disk, as json and md."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "parts").glob("*.json"))}
    lines = [
        "# Digits: every method beside its teacher",
        "",
        f"Frechet distance of {NUM_SAMPLES} samples of stock pipelines from the 1,797 digits, in 32 features of a classifier; "
        f"real half against real half: {floor():.2f}.",
        "Means over seeds of training, with the lowest and highest. Made by `python benchmarks/digits.py`.",
        "",
        "| part | seeds | measured |",
        "| --- | --- | --- |",
    ]
    for name in [name for name in PARTS if name in parts]:
        runs = list(parts[name].values())
        cells = []
        for key in runs[0]:
            values = [run[key] for run in runs]
            spread = "" if len(runs) == 1 or key == "seconds" else f" ({min(values):.2f} to {max(values):.2f})"
            cells.append(f"{key}: {np.mean(values):.0f}" if key == "seconds" else f"{key}: {np.mean(values):.2f}{spread}")
        lines.append(f"| {name} | {len(runs)} | {'; '.join(cells)} |")
    if changed := ablations(parts):
        lines += [
            "",
            "## What changes a teacher",
            "",
            "Teachers trained for a third of the steps (500), the same seeds with and without the change; a change that helps at some "
            "seeds and hurts at others is not told from chance here.",
            "",
            "| change | calls | distance without | change of the mean | helps at |",
            "| --- | --- | ---: | ---: | ---: |",
            *changed,
        ]
    (RESULTS / "report.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "report.json").write_text(json.dumps({"floor": floor(), "parts": parts}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "make-teachers", "report"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after this long")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    if "make-teachers" in chosen.parts:
        for name, pipe, recipe in (("teacher", untrained(vp_scheduler()), {}), ("told", untrained_told(), {"condition_dropout": 0.1})):
            made = train_teacher(pipe, **recipe)
            made.pipe.to(torch.float16).save_pretrained(TEACHERS / name)  # Diffusers computes in float32 what it loads without a dtype
            print(name, f"{made.seconds:.0f} s")
    for seed in chosen.seeds:
        for name in (name for name in chosen.parts if name in PARTS):
            if time.monotonic() - start > 60 * chosen.minutes:
                print(f"{name}, seed {seed}: no time left")
                continue
            path = RESULTS / "parts" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {key: round(value, 3) for key, value in PARTS[name](seed).items()}
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(known | {str(seed): found}, indent=1) + "\n")
            print(name, seed, found, flush=True)
    write_report()


if __name__ == "__main__":
    main()
