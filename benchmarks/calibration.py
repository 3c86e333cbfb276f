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
from itertools import product
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffx.calibration import NetworkProblem, PipelineProblem, Problem, Settings
from diffx.calibration.api import calibrate_problems
from diffx.calibration.fixed import candidates
from diffx.calibration.reference import References
from diffx.evaluation.report import write_atomically
from diffx.evaluation.samplers import make_sampler
from diffx.oracle import Mixture
from diffx.schedulers.calibrated import Calibrated
from diffx.schedulers.process import is_flow

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
FOLDER = Path(__file__).parent / "results" / "calibration"
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
    from diffx import glyphs
    from diffx.evaluation.emoji import all_prompts, parse_prompt
    from diffx.loading import load_pipeline

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
    cache = FOLDER.parent.parent.parent / "outputs" / "calibration-cache"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="*", default=["mixture-vp", "mixture-flow", "emoji"])
    parser.add_argument("--calls", nargs="*", type=int, default=list(CALLS))
    arguments = parser.parse_args()
    (FOLDER / "parts").mkdir(parents=True, exist_ok=True)
    for name, calls in product(arguments.problem, arguments.calls):
        file = FOLDER / "parts" / f"{name}-{calls}.json"
        if not file.exists():
            write_atomically(file, lambda out: out.write(json.dumps(measure(name, calls), indent=1).encode()))  # noqa: B023
        part = json.loads(file.read_text())
        print(
            name, calls, "calibrated", part["calibrated"]["mean"], "diffx", part["diffx"][0], "diffusers", part["diffusers"][0], flush=True
        )


if __name__ == "__main__":
    main()
