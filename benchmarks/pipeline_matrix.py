"""Every pipeline of the contract matrix with every solver, ours and Diffusers' own. Writes results/pipeline_matrix.md.

    python benchmarks/pipeline_matrix.py

The pipelines are real classes with few random weights (``diffx.testing``), so this is about contracts, not about pictures: does
it run, do the same seeds give the same bits, and how far is a sample made in a batch of three from the same sample made alone.
"""

import os
import platform
import re
import statistics
import textwrap
from pathlib import Path
from typing import TypeGuard

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import torch
import transformers

from diffx.schedulers.process import is_flow
from diffx.testing import call_inputs, end_of
from diffx.testing.matrix import CASES, SOLVERS, Case, Observation, Solver, observe

NUM_STEPS = 6
RESULT = Path(__file__).parent / "results" / "pipeline_matrix.md"

Cell = Observation | Exception | None  # what was seen, what was raised, or that there is no such class


def look(case: Case) -> tuple[Solver, bool, dict[str, tuple[Cell, Cell]]]:
    """The solver that is the pipeline's own scheduler, whether the model is a flow, and (ours, Diffusers' own) of every solver."""
    pipe = case.build()
    stock = pipe.scheduler
    own = next(solver for solver in SOLVERS if type(stock) in (solver.stock, solver.stock_flow))
    return (
        own,
        is_flow(stock.config),
        {solver.name: (see(pipe, solver.make, stock), see(pipe, solver.make_stock, stock)) for solver in SOLVERS},
    )


def see(pipe, make, stock) -> Cell:
    try:
        scheduler = make(stock.config)
        return None if scheduler is None else observe(pipe, scheduler, NUM_STEPS)
    except Exception as error:  # whatever a foreign class raises is the finding
        return error


def holds(cell: Cell) -> TypeGuard[Observation]:
    return isinstance(cell, Observation) and cell.finite and cell.repeats and cell.seeded


def says(cell: Cell, cls: type | None, notes: list[str], *, expected: bool = False, wrong: bool = False, bold: bool = False) -> str:
    """One entry of the table; messages go to the notes, once for all classes.

    Args:
        expected: ours, and refused by design. wrong: Diffusers' own where ours refuses. bold: the pipeline's own scheduler.
    """
    if cell is None or cls is None:
        return "none"
    if isinstance(cell, Exception):
        message = re.sub(rf"\b{cls.__name__}\b", "(class)", re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", str(cell)))
        text = f"{type(cell).__name__}: {textwrap.shorten(message, 320) or 'no message'}"
        notes += [] if text in notes else [text]
        return f"{'refused' if expected else 'raises'} [{notes.index(text) + 1}]"
    if not cell.finite:
        return "not finite"
    if not cell.repeats:
        return "not reproducible"
    if not cell.seeded:
        return "ignores the seed"
    text = f"{cell.batch_difference:.1e}"
    return f"**{text}**" if bold else f"{text} *" if wrong else text


def bfloat16() -> dict[str, tuple[float, float]]:
    """(ours, Diffusers' own): the end in bfloat16 minus the end in float32, relative to its largest entry; Stable Diffusion."""
    wide, half = CASES[0].build(), CASES[0].build().to(torch.bfloat16)
    config = wide.scheduler.config

    def error(make) -> float:
        ends = []
        for pipe in (half, wide):
            pipe.scheduler = make(config)
            start = dict(num_inference_steps=NUM_STEPS, generator=torch.Generator().manual_seed(4))
            ends.append(end_of(pipe, **call_inputs(pipe), **start).float())
        return ((ends[0] - ends[1]).abs().max() / ends[1].abs().max()).item()

    return {solver.name: (error(solver.make), error(solver.make_stock)) for solver in SOLVERS}


def report() -> str:
    names, notes = [solver.name for solver in SOLVERS], []
    table, ratios, beside, held, refused, not_held = [], {}, [], 0, 0, []
    for case in CASES:
        own, flow, seen = look(case)
        ours, theirs = [], []
        allowed = seen[own.name][1].batch_difference  # type: ignore[union-attr]  # the pipeline's own scheduler runs in it
        for solver in SOLVERS:
            mine, its = seen[solver.name]
            refuses = solver.ours in case.refusals
            ours.append(says(mine, solver.ours, notes, expected=refuses))
            theirs.append(says(its, solver.stock_flow if flow else solver.stock, notes, wrong=refuses, bold=solver is own))
            if holds(mine) and holds(its):
                beside.append(mine.batch_difference / its.batch_difference)
            if refuses:
                refused += isinstance(mine, ValueError)
            elif holds(mine):
                held += 1
                ratios[case.name, solver.name] = mine.batch_difference / allowed
            else:
                not_held.append(f"{case.name} with {solver.name}")
        table += [f"| `{case.name}` | diffx | {' | '.join(ours)} |", f"| | Diffusers | {' | '.join(theirs)} |"]
    worst = max(ratios, key=lambda cell: ratios[cell])
    within = sum(ratio <= 1 for ratio in ratios.values())
    half = bfloat16()
    lines = [
        "# Pipelines and solvers",
        "",
        f"`python benchmarks/pipeline_matrix.py`: tiny real pipelines with random weights, float32, {NUM_STEPS} steps, "
        "three samples in one batch, again, and each alone.",
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, one CPU thread.",
        "",
        "A number means: it runs, is finite, the same seeds give the same bits twice in one process, another seed gives another sample; "
        "it is the largest difference between a sample made in the batch and alone, relative to the largest entry. "
        "The network rounds otherwise in another batch, and the steps pass that on.",
        "*Bold* is the scheduler that the pipeline comes with. *Refused*: our class says by name that it does not fit. "
        "*None*: Diffusers has no such class for flow models. "
        "A star: Diffusers' class runs where ours refuses, on samples in other units than the pipeline's (see "
        "[docs/upstream.md](../../docs/upstream.md)). Diffusers' classes are made by `from_config` of the pipeline's scheduler, "
        "as the first row of each pair is.",
        "",
        f"Of diffx's {held + refused + len(not_held)} cells {held} hold, {refused} are refused, {len(not_held)} do neither"
        f"{': ' + ', '.join(not_held) if not_held else ''}. "
        f"{within} of the {held} differ by no more than the pipeline's own Diffusers scheduler does; the others by up to "
        f"{ratios[worst]:.1f} times as much ({worst[0]} with {worst[1]}). Another solver passes the network's roundings on with other "
        f"weights: beside the same solver of Diffusers, where that holds ({len(beside)} cells), the ratio is {min(beside):.1f} to "
        f"{max(beside):.1f}, the median {statistics.median(beside):.2f}.",
        "",
        f"| pipeline | | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
        *table,
        "",
        "What was raised:",
        "",
        *(f"{i}. {text}" for i, text in enumerate(notes, 1)),
        "",
        "## Half precision",
        "",
        f"`{CASES[0].name}` in bfloat16: largest difference from the same run in float32, relative to the largest entry.",
        "",
        f"| | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        *(f"| {who} | {' | '.join(f'{half[name][i]:.3f}' for name in names)} |" for i, who in enumerate(("diffx", "Diffusers"))),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    text = report()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    print(text)
