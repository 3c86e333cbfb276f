"""CPU-seconds and memory of training beside Diffusers' own scripts, and at full size. Writes results/training_cost.json, .md.

    git clone https://github.com/huggingface/diffusers
    python benchmarks/training_cost.py script controlnet --checkout diffusers --python PYTHON
    python benchmarks/training_cost.py one-base full-size

PYTHON is an interpreter with the requirements of examples/consistency_distillation or examples/controlnet. Parts are measured one by
one and kept in the JSON file; what is not measured again stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Nothing large is imported here: a process counts as its own the memory of the one that started it, up to the moment it starts.
from controlnet_cost import CONTROL_SCRIPT, measure_controlnet, render_controlnet
from training_scripts import FULL_SIZE, LCM_SCRIPT, ROOT, Used, calling, measure_script, measured, render_script, stable_diffusion

RESULT = ROOT / "benchmarks" / "results" / "training_cost"
SCRIPTS = {"script": LCM_SCRIPT, "controlnet": CONTROL_SCRIPT}  # by the part that runs it
MOST_GIB = 24.0


# Parts "full-size" and "one-base": Stable Diffusion 1.5 with random weights


def train_full_size(method: str, pixels: str, folder: str) -> None:
    """One turn of every trained role at full size, and the export; writes what it took to ``folder/report.json``."""
    import resource

    import numpy as np
    import torch
    from accelerate import Accelerator

    from diffx.families import family_of
    from diffx.objectives import DMD2, LCM
    from diffx.training.cache import make_cache
    from diffx.training.config import TrainConfig
    from diffx.training.data import DataConfig
    from diffx.training.export import export
    from diffx.training.loop import Training
    from diffx.training.networks import Lora, Networks

    torch.set_num_threads(1)
    place, size = Path(folder), (int(pixels), int(pixels))
    report: dict[str, Any] = {}

    def note(name: str, since: float) -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report[name] = asdict(Used(time.process_time() - since, peak))
        print(name, report[name], flush=True)
        return time.process_time()

    pipe = stable_diffusion(**FULL_SIZE)
    now = note("make the pipeline", 0.0)
    objective = {"lcm": LCM(), "dmd2": DMD2(fake_steps=1)}[method]
    picture = {"image": np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), "text": "a picture"}
    family = family_of(pipe)
    data = make_cache([picture], family, DataConfig(resolution=size, cache=place / "cache"), progress=False)
    now = note("encode a picture and its caption", now)
    nets = Networks(family, objective, Lora(rank=64), size=size)
    config = TrainConfig(train_steps=objective.period, batch_size=1, gradient_checkpointing=True)
    training = Training(nets, data, config, Accelerator(cpu=True))
    now = note("add adapters", now)
    report["losses"] = [dict(step.losses) for step in training.steps()]
    now = note("train", now)
    export(nets, nets.objective.inference(family), place / "model")
    note("export", now)
    weights = {id(w): (name, w) for network in set(nets.modules.values()) for name, w in network.named_parameters()}.values()
    report["parameters"] = {
        "base": sum(w.numel() for name, w in weights if "lora_" not in name),
        **{role: sum(w.numel() for w in nets.parameters(role).values()) for role in nets.adapters},
    }
    (place / "report.json").write_text(json.dumps(report, indent=1))


def measure_full_size(folder: Path) -> dict[str, Any]:
    """An LCM-LoRA update of one 512 px picture."""
    return _full_size(folder, "lcm", 512)


def measure_one_base(folder: Path) -> dict[str, Any]:
    """LCM-LoRA and DMD2-LoRA at 64 px, where memory holds little else than weights."""
    return {method: _full_size(folder, method, 64) for method in ("lcm", "dmd2")}


def _full_size(folder: Path, method: str, pixels: int) -> dict[str, Any]:
    own = folder / f"{method}-{pixels}"
    own.mkdir()
    used = measured(calling(train_full_size, method, pixels, own), own)
    return json.loads((own / "report.json").read_text()) | {"whole": asdict(used)}


# The report


def render(parts: dict[str, Any]) -> str:
    sections = {"script": render_script, "controlnet": render_controlnet, "full-size": render_full_size, "one-base": render_one_base}
    found = [[*section(parts[name]), ""] for name, section in sections.items() if name in parts]
    return "\n".join(["# Cost of training", "", *(line for lines in found for line in lines)])


def render_full_size(found: dict[str, Any]) -> list[str]:
    most = found["whole"]["peak_mib"] / 1024
    return [
        "## Full size",
        "",
        f"`python benchmarks/training_cost.py full-size`, {found['made']}. Stable Diffusion 1.5 with random weights; UNet, VAE and",
        "text encoder have their real sizes, float32: one LCM-LoRA update of rank 64, batch 1, 512 x 512 pixels, gradient",
        "checkpointing, one thread.",
        "",
        "| | CPU-s | peak memory so far, GiB |",
        "|---|---:|---:|",
        *(f"| {name} | {used['cpu_s']:.1f} | {used['peak_mib'] / 1024:.2f} |" for name, used in found.items() if _is_used(used)),
        "",
        f"Parameters: {_parameters(found)}.",
        f"Goal, one update and the export within {MOST_GIB:g} GiB: {'met' if most < MOST_GIB else 'missed'}.",
    ]


def render_one_base(found: dict[str, Any]) -> list[str]:
    lines = [
        "## One base",
        "",
        f"`python benchmarks/training_cost.py one-base`, {found['made']}. The same model at 64 x 64 pixels, so that weights are what",
        "memory holds; every trained role takes one step. A second copy of the base would be another 3.2 GiB; an adapter and its",
        "moments are 0.75, and the gradients of one role are gone before the other's come.",
        "",
        "| | parameters of the networks | memory before adapters, GiB | peak memory, GiB |",
        "|---|---|---:|---:|",
    ]
    for name in ("lcm", "dmd2"):
        before, whole = found[name]["encode a picture and its caption"]["peak_mib"], found[name]["whole"]["peak_mib"]
        lines.append(f"| {name} | {_parameters(found[name])} | {before / 1024:.2f} | {whole / 1024:.2f} |")
    return lines


def _is_used(value: Any) -> bool:
    return isinstance(value, dict) and "peak_mib" in value


def _parameters(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in report["parameters"].items())


def device() -> str:
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return f"CPU {names[0] if names else platform.machine()}; torch {version('torch')}, diffusers {version('diffusers')}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["call"]:
        globals()[sys.argv[2]](*sys.argv[3:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["script", "controlnet", "full-size", "one-base"])
    parser.add_argument("--checkout", type=Path, default=os.environ.get("DIFFUSERS_CHECKOUT"), help="of Diffusers; else DIFFUSERS_CHECKOUT")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the scripts")
    parser.add_argument("--rounds", type=int, default=3, help="of parts script and controlnet")
    parser.add_argument("--output", type=Path, default=RESULT, help="without its endings .json and .md")
    chosen = parser.parse_args()
    for part, script in SCRIPTS.items():
        if part in chosen.parts and not (chosen.checkout and (chosen.checkout / script).is_file()):
            parser.error(f"--checkout={chosen.checkout} holds no {script}")
    python = os.path.abspath(shutil.which(chosen.python) or chosen.python)  # training runs in folders of its own
    file = chosen.output.with_suffix(".json")
    found = json.loads(file.read_text()) if file.exists() else {}
    for part in chosen.parts:
        with tempfile.TemporaryDirectory() as scratch:
            match part:
                case "script":
                    result = measure_script(Path(scratch), chosen.checkout.resolve(), python, chosen.rounds)
                case "controlnet":
                    result = measure_controlnet(Path(scratch), chosen.checkout.resolve(), python, chosen.rounds)
                case "full-size":
                    result = measure_full_size(Path(scratch))
                case "one-base":
                    result = measure_one_base(Path(scratch))
        found[part] = result | {"made": device()}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        chosen.output.with_suffix(".md").write_text(render(found))
    print(render(found))
