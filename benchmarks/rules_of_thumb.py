"""Common advice on sampling, measured on the embedded model. Writes results/rules_of_thumb.md.

    python benchmarks/rules_of_thumb.py

CPU, float32, one thread. Every sentence under a table is computed from its numbers, so it changes with the model; read them as
facts about a 32-pixel model with v prediction and zero terminal SNR, and as questions to ask of yours.
"""

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import numpy as np
import torch
from scipy.spatial.distance import pdist
from torch import Tensor

import diffx
from diffx import glyphs
from diffx.evaluation import compare
from diffx.evaluation.emoji import GlyphEvaluator, render
from diffx.evaluation.features import GlyphFeatures
from diffx.evaluation.metrics import Measure
from diffx.evaluation.report import Result, write_atomically
from diffx.loading import load_pipeline

RESULT = Path(__file__).parent / "results" / "rules_of_thumb.md"
SEED = 0
SAMPLERS = ("DDIM", "Euler", "DPMSolver", "UniPC", "UniPC:solver_order=3", "diffusers:DPMSolverMultistepScheduler")
CALLS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32)
LIMIT = 100
SCALES = (1.0, 3.0, 5.0, 7.5, 12.0, 20.0)
GRIDS = ("trailing", "linspace", "leading", "karras")
SAME_PICTURE = 30.0  # dB, about 8 of 255 in every channel
SATURATED = 2 / 255  # from either end of the range


@dataclass(frozen=True)
class Size:
    """How much is measured; the default takes minutes, the smallest one seconds."""

    prompts: int = 32
    per_prompt: int = 4  # where pictures of one prompt are compared with each other
    calls: tuple[int, ...] = CALLS
    limit: int = LIMIT
    rounds: int = 15  # of timings


@dataclass
class QualityInDecibels:
    """PSNR against the nearest of ``renderings`` real pictures of the prompt, over all pictures: it has a limit below infinity."""

    renderings: int = 32
    _real: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def evaluate(self, images: Tensor, prompts) -> tuple[Measure, ...]:
        key = tuple(prompts)
        if key not in self._real:
            shape = (len(key), self.renderings, -1)
            self._real[key] = render(key, seed=SEED, per_prompt=self.renderings).reshape(shape)
        fresh = render(key, seed=SEED + 1)
        value, floor = self._decibels(images, key), self._decibels(fresh, key)
        return (Measure(name="nearest real, dB", value=value, floor=floor, count=len(key), seed=SEED),)

    def _decibels(self, images: Tensor, key: tuple[str, ...]) -> float:
        squares = (self._real[key] - images.flatten(1)[:, None]).square().mean(2).min(1).values
        return float(-10 * squares.mean().log10())


