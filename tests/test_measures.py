"""Measures of feature sets against closed forms, expectations over many draws, and counting by hand."""

import numpy as np
import pytest

from diffx.evaluation import alignment, density_coverage, frechet_distance, inception_score, kernel_distance, precision_recall


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# kernel distance


def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """E (x . y / D + 1)^3 of independent x ~ N(a, I), y ~ N(b, I), from the moments of x . y, which given y is N(a . y, |y|^2)."""
    dim, ab = len(a), a @ b
    square = ab**2 + a @ a + b @ b + dim
    cube = ab**3 + 3 * ab * (a @ a) + 3 * ab * (b @ b + dim + 2)
    return 1 + 3 * ab / dim + 3 * square / dim**2 + cube / dim**3


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kernel_distance_is_without_bias(shift):
    zero, mean = np.zeros(3), np.full(3, shift)
    expected = mean_kernel(zero, zero) + mean_kernel(mean, mean) - 2 * mean_kernel(zero, mean)
    assert shift or expected == pytest.approx(0, abs=1e-15)
    draws = [kernel_distance(normal((1, k), 6, 3), mean + normal((2, k), 5, 3), subset_size=5, num_subsets=1)[0] for k in range(4000)]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - expected) < 4 * error  # one seed in 16,000 would miss


def test_kernel_distance_of_whole_sets_is_the_sum_over_pairs_of_different_samples():
    x, y = normal(0, 7, 3), normal(1, 7, 3) + 0.5
    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = np.mean([(x[i] @ x[j] / 3 + 1) ** 3 + (y[i] @ y[j] / 3 + 1) ** 3 for i, j in pairs if i != j])
    between = np.mean([(x[i] @ y[j] / 3 + 1) ** 3 for i, j in pairs])
    value, deviation = kernel_distance(x, y, subset_size=7)
    assert value == pytest.approx(within - 2 * between, rel=1e-12)  # sums in another order
    assert deviation == 0  # there is one subset of everything


def test_kernel_distance_over_subsets_depends_on_the_seed_alone_and_scatters_around_that_of_all():
    x, y = normal(0, 200, 4), normal(1, 200, 4) + 0.5
    value, deviation = kernel_distance(x, y, subset_size=50, seed=3)
    assert (value, deviation) == kernel_distance(x, y, subset_size=50, seed=3) != kernel_distance(x, y, subset_size=50, seed=4)
    assert abs(value - kernel_distance(x, y, subset_size=200)[0]) < 4 * deviation / np.sqrt(100)  # the default hundred subsets


def test_kernel_distance_refuses_subsets_larger_than_the_sets():
    kernel_distance(normal(0, 8, 2), normal(1, 9, 2), subset_size=8)
    with pytest.raises(ValueError, match="between 2 and 8 samples"):
        kernel_distance(normal(0, 8, 2), normal(1, 9, 2), subset_size=9)
    with pytest.raises(ValueError, match="num_subsets=0"):
        kernel_distance(normal(0, 8, 2), normal(1, 9, 2), subset_size=8, num_subsets=0)


# density and coverage


def test_density_and_coverage_counted_by_hand():
    real = np.array([[0.0], [1], [2], [10]])  # with k = 1 their balls reach 1, 1, 1 and 8 far
    generated = np.array([[0.5], [1.5], [9], [50]])  # in 2, 2, 1 and 0 balls
    assert density_coverage(real, generated, k=1) == (1.25, 1.0)
    assert density_coverage(real, generated[[0, 3]], k=1) == (1.0, 0.5)


def test_an_outlier_fools_precision_but_not_density():
    """The case the measures were made for: generated samples around one real outlier, whose ball is wide."""
    real, generated = np.array([[0.0], [1], [2], [3], [100]]), np.array([[60.0], [70], [80], [90]])
    assert precision_recall(real, generated, k=2)[0] == 1
    assert density_coverage(real, generated, k=2) == (0.5, 0.2)


