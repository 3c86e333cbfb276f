"""Distances and shares in NumPy, about ten lines each; a ``Measure`` carries beside its value the same figure of real against real."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist
from scipy.special import rel_entr


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure, the same figure measured on ``count`` real pictures against real ones (``floor``), and the seed of both."""

    name: str
    value: float
    floor: float
    count: int
    seed: int


def rms(a: ArrayLike, b: ArrayLike) -> float:
    """Root mean square difference of two arrays of one shape, over all entries, in their unit."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; pass two arrays of the same shape, not empty")
    return float(np.sqrt(np.mean((a - b) ** 2)))


def psnr(a: ArrayLike, b: ArrayLike, *, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB, over all entries together; infinity for equal arrays.

    Args:
        peak: the width of the range of values: 1 for images in [0, 1], 2 for [-1, 1].
    """
    distance = rms(a, b)
    return float(20 * np.log10(peak / distance)) if distance else float("inf")


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """Squared Frechet distance of the Gaussians fitted to two feature sets, (N, D) and (M, D); "FID" only for Inception features.

    The trace of the root of C1 C2 is the sum of the singular values of R1 R2^T, where C = R^T R; R comes from a QR
    decomposition of the centred features, so that no covariance is formed and no matrix root can fail.
    The figure shrinks with N (it is biased for few samples): compare figures of one N only, and with their floor.

    Source: Heusel et al. 2017 (arXiv:1706.08500); Dowson & Landau 1982 for the closed form.

    Raises:
        ValueError: not more samples than features.
    """
    x, y = _features(x, y)
    for samples in (x, y):
        if len(samples) <= samples.shape[1]:
            raise ValueError(
                f"{len(samples)} samples of {samples.shape[1]} features: the covariance is singular; "
                f"pass at least {samples.shape[1] + 1} samples or use an encoder with fewer features"
            )
    (mean_x, root_x), (mean_y, root_y) = _gaussian(x), _gaussian(y)
    overlap = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + np.sum(root_x**2) + np.sum(root_y**2) - 2 * overlap)


