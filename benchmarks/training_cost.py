"""CPU-seconds and memory of LCM-LoRA training beside Diffusers' own script, and at full size. Writes results/training_cost.json, .md.

    git clone https://github.com/huggingface/diffusers
    python benchmarks/training_cost.py script --checkout diffusers --python PYTHON
    python benchmarks/training_cost.py one-base full-size

PYTHON is an interpreter with the requirements of examples/consistency_distillation. Every training is a process of its own with one
thread, whose CPU-seconds (user and system) and peak resident memory the operating system counts. Parts are measured one by one and
kept in the JSON file; what is not measured again stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Nothing large is imported here: a process counts as its own the memory of the one that started it, up to the moment it starts.

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "training_cost"
SCRIPT = Path("examples/consistency_distillation/train_lcm_distill_lora_sdxl.py")
LENGTHS = (4, 24)  # updates of two runs, whose difference is that of their updates alone
GOAL = 1.5  # times fewer CPU-seconds than the script
RANKS = (64, 4)
BATCH, PIXELS, LR, NUM_PICTURES = 4, 64, 1e-4, 16
MOST_GIB = 24.0
# torchvision's wheel beside a CPU build of torch lacks the operators that it describes when it is imported; the script calls none.
LAUNCH = """
import runpy, sys
try:
    import torchvision
except RuntimeError:
    import torch
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    missing = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        missing.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Measured processes


@dataclass(frozen=True)
class Used:
    """What a process used until its end: CPU-seconds, and peak resident memory in MiB."""

    cpu_s: float
    peak_mib: float


def measured(command: list[Any], folder: Path) -> Used:
    """What ``command`` used; it must succeed. What it printed is kept in ``folder``."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf")}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([str(word) for word in command], env=env, stdout=log, stderr=log, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command[:6]} failed:\n{(folder / 'log.txt').read_text()[-4000:]}")
    return Used(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def calling(function: str, *words: Any) -> list[Any]:
    """The command that calls a function of this file in a process of its own; words become strings."""
    return [sys.executable, __file__, "call", function, *words]


# Part "script": the same tiny SDXL, pictures, adapters and batch


def make_material(folder: str) -> None:
    """A Stable Diffusion XL of the size of Diffusers' test models, and a folder of pictures with captions.

    In it as in the real one the VAE's encoder costs 0.6 to 0.7 of a network call (in operations), which matters for what is encoded anew
    at every update.
    """
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from diffx.testing.parts import byte_tokenizer

    torch.manual_seed(0)
    place = Path(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 77
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4, projection_dim=32,
        **special,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=64, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, sample_size=PIXELS,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text), add_watermarker=False,
    ).save_pretrained(place / "model")  # fmt: skip
    (place / "pictures").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(NUM_PICTURES):
        name = f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)).save(place / "pictures" / name)
        rows.append({"file_name": name, "text": f"picture number {i}"})
    (place / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def script_command(python: str, checkout: Path, material: Path, folder: Path, rank: int, steps: int) -> list[Any]:
    options = {
        "pretrained_teacher_model": material / "model", "train_data_dir": material / "pictures", "output_dir": folder / "run",
        "resolution": PIXELS, "train_batch_size": BATCH, "max_train_steps": steps, "lora_rank": rank, "lora_alpha": rank,
        "loss_type": "huber", "learning_rate": LR, "lr_warmup_steps": 0, "seed": 0, "mixed_precision": "no", "cache_dir": folder / "cache",
    }  # fmt: skip
    return [python, "-c", LAUNCH, checkout / SCRIPT, *(f"--{name}={value}" for name, value in options.items()), "--center_crop"]


def our_command(material: Path, folder: Path, rank: int, steps: int) -> list[Any]:
    options = {
        "teacher": material / "model", "output": folder / "run", "resolution": PIXELS, "batch-size": BATCH, "train-steps": steps,
        "lora-rank": rank, "lr": LR, "weight-decay": 0.01, "huber-c": 0.001, "teacher-steps": 50,
        "guidance-range": "4,16",  # the script's w, from 3 to 15, is a scale less 1
        "cache": folder / "cache", "device": "cpu",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "diffx", "distill", "lcm", material / "pictures", *flags]


def measure_script(folder: Path, checkout: Path, python: str, rounds: int) -> dict[str, Any]:
    """Per update, ours and theirs; the runs of a round follow each other, so that a busy machine slows both alike."""
    material = folder / "material"
    material.mkdir()
    measured(calling("make_material", material), material)
    runs: dict[str, Callable[[Path, int, int], list[Any]]] = {
        "script": lambda own, rank, steps: script_command(python, checkout, material, own, rank, steps),
        "diffx": lambda own, rank, steps: our_command(material, own, rank, steps),
    }
    found: dict[str, Any] = {"rounds": rounds, "updates": LENGTHS, "checkout": revision(checkout)}
    for rank in RANKS:
        used: dict[tuple[str, int], list[Used]] = {(name, steps): [] for name in runs for steps in LENGTHS}
        for i in range(rounds):
            for name, steps in used:
                own = folder / f"{name}-{rank}-{steps}-{i}"
                own.mkdir()
                used[name, steps].append(measured(runs[name](own, rank, steps), own))
                print(f"rank {rank:2d}, {name:>6}, {steps:2d} updates: {used[name, steps][-1]}", flush=True)
        found[f"rank {rank}"] = {name: _per_update(*(used[name, steps] for steps in LENGTHS)) for name in runs}
    return found


def _per_update(first: list[Used], last: list[Used]) -> dict[str, Any]:
    """What an update and the start-up used: the least of the rounds, since other work on a machine only adds."""
    runs = [[used.cpu_s for used in runs] for runs in (first, last)]
    cost = (min(runs[1]) - min(runs[0])) / (LENGTHS[1] - LENGTHS[0])
    peak = min(used.peak_mib for used in last)
    return {"cpu_s_per_update": cost, "start_cpu_s": min(runs[0]) - LENGTHS[0] * cost, "peak_mib": peak, "cpu_s_of_runs": runs}


def revision(checkout: Path) -> str | None:
    """The commit of a checkout, where git knows one."""
    asked = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip()[:12] or None


# Parts "full-size" and "one-base": Stable Diffusion 1.5 with random weights


def full_size_pipeline() -> Any:
    """Stable Diffusion 1.5 in float32: every network as its public config says, with random weights; a tokenizer of single bytes."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffx.testing.parts import byte_tokenizer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 77
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        **special,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


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

    pipe = full_size_pipeline()
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
    used = measured(calling("train_full_size", method, pixels, own), own)
    return json.loads((own / "report.json").read_text()) | {"whole": asdict(used)}


