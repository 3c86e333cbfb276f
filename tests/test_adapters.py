"""ControlNets and IP-Adapters: what they leave alone, what they train, and that stock Diffusers has the same of them bit for bit."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapter_parts import IP_CASES, SIZE, clip, ip_adapter, picture, save_encoders, training
from diffusers import ControlNetModel, DiffusionPipeline
from diffusers.models.controlnets import MultiControlNetModel
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families import recorded

import diffx
from diffx.conditioning.ip_adapter import WEIGHTS, check_reload
from diffx.conditioning.ip_layouts import FluxLayout, UNetLayout, projection_to_file
from diffx.families import family_of
from diffx.families.family import REFERENCE
from diffx.objectives import Diffusion
from diffx.testing import IMAGE_SIZE, call_inputs, tiny_dit, tiny_flux, tiny_sd3, tiny_sdxl, tiny_stable_diffusion
from diffx.training.draws import Draws
from diffx.training.export import export
from diffx.training.networks import Batch

ZERO_CONVOLUTIONS = ("controlnet_down_blocks", "controlnet_mid_block")
CONTROLLED = {"SD": tiny_stable_diffusion, "SDXL": tiny_sdxl}
each_controlled = pytest.mark.parametrize("build", CONTROLLED.values(), ids=CONTROLLED)
each_ip = pytest.mark.parametrize("name", IP_CASES)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def images(pipe, guidance_scale=3.0, count=2, **more):
    """Pictures of a pipeline, in three calls of the network for each."""
    pipe.set_progress_bar_config(disable=True)
    given = {**call_inputs(pipe, batch_size=count), "num_inference_steps": 3, "guidance_scale": guidance_scale, **more}
    given = {name: value for name, value in given.items() if name in inspect.signature(type(pipe).__call__).parameters}
    return pipe(**given, generator=torch.Generator().manual_seed(0), output_type="np").images


def hints(count=2):
    canny = diffx.ControlNet("canny").drawn_by()
    return [canny(picture(i)) for i in range(count)]


@pytest.fixture(scope="module")
def controlled():
    """A training of two updates that has ended, and a network of before."""
    made = training(tiny_stable_diffusion(), diffx.ControlNet(), lr=0.05)
    list(made.steps())
    return made


# a ControlNet changes nothing where it should not


@each_controlled
def test_a_new_controlnet_changes_nothing(build):
    made = training(build(), diffx.ControlNet())
    base = images(build())
    pipe, _ = made.result()
    assert np.array_equal(images(pipe, image=hints()), base)
    assert np.array_equal(images(pipe, image=hints(), controlnet_conditioning_scale=7.5), base)


@each_controlled
def test_gradients_reach_the_copy_alone(build):
    made = training(build(), diffx.ControlNet(), train_steps=3)
    network, unet = made.nets.modules["student"], made.nets.family.inner.denoiser
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    moved = []
    for _ in made.steps():  # Adam's first step moves every weight whose gradient is not exactly zero
        moved.append({name: weight.clone() for name, weight in network.named_parameters()})
    start = dict(made.nets.family.base.named_parameters())
    first = {name for name in start if not torch.equal(start[name], moved[0][name])}
    assert first and all(name.startswith(ZERO_CONVOLUTIONS) for name in first)
    second = {name.split(".")[0] for name in start if not torch.equal(moved[0][name], moved[2][name])}
    assert {"controlnet_cond_embedding", "down_blocks", "mid_block", "conv_in", *ZERO_CONVOLUTIONS} <= second
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in unet.parameters())


def test_scale_zero_and_an_empty_window_are_the_base(controlled):
    pipe, _ = controlled.result()
    base, full = images(tiny_stable_diffusion()), images(pipe, image=hints())
    assert not np.array_equal(full, base), "the ControlNet must act, or nothing is shown here"
    assert np.array_equal(images(pipe, image=hints(), controlnet_conditioning_scale=0.0), base)
    # Three calls lie at 0, 1/3 and 2/3 of the way.
    assert np.array_equal(images(pipe, image=hints(), control_guidance_start=0.9, control_guidance_end=1.0), base)
    assert not np.array_equal(images(pipe, image=hints(), control_guidance_end=0.4), full)


def residuals(network, **more):
    rng = torch.Generator().manual_seed(0)
    x, told = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 8, 16, generator=rng)
    hint = torch.rand(2, 3, *SIZE, generator=rng)
    with torch.no_grad():
        down, mid = network(x, torch.tensor([10, 900]), told, hint, return_dict=False, **more)
    return [*down, mid]


def test_residuals_are_linear_in_scale_and_fall_in_guess_mode(controlled):
    network = controlled.nets.modules["student"]
    one = residuals(network)
    for many in (2.0, 0.5):  # powers of two: no rounding
        assert all(torch.equal(many * a, b) for a, b in zip(one, residuals(network, conditioning_scale=many)))
    factors = torch.logspace(-1, 0, len(one))
    assert all(torch.equal(a * f, b) for a, f, b in zip(one, factors, residuals(network, guess_mode=True)))


def test_several_controlnets(controlled):
    network = controlled.nets.modules["student"]
    fresh = training(tiny_stable_diffusion(), diffx.ControlNet()).nets.modules["student"]
    family, scheduler = controlled.nets.family, controlled.nets.family.pipe.scheduler
    alone = images(family.pipeline(network, scheduler), count=1, image=hints(1))

    def several(*parts):
        nets, shown, scales = zip(*parts)
        pipe = family.pipeline(MultiControlNetModel(list(nets)), scheduler)
        return images(pipe, count=1, image=list(shown), controlnet_conditioning_scale=list(scales))

    one, two = hints()
    assert np.array_equal(several((network, one, 1.0)), alone)
    assert np.array_equal(several((network, one, 1.0), (fresh, two, 1.0)), alone)
    # Two numbers have one sum, in whichever order.
    assert np.array_equal(several((network, one, 0.5), (network, two, 1.0)), several((network, two, 1.0), (network, one, 0.5)))


@each_controlled
def test_a_controlled_call_is_the_pipelines_own(build):
    made = training(build(), diffx.ControlNet(), lr=0.05)
    list(made.steps())
    family, network = made.nets.family, made.nets.modules["student"]
    pipe, _ = made.result()
    unet, calls = pipe.unet, []
    with torch.no_grad():
        calls = recorded(unet, lambda: images(pipe, guidance_scale=1.0, image=hints()))
        inputs = call_inputs(pipe, batch_size=2)
        condition = {**family.encode_condition(inputs["prompt"], None, size=SIZE), **family.encode_shown(hints())}
        for given, out in calls:
            t = torch.as_tensor(given["timestep"], dtype=torch.float32).expand(2)
            assert torch.equal(family.forward(network, given["sample"], t, condition), out)


# an IP-Adapter changes nothing where it should not


@each_ip
def test_a_new_ip_adapter_changes_nothing_unless_it_begins_as_the_text(name, encoders):
    build, _ = IP_CASES[name]
    base = {num: images(build(), count=num) for num in (1, 2)}
    for init in ("zero", "text"):
        made = training(build(), ip_adapter(name, encoders, init=init))
        pipe, _ = made.result()
        shown = made.nets.family.inputs([picture(0)], {"guidance_scale": 3.0})
        # SD 3's layers attend to the picture itself once more, whatever the reference: there is no beginning that changes nothing.
        same = init == "zero" and not name.startswith("SD3")
        assert np.array_equal(images(pipe, count=1, **shown), base[1]) == same
        pipe.unload_ip_adapter()
        assert np.array_equal(images(pipe), base[2])


@each_ip
def test_an_ip_adapter_trains_its_own_layers_alone(name, encoders):
    build, _ = IP_CASES[name]
    made = training(build(), ip_adapter(name, encoders))
    network = made.nets.family.inner.denoiser
    before = {key: value.clone() for key, value in getattr(build(), made.nets.family.network).state_dict().items()}
    list(made.steps())
    own = {id(weight) for weight in made.nets.modules["student"].parameters()}
    for key, weight in network.named_parameters():
        assert (id(weight) in own) == ("_ip" in key or key.startswith(made.nets.family.layout.projection) or "processor" in key)
        assert id(weight) in own or torch.equal(weight, before[key])
    # Values, which begin as zeros, move at once; all else with the second update.
    start = made.nets.family.base.state_dict()
    still = [key for key, value in made.nets.modules["student"].state_dict().items() if torch.equal(value, start[key])]
    assert all("attn2" in key or "time_proj" in key or name == "SD3.5" for key in still), still


def test_student_and_average_share_one_network(encoders):
    made = training(tiny_stable_diffusion(), ip_adapter("SD plain", encoders), Diffusion(ema_decay=0.5), train_steps=3)
    list(made.steps())
    nets = made.nets
    x, condition = made.data.read([0, 1])
    level = nets.times.between(np.array([0.5, 0.9]))
    outs = {role: nets.output(role, x, level, condition) for role in ("student", "target", "student")}
    assert not torch.equal(outs["student"], outs["target"])
    with torch.no_grad():
        pipe, _ = made.result()  # with the average in it
        assert torch.equal(nets.family.inner.forward(pipe.unet, x, torch.tensor(level.t, dtype=torch.float32), condition), outs["target"])
    assert sum(weight.numel() for weight in nets.modules["student"].parameters()) < 0.5 * sum(w.numel() for w in pipe.unet.parameters())


def test_text_and_picture_are_dropped_together_and_alone(encoders):
    made = training(tiny_stable_diffusion(), ip_adapter("SD plain", encoders, image_dropout=0.3, text_dropout=0.2))
    nets, count = made.nets, 2000
    rows = {name: value[:1].expand(count, *value.shape[1:]) for name, value in made.data.read([0])[1].items()}
    found = nets.dropout(Batch(torch.zeros(count), rows, Draws(0, 0, range(count))), 0.1)
    null = {name: (found[name] == nets.null[name]).flatten(1).all(1).numpy() for name in ("encoder_hidden_states", REFERENCE)}
    text, shown = null["encoder_hidden_states"], null[REFERENCE]
    expected = {"text": 1 - 0.9 * 0.8, "image": 1 - 0.9 * 0.7, "both": 0.1 + 0.9 * 0.2 * 0.3}
    got = {"text": text.mean(), "image": shown.mean(), "both": (text & shown).mean()}
    assert got == pytest.approx(expected, abs=4 * 0.5 / count**0.5)  # four standard errors


# stock Diffusers has the same

STOCK = """
import json, sys
sys.modules["diffx"] = None  # an import of it fails
import diffusers, numpy, torch
from pathlib import Path
from PIL import Image
torch.set_num_threads(1)
for work in json.load(open("work.json")):
    folder = Path(work["folder"])
    told = json.loads((folder / "adapter.json").read_text())["load"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(work["base"])
    shown = [Image.open(file) for file in work["shown"]]
    if "class" in told:
        network = getattr(diffusers, told["class"]).from_pretrained(folder)
        pipe = getattr(diffusers, told["pipeline"]).from_pipe(pipe, controlnet=network)
        given = {"image": shown}
    else:
        words = {name: value.replace("{folder}", str(folder)) if value else value for name, value in told.items()}
        if "image_encoder_subfolder" in words:
            words["image_encoder_dtype"] = torch.float32
        pipe.load_ip_adapter(folder, **words)
        given = {"ip_adapter_image": shown[0]}
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**work["inputs"], **given, generator=torch.Generator().manual_seed(0), output_type="np").images
    numpy.save(work["name"] + ".npy", images)
