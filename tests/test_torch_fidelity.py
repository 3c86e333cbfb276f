"""Our measures beside torch-fidelity's on the same features, in an environment of its own: it needs torchvision, which we do not.

Its Inception network would have to be downloaded, so the comparison begins at the features. ``pytest -m slow -s`` shows the figures.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from diffx.evaluation import GlyphFeatures, frechet_distance, inception_score, kernel_distance, precision_recall, random_pictures

PACKAGES = ("torch-fidelity==0.4.0", "torchvision")
SUBSET = 100  # samples of KID's subsets

# Runs where torch-fidelity is; argument: folder with one NumPy file per set.
THEIRS = """
import json, sys, pathlib
import numpy as np, torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

found = {}
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.npz")):
    generated, real, logits = (torch.from_numpy(np.load(file)[name]) for name in ("generated", "real", "logits"))
    quiet = dict(verbose=False, save_cpu_ram=False)
    kid = lambda size, subsets: kid_features_to_metric(generated, real, kid_subset_size=size, kid_subsets=subsets, **quiet)
    whole, subsets = kid(len(real), 1), kid(SUBSET, 400)
    found[file.stem] = {
        **fid_statistics_to_metric(fid_features_to_statistics(generated), fid_features_to_statistics(real), False),
        **prc_features_to_metric(generated, real, **quiet),
        **isc_features_to_metric(logits, splits=1),
        "kid of all": whole["kernel_inception_distance_mean"],
        "kid of subsets": subsets["kernel_inception_distance_mean"],
        "kid deviation": subsets["kernel_inception_distance_std"],
    }
print(json.dumps(found))
"""


def sets() -> dict[str, dict[str, np.ndarray]]:
    """Features of real pictures and of stretched ones (unit length, narrow), and wide normal features, in float64."""
    rng, features = np.random.default_rng(0), GlyphFeatures()
    real, other = (random_pictures(400, seed=seed).images for seed in (0, 1))
    glyphs = {"real": features(real), "generated": features((other * 1.3 - 0.1).clamp(0, 1))}
    wide = {"real": rng.standard_normal((600, 256)), "generated": 0.9 * rng.standard_normal((600, 256)) + 0.1}
    logits = {"logits": 3 * rng.standard_normal((400, 10))}
    return {
        name: {key: np.asarray(x, np.float64) for key, x in (part | logits).items()} for name, part in (("glyphs", glyphs), ("wide", wide))
    }


@pytest.fixture(scope="module")
def torch_fidelity():
    """The python of an environment that has torch-fidelity; gone afterwards, since it takes gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no environment can be made here: {made.stderr[-300:]}")
        installed = subprocess.run([python, "-m", "pip", "install", *PACKAGES], capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"{' and '.join(PACKAGES)} cannot be installed here: {installed.stderr[-300:]}")
        yield python


@pytest.mark.slow  # installs an environment of its own, a second torch included
def test_the_same_features_give_the_same_figures(torch_fidelity, tmp_path):
    for name, arrays in sets().items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    script = THEIRS.replace("SUBSET", str(SUBSET))
    done = subprocess.run([torch_fidelity, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, theirs in json.loads(done.stdout).items():
        arrays = sets()[name]
        real, generated, size = arrays["real"], arrays["generated"], len(arrays["real"])
        softmax = np.exp(arrays["logits"]) / np.exp(arrays["logits"]).sum(1, keepdims=True)
        precision, recall = precision_recall(real, generated)
        subsets, deviation = kernel_distance(generated, real, subset_size=SUBSET, num_subsets=400)
        rows = [  # ours, theirs, relative tolerance, absolute tolerance
            # They take roots of the eigenvalues of C1 C2, which is not symmetric; we take singular values.
            ("FD", frechet_distance(generated, real), theirs["frechet_inception_distance"], 1e-8, 0),
            ("KID of all", kernel_distance(generated, real, subset_size=size)[0], theirs["kid of all"], 1e-8, 0),
            # Other random subsets: the means of 400 scatter by a twentieth of the deviation each.
            ("KID of subsets", subsets, theirs["kid of subsets"], 0, 4 * np.hypot(deviation, theirs["kid deviation"]) / 20),
            ("KID deviation", deviation, theirs["kid deviation"], 0.2, 0),
            # Their distances come from a matrix product, whose rounding may put one sample on the other side of a radius.
            ("precision", precision, theirs["precision"], 0, 1.5 / size),
            ("recall", recall, theirs["recall"], 0, 1.5 / size),
            ("IS", inception_score(softmax), theirs["inception_score_mean"], 1e-10, 0),
        ]
        for measure, ours, other, relative, absolute in rows:
            sys.stdout.write(f"{name:7} {measure:15} {ours:.12g} {other:.12g} difference {abs(ours - other):.2g}\n")
            assert ours == pytest.approx(other, rel=relative, abs=absolute), (name, measure)