@dataclass
class Look:
    """Diversity, saturation and the share of pixels at the ends of the range, beside real pictures'."""

    per_prompt: int
    features: GlyphFeatures = field(default_factory=GlyphFeatures)

    def evaluate(self, images: Tensor, prompts) -> tuple[Measure, ...]:
        real = self._figures(render(prompts, seed=SEED + 1))
        found = self._figures(images)
        return tuple(Measure(name=n, value=found[n], floor=real[n], count=len(images), seed=SEED) for n in found)

    def _figures(self, images: Tensor) -> dict[str, float]:
        groups = self.features(images).reshape(len(images) // self.per_prompt, self.per_prompt, -1)
        colour = images.amax(1) - images.amin(1)
        return {
            "diversity": float(np.mean([pdist(group).mean() for group in groups])),
            "colour": float(colour.mean()),
            "at the ends": float(((images <= SATURATED) | (images >= 1 - SATURATED)).float().mean()),
        }


@dataclass(frozen=True)
class Together:
    """What several evaluators measure, one after the other."""

    evaluators: tuple

    def evaluate(self, images: Tensor, prompts) -> tuple[Measure, ...]:
        return tuple(measure for evaluator in self.evaluators for measure in evaluator.evaluate(images, prompts))


def seen_prompts(count: int) -> list[str]:
    """``count`` prompts of glyphs that the model was trained on, every second one with a background."""
    rng = np.random.default_rng(SEED)
    chosen = rng.choice(sorted(glyphs.seen()), count, replace=False)
    return [
        glyphs.Rendering(int(g), "white" if i % 2 else str(rng.choice(list(glyphs.BACKGROUNDS)))).caption() for i, g in enumerate(chosen)
    ]


def value(row: Result, name: str) -> float:
    return next(measure.value for measure in row.measures if measure.name == name)


def table(head: list[str], rows: list[list]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|:---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(cell if isinstance(cell, str) else f"{cell:g}" for cell in row) + " |" for row in rows]


def calls_needed(pipe, size: Size) -> list[str]:
    prompts, rows, needed = seen_prompts(size.prompts), [], {}
    for spec in SAMPLERS:
        found = compare(
            pipe, [spec], num_inference_steps=size.calls, prompts=prompts, seed=SEED, reference=spec, reference_steps=size.limit,
            evaluator=QualityInDecibels(), progress=False,
        ).rows  # fmt: skip
        limit = value(found[0], "nearest real, dB")
        runs = [row for row in found if row.role in ("sampler", "control")]
        good = first((row.nfe for row in runs if value(row, "nearest real, dB") >= limit - 1), size.calls[-1])
        same = first((row.nfe for row in runs if row.psnr is None or row.psnr >= SAME_PICTURE), size.calls[-1])
        needed[spec] = good, same
        rows.append([f"`{spec}`", good, same, f"{limit:.2f}", f"{value(runs[0], 'nearest real, dB'):.2f}"])
    floor = found[0].measures[0].floor
    most = max((good for good, _ in needed.values()), key=lambda text: int(text.strip("> ")))
    fewest, slowest = (sorted(needed, key=lambda spec: int(needed[spec][1].strip("> ")))[end] for end in (0, -1))
    return [
        "## How many calls a sampler needs",
        "",
        'The advice: "20 to 30 calls with a fast sampler, 50 with DDIM".',
        "",
        f"Quality is the PSNR against the nearest of 32 real renderings of the prompt; its limit is the figure at {size.limit} calls "
        f"(fresh real renderings: {floor:.2f} dB). *Same picture* is {SAME_PICTURE:g} dB to the sampler's own picture at {size.limit} "
        f"calls from the same noise. {size.prompts} prompts of seen glyphs, guidance 3, calls tried: {', '.join(map(str, size.calls))}.",
        "",
        *table(
            ["sampler", "calls to within 1 dB of its limit", "calls to the same picture", "limit, dB", f"at {size.calls[0]} calls, dB"],
            rows,
        ),
        "",
        f"So: {most} calls bring every sampler here to within 1 dB of its limit. The very picture of many calls takes "
        f"{needed[fewest][1]} (`{fewest}`) to {needed[slowest][1]} (`{slowest}`).",
    ]


def first(counts, last: int) -> str:
    """The first of ``counts``, or that there is none up to ``last``."""
    return str(next(iter(counts), f"> {last}"))


def guidance(pipe, size: Size) -> list[str]:
    prompts = [prompt for prompt in seen_prompts(size.prompts) for _ in range(size.per_prompt)]
    judges, rows, scores, looks = (GlyphEvaluator(), Look(size.per_prompt)), [], {}, {}
    for scale in SCALES:
        # The reference is the run that counts here; compare() asks for one more.
        found = compare(
            pipe, ["UniPC"], num_inference_steps=[1], prompts=prompts, guidance_scale=[scale], seed=SEED, reference="UniPC",
            reference_steps=16, evaluator=Together(judges), progress=False,
        ).rows[0]  # fmt: skip
        run = {measure.name: measure for measure in found.measures}
        names = ["R-precision@1", "diversity", "colour", "at the ends"]
        scores[scale], looks[scale] = run[names[0]].value, run
        rows.append([f"{scale:g}", *(f"{run[name].value:.3f}" for name in names)])
    rows.append(["real pictures", *(f"{run[name].floor:.3f}" for name in names)])
    best = max(scores, key=lambda scale: scores[scale])
    last = SCALES[-1]
    return [
        "## Guidance",
        "",
        'The advice: "7.5 by default; more follows the prompt better, at the price of diversity and burnt colours".',
        "",
        f"{len(prompts)} pictures, {size.per_prompt} of each of {size.prompts} prompts of seen glyphs, UniPC, 16 calls. R-precision@1 "
        "among these prompts and 200 others; diversity: mean feature distance between pictures of one prompt; colour: mean over "
        "pixels of the largest minus the smallest channel; at the ends: share of values within 2 of 0 or 255.",
        "",
        *table(["guidance scale", *names], rows),
        "",
        f"So: R-precision is best at guidance {best:g} ({scores[best]:.3f}); 7.5 has {scores[7.5]:.3f}, {last:g} has {scores[last]:.3f}. "
        f"From 1 to {last:g} diversity goes from {looks[1.0]['diversity'].value:.3f} to {looks[last]['diversity'].value:.3f}, colour from "
        f"{looks[1.0]['colour'].value:.3f} to {looks[last]['colour'].value:.3f}.",
    ]


@torch.no_grad()
def batched_guidance(pipe, size: Size) -> list[str]:
    rows, ratios, worst = [], [], 0.0
    states = pipe.encode_prompt("rocket", pipe.device, 1, True)
    for batch in (1, 4, 16):
        x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))
        condition, uncondition = (state.expand(batch, -1, -1) for state in states)
        both, twice = torch.cat([condition, uncondition]), torch.cat([x, x])
        together, apart, t = [], [], torch.tensor(500)
        for _ in range(size.rounds):
            start = time.perf_counter()
            one = pipe.unet(twice, t, both).sample
            middle = time.perf_counter()
            other = torch.cat([pipe.unet(x, t, condition).sample, pipe.unet(x, t, uncondition).sample])
            together.append(middle - start)
            apart.append(time.perf_counter() - middle)
        difference = ((one - other).abs().max() / other.abs().max()).item()
        a, b = statistics.median(together), statistics.median(apart)
        ratios.append(b / a)
        worst = max(worst, difference)
        rows.append([str(batch), f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", f"{b / a:.2f}", f"{difference:.1e}"])
    return [
        "## Batched or sequential guidance",
        "",
        'The advice: "run condition and uncondition as one batch: it is faster and the same".',
        "",
        f"One guided prediction of the network, median of {size.rounds} interleaved rounds.",
        "",
        *table(["pictures", "one batch, ms", "two calls, ms", "two calls / one batch", "largest relative difference"], rows),
        "",
        f"So: on one CPU thread one batch is {min(ratios):.2f} to {max(ratios):.2f} times as fast as two calls, at twice the activations "
        f"in memory, and {'the same bit for bit' if worst == 0 else f'the same but for rounding ({worst:.0e})'}. On a GPU: not measured.",
    ]


def img2img(pipe, size: Size) -> list[str]:
    """Calls made at each strength, and how much of the input survives strength 1."""
    painter, calls, rows = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe), 0, []
    painter.set_progress_bar_config(disable=True)
    inputs = render(["rocket", "red apple on blue"], seed=SEED)

    def count(module, args):
        nonlocal calls
        calls += 1

    def draw(scheduler, image: Tensor, strength: float, steps: int = 20) -> Tensor:
        painter.scheduler = scheduler
        options = dict(strength=strength, num_inference_steps=steps, guidance_scale=3.0, generator=torch.Generator().manual_seed(SEED))
        return painter("ghost", image=image[None], output_type="pt", **options).images

    hook = pipe.unet.register_forward_pre_hook(count)
    try:
        for strength in (0.1, 0.3, 0.5, 0.8, 1.0):
            calls = 0
            draw(diffx.UniPC.from_config(pipe.scheduler.config), inputs[0], strength)
            rows.append([f"{strength:g}", str(calls), f"{calls / 20:.0%}"])
    finally:
        hook.remove()
    share = next(row[2] for row in rows if row[0] == "0.3")
    full, left = [], {}
    for name, options in {"DDIM": {}, "UniPC": {}, "DDIM, leading": {"timestep_spacing": "leading"}}.items():
        scheduler = getattr(diffx, name.split(",")[0]).from_config(pipe.scheduler.config, **options)
        a, b = (draw(scheduler, image, 1.0) for image in inputs)
        alpha = float(scheduler._levels[0][0])
        left[name] = (a - b).abs().max().item()
        full.append([name, f"{alpha:.2g}", f"{left[name]:.2g}"])
    stable = diffx.DDIM(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing")
    stable.set_timesteps(20)
    return [
        "## Image to image",
        "",
        'The advice: "strength 0.3 runs 30 % of the calls, and strength 1 does not depend on the input".',
        "",
        *table(["strength", "calls of 20", "share"], rows),
        "",
        "At strength 1 the run begins with alpha of the input in the noise. Two inputs, one seed, largest difference of the two pictures, "
        "in [0, 1]:",
        "",
        *table(["sampler", "alpha at the first call", "difference"], full),
        "",
        f"So: strength 0.3 runs {share}. Strength 1 is independent of the input "
        + (f"only for {', '.join(n for n in left if left[n] == 0)}" if any(v == 0 for v in left.values()) else "for none of these")
        + f", bit for bit; the largest trace is {max(left.values()):.2g} ({max(left, key=lambda n: left[n])}). It takes a zero terminal "
        f"SNR and a grid that begins there; the betas of Stable Diffusion 1.5 leave alpha = {float(stable._levels[0][0]):.3f} of the input "
        "at the last train time.",
    ]


def grids(pipe, size: Size) -> list[str]:
    counts = [n for n in (4, 6, 8, 12, 20) if n <= max(size.calls)]
    words = {grid: "use_karras_sigmas=true" if grid == "karras" else f"timestep_spacing={grid}" for grid in GRIDS}
    rows, best = [], {}
    for name in ("Euler", "UniPC"):
        found = compare(
            pipe, [f"{name}:{word}" for word in words.values()], num_inference_steps=counts, prompts=seen_prompts(size.prompts), seed=SEED,
            reference_steps=max(*counts, size.limit), evaluator=GlyphEvaluator(), progress=False,
        ).rows  # fmt: skip
        for grid, word in words.items():
            runs = [row for row in found if row.sampler == f"{name}:{word}"]
            rows.append([f"{name}, {grid}", *(f"{row.psnr:.1f}" for row in runs), f"{runs[0].measures[0].value:.3f}"])
            for row in runs:
                key = name, row.nfe
                best[key] = max(best.get(key, (-np.inf, "")), (row.psnr, grid))
    winners = {name: [best[name, n][1] for n in counts] for name in ("Euler", "UniPC")}
    return [
        "## Grids",
        "",
        'The advice: "karras noise levels for few calls, trailing for zero terminal SNR, leading never".',
        "",
        f"PSNR in dB against Diffusers' DDIM at {max(*counts, size.limit)} calls on the model's own (trailing) grid, {size.prompts} "
        f"prompts of seen glyphs, guidance 3; in the last column the R-precision@1 at {counts[0]} calls.",
        "",
        *table(["sampler, grid", *map(str, counts), f"R-precision at {counts[0]}"], rows),
        "",
        "So: nearest to the reference at "
        + ", ".join(map(str, counts))
        + " calls are "
        + "; ".join(f"for {name} {', '.join(names)}" for name, names in winners.items())
        + ".",
    ]


def report(size: Size) -> str:
    pipe = load_pipeline(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    sections = [section(pipe, size) for section in (calls_needed, guidance, batched_guidance, img2img, grids)]
    head = [
        "# Rules of thumb, measured",
        "",
        f"`python benchmarks/rules_of_thumb.py`: the embedded model, seed {SEED}, CPU ({platform.machine()}), float32, one thread; "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}.",
        "One small model: a rule that fails here is no law; one that holds here may fail on yours.",
    ]
    return "\n".join(head + [line for section in sections for line in ["", *section]]) + "\n"


def main(output: Path, size: Size) -> None:
    torch.set_num_threads(1)
    text = report(size)
    write_atomically(output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--smallest", action="store_true", help="a few seconds: to see that it runs, not for figures")
    args = parser.parse_args()
    main(args.output, Size(prompts=4, per_prompt=2, calls=(2, 4), limit=5, rounds=2) if args.smallest else Size())
