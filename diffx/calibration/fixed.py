"""Stage (a): the best of the solvers and grids that need no learning, written as a calibration."""

import contextlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from ..evaluation.samplers import make_sampler
from ..schedulers.calibrated import Calibration
from ..schedulers.derivative import gradient_estimation
from ..schedulers.process import is_flow
from ..schedulers.scheduler import TableScheduler
from ..schedulers.table import Table

GRADIENT_ESTIMATION = {f"gradient_estimation:gamma={gamma:g}": gamma for gamma in (1.5, 2.0)}
SOLVERS = ("DDIM", "DPMSolver", "DPMSolver:solver_order=3", "UniPC", "UniPC:solver_order=3")
BETA_GRIDS = (
    "timestep_spacing=trailing", "timestep_spacing=linspace", "timestep_spacing=leading", "spacing=quadratic", "spacing=ays_sd",
    "use_karras_sigmas=true", "use_exponential_sigmas=true", "use_beta_sigmas=true",
)  # fmt: skip
FLOW_GRIDS = (
    "",
    "shift=1",
    "shift=2",
    "shift=3",
    "shift=5",
    "use_karras_sigmas=true",
    "use_exponential_sigmas=true",
    "use_beta_sigmas=true",
)
# Pairs that were among the best of all solvers on all grids for a mixture with an exact denoiser, or of Diffusers' for any model.
BETA_PAIRS = (
    *product((*GRADIENT_ESTIMATION,), ("spacing=ays_sd", "use_karras_sigmas=true", "timestep_spacing=linspace")),
    *product(("DPMSolverSinglestep:solver_order=3",), ("use_karras_sigmas=true", "timestep_spacing=linspace")),
    *product(("UniPC", "DPMSolverSinglestep:solver_order=3"), ("spacing=polyexponential,spacing_rho=0.7",)),
    ("LMS", "use_karras_sigmas=true"),
    ("DEIS:solver_order=2,final_sigmas_type=zero", "use_karras_sigmas=true"),
)
FLOW_PAIRS = (
    *product((*GRADIENT_ESTIMATION,), ("shift=1", "use_beta_sigmas=true")),
    ("gradient_estimation:gamma=2", "spacing=beta,spacing_alpha=0.5,spacing_beta=0.8"),
    *product(("LMS:solver_order=2",), ("shift=1", "use_beta_sigmas=true")),
    ("LMS", "use_beta_sigmas=true"),
    ("UniPC", "spacing=polyexponential,spacing_rho=0.7"),
)


def candidates(config: Mapping[str, Any], calls: int, mu: float | None = None) -> dict[str, Calibration]:
    """Sampler -> its run of ``calls`` network calls on the model of ``config``; grids that the model cannot have are left out.

    Flow models have every grid twice: as their scheduler spaces it, down to the lowest train time, and from the sigmas
    1 - i / N that their pipelines hand over, whose last interval is as wide as the others.
    """
    flow = is_flow(config)
    given = {"": None, " from even sigmas": np.linspace(1, 1 / calls, calls).tolist()} if flow else {"": None}
    found = {}
    pairs = [(solver, grid) for grid in (FLOW_GRIDS if flow else BETA_GRIDS) for solver in SOLVERS]
    for (solver, grid), (note, sigmas) in product([*pairs, *(FLOW_PAIRS if flow else BETA_PAIRS)], given.items()):
        with contextlib.suppress(ValueError):  # a contradiction with the model's own grid words
            scheduler: Any = make_sampler(word_of("DDIM" if solver in GRADIENT_ESTIMATION else solver, grid), config)
            scheduler.set_timesteps(None if sigmas else calls, sigmas=sigmas, mu=mu)
            if solver in GRADIENT_ESTIMATION:  # no class of the package, but rows on the grid of DDIM
                alpha, sigma = scheduler._levels
                table = Table(alpha, sigma, tuple(gradient_estimation(alpha, sigma, GRADIENT_ESTIMATION[solver])))
                made = written(table, scheduler.timesteps.tolist(), scheduler._process.frame)
            else:
                made = calibration_of(scheduler)
            found[word_of(solver, grid) + note] = made
    return found


def word_of(solver: str, grid: str) -> str:
    """A solver of ``SOLVERS`` on a grid, in one word."""
    return solver + (("," if ":" in solver else ":") + grid if grid else "")


def calibration_of(scheduler: TableScheduler) -> Calibration:
    """The run that a deterministic scheduler is set to, as a calibration: weights of the sample and of x0 predictions alone.

    Every table without noise can be written so, also one that keeps anchors or other directions in its history, and at VE scale.

    Raises:
        ValueError: the scheduler draws noise.
    """
    table = scheduler._table(0)
    if any(row.noise for row in table.rows):
        raise ValueError(f"{type(scheduler).__name__} draws fresh noise; only deterministic samplers can be written as a calibration")
    return written(table, scheduler.timesteps.tolist(), scheduler._process.frame)


def written(table: Table, timesteps: Sequence[float], frame: str) -> Calibration:
    """A table without noise as a calibration, whose samples have VP scale (flow: their own)."""
    scale = 1 / (table.alpha + table.sigma if frame == "flow" else np.hypot(table.alpha, table.sigma))
    levels = table.sigma / (table.alpha + table.sigma)
    rows = []
    for k, (keep, *weights) in enumerate(x0_rows(table)):
        rows.append([float(keep * scale[k + 1] / scale[k]), *(float(w * scale[k + 1]) for w in weights)])
    return Calibration(levels=levels.tolist(), timesteps=list(timesteps), rows=rows)


def x0_rows(table: Table) -> list[list[float]]:
    """The rows of a table without noise as weights of (the sample, newest x0, older ...): sigma' / sigma, and what follows from it."""
    basis = np.eye(len(table.rows) + 1)  # the first sample, and the x0 prediction of each call
    x, anchor, history, rows = basis[0], None, [], []
    for k, row in enumerate(table.rows):
        history = [row.kept[0] * x + row.kept[1] * basis[k + 1], *history]
        start = x if anchor is None else anchor
        land = _sum(row.sample, start, history)
        keep = table.sigma[k + 1] / table.sigma[k]
        anchor = None if row.anchor is None else _sum(row.anchor, start, history)
        weights = (land - keep * x)[k + 1 : 0 : -1]
        rows.append([float(keep), *weights[: max(1, len(np.trim_zeros(weights, "b")))].tolist()])
        x = land
    return rows


def _sum(weights: Sequence[float], start: np.ndarray, history: Sequence[np.ndarray]) -> np.ndarray:
    return sum(w * column for w, column in zip(weights, (start, *history)))  # type: ignore[return-value]
