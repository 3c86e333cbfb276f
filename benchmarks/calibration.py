"""Calibrated tables beside the best of every fixed sampler, Diffusers' and ours. Writes results/calibration/.

    python benchmarks/calibration.py --problem mixture-flow --calls 4,6

Three models: the embedded one at guidance 3, and a mixture of eight Gaussians in 16 dimensions with its exact denoiser, on VP and on
flow levels. Everything is measured against a 200-call reference, on noises (and prompts) that no calibration has seen. The rival is
the best of all configurations of Diffusers' deterministic schedulers, chosen on the test samples themselves, which favours it.
Every part is written when it is done, and a part that is there is not measured again.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from diffx import glyphs
from diffx.calibration import NetworkProblem, PipelineProblem, Problem, Settings
from diffx.calibration.api import calibrate_problems
from diffx.calibration.fixed import candidates
from diffx.calibration.reference import References
from diffx.evaluation import compare
from diffx.evaluation.compare import noise_generator
from diffx.evaluation.emoji import GlyphEvaluator, all_prompts, parse_prompt, render
from diffx.evaluation.report import picture_grid, write_atomically
from diffx.evaluation.samplers import make_sampler
from diffx.loading import EMBEDDED, load_pipeline
from diffx.oracle import Mixture
from diffx.schedulers.calibrated import Calibrated, fingerprint
from diffx.schedulers.process import is_flow

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "calibration"
CALLS = (4, 5, 6, 8, 10)
REFERENCE, REFERENCE_STEPS = "DPMSolver:timestep_spacing=trailing", 200
GUIDANCE = 3.0
FEW, FINALISTS = 8, 6  # test samples of the sweep's first round; configurations that see all of them

# Diffusers' deterministic schedulers, with the options that choose a method.
DPM = [f"solver_order={order},solver_type={kind}" for order, kind in product((1, 2, 3), ("midpoint", "heun"))]
STOCK: dict[str, list[str]] = {
    "DDIMScheduler": [""], "EulerDiscreteScheduler": [""], "HeunDiscreteScheduler": [""], "KDPM2DiscreteScheduler": [""],
    "LMSDiscreteScheduler": [""], "PNDMScheduler": ["skip_prk_steps=true"],
    "DPMSolverMultistepScheduler": DPM + [f"algorithm_type=dpmsolver,final_sigmas_type=sigma_min,solver_order={n}" for n in (1, 2, 3)],
    "DPMSolverSinglestepScheduler": [f"solver_order={order}" for order in (1, 2, 3)],
    "DEISMultistepScheduler": [f"solver_order={order}" for order in (1, 2, 3)],
    "UniPCMultistepScheduler": [f"solver_order={order},solver_type={kind}" for order, kind in product((1, 2, 3), ("bh1", "bh2"))],
}  # fmt: skip
FLOW_STOCK = {
    "FlowMatchEulerDiscreteScheduler": [""], "FlowMatchHeunDiscreteScheduler": [""],
    **{name: STOCK[name] for name in ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler")},
}  # fmt: skip
FILLS = ("", "use_karras_sigmas=true", "use_exponential_sigmas=true", "use_beta_sigmas=true", "use_lu_lambdas=true")
SPACINGS = ("timestep_spacing=leading", "timestep_spacing=linspace", "timestep_spacing=trailing")
SHIFTS = (1, 2, 3, 5)


def stock_configurations(flow: bool) -> list[str]:
    """Every class x method x sigmas x spacing (flow: x shift), as words of ``make_sampler``; what a class refuses drops out later."""
    words = []
    for name, methods in (FLOW_STOCK if flow else STOCK).items():
        shift = "shift" if name.startswith("FlowMatch") else "flow_shift"
        places = [f"{shift}={s}" for s in SHIFTS] if flow else SPACINGS
        for method, fill, place in product(methods, FILLS, places):
            extra = "use_flow_sigmas=true,prediction_type=flow_prediction" if flow and shift == "flow_shift" else ""
            words.append(f"diffusers:{name}:" + ",".join(filter(None, [method, fill, place, extra])))
    return words


def steps_for(word: str, config: dict, calls: int):
    """A scheduler, and the largest number of steps that makes at most ``calls`` network calls; None where it refuses."""
    for steps in (calls, (calls + 1) // 2, calls - 1):  # one call a step; two calls in all but the last; one extra call
        try:
            scheduler = make_sampler(word, config)
            scheduler.set_timesteps(steps)
        except Exception:  # Diffusers' classes raise many things at options that do not go together
            return None
        if len(scheduler.timesteps) <= calls:
            return scheduler, steps
    return None


def mixture(kind: str) -> tuple[Problem, Problem, Problem]:
    """Eight Gaussians in 16 dimensions, as float32 samples: to learn from, held out, to test on."""
    rng = torch.Generator().manual_seed(0)
    means, std = torch.randn(8, 16, generator=rng, dtype=torch.float64), 0.05 + 0.25 * torch.rand(8, 1, generator=rng, dtype=torch.float64)
    data = Mixture(means, std, (0.5 * torch.randn(8, generator=rng, dtype=torch.float64)).softmax(0))
    if kind == "flow":
        config = dict(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    else:
        betas = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        config = dict(diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **betas).config)
    sigmas = None if kind == "flow" else make_sampler("DDIM", config)._process.edm_sigmas

    def network(x: Tensor, t: Tensor) -> Tensor:
        if sigmas is None:
            sigma = min(float(t) / 1000, 1 - 1e-9)
            return data.predict(x, 1 - sigma, sigma, "flow_prediction")
        ratio = float(np.exp(np.interp(float(t), np.arange(1000), np.log(sigmas))))
        return data.predict(x, 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio), "epsilon")

    one, two, three = (NetworkProblem(network, config, (16,), f"mixture-{kind}", seed=seed) for seed in range(3))
    return one, two, three


def emoji() -> tuple[Problem, Problem, Problem]:
    """The embedded model on prompts that it was trained on: 96 to learn from, 32 held out, 128 to test on, none twice."""
    shown = []
    for prompt in all_prompts():
        glyph, background = parse_prompt(prompt)
        if glyph not in glyphs.held_out() and not glyphs.is_held_out_pair(glyph, background):
            shown.append(prompt)
    prompts = [shown[i] for i in np.random.default_rng(0).permutation(len(shown))[:256]]
    pipe = load_pipeline(device="cpu")
    parts = prompts[:96], prompts[96:128], prompts[128:]
    one, two, three = (PipelineProblem(pipe, part, GUIDANCE, seed) for seed, part in enumerate(parts))
    return one, two, three


def settings_for(problem: str, calls: int) -> tuple[Settings, int]:
    """How much a calibration may spend, and the number of test samples."""
    shared = dict(num_inference_steps=calls, reference=REFERENCE)
    if problem == "emoji":
        return Settings(num_samples=96, num_held_out=48, reference_steps=100, iterations=6, **shared), 128
    return Settings(num_samples=2048, num_held_out=2048, batch_size=2048, reference_steps=200, iterations=40, **shared), 4096


def errors(problem: Problem, scheduler, steps: int, goals: Tensor, batch: int) -> tuple[float, float]:
    """RMS over all entries of all samples, and the mean over samples of each one's RMS; infinite where a run is not finite."""
    square = []
    for first in range(0, len(goals), batch):
        samples = range(first, min(first + batch, len(goals)))
        with torch.no_grad():
            end = problem.ends(scheduler, samples, steps).float()
        square.append((end - goals[list(samples)]).double().flatten(1).square().mean(1))
    each = torch.cat(square)
    return (float(each.mean().sqrt()), float(each.sqrt().mean())) if each.isfinite().all() else (float("inf"), float("inf"))


