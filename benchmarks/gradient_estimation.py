"""Error against network calls of schedulers/gradient_estimation on the embedded model: its card's plot and table.

    python benchmarks/gradient_estimation.py

Final latents against DDIM at 200 calls from the same noise, RMS over prompts, at guidance 1 (off) and 3. CPU, float32.
"""

import argparse
import os
import re
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import diffx
from diffx.evaluation.metrics import rms
from diffx.loading import load_pipeline

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from schedulers.gradient_estimation.scheduler import GradientEstimation  # noqa: E402  # the folder is no installed package

CARD = ROOT / "schedulers" / "gradient_estimation"
PROMPTS = [f"{name}{place}" for place in ("", " on blue") for name in ("rocket", "ghost", "red apple", "snail", "hot beverage", "cat face")]
CALLS = (4, 6, 8, 12, 16, 24, 32)
SCALES = (1.0, 3.0)
REFERENCE_CALLS = 200
SAMPLERS = {
    "DDIM": lambda config: diffx.DDIM.from_config(config),
    "gradient estimation": lambda config: GradientEstimation.from_config(config),
    "gamma 1.5": lambda config: GradientEstimation.from_config(config, gamma=1.5),
    "DPMSolver": lambda config: diffx.DPMSolver.from_config(config),
    "UniPC": lambda config: diffx.UniPC.from_config(config),
}


def latents(pipe, scheduler, calls: int, scale: float) -> torch.Tensor:
    """(P, 4, 8, 8) the end latents of every prompt, each from noise of its own."""
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(PROMPTS, num_inference_steps=calls, guidance_scale=scale, generator=generators, output_type="latent").images


def measure(pipe, calls: tuple[int, ...], reference_calls: int) -> dict[float, dict[str, list[float]]]:
    """RMS error by guidance scale and sampler, one figure per entry of ``calls``."""
    config, errors = pipe.scheduler.config, {}
    for scale in SCALES:
        goal = latents(pipe, SAMPLERS["DDIM"](config), reference_calls, scale)
        errors[scale] = {
            name: [rms(latents(pipe, make(config), n, scale), goal) for n in calls] for name, make in SAMPLERS.items()
        }  # fmt: skip
    return errors


def plot(errors: dict, calls: tuple[int, ...], file: Path) -> None:
    figure, axes = plt.subplots(1, len(errors), figsize=(9, 3.6), sharey=True, constrained_layout=True)
    for axis, (scale, lines) in zip(axes, errors.items()):
        for name, values in lines.items():
            axis.loglog(calls, values, marker="o", markersize=3, linewidth=2 if "gradient" in name else 1, label=name)
        axis.set(title=f"guidance {scale:g}", xlabel="network calls", xticks=calls, xticklabels=calls)
        axis.minorticks_off()
    axes[0].set_ylabel("RMS error of the latents")
    axes[-1].legend(frameon=False)
    figure.savefig(file, dpi=100)


def table(errors: dict, calls: tuple[int, ...]) -> str:
    head = ["guidance", "sampler", *map(str, calls)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|:---|" + "---:|" * len(calls)]
    for scale, rows in errors.items():
        lines += [f"| {scale:g} | {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |" for name, values in rows.items()]
    return "\n".join(lines)


def main(output: Path, calls: tuple[int, ...], reference_calls: int) -> None:
    pipe = load_pipeline(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    errors = measure(pipe, calls, reference_calls)
    plot(errors, calls, output / "error.png")
    card = output / "README.md"
    card.write_text(re.sub(r"(?<=<!-- table -->\n).*(?=<!-- /table -->)", f"{table(errors, calls)}\n", card.read_text(), flags=re.DOTALL))
    print(table(errors, calls))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CARD, help="folder with the card; its table and error.png are written")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS)
    parser.add_argument("--reference-calls", type=int, default=REFERENCE_CALLS)
    args = parser.parse_args()
    main(args.output, tuple(args.calls), args.reference_calls)
