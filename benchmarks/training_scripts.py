"""What an update costs in Diffusers' training scripts and in ours, on the same tiny model and data; parts of training_cost.py.

Every training is a process of its own with one thread, whose CPU-seconds (user and system) and peak resident memory the operating
system counts. The scripts run as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing large is imported here: a process counts as its own the memory of the one that started it, up to the moment it starts.

ROOT = Path(__file__).resolve().parent.parent
LCM_SCRIPT = Path("examples/consistency_distillation/train_lcm_distill_lora_sdxl.py")
LENGTHS = (4, 24)  # updates of two runs, whose difference is that of their updates alone
GOAL = 1.5  # times fewer CPU-seconds than the script
RANKS = (64, 4)
BATCH, LR, NUM_PICTURES = 4, 1e-4, 16
PIXELS = 64
HINT_COLUMN = "conditioning_image"
# torchvision's wheel beside a CPU build of torch lacks the operators that it describes when it is imported; the script calls none.
TORCHVISION = """
import sys
try:
    import torchvision
except RuntimeError:
    import torch
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    missing = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        missing.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
LAUNCH = """
import runpy, sys
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


def calling(function: Callable, *words: Any) -> list[Any]:
    """The command that calls a function in a process of its own, by the end of its file; words become strings."""
    return [sys.executable, function.__code__.co_filename, "call", function.__name__, *words]


Run = Callable[[Path, int], list[Any]]  # the command of a training in a folder, of so many updates


def side_by_side(folder: Path, runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """What an update of each uses; the runs of a round follow each other, so that a busy machine slows all alike."""
    used: dict[tuple[str, int], list[Used]] = {(name, steps): [] for name in runs for steps in LENGTHS}
    for i in range(rounds):
        for name, steps in used:
            own = folder / f"{name}-{steps}-{i}"
            own.mkdir(parents=True)
            used[name, steps].append(measured(runs[name](own, steps), own))
            print(f"{folder.name}, {name:>6}, {steps:2d} updates: {used[name, steps][-1]}", flush=True)
    return {name: per_update(*(used[name, steps] for steps in LENGTHS)) for name in runs}


def per_update(first: list[Used], last: list[Used]) -> dict[str, Any]:
    """What an update and the start-up used: the least of the rounds, since other work on a machine only adds."""
    runs = [[used.cpu_s for used in runs] for runs in (first, last)]
    cost = (min(runs[1]) - min(runs[0])) / (LENGTHS[1] - LENGTHS[0])
    peak = min(used.peak_mib for used in last)
    return {"cpu_s_per_update": cost, "start_cpu_s": min(runs[0]) - LENGTHS[0] * cost, "peak_mib": peak, "cpu_s_of_runs": runs}


def revision(checkout: Path) -> str | None:
    """The commit of a checkout, where git knows one."""
    asked = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip()[:12] or None


# Models


def stable_diffusion(unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> Any:
    """A Stable Diffusion 1 in float32 with random weights and a tokenizer of single bytes; widths and depths are given."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer, config = tokenizer_and_text_config(**text)
    levels = len(vae["block_out_channels"])
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            **vae, layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        ),
        text_encoder=CLIPTextModel(config), tokenizer=tokenizer, unet=UNet2DConditionModel(**unet, layers_per_block=2), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tokenizer_and_text_config(**config: Any) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig

    from diffx.testing.parts import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 77
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tokenizer, CLIPTextConfig(**{"vocab_size": len(tokenizer)} | config | special)


FULL_SIZE: dict[str, Any] = {  # every network as its public config says
    "unet": dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8),
    "vae": dict(block_out_channels=(128, 256, 512, 512), sample_size=512),
    "text": dict(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    ),
}


# Part "script": LCM-LoRA on the same tiny SDXL, pictures, adapters and batch


