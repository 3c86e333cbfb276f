"""What an update of a ControlNet costs in Diffusers' script and in ours, and whether both compute the same; a part of training_cost.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_scripts import (
    BATCH,
    FULL_SIZE,
    HINT_COLUMN,
    LAUNCH,
    LR,
    TORCHVISION,
    Run,
    calling,
    make_pictures,
    measured,
    revision,
    side_by_side,
    stable_diffusion,
    table,
)

CONTROL_SCRIPT = Path("examples/controlnet/train_controlnet.py")
PIXELS = 128
COMPARED = 8  # updates whose losses are compared
TINY: dict[str, Any] = {
    "unet": dict(sample_size=16, block_out_channels=(64, 128, 128, 128), cross_attention_dim=64, attention_head_dim=8),
    "vae": dict(block_out_channels=(32, 32, 64, 64), sample_size=PIXELS),
    "text": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, projection_dim=64),
}
TINY_HINT_WIDTHS = (16, 16, 32, 32)


def make_control_material(folder: str) -> None:
    """A Stable Diffusion 1, a ControlNet to begin with, and pictures with captions and edges.

    The sizes are such that encoding a picture costs in operations what it does in the real one, beside the rest of an update.
    """
    place, pipe = Path(folder), stable_diffusion(**TINY)
    pipe.save_pretrained(place / "model")
    new_controlnet(pipe, TINY_HINT_WIDTHS).save_pretrained(place / "controlnet")
    make_pictures(place / "pictures", PIXELS)


def new_controlnet(pipe: Any, widths: tuple[int, ...]) -> Any:
    from diffusers import ControlNetModel

    return ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=widths)


def control_script(python: str, checkout: Path, material: Path, folder: Path, steps: int, before: str = "") -> list[Any]:
    options = {
        "pretrained_model_name_or_path": material / "model", "controlnet_model_name_or_path": material / "controlnet",
        "train_data_dir": material / "pictures", "conditioning_image_column": HINT_COLUMN, "output_dir": folder / "run",
        "resolution": PIXELS, "train_batch_size": BATCH, "max_train_steps": steps, "learning_rate": LR, "lr_warmup_steps": 0,
        "seed": 0, "mixed_precision": "no", "cache_dir": folder / "cache",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [python, "-c", TORCHVISION + before + LAUNCH, checkout / CONTROL_SCRIPT, *flags]


def control_ours(material: Path, folder: Path, steps: int) -> list[Any]:
    options = {
        "model": material / "model", "start": material / "controlnet", "hint-column": f"{HINT_COLUMN}_file_name", "output": folder / "run",
        "resolution": PIXELS, "batch-size": BATCH, "train-steps": steps, "lr": LR, "weight-decay": 0.01,
        "ema-decay": 0, "condition-dropout": 0,  # which the script does not have
        "cache": folder / "cache", "device": "cpu",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "diffx", "train", "controlnet", material / "pictures", *flags]


def measure_controlnet(folder: Path, checkout: Path, python: str, rounds: int) -> dict[str, Any]:
    """An update of either; the losses of both for the same latents, noise, times and start; and operations, counted."""
    material, compared = folder / "material", folder / "compared"
    for place in (material, compared):
        place.mkdir()
    measured(calling(make_control_material, material), material)
    measured(control_script(python, checkout, material, compared, COMPARED, RECORD), compared)
    measured(calling(train_on_recorded, material, compared), compared)
    found = {"rounds": rounds, "checkout": revision(checkout), **json.loads((compared / "losses.json").read_text())}
    measured(calling(count_operations, folder), compared)
    found["operations"] = json.loads((folder / "operations.json").read_text())
    runs: dict[str, Run] = {
        "script": lambda own, steps: control_script(python, checkout, material, own, steps),
        "diffx": lambda own, steps: control_ours(material, own, steps),
    }
    return found | side_by_side(folder / "controlnet", runs, rounds)


# What the script computes is kept as it goes by: clean latents, noise and times, what the ControlNet is told, and the loss.
RECORD = """
import atexit, torch, diffusers
from safetensors.torch import save_file
seen = {}
def keep(name, value):
    count = sum(key.startswith(name + "/") for key in seen)
    seen[f"{name}/{count}"] = value.detach().clone(memory_format=torch.contiguous_format)
def add_noise(self, latents, noise, timesteps, of=diffusers.DDPMScheduler.add_noise):
    for name, value in (("latents", latents), ("noise", noise), ("t", timesteps)):
        keep(name, value)
    return of(self, latents, noise, timesteps)
def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, of=diffusers.ControlNetModel.forward, **more):
    keep("text", encoder_hidden_states)
    keep("hint", controlnet_cond)
    return of(self, sample, timestep, encoder_hidden_states, controlnet_cond, **more)
def mse_loss(one, two, of=torch.nn.functional.mse_loss, **more):
    loss = of(one, two, **more)
    keep("loss", loss)
    return loss
