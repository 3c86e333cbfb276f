"""The whole run before it starts: a printable record of every network call."""

from dataclasses import asdict, dataclass

import numpy as np

from .error import planned_errors
from .grid import Grid
from .table import KEEP_X0, Table


@dataclass(frozen=True)
class Call:
    """One network call: what the network is fed, at which noise level, and what is made of its prediction."""

    k: int  # index in the grid
    t: float  # the time the network is fed
    sigma: float  # grid value: edm_sigma (sigma / alpha), or the flow sigma
    lam: float  # half-log-SNR, log(alpha / sigma)
    predictions: int  # calls, this one among them, whose predictions the next sample weighs
    sample: tuple[float, ...]  # weights of (anchor, what was kept of this call, of older calls ...) in the next sample
    anchor: tuple[float, ...] | None  # the same for an anchor of its own, where one is kept
    noise: float  # standard deviation of the fresh noise
    kept: tuple[float, float]  # weights of (sample, x0) in what is kept of this call; (0, 1) is its x0
    error: float | None  # of this step on normal data of std 0.5, estimated, relative to the sample there; see ``error``


@dataclass(frozen=True)
class Plan:
    """A run as a list of calls; ``len(plan)`` is the NFE, ``str(plan)`` a table to read."""

    scheduler: str
    calls: tuple[Call, ...]

    def __len__(self) -> int:
        return len(self.calls)

    def to_dict(self) -> dict:
        """Plain numbers and lists, ready for JSON (lam of a pure-noise start is None: JSON has no infinity)."""
        calls = [asdict(c) | {"lam": c.lam if np.isfinite(c.lam) else None} for c in self.calls]
        return {"scheduler": self.scheduler, "nfe": len(self), "calls": calls}

    def __str__(self) -> str:
        head = f"{'k':>3} {'t':>9} {'sigma':>10} {'lambda':>8} {'noise':>8} {'error':>7}  next sample = anchor, newest x0, older x0 ..."
        lines = [
            f"{c.k:>3} {c.t:>9.3f} {c.sigma:>10.5f} {c.lam:>8.3f} {c.noise:>8.4f} "
            + ("      -  " if c.error is None else f"{c.error:>7.0e}  ")
            + "  ".join(f"{w:+.5f}" for w in c.sample)
            + ("" if c.kept == KEEP_X0 else "  where x0 stands for {:+.5f} sample {:+.5f} x0".format(*c.kept))
            for c in self.calls
        ]
        return "\n".join([f"{self.scheduler}: {len(self)} network calls", head, *lines])


def make_plan(name: str, grid: Grid, table: Table, begin: int) -> Plan:
    """The plan of ``table``, whose first row is call ``begin`` of ``grid``."""
    with np.errstate(divide="ignore"):
        lam = np.log(table.alpha) - np.log(table.sigma)
    errors = planned_errors(table)
    calls = [
        Call(
            k=begin + i,
            t=float(grid.t[begin + i]),
            sigma=float(grid.sigmas[begin + i]),
            lam=float(lam[i]),
            predictions=int(np.count_nonzero(row.sample[1:])),
            sample=tuple(float(w) for w in row.sample),
            anchor=None if row.anchor is None else tuple(float(w) for w in row.anchor),
            noise=float(row.noise),
            kept=(float(row.kept[0]), float(row.kept[1])),
            error=errors[i],
        )
        for i, row in enumerate(table.rows)
    ]
    return Plan(name, tuple(calls))
