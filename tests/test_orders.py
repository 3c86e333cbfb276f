"""Convergence order of every solver, measured on Gaussian data, whose probability flow is a formula.

Grids are even in the half-log-SNR lam = log(alpha / sigma), everything is float64, and the order is the slope of log error
against log step over 48 to 256 steps. A multistep method of order p is given exact values for its first p - 1 intervals, as
is usual: its own start has order 1 (UniPC: 2), an error made once, which would hide orders above 2 (UniPC: 3).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import diffx
from diffx.oracle import Gaussian
from diffx.schedulers.derivative import adams_bashforth
from diffx.schedulers.multistep import dpm, dpmpp
from diffx.schedulers.one_step import ddim
from diffx.schedulers.singlestep import dpm_singlestep
from diffx.schedulers.table import Row, State, Table, advance
from diffx.schedulers.two_stage import heun
from diffx.schedulers.unipc import unipc
from diffx.testing import denoise

NUM_STEPS = (48, 72, 108, 160, 256)
LAM = (-3.0, 3.0)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


GAUSSIANS = {
    "narrow": Gaussian(vector(0.7), 0.5),
    "wide": Gaussian(vector(-1.5), 1.8),
    "diagonal": Gaussian(vector(0.5, -1.0, 2.0, 0.1), vector(0.3, 0.7, 1.3, 2.0)),
    "correlated": Gaussian.from_covariance(vector(0.4, -0.8), torch.tensor([[1.2, 0.5], [0.5, 0.6]], dtype=torch.float64)),
}


def levels(frame, num_steps):
    """(alpha, sigma), each (N + 1,), even in lam."""
    lam = np.linspace(*LAM, num_steps + 1)
    if frame == "flow":
        sigma = 1 / (1 + np.exp(lam))
        return 1 - sigma, sigma
    if frame == "ve":
        return np.ones_like(lam), np.exp(-lam)
    alpha = 1 / np.sqrt(1 + np.exp(-2 * lam))
    return alpha, alpha * np.exp(-lam)


def growing(order, num_steps):
    """Full order as soon as there are enough predictions."""
    return [min(i + 1, order) for i in range(num_steps)]


def grouped(order, num_steps):
    """Groups of ``order`` calls."""
    return [1 + i % order for i in range(num_steps)]


SINGLESTEP = {
    f"single{order}_{kind}_{algorithm}": lambda a, s, order=order, kind=kind, algorithm=algorithm: dpm_singlestep(
        a, s, grouped(order, len(a) - 1), solver_type=kind, algorithm_type=algorithm
    )
    for order in (2, 3)
    for kind in ("midpoint", "heun")
    for algorithm in ("dpmsolver++", "dpmsolver")
}
SOLVERS = {
    "ddim": lambda a, s: ddim(a, s),
    "dpm1": lambda a, s: dpmpp(a, s, growing(1, len(a) - 1)),
    "dpm2": lambda a, s: dpmpp(a, s, growing(2, len(a) - 1)),
    "dpm2_heun": lambda a, s: dpmpp(a, s, growing(2, len(a) - 1), solver_type="heun"),
    "dpm3": lambda a, s: dpmpp(a, s, growing(3, len(a) - 1)),
    "dpm3_stock": lambda a, s: dpmpp(a, s, growing(3, len(a) - 1), stock_third_order=True),
    "eps1": lambda a, s: dpm(a, s, growing(1, len(a) - 1)),
    "eps2": lambda a, s: dpm(a, s, growing(2, len(a) - 1)),
    "eps2_heun": lambda a, s: dpm(a, s, growing(2, len(a) - 1), solver_type="heun"),
    "eps3": lambda a, s: dpm(a, s, growing(3, len(a) - 1)),
    "eps3_stock": lambda a, s: dpm(a, s, growing(3, len(a) - 1), stock_third_order=True),
    "ab2": lambda a, s: adams_bashforth(s, growing(2, len(a) - 1)),
    "ab3": lambda a, s: adams_bashforth(s, growing(3, len(a) - 1)),
    "ab4": lambda a, s: adams_bashforth(s, growing(4, len(a) - 1)),
} | {
    f"unipc{order}_{kind}": lambda a, s, order=order, kind=kind, given=given: unipc(
        a, s, growing(order, len(a) - 1), solver_type=kind, uncorrected=given
    )
    for order, given in ((1, ()), (2, ()), (3, (1, 2)))  # points that are given exactly are not corrected
    for kind in ("bh1", "bh2")
} | SINGLESTEP  # fmt: skip
# solver -> (lowest, highest) slope accepted: 0.2 around theory (measured within 0.1). Orders above 3 are approached from above,
# since terms of the next order still count at 48 steps: measured 3.4 to 3.6 for dpm3.
ORDERS = {
    "ddim": (0.8, 1.2),
    "dpm1": (0.8, 1.2),
    "dpm2": (1.8, 2.2),
    "dpm2_heun": (1.8, 2.2),
    "dpm3": (2.7, 3.8),
    "dpm3_stock": (1.8, 2.2),  # what Diffusers' half D2 term costs
    "eps1": (0.8, 1.2),
    "eps2": (1.8, 2.2),
    "eps2_heun": (1.8, 2.2),
    "eps3": (2.7, 3.2),
    "eps3_stock": (1.8, 2.2),
    "ab2": (1.8, 2.2),
    "ab3": (2.8, 3.2),
    "ab4": (3.8, 4.2),
    "unipc1_bh1": (1.8, 2.2),
    "unipc1_bh2": (1.8, 2.2),
    "unipc2_bh1": (2.8, 3.2),
    "unipc2_bh2": (2.8, 3.2),
    "unipc3_bh1": (3.5, 4.5),
    "unipc3_bh2": (3.5, 4.5),
} | {name: (1.8, 2.2) if "2" in name else (2.8, 3.2) for name in SINGLESTEP}  # fmt: skip
# Errors of the first two change sign between 48 and 256 steps on some of the data (slopes there: 2.2 to 3.9); groups come out even.
OTHER_STEPS = dict.fromkeys(("eps3", "ab3"), (400, 600, 900, 1350)) | dict.fromkeys(SINGLESTEP, (48, 72, 108, 162, 258))


def start_of(data, alpha, sigma):
    """Points one marginal standard deviation off the mean, both ways."""
    offset = (alpha**2 * data._std() ** 2 + sigma**2).sqrt()
    return torch.stack([alpha * data.mean + offset, alpha * data.mean - 0.7 * offset])


def error_of_table(data, alpha, sigma, rows, exact=0):
    """Largest error at the end point; the first ``exact`` intervals are replaced by the exact flow."""
    table, state = Table(alpha, sigma, tuple(rows)), State()
    x = start = start_of(data, alpha[0], sigma[0])

    def truth(k):
        return data.flow(start, (alpha[0], sigma[0]), (alpha[k], sigma[k]))

    for k in range(len(rows)):
        x, state = advance(table, state, x, data.x0(x, alpha[k], sigma[k]), noise=None)
        if k < exact:
            assert state.anchor is None, "an anchor of its own would not take the exact point"
            x = truth(k + 1)
    return (x - truth(-1)).abs().max().item()


def slope(errors, num_steps=NUM_STEPS):
    return -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("frame", ["vp", "flow", "ve"])
@pytest.mark.parametrize("name", GAUSSIANS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_solver_function(solver, name, frame):
    if solver.startswith("ab") and frame == "vp":
        pytest.skip("dx/dsigma is (x - x0) / sigma at alpha = 1 and alpha = 1 - sigma only")
    make, (lowest, highest), num_steps = SOLVERS[solver], ORDERS[solver], OTHER_STEPS.get(solver, NUM_STEPS)
    exact = next((p - 1 for p in (4, 3) if str(p) in solver and solver not in SINGLESTEP), 0)  # singlestep starts with full order
    errors = []
    for n in num_steps:
        alpha, sigma = levels(frame, n)
        errors.append(error_of_table(GAUSSIANS[name], alpha, sigma, make(alpha, sigma), exact))
    assert min(errors) > 1e-13, "below rounding no slope can be read"
    measured = slope(errors, num_steps)
    assert lowest <= measured <= highest, f"order {measured:.2f}, errors {errors}"


CLASSES = {
    "Euler": (lambda **flow: diffx.Euler(**flow), 1),
    "Heun": (lambda **flow: diffx.Heun(**flow), 2),
    "DPMSolver-2": (lambda **flow: diffx.DPMSolver(**flow), 2),
    "DPMSolverSinglestep-2": (lambda **flow: diffx.DPMSolverSinglestep(**flow), 2),
    "UniPC-1": (lambda **flow: diffx.UniPC(solver_order=1, **flow), 2),
    "UniPC-2": (lambda **flow: diffx.UniPC(solver_order=2, lower_order_final=False, **flow), 3),
}


@pytest.mark.parametrize("frame", ["vp", "flow"])
@pytest.mark.parametrize("name", CLASSES)
def test_order_of_the_class_that_users_run(name, frame):
    """The whole contract in float64: set_timesteps(sigmas=...), scale_model_input, step. The run stops before its jump to sigma 0."""
    make, order = CLASSES[name]
    data, errors = GAUSSIANS["diagonal"], []
    flow = dict(prediction_type="flow_prediction") if frame == "flow" else dict(prediction_type="epsilon")
    for n in NUM_STEPS:
        scheduler = make(**flow)
        alpha, sigma = levels(frame, n)
        grid = sigma if frame == "flow" else sigma / alpha
        scheduler.set_timesteps(sigmas=[*grid, 0.0])
        told = iter(list(zip(*(np.repeat(level, scheduler.order)[scheduler.order - 1 :] for level in (alpha, sigma)), strict=True)))
        start = start_of(data, alpha[0], sigma[0])
        ve = frame == "vp" and scheduler.frame == "ve"  # a frame with alpha = 1
        kept = {}
        denoise(
            scheduler,
            lambda x, t: data.predict(x, *next(told), flow["prediction_type"]),  # noqa: B023
            start * (math.hypot(grid[0], 1) if ve else 1.0),
            edit=lambda k, x: kept.setdefault(k, x),  # noqa: B023
        )
        end = kept[n * scheduler.order - 1] / (math.hypot(grid[-1], 1) if ve else 1.0)
        errors.append((end - data.flow(start, (alpha[0], sigma[0]), (alpha[-1], sigma[-1]))).abs().max().item())
    assert abs(slope(errors) - order) <= 0.2, f"order {slope(errors):.2f}, errors {errors}"


@pytest.mark.parametrize("frame", ["flow", "ve"])
@pytest.mark.parametrize("name", GAUSSIANS)
def test_order_of_heun(name, frame):
    """Two calls per interval, so the levels repeat; the table ends one call before the last Euler step."""
    errors = []
    for n in NUM_STEPS:
        alpha, sigma = (np.repeat(level, 2)[1:] for level in levels(frame, n + 1))
        rows = heun(sigma[[0, *range(1, 2 * n + 2, 2)]])[: 2 * n]
        errors.append(error_of_table(GAUSSIANS[name], alpha[: 2 * n + 1], sigma[: 2 * n + 1], rows))
    assert 1.8 <= slope(errors) <= 2.2, f"order {slope(errors):.2f}, errors {errors}"


# ---------------------------------------------------------------------------------------------- why both guards exist


def flipped(rows):
    """The multistep slope extrapolates the wrong way: each row's sum, all that the invariant sees, is kept."""
    return [replace(r, sample=(r.sample[0], r.sample[1] + 2 * r.sample[2], -r.sample[2])) if len(r.sample) == 3 else r for r in rows]