def sweep(problem: Problem, runs: dict[str, tuple], goals: Tensor, batch: int) -> list[dict]:
    """Every run (scheduler, steps) on a few test samples; the best few on all of them, which are listed first with both errors."""
    rounds: dict[str, tuple] = {}
    for word, found in runs.items():
        try:
            rounds[word] = (*found, errors(problem, *found, goals[:FEW], batch)[1])
        except Exception as error:  # Diffusers' classes fail in many ways at step, too
            print(f"  {word}: {type(error).__name__}: {error}"[:150], flush=True)
    order = sorted((word for word in rounds if np.isfinite(rounds[word][2])), key=lambda word: rounds[word][2])
    rows = []
    for word in order[:FINALISTS]:
        scheduler, steps, few = rounds[word]
        rms, mean = errors(problem, scheduler, steps, goals, batch)
        rows.append({"sampler": word, "steps": steps, "calls": len(scheduler.timesteps), "few": few, "rms": rms, "mean": mean})
    rows.sort(key=lambda row: row["mean"])
    return rows + [{"sampler": word, "steps": rounds[word][1], "few": rounds[word][2]} for word in order[FINALISTS:]]


def measure(name: str, calls: int) -> dict:
    """One part: both sweeps and a calibration, all on the same test samples."""
    learned, held_out, test = emoji() if name == "emoji" else mixture(name.removeprefix("mixture-"))
    settings, count = settings_for(name, calls)
    cache = ROOT / "outputs" / "calibration-cache"
    goals = References(test, REFERENCE, REFERENCE_STEPS, cache).ends(count)
    floor = errors(test, make_sampler(REFERENCE, test.config), REFERENCE_STEPS // 2, goals, settings.batch_size)
    start = time.perf_counter()
    calibrated = calibrate_problems(learned, held_out, settings, cache=cache)
    seconds = time.perf_counter() - start
    rms, mean = errors(test, calibrated, calls, goals, settings.batch_size)
    stock = {word: steps_for(word, test.config, calls) for word in stock_configurations(is_flow(test.config))}
    fixed = {
        word: (Calibrated.from_config(test.config, calibration=made.to_dict()), calls)
        for word, made in candidates(test.config, calls).items()
    }
    part = {
        "problem": name, "calls": calls, "test_samples": count, "floor": {"rms": floor[0], "mean": floor[1]},
        "calibrated": {"rms": rms, "mean": mean, "seconds": round(seconds, 1), "stages": calibrated.calibration.made_with["stages"]},
        "config": {key: value for key, value in calibrated.config.items() if not key.startswith("_")},
        "diffx": sweep(test, fixed, goals, settings.batch_size),
        "diffusers": sweep(test, {word: run for word, run in stock.items() if run}, goals, settings.batch_size),
    }  # fmt: skip
    return part


def misuse(calls: int) -> dict:
    """The embedded model's table where it does not belong, beside the best fixed sampler of its own test: mean distances to 100 calls."""
    part = read("emoji", calls)
    _, _, test = emoji()
    settings, count = settings_for("emoji", calls)
    cache, fixed = ROOT / "outputs" / "calibration-cache", part["diffx"][0]["sampler"]

    def beside(problem: Problem) -> dict:
        goals = References(problem, REFERENCE, REFERENCE_STEPS // 2, cache).ends(count // 4)
        table = Calibrated.from_config(problem.config, calibration=part["config"]["calibration"])
        rivals = {"calibrated": table, fixed: make_sampler(fixed, problem.config)}
        return {name: errors(problem, scheduler, calls, goals, settings.batch_size)[1] for name, scheduler in rivals.items()}

    picture = render(list(test.prompts[:1]), seed=0)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**test.pipe.components, requires_safety_checker=False)
    return {
        "as calibrated": beside(test),
        "another seed": beside(replace(test, seed=9)),
        "guidance 4.5": beside(replace(test, guidance_scale=1.5 * GUIDANCE)),
        "guidance 2": beside(replace(test, guidance_scale=2.0)),
        "image to image, strength 0.7": beside(ImageProblem(pipe, test.prompts, GUIDANCE, test.seed, {"image": picture})),
    }


class ImageProblem(PipelineProblem):
    """The same from a picture: every run starts where strength 0.7 says."""

    def ends(self, scheduler, samples, num_inference_steps, start=None):
        image = self.call_kwargs["image"].expand(len(samples), -1, -1, -1)
        self.pipe.scheduler = scheduler
        self.pipe.set_progress_bar_config(disable=True)
        prompts, generator = [self.prompts[i] for i in samples], [noise_generator(self.seed, i) for i in samples]
        options = dict(strength=0.7, num_inference_steps=num_inference_steps, guidance_scale=self.guidance_scale, output_type="latent")
        return self.pipe(prompt=prompts, image=image, generator=generator, return_dict=False, **options)[0]


def pictures(calls: int) -> dict:
    """FD and R-precision of the test prompts' pictures, and the sheet of the first eight."""
    part, (_, _, test) = read("emoji", calls), emoji()
    os.chdir(EMBEDDED.parent)  # so that the table is named as users name it
    samplers = [
        f"emoji_calibrated_{calls}",
        part["diffx"][0]["sampler"],
        part["diffusers"][0]["sampler"],
        "UniPC",
        "diffusers:DPMSolverMultistepScheduler",
    ]
    found = compare(
        test.pipe, samplers, num_inference_steps=(calls,), prompts=list(test.prompts), guidance_scale=(GUIDANCE,), seed=2,
        reference=REFERENCE, reference_steps=64, evaluator=GlyphEvaluator(),
    )  # fmt: skip
    few = replace(found, images={key: value[:8] for key, value in found.images.items()}, prompts=found.prompts[:8])
    picture_grid(few).save(FOLDER / f"emoji-{calls}.png")
    return {"rows": [asdict(row) for row in found.rows]}


def read(problem: str, calls: int) -> dict:
    """A part that was measured."""
    return json.loads((FOLDER / "parts" / f"{problem}-{calls}.json").read_text())


def publish(calls: int) -> None:
    """The embedded model's table beside the model, in ``diffx/assets``: the only copy. Its card is written by hand."""
    part, (learned, _, _) = read("emoji", calls), emoji()
    made = {**part["config"]["calibration"], "guidance_scale": GUIDANCE, "model": fingerprint(learned.pipe)}
    scheduler = Calibrated.from_config(learned.config, calibration=made)
    scheduler.save_pretrained(EMBEDDED.with_name(f"emoji_calibrated_{calls}"))


def report() -> str:
    """The table of all parts, and the plot beside it."""
    parts = [json.loads(file.read_text()) for file in sorted((FOLDER / "parts").glob("*-*.json")) if file.stem.split("-")[-1].isdigit()]
    parts.sort(key=lambda part: (part["problem"], part["calls"]))
    names = list(dict.fromkeys(part["problem"] for part in parts))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), constrained_layout=True, squeeze=False)
    lines = [
        "# Calibrated tables beside fixed samplers",
        "",
        "`python benchmarks/calibration.py`: distances of a run's end to that of a 200-call run from the same noise, on noises and prompts "
        "that no calibration saw. *Mean* is over samples of each one's RMS, *RMS* over all entries of all samples: a few samples that end "
        "in another mode of the data weigh much in the second, most of all on the mixtures. *Floor*: the reference at half its calls.",
        f"CPU, float32, one thread; torch {torch.__version__}, diffusers {diffusers.__version__}. "
        "*Diffusers*: the best of all its configurations, chosen by the mean on these very samples (the list is in the script; which ones "
        "ran, with their figures, in `parts/`). *diffx*: the best of the fixed ones that a calibration starts from, chosen alike.",
        "",
        "| model | calls | samples | floor | Diffusers, mean | RMS | diffx, mean | RMS | calibrated, mean | RMS "
        "| Diffusers / calibrated, mean | RMS | network calls spent | seconds |",
        "|:---|" + "---:|" * 13,
    ]
    for part in parts:
        stock, ours, made = part["diffusers"][0], part["diffx"][0], part["calibrated"]
        spent = sum(stage["calls"] for stage in made["stages"])
        figures = [part["floor"]["mean"], stock["mean"], stock["rms"], ours["mean"], ours["rms"], made["mean"], made["rms"]]
        ratios = [stock["mean"] / made["mean"], stock["rms"] / made["rms"]]
        cells = [f"{value:.4f}" for value in figures] + [f"{ratio:.2f}" for ratio in ratios]
        lines.append(
            f"| {part['problem']} | {part['calls']} | {part['test_samples']:,} | {' | '.join(cells)} | {spent:,} | {made['seconds']:.0f} |"
        )
    lines += ["", "Chosen:", ""]
    for part in parts:
        lines.append(f"- {part['problem']}, {part['calls']} calls: `{part['diffusers'][0]['sampler']}`; `{part['diffx'][0]['sampler']}`")
    for axis, name in zip(axes[0], names):
        mine = [part for part in parts if part["problem"] == name]
        calls = [part["calls"] for part in mine]
        for label, key in (("best of Diffusers", "diffusers"), ("best fixed of diffx", "diffx"), ("calibrated", "calibrated")):
            values = [(part[key] if key == "calibrated" else part[key][0])["mean"] for part in mine]
            axis.semilogy(calls, values, marker="o", markersize=4, linewidth=2 if key == "calibrated" else 1, label=label)
        axis.set(title=name, xlabel="network calls", xticks=calls)
    axes[0][0].set_ylabel("mean distance to 200 calls")
    axes[0][-1].legend(frameon=False)
    figure.savefig(FOLDER / "error.png", dpi=100)
    for file, draw in (("misuse.json", misuse_table), ("pictures.json", pictures_table)):
        if (FOLDER / file).exists():
            lines += draw(json.loads((FOLDER / file).read_text()))
    return "\n".join(lines) + "\n"


