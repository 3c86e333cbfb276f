"""Every scheduler class through a folder and through a Hub, with diffx and without. Writes results/hub_matrix.md.

    python benchmarks/hub_matrix.py

Pipelines are saved, pushed to ``diffx.testing.LocalHub``, and loaded in fresh processes; an entry is the largest difference of
the latents sampled there and here. Below them stand controls: what Diffusers does of itself with classes that are not its own.
"""

import json
import os
import platform
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import huggingface_hub
import numpy as np
import torch

import diffx
from diffx.hub.degrade import degraded
from diffx.loading import EMBEDDED_TABLE, load_pipeline
from diffx.testing import LocalHub, call_inputs, end_of, tiny_flux, tiny_latent_consistency, tiny_stable_diffusion

RESULT = Path(__file__).parent / "results" / "hub_matrix.md"
TABLE = json.loads((EMBEDDED_TABLE / "scheduler_config.json").read_text())["calibration"]
ROWS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DDIM": (tiny_stable_diffusion, diffx.DDIM, dict(spacing="ays_sd")),
    "DDPM": (tiny_stable_diffusion, diffx.DDPM, {}),
    "DEIS": (tiny_stable_diffusion, diffx.DEIS, dict(solver_order=3)),
    "LMS": (tiny_stable_diffusion, diffx.LMS, dict(spacing="logsnr")),
    "Euler": (tiny_stable_diffusion, diffx.Euler, dict(use_karras_sigmas=True)),
    "EulerAncestral": (tiny_stable_diffusion, diffx.EulerAncestral, dict(eta=0.5)),
    "Heun": (tiny_stable_diffusion, diffx.Heun, {}),
    "DPMSolver": (tiny_stable_diffusion, diffx.DPMSolver, dict(algorithm_type="sde-dpmsolver++", eta=0.3)),
    "DPMSolverSinglestep": (tiny_stable_diffusion, diffx.DPMSolverSinglestep, {}),
    "UniPC": (tiny_stable_diffusion, diffx.UniPC, dict(solver_order=3, seed=7)),
    "LCM": (tiny_latent_consistency, diffx.LCM, {}),
    "Calibrated": (load_pipeline, diffx.Calibrated, dict(calibration=TABLE)),
    "UniPC, flow": (tiny_flux, diffx.UniPC, dict(solver_order=3)),
}
WAYS = [(place, by) for place in ("folder", "Hub") for by in ("DiffusionPipeline", "own class")]
FOREIGN = "from diffusers import DDIMScheduler\n\n\nclass Foreign(DDIMScheduler):\n    pass\n"
# What a process does, a list of: [name of the entry or of the repository, action, source, class or None, arguments of the call].
CHILD = """
import json, os, sys
import numpy, torch
torch.set_num_threads(1)
sys.path.insert(0, os.getcwd())
for module in sys.argv[2:]:
    __import__(module)
import diffusers
diffusers.utils.logging.disable_progress_bar()
said = {}
for key, action, source, name, call in json.load(open(sys.argv[1])):
    try:
        if action == "restore":
            pipe = diffx.from_pretrained(source)
        else:
            pipe = getattr(diffusers, name or "DiffusionPipeline").from_pretrained(source)
        if action == "push":
            pipe.push_to_hub(key)
            continue
        if action == "push degraded":
            import diffx
            diffx.push_to_hub(pipe, key, license="apache-2.0")
            continue
        if action == "save":
            pipe.save_pretrained(key)
            continue
        pipe.set_progress_bar_config(disable=True)
        made = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images
        numpy.save(key.replace("/", "_") + ".npy", made.numpy())
        said[key] = type(pipe.scheduler).__module__.split(".")[0] + " " + type(pipe.scheduler).__name__
    except Exception as error:
        said[key] = type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0]
print(json.dumps(said))
"""


class Measured:
    """Pictures made here, and what other processes made and said."""

    def __init__(self, root: Path, said: dict[str, str], here: dict[str, np.ndarray], twins: dict[str, str]) -> None:
        self.root, self.said, self.here, self.twins = root, said, here, twins

    def entry(self, key: str, want: str, scheduler: str = "") -> str:
        """The difference to the picture ``want``, or the error, or another scheduler than the expected one."""
        file = self.root / f"{key.replace('/', '_')}.npy"
        if not file.is_file():
            return f"`{self.said[key].split(':')[0]}`"
        if self.said[key] != scheduler:
            return self.said[key]
        return f"{np.abs(np.load(file) - self.here[want]).max():g}"


