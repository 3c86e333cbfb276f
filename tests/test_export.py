"""What is exported loads in stock Diffusers, in a process that cannot import diffx, and makes the same pictures bit for bit."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DiffusionPipeline
from safetensors.torch import load_file
from test_families import SIZE, tiny_unet2d, tiny_v_prediction

import diffx
from diffx.families import family_of
from diffx.objectives import DMD2, LCM, PCM, Diffusion, Guidance, Inference, Objective, Progressive
from diffx.testing import call_inputs, tiny_dit, tiny_flux, tiny_sd3, tiny_sdxl, tiny_stable_diffusion
from diffx.training.config import TrainConfig
from diffx.training.export import CALL_KWARGS, KOHYA, export, merged, replacing
from diffx.training.loop import Training
from diffx.training.networks import Lora, Networks, use_adapter

BUILDS = {
    "unet2d": tiny_unet2d, "sd": tiny_stable_diffusion, "sd-v": tiny_v_prediction, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux,
    "dit": tiny_dit,
}  # fmt: skip
ADAPTER = Lora(rank=2, alpha=6)  # alpha is not the rank, and UNets' targets have convolutions


@dataclass
class Noise:
    """Examples of nothing in particular: normal numbers and the pipeline's own conditions."""

    family: Any
    group_sizes = (4,)

    def read(self, indices):
        rng = torch.Generator().manual_seed(0)
        x0 = torch.randn(4, *self.family.sample_shape(SIZE), generator=rng)[indices]
        told = call_inputs(self.family.pipe, batch_size=len(indices))
        labels = torch.tensor(told["class_labels"]) if "class_labels" in told else None
        return x0, self.family.encode_condition(told.get("prompt"), labels, size=SIZE)


def trained(pipe, lora: Lora | None = None, objective: Objective | None = None, **options) -> tuple[Networks, Inference]:
    """Two updates of a method, or of progressive distillation to two calls, at a rate that shows in pictures."""
    family, objective = family_of(pipe), objective or Progressive(start=4, end=2, **options)
    nets = Networks(family, objective, lora, size=SIZE)
    config = TrainConfig(train_steps=2, batch_size=2, lr=0.02)
    assert len(list(Training(nets, Noise(family), config, Accelerator(cpu=True)).steps())) == 2
    nets.release()
    return nets, nets.objective.inference(family)


def made_by(pipe, call_kwargs: dict[str, Any]) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # Flux, SD3 and DiT hand their schedulers no generator
    return pipe(**inputs_of(pipe), **call_kwargs, generator=torch.Generator().manual_seed(0), output_type="np").images


def inputs_of(pipe) -> dict[str, Any]:
    return {"batch_size": 2} if isinstance(pipe, DDPMPipeline) else call_inputs(pipe, batch_size=2)


STOCK = """
import json, sys
sys.modules["diffx"] = None  # an import of it fails
import diffusers, numpy, torch
from pathlib import Path
torch.set_num_threads(1)
for work in json.load(open("work.json")):
    folder = Path(work["folder"])
    if work["base"]:
        pipe = diffusers.DiffusionPipeline.from_pretrained(work["base"])
        pipe.load_lora_weights(folder, **work["options"])
        name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
        pipe.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((folder / "call_kwargs.json").read_text())
    torch.manual_seed(0)
    images = pipe(**work["inputs"], **call, generator=torch.Generator().manual_seed(0), output_type="np").images
    numpy.save(folder.parent / (work["name"] + ".stock.npy"), images)
assert not [name for name in sys.modules if name.startswith("diffx") and sys.modules[name]]
"""


