"""The estimate of each step's error: its closed form, its order, and how well it tells steps of a mixture apart."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from test_orders import SINGLESTEP, growing, levels, slope

import diffx
from diffx.oracle import Mixture
from diffx.schedulers import SAMPLERS
from diffx.schedulers.error import error_weights, estimate, planned_errors
from diffx.schedulers.multistep import dpm, dpmpp
from diffx.schedulers.one_step import ddim
from diffx.schedulers.table import State, Table, advance
from diffx.schedulers.two_stage import heun
from diffx.schedulers.unipc import unipc
from diffx.testing import denoise

SOLVERS = {
    "ddim": lambda a, s: ddim(a, s),
    "dpm2": lambda a, s: dpmpp(a, s, growing(2, len(a) - 1), solver_type="heun"),
    "dpm3": lambda a, s: dpmpp(a, s, growing(3, len(a) - 1)),
    "eps2": lambda a, s: dpm(a, s, growing(2, len(a) - 1)),
    "eps3": lambda a, s: dpm(a, s, growing(3, len(a) - 1)),
    "unipc1": lambda a, s: unipc(a, s, growing(1, len(a) - 1)),
    "unipc2": lambda a, s: unipc(a, s, growing(2, len(a) - 1)),
    "unipc3": lambda a, s: unipc(a, s, growing(3, len(a) - 1)),
    "single2": SINGLESTEP["single2_heun_dpmsolver++"],
    "single3": SINGLESTEP["single3_midpoint_dpmsolver++"],
}
FINE = (160, 256, 400, 600)
POLYNOMIALS = {"ddim": 1, "dpm2": 2, "dpm3": 3, "eps2": 2, "eps3": 3, "unipc1": 1, "unipc2": 2, "unipc3": 3, "single2": 2, "single3": 3}


def table_of(solver, alpha, sigma):
    """The table of a solver; Heun's has an entry per call, as ``Grid.per_call`` makes it."""
    if solver != "heun":
        return Table(alpha, sigma, tuple(SOLVERS[solver](alpha, sigma)))
    per_call = [np.append(np.repeat(level[:-1], 2)[1:], level[-1]) for level in (alpha, sigma)]
    return Table(*per_call, tuple(heun(sigma)))


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm2", 2), ("dpm3", 3)])
def test_it_is_the_error_where_x0_is_the_next_polynomial(solver, order):
    """x0 = lam^order, of which the divided difference is 1: the row misses the integral by exactly the estimate."""
    lam = np.cumsum([-2.0, 0.7, 0.4, 0.9, 0.3, 1.1])
    alpha = 1 / np.sqrt(1 + np.exp(-2 * lam))
    table = Table(alpha, alpha * np.exp(-lam), tuple(SOLVERS[solver](alpha, alpha * np.exp(-lam))))
    nodes, weights = np.polynomial.legendre.leggauss(40)  # exact to rounding
    for k in range(order, 5):
        x0, h = lam[k::-1] ** order, lam[k + 1] - lam[k]
        u = h / 2 * (nodes + 1)
        integral = alpha[k + 1] * h / 2 * np.sum(weights * np.exp(u - h) * (lam[k] + u) ** order)
        row, told = table.rows[k].sample[1:], error_weights(table)[k]
        missed = integral - np.dot(row, x0[: len(row)])
        assert np.dot(told, x0[: len(told)]) == pytest.approx(missed, rel=1e-10)  # float64


@pytest.mark.parametrize("solver", [*SOLVERS, "heun"])
def test_it_shrinks_by_one_order_more_than_the_polynomial(solver):
    """At lam = 0 of ever finer grids, on normal data; Heun is compared with Euler, whose step has order 2.

    Within 0.2: the differences look back only, so that order 3 comes late to its 4 (3.7 between 48 and 256 steps).
    """
    told = []
    for n in FINE:
        errors = planned_errors(table_of(solver, *levels("vp", n)) if solver != "heun" else table_of(solver, *levels("ve", n)))
        middle = n - 1 if solver == "heun" else n // 2
        if solver.startswith("single"):  # the last call of a group
            middle -= (middle + 1) % POLYNOMIALS[solver]
        told.append(errors[middle])
    expected = POLYNOMIALS.get(solver, 1) + 1
    assert abs(slope(told, FINE) - expected) < 0.2, f"order {slope(told, FINE):.2f}, errors {told}"


def test_where_nothing_can_be_said():
    alpha, sigma = levels("flow", 6)
    alpha, sigma = np.array([0.0, *alpha[1:-1], 1.0]), np.array([1.0, *sigma[1:-1], 0.0])
    told = error_weights(Table(alpha, sigma, tuple(ddim(alpha, sigma))))
    # The first call; one whose only neighbour is pure noise, at infinite lam; a step to infinite lam.
    assert [weights is None for weights in told] == [True, True, False, False, False, True]
    alpha, sigma = np.ones(4), np.array([3.0, 2.0, 2.0, 1.0])  # a level twice: a step of 0, and two predictions at one lam
    assert error_weights(Table(alpha, sigma, tuple(ddim(alpha, sigma)))) == (None, None, None)


# ---------------------------------------------------------------------------------------------- against the truth


GRIDS = ("even", "early", "late", "karras")


def grids(num_steps):
    """lam from -3 to 3: even, denser at either end, and as karras sigmas lie."""
    u = np.linspace(0, 1, num_steps + 1)
    root = np.exp(3 / 7)
    return {"even": 6 * u - 3, "early": 6 * u**1.6 - 3, "late": 6 * u**0.6 - 3, "karras": -7 * np.log(root + u * (1 / root - root))}