def test_density_and_coverage_of_equal_and_of_distant_sets():
    x = normal(0, 60, 3)
    density, coverage = density_coverage(x, x, k=5)
    assert (density, coverage) == (6 / 5, 1.0)  # each ball holds its own sample and five neighbours
    assert density_coverage(x, x + 100) == (0.0, 0.0)


def test_expected_density_and_coverage_of_equal_distributions():
    """A real sample's other N - 1 and the M generated ones come in random order of their distance from it: the rest is counting."""
    k, num_real, num_generated = 3, 12, 8
    found = np.array(
        [density_coverage(normal((1, i), num_real, 2), normal((2, i), num_generated, 2), k=k) for i in range(4000)]
    )  # fmt: skip
    uncovered = np.prod([(num_real - 1 - j) / (num_real - 1 + num_generated - j) for j in range(k)])  # the k nearest are all real
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - [1, 1 - uncovered]) < 4 * error).all()  # one seed in 8,000 would miss


def test_density_needs_more_than_k_samples():
    density_coverage(normal(0, 6, 2), normal(1, 6, 2))
    with pytest.raises(ValueError, match="k=5 neighbours need more than 5 samples on each side, got 6 and 5"):
        density_coverage(normal(0, 6, 2), normal(1, 5, 2))


# what must not matter

MEASURES = {
    "FD": frechet_distance,
    "KID": lambda x, y: kernel_distance(x, y, subset_size=len(x))[0],
    "precision, recall": precision_recall,
    "density, coverage": density_coverage,
}


@pytest.mark.parametrize("name", MEASURES)
def test_order_and_rotation_do_not_matter(name):
    x, y, measure = normal(0, 40, 4), 0.8 * normal(1, 40, 4) + 0.3, MEASURES[name]
    turn, order = np.linalg.qr(normal(2, 4, 4))[0], np.random.default_rng(3).permutation(40)
    # Rounding of sums of 40 x 40 terms; shares are exact, since no distance is this near to a radius.
    np.testing.assert_allclose(measure(x[order], y), measure(x, y), rtol=1e-9)
    np.testing.assert_allclose(measure(x, y[order]), measure(x, y), rtol=1e-9)
    np.testing.assert_allclose(measure(x @ turn, y @ turn), measure(x, y), rtol=1e-9)


# Inception Score


def test_inception_score_of_uniform_and_of_certain_predictions():
    assert inception_score(np.full((6, 4), 0.25)) == pytest.approx(1, rel=1e-15)
    assert inception_score(np.eye(4)[[2, 2, 2]]) == 1  # certain, and always of the same class
    assert inception_score(np.eye(4)[[0, 1, 2, 3] * 3]) == pytest.approx(4, rel=1e-14)  # certain, and of all classes alike
    half = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert inception_score(half) == pytest.approx(2, rel=1e-14)  # one of two pairs, never which of the pair


def test_inception_score_refuses_logits():
    with pytest.raises(ValueError, match="not its logits"):
        inception_score(normal(0, 5, 3))
    with pytest.raises(ValueError, match="sum 1"):
        inception_score(np.full((5, 3), 0.5))


# alignment


def test_alignment_of_equal_orthogonal_and_opposite_embeddings():
    x, axes = normal(0, 5, 4), np.eye(4)
    assert alignment(x, 3 * x) == pytest.approx(1, rel=1e-15)
    assert alignment(axes, axes[[1, 2, 3, 0]]) == 0
    assert alignment(x, -x) == 0  # below zero counts as zero
    assert alignment(axes, axes[[0, 1, 3, 2]]) == 0.5
    assert alignment(axes[:1], [[1, 1, 0, 0]]) == pytest.approx(0.5**0.5, rel=1e-15)


def test_alignment_refuses_what_is_no_pair():
    with pytest.raises(ValueError, match="5 pictures and 4 texts"):
        alignment(normal(0, 5, 3), normal(1, 4, 3))
    with pytest.raises(ValueError, match="no direction"):
        alignment(np.zeros((2, 3)), normal(1, 2, 3))