class Stock:
    """A collection of exports, and what stock Diffusers makes of them in one fresh process."""

    def __init__(self, root):
        self.root, self.work, self.expected, self.base = root, [], {}, {}

    def add(self, name: str, pipe, folder, call_kwargs, base=None, **options) -> None:
        """``pipe`` makes what the export in ``folder`` must make; an adapter is loaded into the pipeline in ``base``."""
        inputs = inputs_of(pipe)
        self.expected[name] = made_by(pipe, call_kwargs)
        self.work.append(dict(name=name, folder=str(folder), base=base and str(base), inputs=inputs, options=options))

    def differences(self) -> dict[str, float]:
        (self.root / "work.json").write_text(json.dumps(self.work))
        done = subprocess.run([sys.executable, "-I", "-c", STOCK], cwd=self.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made = {name: np.load(self.root / f"{name}.stock.npy") for name in self.expected}
        return {name: float(np.abs(made[name] - images).max()) for name, images in self.expected.items()}


FAST = ["unet2d", "sd", "flux"]


@pytest.mark.parametrize(
    "names", [FAST, pytest.param([name for name in BUILDS if name not in FAST], marks=pytest.mark.slow)], ids=["fast", "rest"]
)
def test_stock_diffusers_makes_the_same_pictures(tmp_path, names):
    stock = Stock(tmp_path)
    for name in names:
        build = BUILDS[name]
        nets, inference = trained(build())
        ours = nets.family.pipeline(nets.modules["student"], inference.scheduler)
        stock.add(f"{name}-full", ours, export(nets, inference, tmp_path / f"{name}-full"), inference.call_kwargs)

        # The average is what comes out where one is kept; its adapter has another name.
        nets, inference = trained(build(), ADAPTER, ema_decay=0.5 if name == "sd" else 0.0)
        if nets.family.loads_lora:
            base, untrained = tmp_path / f"{name}-base", build()
            untrained.save_pretrained(base)
            use_adapter(nets.family.base, nets.exported())
            ours = nets.family.pipeline(nets.family.base, inference.scheduler)
            has_kohya = nets.family.network == "unet"
            folder = export(nets, inference, tmp_path / f"{name}-lora", kohya=has_kohya)
            stock.add(f"{name}-lora", ours, folder, inference.call_kwargs, base=base)
            if has_kohya:
                stock.add(f"{name}-kohya", ours, folder, inference.call_kwargs, base=base, weight_name=KOHYA)
            untrained.scheduler = inference.scheduler
            effect = np.abs(made_by(untrained, inference.call_kwargs) - stock.expected[f"{name}-lora"]).max()
            assert effect > 1e-3, "the adapter must show in the pictures, or its absence would not be seen"
        ours = nets.family.pipeline(merged(nets), inference.scheduler)
        stock.add(f"{name}-merged", ours, export(nets, inference, tmp_path / f"{name}-merged", "merged"), inference.call_kwargs)
    differences = stock.differences()
    assert len(differences) == (9 if names == FAST else 13)
    assert differences == dict.fromkeys(differences, 0.0)


METHODS = {
    "train base": Diffusion(),
    "lcm": LCM(calls=2, teacher_steps=4),
    "pcm": PCM(calls=2, teacher_steps=4),
    "dmd2": DMD2(calls=1, fake_steps=1),
    "guidance": Guidance(guidance_scale=2.0, calls=4),
}
REFUSED = {("guidance", "unet2d"): "cannot be guided"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_family_and_stock_diffusers_makes_the_same_pictures(tmp_path, method):
    """What the README's table of methods and families calls "runs and reloads"; progressive has the test above."""
    stock = Stock(tmp_path)
    for name, build in BUILDS.items():
        if (method, name) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[method, name]):
                trained(build(), objective=METHODS[method])
            continue
        for lora in (None, ADAPTER):
            nets, inference = trained(build(), lora, METHODS[method])
            if lora and not nets.family.loads_lora:
                continue
            base = None
            if lora:
                build().save_pretrained(base := tmp_path / f"{name}-base")
                use_adapter(nets.family.base, nets.exported())
            ours = nets.family.pipeline(nets.modules[nets.exported()], inference.scheduler)
            form = "lora" if lora else "full"
            stock.add(f"{name}-{form}", ours, export(nets, inference, tmp_path / f"{name}-{form}"), inference.call_kwargs, base=base)
    differences = stock.differences()
    assert differences == dict.fromkeys(differences, 0.0)


def untrained(pipe, lora: Lora | None = None, objective: Progressive | None = None) -> tuple[Networks, Inference]:
    family, objective = family_of(pipe), objective or Progressive(start=4, end=2)
    return Networks(family, objective, lora, size=SIZE), objective.inference(family)


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_flux])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_models_run_without_a_dtype(tmp_path, build, half):
    pipe = build().to(half)
    nets, inference = untrained(pipe)
    loaded = DiffusionPipeline.from_pretrained(export(nets, inference, tmp_path / "out"))
    encoders = [part for name, part in loaded.components.items() if name.startswith("text_encoder")]
    assert {weight.dtype for part in encoders for weight in part.parameters()} == {torch.float32}
    assert np.isfinite(made_by(loaded, inference.call_kwargs)).all()
    assert pipe.text_encoder.dtype == half  # the user's own stays as it is


def test_merging_leaves_the_adapter_to_train_on():
    nets, _ = trained(tiny_stable_diffusion(), ADAPTER)
    before = {name: value.clone() for name, value in nets.family.base.state_dict().items()}
    network = merged(nets)
    assert network.state_dict().keys() == tiny_stable_diffusion().unet.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in nets.family.base.state_dict().items())