def kernel_distance(x: ArrayLike, y: ArrayLike, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased squared MMD of two feature sets; "KID" only for Inception features.

    The kernel is (x . y / D + 1)^3. Without bias the mean of equal distributions is 0, and single figures fall below it. Unlike
    the Frechet distance it asks for no more samples than features, and does not shrink with their number.

    Source: Binkowski et al. 2018 (arXiv:1801.01401), the Kernel Inception Distance; Gretton et al. 2012 (JMLR 13) for the estimate.

    Args:
        x, y: (N, D) and (M, D).
        subset_size: samples drawn from each set, without repetition; where it takes all of both, one subset is all there is.

    Raises:
        ValueError: a subset is larger than a set, or smaller than 2.
    """
    x, y = _features(x, y)
    if not 2 <= subset_size <= min(len(x), len(y)) or num_subsets < 1:
        raise ValueError(
            f"num_subsets={num_subsets} of subset_size={subset_size}: pass at least 1, of between 2 and {min(len(x), len(y))} samples"
        )
    if subset_size == len(x) == len(y):
        num_subsets = 1
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_subsets):
        a, b = (samples[rng.choice(len(samples), subset_size, replace=False)] for samples in (x, y))
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(a, a), _kernel(b, b)))  # no sample beside itself: no bias
        found.append(within / (subset_size * (subset_size - 1)) - 2 * np.mean(_kernel(a, b)))
    return float(np.mean(found)), float(np.std(found))


def precision_recall(real: ArrayLike, generated: ArrayLike, *, k: int = 3) -> tuple[float, float]:
    """Share of generated samples inside the real manifold, and of real ones inside the generated.

    A manifold is the union of balls around its samples, each as wide as the way to its k-th neighbour.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), k = 3 as there.

    Args:
        real, generated: (N, D) and (M, D) features; recall depends on both counts, keep them equal.
    """
    real, generated = _neighbourhoods(real, generated, k)
    distance = cdist(generated, real)  # (M, N)
    precision = (distance <= _kth_neighbour(real, k)).any(1).mean()
    recall = (distance <= _kth_neighbour(generated, k)[:, None]).any(0).mean()
    return float(precision), float(recall)


def density_coverage(real: ArrayLike, generated: ArrayLike, *, k: int = 5) -> tuple[float, float]:
    """In how many real samples' balls a generated one lies, in units of k, and the share of these balls that hold a generated sample.

    Balls as in ``precision_recall``, around real samples only, so that one odd sample of either kind moves little. For equal
    distributions the expected density is 1 (single figures may be above it) and the expected coverage of N = M samples near 1 - 2^-k.

    Source: Naeem et al. 2020 (arXiv:2002.09797), definitions of density and coverage, k = 5 as there.

    Args:
        real, generated: (N, D) and (M, D) features; coverage depends on both counts, keep them equal.
    """
    real, generated = _neighbourhoods(real, generated, k)
    inside = cdist(generated, real) <= _kth_neighbour(real, k)  # (M, N)
    return float(inside.sum(1).mean() / k), float(inside.any(0).mean())


def inception_score(probabilities: ArrayLike) -> float:
    """exp of the mean KL divergence of each picture's class probabilities from their mean, in [1, C]: sure of each, and of many classes.

    It never sees a real picture, so only its floor (the score of real ones) says what is good, and it grows with the number of
    pictures. All are taken together; the ten parts of the original code are not a part of the definition.

    Source: Salimans et al. 2016 (arXiv:1606.03498) section 4.

    Args:
        probabilities: (N, C), each row nonnegative with sum 1.
    """
    p, _ = _features(probabilities, probabilities)
    if (p < 0).any() or not np.allclose(p.sum(1), 1, atol=1e-4):  # float32 softmax
        raise ValueError("probabilities must be at least 0 and each row must have sum 1; pass a softmax, not its logits")
    return float(np.exp(rel_entr(p, p.mean(0)).sum(1).mean()))


def alignment(images: ArrayLike, texts: ArrayLike) -> float:
    """Mean cosine of each picture's embedding and that of its own text, negative ones counted as 0: in [0, 1].

    Source: Hessel et al. 2021 (arXiv:2104.08718), CLIP-S, which is this for CLIP embeddings times w = 2.5.

    Args:
        images, texts: (N, D) each, row by row of one pair.
    """
    images, texts = _features(images, texts)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures and {len(texts)} texts; pass one text for each picture")
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    if not lengths.all():
        raise ValueError("an embedding is zero and has no direction; check the model it comes from")
    return float(np.maximum((images * texts).sum(1) / lengths, 0).mean())


def r_precision(features: ArrayLike, prototypes: ArrayLike, own: ArrayLike) -> float:
    """Share of samples whose nearest prototype among all candidates is that of their own prompt (R-precision at 1).

    Source: Xu et al. 2018 (arXiv:1711.10485), with image prototypes in the place of text embeddings.

    Args:
        features: (N, D).
        prototypes: (P, D), one per candidate prompt.
        own: (N,) index of each sample's own prompt.
    """
    features, prototypes = _features(features, prototypes)
    own = np.asarray(own)
    if own.shape != (len(features),) or own.min() < 0 or own.max() >= len(prototypes):
        raise ValueError(f"own has shape {own.shape}; pass an index in 0..{len(prototypes) - 1} for each of {len(features)} samples")
    return float((nearest(features, prototypes) == own).mean())


def nearest(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """(N,) index of the prototype with the smallest Euclidean distance."""
    return cdist(features, prototypes).argmin(1)


def near_copy_share(samples: ArrayLike, training: ArrayLike, fresh: ArrayLike, *, quantile: float = 0.05) -> tuple[float, float]:
    """Share of samples nearer to some training picture than nearly all real pictures that were never trained on, and that threshold.

    The threshold is the ``quantile`` of the distances from ``fresh`` real pictures of the same prompts to their nearest
    training picture, so real pictures score ``quantile`` by construction: that is the floor, and only the excess speaks
    of copying.

    Source: the nearest-neighbour test of Meehan et al. 2020 (arXiv:2004.05675), as a share at one quantile.

    Args:
        samples, training, fresh: (N, D), (T, D), (F, D) in one space; small images or latents, flattened.
    """
    samples, training = _features(samples, training)
    fresh, _ = _features(fresh, training)
    threshold = float(np.quantile(cdist(fresh, training).min(1), quantile))
    return float((cdist(samples, training).min(1) < threshold).mean()), threshold


def halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint random halves of ``range(count)``, equally long: what real-versus-real floors are measured on."""
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // 2], order[count // 2 : 2 * (count // 2)]


def _features(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f"features have shapes {x.shape} and {y.shape}; pass (N, D) and (M, D) with one D, not empty")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features hold NaN or infinity; check the pictures they come from")
    return x, y


def _gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a factor R (D, D) of the covariance R^T R."""
    mean = x.mean(0)
    return mean, np.asarray(np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r"))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _neighbourhoods(real: ArrayLike, generated: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
    real, generated = _features(real, generated)
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} samples on each side, got {len(real)} and {len(generated)}")
    return real, generated


def _kth_neighbour(x: np.ndarray, k: int) -> np.ndarray:
    """(N,) distance from each point to its k-th neighbour, itself not counted."""
    return np.partition(cdist(x, x), k, axis=1)[:, k]
