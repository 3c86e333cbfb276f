"""What ``scheduler.step`` costs beside the bare torch operations it must do, and beside Diffusers. Writes results/step_cost.md.

    python benchmarks/step_cost.py

(1, 4, 64, 64) float32 on one CPU thread, called as pipelines call it (``return_dict=False``). Every candidate is timed in turn,
step by step, in one process: a round runs each of them through one whole 20-step schedule, rounds are interleaved, and the
median over all steps of all rounds counts. So a busy machine slows all of them alike; read the ratios, not the microseconds.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import torch
from torch import Tensor

import diffx

Weights = tuple[float, ...]
NUM_STEPS = 20
SHAPE = (1, 4, 64, 64)
MOST_OF_BARE = 1.8
RESULT = Path(__file__).parent / "results" / "step_cost.md"


@dataclass(frozen=True)
class Contest:
    """One of our classes, its twin, and how many times cheaper than the twin it should be."""

    name: str
    ours: diffx.TableScheduler
    stock: diffusers.SchedulerMixin
    goal: float | None = None


def contests() -> list[Contest]:
    betas = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ddim = diffusers.DDIMScheduler(clip_sample=False, **betas)
    dpm, unipc = diffusers.DPMSolverMultistepScheduler(**betas), diffusers.UniPCMultistepScheduler(**betas)
    euler, flow = diffusers.EulerDiscreteScheduler(**betas), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return [
        Contest("DDIM", diffx.DDIM.from_config(ddim.config), ddim, goal=3),
        Contest("Euler", diffx.Euler.from_config(euler.config), euler),
        Contest("Euler (flow)", diffx.Euler.from_config(flow.config), flow),
        Contest("DPM++ 2M", diffx.DPMSolver.from_config(dpm.config), dpm, goal=5),
        Contest("UniPC-2", diffx.UniPC.from_config(unipc.config), unipc, goal=12),
    ]


def bare_steps(scheduler: diffx.TableScheduler) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """For every step of the run, its mul and add_ kernels as plain torch calls with the same numbers, and nothing else."""
    calls = scheduler.plan().calls
    return [_bare(scheduler._x0_weights[k], call.sample, call.anchor) for k, call in enumerate(calls)]


def _bare(x0: Weights, sample: Weights, anchor: Weights | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Two sums, the prediction of x0 from the network's output and the next sample, and a copy where the sample is also kept."""
    assert anchor in (None, sample), "these solvers keep no anchor but the sample"
    predict, land = _sum(x0), _sum(sample)

    def step(x: Tensor, out: Tensor) -> Tensor:
        y = land(x, predict(x, out))
        return y if anchor is None else y.clone()

    return step


def _sum(weights: Weights) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, m) -> weights[0] x + (each further weight) m: one kernel per non-zero weight, none for a lone 1."""
    first, rest = weights[0], [w for w in weights[1:] if w != 0]
    if not rest:
        return (lambda x, m: x) if first == 1 else (lambda x, m: torch.mul(x, first))
    if first == 0 and rest == [1.0]:
        return lambda x, m: m

    def run(x: Tensor, m: Tensor) -> Tensor:
        if first == 0:
            y = torch.mul(m, rest[0])
        elif first == 1:
            y = torch.add(x, m, alpha=rest[0])
        else:
            y = torch.mul(x, first).add_(m, alpha=rest[0])
        for w in rest[1:]:
            y.add_(m, alpha=w)
        return y

    return run


def time_scheduler(scheduler, out: Tensor, x: Tensor) -> Iterator[float]:
    """Seconds of every ``step`` of one run."""
    scheduler.set_timesteps(NUM_STEPS)
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler):
        scheduler.is_scale_input_called = True  # else it warns at every step
    for t in scheduler.timesteps:
        start = time.perf_counter()
        scheduler.step(out, t, x, return_dict=False)
        yield time.perf_counter() - start


def time_bare(steps: list[Callable[[Tensor, Tensor], Tensor]], out: Tensor, x: Tensor) -> Iterator[float]:
    for step in steps:
        start = time.perf_counter()
        step(x, out)
        yield time.perf_counter() - start


def measure(contest: Contest, rounds: int) -> tuple[float, float, float]:
    """Median seconds of (bare, ours, stock), the first tenth of the rounds thrown away."""
    rng = torch.Generator().manual_seed(0)
    out, x = (torch.randn(SHAPE, generator=rng) for _ in range(2))
    contest.ours.set_timesteps(NUM_STEPS)
    bare = bare_steps(contest.ours)
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for i in range(rounds):
        candidates = time_bare(bare, out, x), time_scheduler(contest.ours, out, x), time_scheduler(contest.stock, out, x)
        for kept, measured in zip(times, candidates, strict=True):
            run = list(measured)
            if i >= rounds // 10:
                kept.extend(run)
    bare_s, ours_s, stock_s = (statistics.median(kept) for kept in times)
    return bare_s, ours_s, stock_s


def report(rounds: int) -> str:
    lines = [
        "# Cost of one scheduler step",
        "",
        f"`python benchmarks/step_cost.py`: {SHAPE} float32, one thread, {NUM_STEPS} steps, median over {rounds} interleaved rounds.",
        f"{_device()}; torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}.",
        "Bare is the row's own mul and add_ kernels as plain torch calls. Goals: at most "
        f"{MOST_OF_BARE} x bare; 3, 5, 12 times cheaper than Diffusers' DDIM, DPM++ 2M, UniPC.",
        "",
        "| solver | bare, us | diffx, us | Diffusers, us | diffx / bare | Diffusers / diffx | goals |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for contest in contests():
        bare, ours, stock = measure(contest, rounds)
        met = ours / bare <= MOST_OF_BARE and (contest.goal is None or stock / ours >= contest.goal)
        goal = f"<= {MOST_OF_BARE} x bare" + (f", >= {contest.goal:g} x cheaper" if contest.goal else "")
        lines.append(
            f"| {contest.name} | {1e6 * bare:.1f} | {1e6 * ours:.1f} | {1e6 * stock:.1f} | {ours / bare:.2f} | {stock / ours:.1f} "
            f"| {goal}: {'met' if met else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


def _device() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="runs of the whole schedule per candidate")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    text = report(rounds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    print(text)