def test_kohya_names_carry_alpha(tmp_path):
    nets, inference = trained(tiny_stable_diffusion(), ADAPTER)
    state = load_file(export(nets, inference, tmp_path / "out", kohya=True) / KOHYA)
    assert all(name.startswith("lora_unet_") for name in state)
    assert {float(value) for name, value in state.items() if name.endswith(".alpha")} == {ADAPTER.alpha}
    # Every layer has three entries: convolutions among them.
    layers = {name.split(".")[0] for name in state}
    assert len(state) == 3 * len(layers) and any("conv1" in layer for layer in layers)


class Told(Progressive):
    """A student that is told the guidance scale."""

    def build(self, family, network):
        return family.with_guidance_embedding(network)


def test_an_adapter_on_another_network_is_exported_merged(tmp_path):
    nets, inference = untrained(tiny_stable_diffusion(), ADAPTER, Told(start=4, end=2))
    with pytest.raises(ValueError, match=r'UNet2DConditionModel was trained with another time_cond_proj_dim .* use form="merged"'):
        export(nets, inference, tmp_path / "out", "lora")
    loaded = DiffusionPipeline.from_pretrained(export(nets, inference, tmp_path / "out"))
    assert loaded.unet.config.time_cond_proj_dim == 256


def test_call_arguments_lie_beside(tmp_path):
    nets, inference = untrained(tiny_stable_diffusion())
    assert json.loads((export(nets, inference, tmp_path / "out") / CALL_KWARGS).read_text()) == inference.call_kwargs


def test_others_may_read_it(tmp_path):
    """Weights that safetensors writes are for their owner alone, and models lie in folders that many use."""
    nets, inference = untrained(tiny_stable_diffusion())
    files = [file for file in export(nets, inference, tmp_path / "out").rglob("*") if file.is_file()]
    assert files and all(file.stat().st_mode & 0o444 == 0o444 for file in files)


# bad input, and what a failure leaves


@pytest.mark.parametrize(
    ("build", "lora", "options", "message"),
    [
        (tiny_stable_diffusion, ADAPTER, dict(form="half"), "form='half' is not one of full, lora, merged"),
        (tiny_stable_diffusion, ADAPTER, dict(form="full"), 'form="full" is for networks trained as a whole, .* form="merged"'),
        (tiny_stable_diffusion, None, dict(form="lora"), "form='lora' is for adapters, .* use form=\"full\", or train with lora_rank"),
        (tiny_stable_diffusion, None, dict(form="merged"), "form='merged' is for adapters"),
        (tiny_unet2d, ADAPTER, dict(form="lora"), 'DDPMPipeline loads no LoRA in stock Diffusers; form="merged" .* UNet2DModel'),
        (tiny_dit, ADAPTER, dict(form="lora"), 'DiTPipeline loads no LoRA in stock Diffusers; form="merged" .* DiTTransformer2DModel'),
        (tiny_flux, ADAPTER, dict(kohya=True), "kohya=True writes the adapters of UNets .* form='lora' of a FluxTransformer2DModel"),
        (tiny_stable_diffusion, ADAPTER, dict(form="merged", kohya=True), "kohya=True .* form='merged' of a UNet2DConditionModel"),
    ],
)
def test_forms_that_a_network_has_not_are_refused(tmp_path, build, lora, options, message):
    nets, inference = untrained(build(), lora)
    with pytest.raises(ValueError, match=message):
        export(nets, inference, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_others_cannot_load_is_refused(tmp_path):
    nets, inference = untrained(tiny_stable_diffusion())
    ours = Inference(diffx.UniPC.from_config(inference.scheduler.config), inference.call_kwargs)
    with pytest.raises(ValueError, match="UniPC is not a scheduler of Diffusers"):
        export(nets, ours, tmp_path / "out")


def test_only_an_older_export_is_replaced(tmp_path):
    nets, inference = untrained(tiny_stable_diffusion(), ADAPTER)
    folder = tmp_path / "out"
    folder.mkdir()
    export(nets, inference, folder, "merged")
    export(nets, inference, folder, "lora")
    assert sorted(path.name for path in folder.iterdir()) == [CALL_KWARGS, "pytorch_lora_weights.safetensors", "scheduler"]
    (folder / CALL_KWARGS).unlink()
    with pytest.raises(ValueError, match="holds something else than an export; give a folder that is new or empty"):
        export(nets, inference, folder, "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path):
    folder = tmp_path / "out"
    with replacing(folder) as scratch:
        (scratch / "file").write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(folder) as scratch:
        (scratch / "file").write_text("new")
        raise OSError("disk full")
    assert (folder / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]