def told_and_true(solver, frame, lam, batch):
    """(calls, batch) each: the estimates of a run on the mixture, and the distance of every step from the flow's."""
    rng = torch.Generator().manual_seed(0)
    data = Mixture(0.8 * torch.randn(6, 8, generator=rng, dtype=torch.float64), 0.3)
    sigma = {"vp": 1 / np.sqrt(1 + np.exp(2 * lam)), "flow": 1 / (1 + np.exp(lam)), "ve": np.exp(-lam)}[frame]
    alpha = {"vp": 1 / np.sqrt(1 + np.exp(-2 * lam)), "flow": 1 - sigma, "ve": np.ones_like(lam)}[frame]
    table = table_of(solver, alpha, sigma)
    x = alpha[0] * data.sample(batch, rng) + sigma[0] * torch.randn(batch, 8, generator=rng, dtype=torch.float64)
    state, past, pairs = State(), (), []
    for k, weights in enumerate(error_weights(table)):
        level = table.alpha[k], table.sigma[k]
        x0 = data.x0(x, *level)
        past = (x0, *past[:3])
        if not k or table.rows[k - 1].anchor in (None, table.rows[k - 1].sample):  # else it starts where the call before did
            start, begin = x, level
        x, state = advance(table, state, x, x0, noise=None)
        if weights is not None:
            true = data.flow(start, begin, (table.alpha[k + 1], table.sigma[k + 1]))
            pairs.append((estimate(weights, past).tolist(), (x - true).square().mean(1).sqrt().tolist()))
    return pairs


def correlation(solvers, num_steps, names, batch):
    """Of the logarithms, per sample, over calls, grids and frames; per solver and of all together."""
    measured, everything = {}, []
    for solver in solvers:
        cases = [(frame, n, name) for frame in ("ve" if solver == "heun" else "vp", "flow") for n in num_steps for name in names]
        pairs = [pair for frame, n, name in cases for pair in told_and_true(solver, frame, grids(n)[name], batch)]
        told, true = (np.log(np.array(side)).ravel() for side in zip(*pairs, strict=True))
        measured[solver] = pearsonr(told, true).statistic
        everything.append((told, true))
    measured["all"] = pearsonr(*(np.concatenate(side) for side in zip(*everything, strict=True))).statistic
    return measured


def test_it_ranks_steps_as_the_truth_does():
    """On a mixture, whose flow gives the true local step. The bound is 0.8; the slow test below has the figures."""
    measured = correlation(("ddim", "dpm2", "unipc2"), (5, 12), GRIDS, batch=2)
    assert min(measured.values()) > 0.8, measured


@pytest.mark.slow  # about a minute
def test_it_ranks_steps_on_many_grids():
    """Measured: ddim 0.97, dpm2 0.94, dpm3 0.95, eps2 0.88, eps3 0.88, unipc1 0.86, unipc2 0.92, unipc3 0.95, heun 0.95, all 0.88."""
    measured = correlation((*SOLVERS, "heun"), (5, 8, 12, 20), GRIDS, batch=4)
    assert min(measured.values()) > 0.8, measured


# ---------------------------------------------------------------------------------------------- as users meet it


def network(x, t):
    return 0.8 * torch.tanh(0.9 * x + 0.001 * float(t))


def noise(seed=0):
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", SAMPLERS, ids=lambda cls: cls.__name__)
def test_tracking_changes_no_sample_and_tells_one_error_per_call(cls):
    ends = []
    for options in ({}, dict(track_error=True)):
        scheduler = cls(**options)
        scheduler.set_timesteps(6)
        ends.append(denoise(scheduler, network, noise() * float(scheduler.init_noise_sigma), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(*ends)
    errors, planned = scheduler.errors, [call.error for call in scheduler.plan().calls]
    assert [error is None for error in errors] == [error is None for error in planned]  # the same weights
    told = [error for error in errors if error is not None]
    assert told and all(error.shape == (3,) and error.dtype == torch.float32 and error.isfinite().all() for error in told)
    assert not torch.equal(told[0][0], told[0][1])  # each sample has its own


def test_the_errors_of_a_run_belong_to_it():
    scheduler, x = diffx.DPMSolver(track_error=True), noise()
    assert scheduler.errors == ()
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert len(scheduler.errors) == 3 and scheduler.fork().errors == ()
    other = copy.deepcopy(scheduler)
    for each in (scheduler, other):
        each.step(network(x, each.timesteps[3]), each.timesteps[3], x)
    assert torch.equal(scheduler.errors[3], other.errors[3])
    scheduler.set_timesteps(5)
    assert scheduler.errors == () and len(other.errors) == 4
    with pytest.raises(ValueError, match=r"errors are not tracked; DDIM\.from_config\(config, track_error=True\) tracks them"):
        _ = diffx.DDIM().errors


def test_a_plan_compares_grids_before_any_call():
    """More steps and the wider order promise less; the column is in the text and in the JSON."""
    worst = {}
    for order, n in ((1, 8), (1, 16), (2, 8), (2, 16)):
        scheduler = diffx.DPMSolver(solver_order=order, use_lu_lambdas=True)  # even in lam
        scheduler.set_timesteps(n)
        plan = scheduler.plan()
        worst[order, n] = max(call.error for call in plan.calls if call.error is not None)
        assert "error" in str(plan).splitlines()[1] and plan.to_dict()["calls"][0]["error"] is None
    assert worst[1, 8] > 2 * worst[1, 16] and worst[1, 8] > worst[2, 8] > 2 * worst[2, 16]