def make_lcm_material(folder: str) -> None:
    """A Stable Diffusion XL of the size of Diffusers' test models, and a folder of pictures with captions.

    In it as in the real one the VAE's encoder costs 0.6 to 0.7 of a network call (in operations), which matters for what is encoded anew
    at every update.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    place = Path(folder)
    tokenizer, text = tokenizer_and_text_config(
        hidden_size=32, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4, projection_dim=32
    )
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
    make_pictures(place / "pictures", PIXELS)


def make_pictures(folder: Path, pixels: int) -> None:
    """Pictures of noise with captions, as both read them, and the edges of each."""
    import numpy as np
    from PIL import Image

    from diffx.conditioning import hints

    (folder / "edges").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(NUM_PICTURES):
        picture = Image.fromarray(rng.integers(0, 256, (pixels, pixels, 3), np.uint8))
        picture.save(folder / f"{i:02d}.png")
        hints.get("canny")(picture).save(folder / "edges" / f"{i:02d}.png")
        row = {"file_name": f"{i:02d}.png", "text": f"picture number {i}", f"{HINT_COLUMN}_file_name": f"edges/{i:02d}.png"}
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lcm_script(python: str, checkout: Path, material: Path, folder: Path, rank: int, steps: int) -> list[Any]:
    options = {
        "pretrained_teacher_model": material / "model", "train_data_dir": material / "pictures", "output_dir": folder / "run",
        "resolution": PIXELS, "train_batch_size": BATCH, "max_train_steps": steps, "lora_rank": rank, "lora_alpha": rank,
        "loss_type": "huber", "learning_rate": LR, "lr_warmup_steps": 0, "seed": 0, "mixed_precision": "no", "cache_dir": folder / "cache",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [python, "-c", TORCHVISION + LAUNCH, checkout / LCM_SCRIPT, *flags, "--center_crop"]


def lcm_ours(material: Path, folder: Path, rank: int, steps: int) -> list[Any]:
    options = {
        "teacher": material / "model", "output": folder / "run", "resolution": PIXELS, "batch-size": BATCH, "train-steps": steps,
        "lora-rank": rank, "lr": LR, "weight-decay": 0.01, "huber-c": 0.001, "teacher-steps": 50,
        "guidance-range": "4,16",  # the script's w, from 3 to 15, is a scale less 1
        "cache": folder / "cache", "device": "cpu",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "diffx", "distill", "lcm", material / "pictures", *flags]


def measure_script(folder: Path, checkout: Path, python: str, rounds: int) -> dict[str, Any]:
    """An update of either, by rank."""
    material = folder / "material"
    material.mkdir()
    measured(calling(make_lcm_material, material), material)
    found: dict[str, Any] = {"rounds": rounds, "updates": LENGTHS, "checkout": revision(checkout)}
    for rank in RANKS:
        runs: dict[str, Run] = {
            "script": lambda own, steps, rank=rank: lcm_script(python, checkout, material, own, rank, steps),
            "diffx": lambda own, steps, rank=rank: lcm_ours(material, own, rank, steps),
        }
        found[f"rank {rank}"] = side_by_side(folder / f"rank-{rank}", runs, rounds)
    return found


# The report


def render_script(found: dict[str, Any]) -> list[str]:
    first, last = found["updates"]
    both = {f"{rank}": found[f"rank {rank}"] for rank in RANKS}
    return [
        "## LCM-LoRA, beside Diffusers' script",
        "",
        f"`python benchmarks/training_cost.py script --rounds {found['rounds']}`, {found['made']};",
        f"the script is of commit {found['checkout']}.",
        f"A tiny SDXL (UNet of 1.98 M, {PIXELS // 2} x {PIXELS // 2} latents), batch {BATCH}, float32, one thread. An update is the",
        f"difference of runs of {first} and {last} updates, each the least of its rounds; start-up is the rest: imports, loading,",
        f"our encoding of the {NUM_PICTURES} pictures, saving, sample pictures. Both train the same adapters. Rank {RANKS[0]} is the",
        f"script's default; rank {RANKS[1]} beside widths of 32 and 64 is nearer to what {RANKS[0]} is beside SDXL's 320 to 1280.",
        "",
        *table("rank", both),
    ]


def table(what: str, pairs: dict[str, dict[str, Any]]) -> list[str]:
    """A row for the script and one for us, for each case, and whether the goals are met."""
    lines = [
        f"| {what} | | CPU-s per update | script / diffx | peak memory, MiB | start-up, CPU-s | CPU-s of the runs |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    goals = ["", f"Goals, {GOAL} times fewer CPU-seconds and not more memory:"]
    for case, both in pairs.items():
        ratio = both["script"]["cpu_s_per_update"] / both["diffx"]["cpu_s_per_update"]
        for name, one in both.items():
            runs = "; ".join(", ".join(f"{value:.1f}" for value in run) for run in one["cpu_s_of_runs"])
            shown = f"{ratio:.2f}" if name == "diffx" else ""
            figures = f"{one['cpu_s_per_update']:.3f} | {shown} | {one['peak_mib']:.0f} | {one['start_cpu_s']:.1f} | {runs}"
            lines.append(f"| {case} | {name} | {figures} |")
        fast, small = ratio >= GOAL, both["diffx"]["peak_mib"] <= both["script"]["peak_mib"]
        end = "." if case == list(pairs)[-1] else ";"
        goals.append(f"{what} {case} {'met' if fast else 'missed'} and {'met' if small else 'missed'}{end}")
    return lines + goals


if __name__ == "__main__" and sys.argv[1:2] == ["call"]:
    globals()[sys.argv[2]](*sys.argv[3:])