diffusers.DDPMScheduler.add_noise, diffusers.ControlNetModel.forward = add_noise, forward
torch.nn.functional.mse_loss = mse_loss
atexit.register(lambda: save_file(seen, "seen.safetensors"))
"""


def train_on_recorded(material: str, folder: str) -> None:
    """Our updates on what the script's saw, from the same start; writes the losses of both to ``folder/losses.json``."""
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    from diffx import ControlNet
    from diffx.families import family_of
    from diffx.objectives import Diffusion
    from diffx.objectives.objective import Batch
    from diffx.training.config import TrainConfig
    from diffx.training.draws import Draws
    from diffx.training.loop import Training
    from diffx.training.networks import Networks

    seen, size = load_file(Path(folder) / "seen.safetensors"), (PIXELS, PIXELS)

    class Recorded(Draws):
        def normal(self, name, like):
            return seen[f"{name}/{self.step}"]

        def uniform(self, name, low=0.0, high=1.0):
            share = (seen[f"t/{self.step}"].double() + 0.5) / 1000  # of all times, in the middle of its own
            return share.numpy() if name == "time" else super().uniform(name, low, high)

    def batch(step: int, places: range) -> Batch:
        told = {"encoder_hidden_states": seen[f"text/{step}"], "hint": (seen[f"hint/{step}"] * 255).round().byte()}
        return Batch(seen[f"latents/{step}"], told, Recorded(0, step, places))

    family = ControlNet(start=Path(material) / "controlnet").wrap(family_of(StableDiffusionPipeline.from_pretrained(f"{material}/model")))
    nets = Networks(family, Diffusion(ema_decay=0, condition_dropout=0), None, size=size)
    config = TrainConfig(train_steps=COMPARED, batch_size=BATCH, lr=LR, weight_decay=0.01)
    nothing: Any = type("", (), {"group_sizes": (BATCH,)})  # batches are handed over below
    training = Training(nets, nothing, config, Accelerator(cpu=True))
    training.batch = batch
    losses = {"script": [float(seen[f"loss/{i}"]) for i in range(COMPARED)], "diffx": [step.losses["student"] for step in training.steps()]}
    (Path(folder) / "losses.json").write_text(json.dumps({"losses": losses}))


def count_operations(folder: str) -> None:
    """Operations of one example in an update, of the tiny and of the full-size model, counted on shapes; to ``folder/operations.json``."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def count(sizes: dict[str, Any], widths: tuple[int, ...]) -> dict[str, float]:
        with torch.device("meta"):
            pipe = stable_diffusion(**sizes)
            control = new_controlnet(pipe, widths)
            pipe.unet.requires_grad_(False)
            pixels, side = sizes["vae"]["sample_size"], sizes["unet"]["sample_size"]
            x, picture = torch.zeros(1, 4, side, side), torch.zeros(1, 3, pixels, pixels)
            t, text = torch.zeros(1), torch.zeros(1, 77, sizes["unet"]["cross_attention_dim"])
            tokens = torch.zeros(1, 77, dtype=torch.long)

        def update() -> None:
            down, mid = control(x, t, text, picture, return_dict=False)
            pipe.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample.sum().backward()

        work: dict[str, Callable[[], Any]] = {
            "picture": lambda: pipe.vae.encode(picture), "caption": lambda: pipe.text_encoder(tokens), "update": update,
        }  # fmt: skip
        found = {}
        for name, run in work.items():
            with FlopCounterMode(display=False) as counter:
                run()
            found[name] = counter.get_total_flops() / 1e9
        return found

    found = {"tiny": count(TINY, TINY_HINT_WIDTHS), "full size": count(FULL_SIZE, (16, 32, 96, 256))}
    (Path(folder) / "operations.json").write_text(json.dumps(found))


def render_controlnet(found: dict[str, Any]) -> list[str]:
    script, ours = found["losses"]["script"], found["losses"]["diffx"]
    saved = found["script"]["cpu_s_per_update"] - found["diffx"]["cpu_s_per_update"]
    paid = (found["diffx"]["start_cpu_s"] - found["script"]["start_cpu_s"]) / saved
    apart = max(abs(one - two) for one, two in zip(script, ours))
    lines = [
        "## A ControlNet, beside Diffusers' script",
        "",
        f"`python benchmarks/training_cost.py controlnet --rounds {found['rounds']}`, {found['made']};",
        f"the script, `{CONTROL_SCRIPT}`, is of commit {found['checkout']}, and runs as it is.",
        f"A tiny Stable Diffusion (UNet of 12.8 M, {PIXELS // 8} x {PIXELS // 8} latents of {PIXELS} pixels), the same ControlNet to",
        f"begin with, batch {BATCH}, float32, AdamW, one thread; updates and start-up as above. In every update the script opens its",
        "pictures and edges, and runs the VAE's encoder and the text encoder; ours did so once, before, and reads latents, embeddings and",
        "edges. Both then call the ControlNet and the U-Net and go back through the U-Net's decoder. Our start-up has that encoding, and",
        f"two measurements on held-out pictures; {paid:.0f} updates pay for it.",
        "",
        *table("model", {"tiny": {name: found[name] for name in ("script", "diffx")}}),
        "",
        "Operations of an example in an update, counted (10^9):",
        "",
        "| | picture encoded | caption encoded | the rest of an update | with all / the rest alone |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in found["operations"].items():
        whole = sum(one.values())
        lines.append(f"| {name} | {one['picture']:.2f} | {one['caption']:.2f} | {one['update']:.2f} | {whole / one['update']:.2f} |")
    return [
        *lines,
        "",
        f"The same loss for the same latents, noise and times: over {len(ours)} updates from one start, in which both train on, the losses",
        f"differ by at most {apart:.1e} (they are {min(script):.3f} to {max(script):.3f}).",
    ]


if __name__ == "__main__" and sys.argv[1:2] == ["call"]:
    globals()[sys.argv[2]](*sys.argv[3:])