def misuse_table(found: dict) -> list[str]:
    fixed = next(name for name in found["as calibrated"] if name != "calibrated")
    lines = [
        "",
        "## The embedded model's table where it does not belong",
        "",
        f"Mean distances to 100 calls, beside `{fixed}`, 32 samples.",
        "",
    ]
    lines += ["| used | calibrated | fixed | ratio |", "|:---|---:|---:|---:|"]
    return lines + [f"| {k} | {v['calibrated']:.4f} | {v[fixed]:.4f} | {v[fixed] / v['calibrated']:.2f} |" for k, v in found.items()]


def pictures_table(found: dict) -> list[str]:
    measures = [measure["name"] for measure in found["rows"][0]["measures"]]
    first = found["rows"][0]["measures"]
    floors = ", ".join(f"{m['name']} {m['value']:.3f} (real against real {m['floor']:.3f})" for m in first)
    lines = ["", "## Pictures of the embedded model", "", f"128 test prompts, seed 2. The 64-call reference has {floors}.", ""]
    lines += [f"| sampler | RMS of pictures | {' | '.join(measures)} |", "|:---|---:|" + "---:|" * len(measures)]
    for row in found["rows"][2:]:
        values = " | ".join(f"{measure['value']:.3f}" for measure in row["measures"])
        lines.append(f"| {row['sampler']} | {row['rms']:.4f} | {values} |")
    return lines