def test_a_flipped_slope_passes_the_invariant_and_fails_the_order():
    errors = []
    for n in NUM_STEPS:
        alpha, sigma = levels("vp", n)
        rows = flipped(SOLVERS["dpm2"](alpha, sigma))
        Table(alpha, sigma, tuple(rows))  # accepted
        errors.append(error_of_table(GAUSSIANS["narrow"], alpha, sigma, rows))
    assert slope(errors) < 1.2  # the extrapolation doubles the error of order 1 instead of removing it


def test_a_wrong_sum_is_refused_by_the_table():
    alpha, sigma = levels("vp", 20)
    rows = SOLVERS["dpm2"](alpha, sigma)
    Table(alpha, sigma, tuple(rows))
    wrong_sign = [*rows[:5], Row((*rows[5].sample[:2], -rows[5].sample[2])), *rows[6:]]
    with pytest.raises(ValueError, match="row 5 lands on alpha="):
        Table(alpha, sigma, tuple(wrong_sign))
    one_percent = [*rows[:7], replace(rows[7], sample=(rows[7].sample[0] * 1.01, *rows[7].sample[1:])), *rows[8:]]
    with pytest.raises(ValueError, match="row 7 lands on alpha="):
        Table(alpha, sigma, tuple(one_percent))
    with pytest.raises(ValueError, match="row 3 lands on alpha=nan"):
        Table(alpha, sigma, (*rows[:3], Row((math.nan, 0.0)), *rows[4:]))
    with pytest.raises(ValueError, match="20 rows need 21 noise levels; got 20 alphas"):
        Table(alpha[:-1], sigma, tuple(rows))


@pytest.mark.parametrize("make", [lambda a, s: dpmpp(a, s, [2, 2]), lambda a, s: unipc(a, s, [1, 3])])
def test_an_order_beyond_the_history_is_refused(make):
    alpha, sigma = levels("vp", 2)
    dpmpp(alpha, sigma, [1, 2])
    with pytest.raises(ValueError, match=r"order \d of interval \d must lie between 1 and"):
        make(alpha, sigma)