def measure(names: Iterable[str], root: Path, hub: LocalHub) -> Measured:
    """Save, push and load the rows of those names, and the controls."""
    (root / "foreign.py").write_text(FOREIGN)
    with_diffx, without = [], []
    here, twins, said = {}, {}, {}
    for name in (*names, "foreign"):
        build, cls, options = ROWS[name] if name in ROWS else (tiny_stable_diffusion, _foreign(root), {})
        pipe = build()
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
        call = call_inputs(pipe) | {"num_inference_steps": 6}
        key, own = name.replace(", ", "-"), type(pipe).__name__
        here[name] = made_by(pipe, call)
        pipe.save_pretrained(root / "plain" / key)
        with_diffx.append([f"tester/plain-{key}", "push", f"plain/{key}", None, call])
        if name == "foreign":
            hub.commit(f"tester/plain-{key}", root / "plain" / key)  # from its folder: no process can load it to push it
            with_diffx.pop()
        kinds = [("plain", with_diffx)] + ([] if name == "foreign" else [("degraded", without)])
        if name in ("foreign", "UniPC"):
            kinds.append(("plain", without))  # the controls
        if name != "foreign":
            plain = degraded(pipe)
            twins[name], here[f"{name} twin"] = type(plain.scheduler).__name__, made_by(plain, call)
            diffx.save_pretrained(pipe, root / "degraded" / key)
            with_diffx.append([f"tester/degraded-{key}", "push degraded", f"plain/{key}", None, call])
            with_diffx.append([f"restored/folder/{key}", "restore", f"degraded/{key}", None, call])
            with_diffx.append([f"restored/Hub/{key}", "restore", f"tester/degraded-{key}", None, call])
            without.append([f"elsewhere/{key}", "save", f"degraded/{key}", None, call])
        for kind, jobs in kinds:
            for place, by in WAYS:
                source = f"{kind}/{key}" if place == "folder" else f"tester/{kind}-{key}"
                process = "with" if jobs is with_diffx else "without"
                jobs.append([f"{process}/{kind}/{place}/{by}/{key}", "load", source, own if by == "own class" else None, call])
    for process, jobs, modules, hidden in (("with", with_diffx, ["diffx", "foreign"], ()), ("without", without, [], ("diffx",))):
        (root / f"{process}.json").write_text(json.dumps(jobs))
        said |= json.loads(hub.run(["-c", CHILD, f"{process}.json", *modules], cwd=root, without=hidden).stdout)
    for name in names:  # what stock Diffusers saved again
        key = name.replace(", ", "-")
        pipe = diffx.from_pretrained(root / "elsewhere" / key)
        said[f"elsewhere/{key}"] = f"{type(pipe.scheduler).__module__} {type(pipe.scheduler).__name__}"
        np.save(root / f"elsewhere_{key}.npy", made_by(pipe, call_inputs(pipe) | {"num_inference_steps": 6}))
    return Measured(root, said, here, twins)


def made_by(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """The latents of a call, as the other processes make them."""
    pipe.set_progress_bar_config(disable=True)
    return end_of(pipe, **call, generator=torch.Generator().manual_seed(0)).numpy()


def _foreign(root: Path) -> Any:
    sys.path.insert(0, str(root))
    try:
        return __import__("foreign").Foreign
    finally:
        sys.path.remove(str(root))


def table(found: Measured, names: Iterable[str]) -> list[list[str]]:
    """Rows of text: the scheduler, its twin, and an entry per way."""
    rows = []
    for name in names:
        key, ours, twin = name.replace(", ", "-"), f"diffx {ROWS[name][1].__name__}", f"diffusers {found.twins[name]}"
        entries = [found.entry(f"with/plain/{place}/{by}/{key}", name, ours) for place, by in WAYS]
        entries += [found.entry(f"without/degraded/{place}/{by}/{key}", f"{name} twin", twin) for place, by in WAYS]
        entries += [found.entry(f"restored/{place}/{key}", name, ours) for place in ("folder", "Hub")]
        entries += [found.entry(f"elsewhere/{key}", name, ours)]
        rows.append([name, found.twins[name], *entries])
    return rows


def controls(found: Measured) -> list[list[str]]:
    """Rows of text: what is loaded, where, and an entry per way."""
    cases = [("a class of another module, which is imported", "with", "foreign"), ("the same, not imported", "without", "foreign")]
    cases += [("UniPC, saved by Diffusers alone, where diffx is absent", "without", "UniPC")]
    return [
        [what, *(found.entry(f"{process}/plain/{place}/{by}/{key}", key) for place, by in WAYS)]
        for what, process, key in cases
        if f"{process}/plain/folder/DiffusionPipeline/{key}" in found.said
    ]


def report(found: Measured, names: Iterable[str]) -> str:
    """The whole file."""
    ways = [f"{place}, {by}" for place, by in WAYS]
    heads = ["scheduler", "its stock twin", *ways, *ways, "restored, folder", "restored, Hub", "saved elsewhere, restored"]
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, huggingface_hub {huggingface_hub.__version__}"
    text = f"""
        # Schedulers through folders and a Hub

        `python benchmarks/hub_matrix.py`: tiny real pipelines with random weights (Calibrated: the embedded model), float32, 6 steps,
        saved, pushed to `diffx.testing.LocalHub` and loaded in two fresh processes, one that imports diffx and one that cannot.
        {versions}, Python {platform.python_version()}, one CPU thread.

        An entry is the largest difference between the latents sampled there and here. No trust flag is given anywhere.

        - The first four: saved by `pipe.save_pretrained` and `pipe.push_to_hub`, loaded after `import diffx`, by `DiffusionPipeline`
          and by the pipeline's own class; against the pipeline that was saved.
        - The next four: saved by `diffx.save_pretrained` and `diffx.push_to_hub`, loaded where diffx cannot be imported; against the
          stock twin here.
        - The last three: the same loaded by `diffx.from_pretrained`; the very last after stock Diffusers had loaded and saved it;
          against the pipeline that was saved.
    """
    lines = [textwrap.dedent(text).strip(), "", *_markdown(heads, table(found, names)), "", "Controls: what Diffusers does of itself.", ""]
    return "\n".join([*lines, *_markdown(["what", *ways], controls(found))]) + "\n"


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        found = measure(ROWS, Path(folder), hub)
        RESULT.write_text(report(found, ROWS))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