def once(file: Path, make: Callable[[], dict]) -> dict:
    """What ``file`` holds, made and written if it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(make(), indent=1).encode()
        write_atomically(file, lambda out: out.write(content))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="*", default=["mixture-vp", "mixture-flow", "emoji"])
    parser.add_argument("--calls", nargs="*", type=int, default=list(CALLS))
    parser.add_argument("--publish", type=int, help="of these calls make diffx/assets/emoji_calibrated_N and measure it as it is used")
    arguments = parser.parse_args()
    for name, calls in product(arguments.problem, arguments.calls):
        part = once(FOLDER / "parts" / f"{name}-{calls}.json", lambda: measure(name, calls))  # noqa: B023
        found = [f"{label} {part[key][0]['mean']:.4f}" for label, key in (("Diffusers", "diffusers"), ("diffx", "diffx"))]
        print(name, calls, *found, f"calibrated {part['calibrated']['mean']:.4f}", flush=True)
    if arguments.publish:
        publish(arguments.publish)
        once(FOLDER / "misuse.json", lambda: misuse(arguments.publish))
        once(FOLDER / "pictures.json", lambda: pictures(arguments.publish))
    text = report()
    write_atomically(FOLDER / "report.md", lambda out: out.write(text.encode()))


if __name__ == "__main__":
    main()