assert not [name for name in sys.modules if name.startswith("diffx") and sys.modules[name]]
"""


class Stock:
    """A collection of adapters, and what stock Diffusers makes of them in one fresh process."""

    def __init__(self, root):
        self.root, self.work, self.expected = root, [], {}

    def add(self, name, made, build, **given):
        """An adapter that was trained; one picture, as its pipeline makes it here."""
        nets = made.nets
        folder, base = self.root / name, self.root / f"{name}-base"
        pipe, _ = made.result()
        untrained = build()
        untrained.save_pretrained(base)
        export(nets, nets.objective.inference(nets.family), folder)
        self.expected[name] = images(pipe, count=1, **given)
        assert not np.array_equal(self.expected[name], images(untrained, count=1)), "it must show in the picture"
        told = {**call_inputs(untrained, batch_size=1), "num_inference_steps": 3, "guidance_scale": 3.0}
        files = []
        for i, image in enumerate(given.get("image", []) or [given["ip_adapter_image"]]):
            files.append(str(self.root / f"{name}-{i}.png"))
            image.save(files[-1])
        self.work.append(dict(name=name, folder=str(folder), base=str(base), inputs=told, shown=files))

    def differences(self):
        (self.root / "work.json").write_text(json.dumps(self.work))
        done = subprocess.run([sys.executable, "-I", "-c", STOCK], cwd=self.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {name: float(np.abs(np.load(self.root / f"{name}.npy") - expected).max()) for name, expected in self.expected.items()}


def test_stock_diffusers_makes_the_same_pictures(tmp_path, encoders):
    stock = Stock(tmp_path)
    for name, build in CONTROLLED.items():
        made = training(build(), diffx.ControlNet(), Diffusion(ema_decay=0.5), lr=0.05)
        list(made.steps())
        stock.add(f"controlnet-{name}", made, build, image=hints(1))
    for name, (build, _) in IP_CASES.items():
        made = training(build(), ip_adapter(name, encoders), Diffusion(ema_decay=0.5), lr=0.05)
        list(made.steps())
        stock.add(name.replace(" ", "-"), made, build, ip_adapter_image=picture(0))
    assert stock.differences() == dict.fromkeys(stock.expected, 0.0)


def test_a_controlnet_comes_back_bit_for_bit(tmp_path, controlled):
    nets = controlled.nets
    loaded = ControlNetModel.from_pretrained(export(nets, nets.objective.inference(nets.family), tmp_path / "out"))
    trained = nets.modules["student"].state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    told = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert told["adapter"]["hint"]["name"] == "canny" and told["model"]["prediction_type"] == "epsilon"


# what stock Diffusers would read wrongly


@pytest.mark.parametrize(
    ("layout", "projection", "message"),
    [
        (UNetLayout, lambda: ImageProjection(10, 16, 8), "plain IP-Adapter with 8 tokens: stock Diffusers reads every one as 4 tokens"),
        (FluxLayout, lambda: ImageProjection(10, 16, 16), "plain IP-Adapter with 16 tokens: stock Diffusers reads every one as 4 tokens"),
        (FluxLayout, lambda: ImageProjection(1, 16384, 4), "with 4 tokens and 65536 rows: stock Diffusers reads so many rows as 16 tokens"),
        (UNetLayout, lambda: plus(depth=5), "with 5 layers: stock Diffusers reads 4, and drops the others or fails"),
        (UNetLayout, lambda: plus(depth=2), "with 2 layers: stock Diffusers reads 4"),
        (UNetLayout, lambda: plus(dim_head=32), "with heads 32 wide: stock Diffusers reads heads 64 wide, and computes something else"),
    ],
)
def test_silent_traps_are_refused(layout, projection, message):
    with pytest.raises(ValueError, match=message):
        projection_to_file(layout(None), projection())


def plus(**more):
    return IPAdapterPlusImageProjection(embed_dims=12, output_dims=16, hidden_dims=64, **(dict(heads=1, num_queries=3) | more))


def test_what_is_not_refused_is_read_as_it_was(tmp_path, encoders):
    assert projection_to_file(FluxLayout(None), ImageProjection(1, 4096, 16)).keys() == {
        "proj.weight",
        "proj.bias",
        "norm.weight",
        "norm.bias",
    }
    assert projection_to_file(UNetLayout(None), plus())["layers.3.0.to_kv.weight"].shape == (128, 64)
    with pytest.raises(ValueError, match="plain IP-Adapter with 5 tokens"):
        ip_adapter("SD plain", encoders, num_tokens=5).wrap(family_of(tiny_stable_diffusion()))


def test_a_file_that_stock_diffusers_reads_otherwise_is_refused(tmp_path, encoders):
    nets = training(tiny_stable_diffusion(), ip_adapter("SD plus", encoders)).nets
    file = export(nets, nets.objective.inference(nets.family), tmp_path / "out") / WEIGHTS
    tensors = load_file(file)
    one, two = "ip_adapter.1.to_k_ip.weight", "ip_adapter.3.to_k_ip.weight"
    tensors[one], tensors[two] = tensors[two][: len(tensors[one])].clone(), tensors[two]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"stock Diffusers reads to_k_ip\.0\.weight of IPAdapterAttnProcessor2_0 as something else"):
        check_reload(nets.family.layout, nets.modules["student"], file)


# bad input


@pytest.mark.parametrize(
    ("build", "adapter", "message"),
    [
        (tiny_flux, diffx.ControlNet(), "a ControlNet is trained for Stable Diffusion 1, 2 and XL, and this is a FluxPipeline"),
        (
            tiny_dit,
            diffx.IPAdapter(),
            "an IP-Adapter is trained for .* 1, 2, XL and 3 and for Flux, and this is a DiTPipeline",
        ),
        (tiny_flux, diffx.IPAdapter("plus"), "kind='plus': stock Diffusers loads only 'plain' into a FluxTransformer2DModel"),
        (tiny_sd3, diffx.IPAdapter("plain"), "kind='plain': stock Diffusers loads only 'plus' into a SD3Transformer2DModel"),
        (tiny_sdxl, diffx.IPAdapter(), "the StableDiffusionXLPipeline has no image encoder; give the folder or Hub id"),
    ],
)
def test_models_without_such_an_adapter_are_refused(build, adapter, message):
    with pytest.raises(ValueError, match=message):
        adapter.wrap(family_of(build()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffx.ControlNet("cany"), "unknown hint 'cany'; the nearest is 'canny'"),
        (lambda: diffx.IPAdapter("full"), "kind='full' is not one of plain, plus"),
        (lambda: diffx.IPAdapter(init="random"), "init='random' is not one of zero, text"),
        (lambda: diffx.IPAdapter("plus", width=100), "width=100 is of the resampler .* a multiple of 64"),
        (lambda: diffx.IPAdapter(width=64), "width=64 is of the resampler"),
        (lambda: diffx.IPAdapter(image_dropout=1.5), "image_dropout=1.5 must lie between 0 and 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_with_an_adapter_is_refused(encoders):
    pipe = tiny_stable_diffusion()
    training(pipe, ip_adapter("SD plain", encoders))
    for adapter in (diffx.ControlNet(), ip_adapter("SD plain", encoders)):
        with pytest.raises(ValueError, match=r"call pipe.unload_ip_adapter\(\) first"):
            adapter.wrap(family_of(pipe))


def test_the_pipelines_own_encoder_is_taken(encoders):
    pipe = tiny_stable_diffusion()
    pipe.register_modules(image_encoder=clip(hidden_size=20))
    family = diffx.IPAdapter("plus").wrap(family_of(pipe))
    assert family.encoder.network is pipe.image_encoder
    assert family.encode_shown([picture(0)])[REFERENCE].shape == (1, 1, 5, 20)  # one picture of 4 patches and the whole


def test_embeddings_are_those_of_the_pipeline(encoders):
    for name, (build, kind) in IP_CASES.items():
        made = training(build(), ip_adapter(name, encoders))
        pipe, _ = made.result()
        large = picture(0, 48).resize((50, 40), Image.Resampling.BICUBIC)
        found = made.nets.family.encode_shown([large])[REFERENCE]
        if name.startswith("SD3"):
            assert torch.equal(pipe.encode_image(large, "cpu"), found)
        elif name == "Flux":
            assert torch.equal(pipe.encode_image(large, "cpu", 1)[None], found)
        else:
            given, nothing = pipe.encode_image(large, "cpu", 1, kind == "plus")
            assert torch.equal(given[None], found) and torch.equal(nothing[None], made.nets.null[REFERENCE])


def test_saved_pipelines_have_the_encoder(tmp_path, encoders):
    nets = training(tiny_stable_diffusion(), ip_adapter("SD plain", encoders)).nets
    folder = export(nets, nets.objective.inference(nets.family), tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.json", "call_kwargs.json", "image_encoder", WEIGHTS]
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.load_ip_adapter(folder, subfolder="", weight_name=WEIGHTS)
    assert pipe.image_encoder.config.projection_dim == 10 and IMAGE_SIZE == pipe.image_encoder.config.image_size
