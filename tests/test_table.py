"""The one step there is, and the tables it refuses."""

import numpy as np
import pytest
import torch

from diffx import Row, Table
from diffx.schedulers import State, advance
from diffx.schedulers.grid import Grid
from diffx.schedulers.multistep import psi
from diffx.schedulers.plan import make_plan
from diffx.schedulers.table import combine


def never():
    raise AssertionError("this row draws no noise")


def test_combine_counts_only_weights_that_are_not_zero():
    x, m = torch.tensor([2.0]), torch.tensor([5.0])
    assert combine((0.5, 2.0, 0.0), x, (m, m)).item() == 11
    assert combine((1.0,), x, ()) is x and combine((0.0, 1.0), x, (m,)) is m  # no kernel, no copy
    assert combine((1.0, 2.0), x, (m,)).item() == 12 and x.item() == 2  # inputs stay as they were


def test_a_kept_anchor_ignores_edits_and_a_followed_one_takes_them():
    levels = np.array([1.0, 1.0, 1.0]), np.array([4.0, 2.0, 1.0])
    step = (0.5, 0.5)
    tables = {
        "at the first call": (Table(*levels, (Row(step, (1.0,)), Row((0.25, 0.75)))), 0.25 * 8),
        "as returned": (Table(*levels, (Row(step, step), Row(step))), 0.5 * 0.5 * 8),
        "as handed back": (Table(*levels, (Row(step), Row(step))), 0.5 * 100),
    }
    for table, expected in tables.values():
        x, zero = torch.tensor([8.0]), torch.zeros(1)
        sample, state = advance(table, State(), x, zero, never)
        sample.fill_(100.0)  # in place, as some callbacks do
        after, _ = advance(table, state, sample, zero, never)
        assert after.item() == expected


def test_noise_enters_with_its_weight():
    table = Table(np.ones(2), np.array([2.0, 1.0]), (Row((0.0, 1.0), noise=1.0),))
    sample, _ = advance(table, State(), torch.tensor([9.0]), torch.tensor([3.0]), lambda: torch.tensor([0.25]))
    assert sample.item() == 3.25


def test_a_row_weighs_the_direction_that_a_call_kept():
    """By hand: two calls keep (x - x0) / sigma, the third its own sample."""
    rows = (
        Row((1.0, -1.0), kept=(1 / 4, -1 / 4)),  # sigma 4 to 3
        Row((1.0, -2.0, 1.0), kept=(1 / 3, -1 / 3)),  # 3 to 2
        Row((0.0, 1.0, 1.0, -2.0), kept=(1.0, 0.0)),  # 2 to 1
    )
    table, state, x = Table(np.ones(4), np.array([4.0, 3.0, 2.0, 1.0]), rows), State(), torch.tensor([8.0])
    for predicted, expected in ((4.0, 8 - 1), (1.0, 7 - 2 * 2 + 1), (9.0, 4 + 2 - 2 * 1)):
        x, state = advance(table, state, x, torch.tensor([predicted]), never)
        assert x.item() == pytest.approx(expected, rel=1e-6)  # thirds in float32


def test_a_kept_sample_outlives_an_edit_in_place():
    table = Table(np.array([1.0, 0.5, 1.0]), np.array([2.0, 1.0, 2.0]), (Row((0.5,), kept=(1.0, 0.0)), Row((0.0, 0.0, 1.0))))
    x, m = torch.tensor([8.0]), torch.tensor([1.0])
    sample, state = advance(table, State(), x, m, never)
    x.fill_(100.0)
    assert advance(table, state, sample, m, never)[0].item() == 8


def test_the_invariant_follows_noise_through_what_was_kept():
    """Call 1 keeps its sample with the noise drawn before; the last row takes half of it away, which variances alone cannot tell."""
    levels = np.ones(4), np.array([2.0, 2.0, 1.0, 0.5])
    first = Row((0.0, 1.0), noise=2.0), Row((0.5, 0.0, 0.5), kept=(1.0, 0.0))
    Table(*levels, (*first, Row((1.5, 0.0, -0.5))))
    with pytest.raises(ValueError, match=r"row 2 lands on alpha=1, sigma\^2=2.25"):
        Table(*levels, (*first, Row((0.5, 0.0, 0.5))))


@pytest.mark.parametrize("kept", [(float("nan"), 1.0), (0.0, float("inf")), (1.0,), (0.0, 1.0, 0.0), (0.0, 0.0)])
def test_what_cannot_be_kept(kept):
    levels = np.ones(2), np.array([2.0, 1.0])
    Table(*levels, (Row((1.0, -0.5), kept=(1.0, -1.0)),))
    with pytest.raises(ValueError, match=r"row 0 keeps .*; kept is two finite numbers, not both 0: weights of the sample and of its x0"):
        Table(*levels, (Row((0.5, 0.5), kept=kept),))


def test_a_plan_tells_what_is_kept_where_it_is_not_x0():
    grid = Grid(np.array([2.0, 1.0]), np.array([4.0, 2.0, 1.0]))
    rows = Row((0.5, 0.5)), Row((1.0, -1.0), kept=(0.5, -0.5))
    plan = make_plan("Mine", grid, Table(np.ones(3), grid.sigmas, rows), 0)
    assert "stands" not in str(plan).splitlines()[2]
    assert str(plan).splitlines()[3].endswith("where x0 stands for +0.50000 sample -0.50000 x0")
    assert [call["kept"] for call in plan.to_dict()["calls"]] == [(0, 1), (0.5, -0.5)]


def test_past_the_last_row():
    table = Table(np.ones(2), np.array([2.0, 0.0]), (Row((0.0, 1.0)),))
    x = torch.ones(1)
    _, state = advance(table, State(), x, x, never)
    with pytest.raises(ValueError, match=r"all 1 rows are used; call set_timesteps\(\)"):
        advance(table, state, x, x, never)


@pytest.mark.parametrize(
    "rows, message",
    [
        ((), "0 rows need 1 noise levels"),
        ((Row((0.5, 0.5)), Row((0.5, 0.5))), "2 rows need 3 noise levels"),
        ((Row((0.5, 0.4)),), "row 0 lands on alpha=0.9"),
        ((Row((0.6, 0.4)),), r"row 0 lands on alpha=1, sigma\^2=1.44"),
        ((Row((float("nan"), 0.5)),), "row 0 lands on alpha=nan"),
    ],
)
def test_tables_that_are_no_run(rows, message):
    levels = np.ones(2), np.array([2.0, 1.0])
    Table(*levels, (Row((0.5, 0.5)),))
    with pytest.raises(ValueError, match=message):
        Table(*levels, rows)


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.00999, 0.01001, 0.3, 5.0, np.inf])
def test_psi_is_its_integral(h):
    # Gauss-Legendre with 60 nodes is exact to rounding for these; at infinite h all the weight sits at the end, u = h.
    u, w = np.polynomial.legendre.leggauss(60)
    s = (u + 1) / 2
    integral = [(w / 2 * h * np.exp(-h * (1 - s)) * f).sum() for f in (1, s, s**2 / 2)] if np.isfinite(h) else [1, 1, 0.5]
    np.testing.assert_allclose(psi(h), integral, rtol=2e-9)  # cancellation in 1/2 - psi_2 / h at h = 0.01