# The report


def render(parts: dict[str, Any]) -> str:
    sections = {"script": render_script, "full-size": render_full_size, "one-base": render_one_base}
    found = [[*section(parts[name]), ""] for name, section in sections.items() if name in parts]
    return "\n".join(["# Cost of training", "", *(line for lines in found for line in lines)])


def render_script(found: dict[str, Any]) -> list[str]:
    first, last = found["updates"]
    lines = [
        "## LCM-LoRA, beside Diffusers' script",
        "",
        f"`python benchmarks/training_cost.py script --rounds {found['rounds']}`, {found['made']};",
        f"the script is of commit {found['checkout']}.",
        f"A tiny SDXL (UNet of 1.98 M, {PIXELS // 2} x {PIXELS // 2} latents), batch {BATCH}, float32, one thread. An update is the",
        f"difference of runs of {first} and {last} updates, each the least of its rounds; start-up is the rest: imports, loading,",
        f"our encoding of the {NUM_PICTURES} pictures, saving, sample pictures. Both train the same adapters. Rank {RANKS[0]} is the",
        f"script's default; rank {RANKS[1]} beside widths of 32 and 64 is nearer to what {RANKS[0]} is beside SDXL's 320 to 1280.",
        "",
        "| rank | | CPU-s per update | script / diffx | peak memory, MiB | start-up, CPU-s | CPU-s of the runs |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    goals = ["", f"Goals, {GOAL} times fewer CPU-seconds and not more memory:"]
    for rank in RANKS:
        both = found[f"rank {rank}"]
        ratio = both["script"]["cpu_s_per_update"] / both["diffx"]["cpu_s_per_update"]
        for name, one in both.items():
            runs = "; ".join(", ".join(f"{value:.1f}" for value in run) for run in one["cpu_s_of_runs"])
            shown = f"{ratio:.2f}" if name == "diffx" else ""
            figures = f"{one['cpu_s_per_update']:.3f} | {shown} | {one['peak_mib']:.0f} | {one['start_cpu_s']:.1f} | {runs}"
            lines.append(f"| {rank} | {name} | {figures} |")
        fast, small = ratio >= GOAL, both["diffx"]["peak_mib"] <= both["script"]["peak_mib"]
        goals.append(f"rank {rank} {'met' if fast else 'missed'} and {'met' if small else 'missed'}" + (";" if rank != RANKS[-1] else "."))
    return lines + goals


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
    parser.add_argument("parts", nargs="+", choices=["script", "full-size", "one-base"])
    parser.add_argument("--checkout", type=Path, default=os.environ.get("DIFFUSERS_CHECKOUT"), help="of Diffusers; else DIFFUSERS_CHECKOUT")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the script")
    parser.add_argument("--rounds", type=int, default=3, help="of part script")
    parser.add_argument("--output", type=Path, default=RESULT, help="without its endings .json and .md")
    chosen = parser.parse_args()
    if "script" in chosen.parts and not (chosen.checkout and (chosen.checkout / SCRIPT).is_file()):
        parser.error(f"--checkout={chosen.checkout} holds no {SCRIPT}")
    python = os.path.abspath(shutil.which(chosen.python) or chosen.python)  # training runs in folders of its own
    file = chosen.output.with_suffix(".json")
    found = json.loads(file.read_text()) if file.exists() else {}
    for part in chosen.parts:
        with tempfile.TemporaryDirectory() as scratch:
            match part:
                case "script":
                    result = measure_script(Path(scratch), chosen.checkout.resolve(), python, chosen.rounds)
                case "full-size":
                    result = measure_full_size(Path(scratch))
                case "one-base":
                    result = measure_one_base(Path(scratch))
        found[part] = result | {"made": device()}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        chosen.output.with_suffix(".md").write_text(render(found))
    print(render(found))
