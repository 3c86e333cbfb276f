"""Attention kernels through one switch: what they reach and stock Diffusers does not, how they are chosen, and that nothing is left."""

import copy
import json
import warnings
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from adapter_parts import ip_adapter, save_encoders
from adapter_parts import picture as picture_of
from adapter_parts import training as adapter_training
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from test_attach import picture
from test_guidance import inputs_of, with_ip_adapter
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

import diffx
from diffx.acceleration import choose_attention, kernels, set_attention
from diffx.acceleration.routing import Route
from diffx.cli import app
from diffx.conditioning.attach import Control, Reference, attach
from diffx.families import family_of
from diffx.guidance import CFG
from diffx.objectives import Diffusion
from diffx.testing import (
    end_of,
    tiny_controlnet,
    tiny_flux,
    tiny_sd3,
    tiny_sd35,
    tiny_sdxl,
    tiny_stable_diffusion,
)  # fmt: skip
from diffx.testing.parts import IMAGE_SIZE, WIDTH, weights_from
from diffx.training.api import split


class Counted(TorchFunctionMode):
    """Calls of PyTorch's attention inside."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """Calls that reach Diffusers' dispatcher, by kernel; the kernels are its own."""
    counts = Counter()

    def counted(kernel, function):
        def call(**kwargs):
            counts[kernel.value] += 1
            return function(**kwargs)

        return call

    for kernel, function in list(_AttentionBackendRegistry._backends.items()):
        monkeypatch.setitem(_AttentionBackendRegistry._backends, kernel, counted(kernel, function))
    return counts


def added_kv():
    """A UNet whose text joins the keys of self-attention, as Kandinsky and IF have it."""
    with weights_from(0):
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=WIDTH, attention_head_dim=8,
        ).eval()  # fmt: skip


def masked_ip_adapter():
    """With a mask over half of the picture."""
    pipe = with_ip_adapter()
    left = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    left[..., : IMAGE_SIZE // 2] = 1
    return pipe, {"cross_attention_kwargs": {"ip_adapter_masks": [left]}}


PIPELINES = {
    "SD": tiny_stable_diffusion, "SDXL": tiny_sdxl, "ControlNet": tiny_controlnet, "IP-Adapter": with_ip_adapter,
    "IP-Adapter, masked": masked_ip_adapter, "SD3": tiny_sd3, "SD3.5": tiny_sd35,
}  # fmt: skip


def network_calls(pipe, **more):
    """[(network, args, kwargs)] of the first call of each network in a run."""
    found = {}
    handles = []
    for name in ("unet", "transformer", "controlnet"):
        if (network := pipe.components.get(name)) is not None:

            def note(module, args, kwargs):
                found.setdefault(module, (args, kwargs))

            handles.append(network.register_forward_pre_hook(note, with_kwargs=True))
    run(pipe, steps=1, **more)
    for handle in handles:
        handle.remove()
    assert found
    return [(network, *told) for network, told in found.items()]


def run(pipe, steps=2, **more):
    told = inputs_of(pipe) | more
    if "controlnet" in pipe.components:
        told["image"] = torch.stack([picture(1), picture(2)])
    return end_of(pipe, **told, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(calls):
    found = []
    for network, args, kwargs in calls:
        made = network(*args, **{**kwargs, "return_dict": False})
        found += [tensor for part in made for tensor in (part if isinstance(part, list | tuple) else [part])]
    return found


def off(found, goal):
    """The largest difference, in lengths of what it should be."""
    return max(float((one - two).norm() / two.norm()) for one, two in zip(found, goal, strict=True))


def state_of(model):
    """All that a kernel may leave behind in a model: classes, attributes and hooks of its modules, and its processors."""
    things = {"": model, **dict(model.named_modules()), **model.attn_processors}
    return {name: (thing, type(thing), {key: seen(value) for key, value in vars(thing).items()}) for name, thing in things.items()}


def seen(value):
    return {key: id(each) for key, each in value.items()} if isinstance(value, dict) else id(value)


def assert_same_state(model, before):
    after = state_of(model)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name][0] is not before[name][0] or after[name][1:] != before[name][1:]] == []


@pytest.fixture(autouse=True)
def the_choice_for_all_models_is_left_alone():
    before = _AttentionBackendRegistry._active_backend
    yield
    assert _AttentionBackendRegistry._active_backend is before


# what is reached


@pytest.mark.parametrize("name", PIPELINES)
def test_every_call_reaches_the_kernel_and_stock_diffusers_reaches_none(name, dispatched):
    made = PIPELINES[name]()
    pipe, more = made if isinstance(made, tuple) else (made, {})
    calls = network_calls(pipe, **more)
    before = {network: state_of(network) for network, _, _ in calls}
    dispatched.clear()
    with Counted() as counted:
        goal = outputs(calls)
    assert counted.calls > 0 and not dispatched, "the control row: stock Diffusers"
    with set_attention(pipe, "native"):
        assert off(outputs(calls), goal) == 0
    assert dispatched == {"native": counted.calls}
    dispatched.clear()
    with set_attention(pipe, "_native_math"):
        dispatched.clear()  # of the trial
        assert off(outputs(calls), goal) < 1e-6  # float32 sums in another order, 6e-8 each, through a few layers
    assert dispatched == {"_native_math": counted.calls}
    assert off(outputs(calls), goal) == 0
    for network, state in before.items():
        assert_same_state(network, state)


def test_flux_is_reached_too_and_its_own_choice_is_not_changed(dispatched):
    pipe = tiny_flux()
    calls = network_calls(pipe)
    dispatched.clear()
    goal = outputs(calls)
    number = dispatched["native"]
    with set_attention(pipe, "_native_math"):
        dispatched.clear()
        assert off(outputs(calls), goal) < 1e-6  # as above
    assert dispatched == {"_native_math": number}
    assert {processor._attention_backend for processor in pipe.transformer.attn_processors.values()} == {None}


def test_ip_adapters_of_sd3_are_reached(tmp_path, dispatched):
    pipe = tiny_sd3()
    ((network, args, kwargs),) = network_calls(pipe)
    ip_adapter("SD3", save_encoders(tmp_path)).wrap(family_of(pipe))
    assert SD3IPAdapterJointAttnProcessor2_0 in map(type, network.attn_processors.values())
    embeddings = torch.randn(len(kwargs["hidden_states"]), 5, 12, generator=torch.Generator().manual_seed(1))
    calls = [(network, args, {**kwargs, "joint_attention_kwargs": {"ip_adapter_image_embeds": embeddings}})]
    with Counted() as counted:
        goal = outputs(calls)
    with set_attention(network, "native"):
        assert off(outputs(calls), goal) == 0
    assert dispatched == {"native": counted.calls}
    assert counted.calls == 2  # of the one block, to itself and text, and to the picture


def test_added_keys_and_vaes_are_reached(dispatched):
    unet, vae = added_kv(), tiny_stable_diffusion().vae
    calls = [(unet, (torch.randn(2, 4, 8, 8), 5, torch.randn(2, 3, WIDTH)), {}), (vae, (torch.randn(1, 3, 16, 16),), {})]
    with Counted() as counted:
        goal = outputs(calls)
    with set_attention({"unet": unet, "vae": vae}, "native") as said:
        assert off(outputs(calls), goal) == 0
    assert dispatched == {"native": counted.calls}
    assert [choice.model for choice in said.choices] == ["unet", "vae"]


def test_flex_runs_here():
    pipe = tiny_stable_diffusion()
    calls = network_calls(pipe)
    goal = outputs(calls)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*flex_attention called without torch.compile")
        with set_attention(pipe.unet, "flex"):
            assert 0 < off(outputs(calls), goal) < 1e-6  # as above


def test_masked_calls_are_native_where_the_kernel_takes_no_mask(dispatched):
    unet = tiny_stable_diffusion().unet.to(torch.bfloat16)
    x, text = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16), torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)
    masked = [(unet, (x, 5, text), {"encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})]
    goal = outputs(masked)
    with set_attention(unet, "_native_flash") as said:
        (choice,) = said.choices
        assert (choice.kernel, choice.masked) == ("_native_flash", "native")
        assert "with a mask native" in str(said)
        dispatched.clear()
        assert off(outputs(masked), goal) < 2**-6  # bfloat16 rounds at 2^-9, through a few layers
    assert dispatched == {"_native_flash": choice.attentions // 2, "native": choice.attentions // 2}  # to itself, and to text


def test_a_mask_of_queries_and_keys_is_not_taken_for_one_of_samples():
    route = Route("_native_math", head_dim=4, dtype=torch.float32, device_type="cpu", takes_masks=True)
    query, key, value = (torch.randn(2, 3, tokens, 4) for tokens in (2, 5, 5))  # two samples, and two queries
    for shape in [(2, 5), (3, 2, 5), (2, 1, 2, 5)]:
        mask = torch.rand(shape) > 0.5
        mask[..., 0] = True
        goal = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert off([route.scaled_dot_product_attention(query, key, value, attn_mask=mask)], [goal]) < 1e-6  # float32, in another order


# one model, and no other


def test_each_model_has_its_own_even_where_two_share_a_processor(dispatched):
    pipe = tiny_controlnet()
    shared = AttnProcessor2_0()
    pipe.unet.set_attn_processor(shared)
    pipe.controlnet.set_attn_processor(shared)
    calls = {type(call[0]).__name__: [call] for call in network_calls(pipe)}
    one, two = set_attention(pipe.unet, "_native_math"), set_attention(pipe.controlnet, "native")
    for name, kernel in (("UNet2DConditionModel", "_native_math"), ("ControlNetModel", "native")):
        dispatched.clear()
        outputs(calls[name])
        assert list(dispatched) == [kernel]
    one.undo()
    dispatched.clear()
    outputs(calls["UNet2DConditionModel"])
    assert not dispatched
    outputs(calls["ControlNetModel"])
    assert list(dispatched) == ["native"]
    two.undo()
    assert {*pipe.unet.attn_processors.values(), *pipe.controlnet.attn_processors.values()} == {shared}


def test_diffusers_choice_for_all_models_neither_reaches_a_unet_nor_is_used(dispatched):
    pipe = tiny_stable_diffusion()
    calls = network_calls(pipe)
    with attention_dispatch.attention_backend("_native_math"):
        dispatched.clear()
        outputs(calls)
        assert not dispatched
        with set_attention(pipe, "native"):
            outputs(calls)
        assert list(dispatched) == ["native"]
        assert _AttentionBackendRegistry._active_backend == AttentionBackendName._NATIVE_MATH


def test_a_deep_copy_keeps_its_kernel_and_outlives_the_original(dispatched):
    pipe = with_ip_adapter()
    calls = network_calls(pipe)
    with set_attention(pipe.unet, "_native_math"):
        twin = copy.deepcopy(pipe.unet)
        goal = outputs(calls)
    assert twin.state_dict().keys() == pipe.unet.state_dict().keys()
    dispatched.clear()
    assert off(outputs([(twin, *calls[0][1:])]), goal) == 0
    assert list(dispatched) == ["_native_math"]


# undoing


def test_the_later_one_is_undone_first(dispatched):
    pipe = tiny_stable_diffusion()
    calls, before = network_calls(pipe), state_of(pipe.unet)
    one = set_attention(pipe.unet, "_native_math")
    two = set_attention(pipe.unet, "native")
    late = AttnProcessor2_0()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(late)
    with pytest.raises(ValueError, match="undo the later one first"):
        one.undo()
    dispatched.clear()
    outputs(calls)
    assert list(dispatched) == ["native"]
    two.undo()
    dispatched.clear()
    outputs(calls)
    assert list(dispatched) == ["_native_math"]
    one.undo()
    one.undo()
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor is late
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(
        before["mid_block.attentions.0.transformer_blocks.0.attn1.processor"][0]
    )
    assert_same_state(pipe.unet, before)


def test_an_ip_adapter_that_comes_and_goes_later_is_reached_and_left_alone(tmp_path, dispatched):
    pipe, stock = tiny_stable_diffusion(), with_ip_adapter()
    goal = outputs(network_calls(stock))
    kernel = set_attention(pipe, "native")
    stock.unet.save_pretrained(tmp_path / "before")
    with_ip_adapter(pipe)
    weights = {name: id(weight) for name, weight in pipe.unet.named_parameters()}
    calls = network_calls(pipe)
    dispatched.clear()
    with Counted() as counted:
        assert off(outputs(calls), goal) == 0
    assert dispatched == {"native": counted.calls}
    pipe.unet.save_pretrained(tmp_path / "after")
    files = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes(), "what is saved is what stock Diffusers saves"
    kernel.undo()
    assert {name: id(weight) for name, weight in pipe.unet.named_parameters()} == weights
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}
    with set_attention(pipe, "native"):
        pipe.unload_ip_adapter()
        pipe.unet.fuse_qkv_projections()
    pipe.unet.unfuse_qkv_projections()  # puts back what it was given while the kernel acted
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
    dispatched.clear()
    run(pipe)
    assert not dispatched


def test_diffusers_own_switches_work_meanwhile():
    pipe = with_ip_adapter()
    with set_attention(pipe, "native"):
        kinds = {each.__class__ for each in pipe.unet.attn_processors.values()}
        assert kinds == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}
        pipe.set_ip_adapter_scale(0.25)
        pipe.unload_ip_adapter()
        pipe.unet.set_default_attn_processor()
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor}
    stock = with_ip_adapter()
    with set_attention(stock, "native"):
        stock.set_ip_adapter_scale(0.25)
    assert {tuple(each.scale) for each in stock.unet.attn_processors.values() if isinstance(each, IPAdapterAttnProcessor2_0)} == {(0.25,)}


@pytest.mark.parametrize("order", ["inside", "outside", "crossed"])
def test_guidance_and_conditions_at_the_same_time(order, dispatched):
    pipe, net = with_ip_adapter(), tiny_controlnet().controlnet
    conditions = Control(net, picture(1), weight=0.7), Reference(weight=0.5)
    before = state_of(pipe.unet)
    scale = {"guidance_scale": 3.0}
    with attach(pipe, *conditions), diffx.guide(pipe, CFG(3.0)):
        goal = run(pipe, **scale)
    both = {"pipe": pipe.unet, "net": net}
    if order == "crossed":
        attached, kernel = attach(pipe, *conditions).attach(), set_attention(both, "native")
        guided = diffx.guide(pipe, CFG(3.0)).attach()
        found = run(pipe, **scale)
        kernel.undo()
        assert torch.equal(run(pipe, **scale), goal)
        guided.detach()
        attached.detach()
    elif order == "inside":
        with attach(pipe, *conditions), diffx.guide(pipe, CFG(3.0)), set_attention(both, "native"):
            found = run(pipe, **scale)
    else:
        with set_attention(both, "native"), attach(pipe, *conditions), diffx.guide(pipe, CFG(3.0)):
            found = run(pipe, **scale)
    assert torch.equal(found, goal)
    assert dispatched["native"] > 0
    assert_same_state(pipe.unet, before)


# the choice

GPUS = {"A100": (8, 0), "H100": (9, 0), "RTX 4090": (8, 9), "B200": (10, 0), "RTX 50": (12, 0), "T4": (7, 5)}
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of some capability, and packages, that are only said to be there."""

    def pretend(capability, *packages):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for package in ("FLASH_ATTN", "FLASH_ATTN_3", "XFORMERS_ATTN", "SAGE_ATTN"):
            monkeypatch.setattr(attention_dispatch, f"_CAN_USE_{package}", package in packages)

    return pretend


def documented():
    """{device: names} of the table in the module's docstring."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in kernels.__doc__.splitlines() if line.startswith("| ")]
    return {device: tuple(filter(None, tried.split(", "))) for devices, _, tried in rows[2:] for device in devices.split(", ")}


@pytest.mark.parametrize("name", GPUS)
def test_auto_tries_what_the_documentation_says(name, gpu):
    everything = ("FLASH_ATTN", "FLASH_ATTN_3", "XFORMERS_ATTN", "SAGE_ATTN")
    gpu(GPUS[name], *everything)
    tried = kernels.candidates(CUDA)
    assert tried == documented()[name]
    kind = kernels.Kind(CUDA, torch.bfloat16, 8, 64)
    assert [kernels.requirement(each, kind) for each in tried] == [None] * len(tried), "with everything installed the first is taken"
    gpu(GPUS[name])
    installed = [each for each in tried if kernels.requirement(each, kind) is None]
    assert installed == [each for each in tried if each == "_native_cudnn"], "with nothing installed only what PyTorch brings is left"
    gpu(GPUS[name], *everything)
    wrong = kernels.Kind(CUDA, torch.float32, 8, 64)
    assert [each for each in tried if kernels.requirement(each, wrong) is None] == ["xformers"], "in float32"


@pytest.mark.parametrize("name", ["CPU", "MPS", "XPU"])
def test_auto_is_native_elsewhere(name):
    assert kernels.candidates(torch.device(name.lower())) == documented()[name] == ()


def test_the_readme_has_the_same_table():
    names = {"flash-attn-3": "_flash_3", "cuDNN": "_native_cudnn", "flash-attn": "flash", "xFormers": "xformers"}
    text = (Path(__file__).parent.parent / "README.md").read_text().split('| device | "auto" tries')[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    said = {
        device: tuple(names[name] for name in tried.split(", ") if name in names)
        for devices, tried in rows
        for device in devices.split(", ")
    }
    assert said == {device: tried for device, tried in documented().items() if device != "older"}


def test_auto_on_the_cpu_is_native_in_silence():
    pipe = tiny_stable_diffusion()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = set_attention(pipe)
    assert {(choice.model, choice.kernel, choice.masked) for choice in said.choices} == {
        ("unet", "native", "native"), ("vae", "native", "native"),
    }  # fmt: skip
    assert "no other one is tried on cpu" in str(said)


def test_a_kernel_that_fails_its_trial_falls_back_with_one_message(gpu):
    """Nothing is CUDA here, so the trial fails as on a machine whose driver is broken."""
    gpu((9, 0), "XFORMERS_ATTN")
    pipe = tiny_stable_diffusion().to(torch.float16)
    with pytest.warns(UserWarning) as caught:
        said = set_attention(pipe, device="cuda")
    (message,) = [str(warning.message) for warning in caught if "attention kernels" in str(warning.message)]
    assert "_native_cudnn (" in message and "xformers (" in message and "Torch not compiled with CUDA" in message
    assert message.count("xformers") == 1 and "unet" in message and "vae" in message
    assert {choice.kernel for choice in said.choices} == {"native"}
    assert "flash-attn" in said.choices[0].refused["flash"], "and what is not installed is said where it is printed"
    assert "flash" not in message.replace("_flash", "")


def test_a_kernel_with_other_numbers_fails_its_trial(monkeypatch):
    math = AttentionBackendName._NATIVE_MATH
    own = _AttentionBackendRegistry._backends[math]
    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, lambda **kwargs: own(**kwargs) * 1.01)
    with pytest.raises(ValueError, match=r"differs from PyTorch's own by 0.01 of its length; 0.0039 is allowed"):
        set_attention(tiny_stable_diffusion(), "_native_math")
    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, lambda **kwargs: own(**kwargs) * torch.nan)
    with pytest.raises(ValueError, match="differs from PyTorch's own by nan"):
        set_attention(tiny_stable_diffusion(), "_native_math")

    def wrong_in_gradients(**kwargs):
        made = own(**kwargs)
        return made + (0 * made).sqrt()  # the same numbers, whose derivative is none

    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, wrong_in_gradients)
    unet = tiny_stable_diffusion().unet
    assert choose_attention(unet, "_native_math")[0].kernel == "_native_math"
    with pytest.raises(ValueError, match="differs from PyTorch's own by nan"):
        choose_attention(unet, "_native_math", training=True)


def test_hub_kernels_are_checked_without_the_network(gpu, monkeypatch):
    gpu((9, 0))
    unet = tiny_stable_diffusion().unet.to(torch.bfloat16)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: False)
    with pytest.raises(ValueError, match="the `kernels` package isn't available"):
        choose_attention(unet, "flash_hub", device="cuda")
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "is_kernels_version", lambda operation, version: True)
    for name in ("flash_hub", "_flash_3_hub", "flash_4_hub", "sage_hub"):
        (choice,) = choose_attention(unet, name, device="cuda")
        assert choice.kernel == name and "not tried" in choice.why
        assert attention_dispatch._HUB_KERNELS_REGISTRY[AttentionBackendName(name)].kernel_fn is None
    with pytest.raises(ValueError, match=r"cannot run here .it runs on CUDA devices, and this is cpu."):
        set_attention(unet, "flash_hub")
    assert not any(kernels.is_from_hub(name) for names in documented().values() for name in names)


def test_what_cannot_be_is_refused(dispatched):
    pipe = tiny_stable_diffusion()
    with pytest.raises(ValueError, match=r"attention kernel 'xformer' is not one of auto, .*; did you mean 'xformers'"):
        set_attention(pipe, "xformer")
    with pytest.raises(ValueError, match=r"'_native_efficient' cannot run.*No viable.*here _native_math, flex, native can"):
        set_attention(pipe, "_native_efficient")
    with pytest.raises(ValueError, match="str is no model"):
        set_attention("emoji")
    with pytest.raises(ValueError, match=r"has no attention .*there is none"):
        set_attention(pipe.vae.encoder.conv_in)
    pipe.unet.set_attention_slice(1)
    with pytest.raises(ValueError, match=r"all are calculated by SlicedAttnProcessor.*set_attn_processor\(AttnProcessor2_0"):
        set_attention(pipe.unet)
    with pytest.warns(UserWarning, match=r"_native_math \(SlicedAttnProcessor calculates attention itself\) for unet"):
        said = set_attention(pipe, "_native_math")
    assert "as they are: 8 with SlicedAttnProcessor" in str(said)
    calls = network_calls(pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())  # and from now on they take it
    dispatched.clear()
    outputs(calls)
    assert list(dispatched) == ["_native_math"]


def test_a_model_that_moves_on_is_native_and_says_so_once(dispatched):
    unet = tiny_stable_diffusion().unet
    set_attention(unet, "_native_math")
    unet.double()
    call = [(unet, (torch.randn(1, 4, 8, 8).double(), 5, torch.randn(1, 3, WIDTH).double()), {})]
    dispatched.clear()
    with pytest.warns(UserWarning, match=r"was chosen for torch.float32 on cpu and is called with torch.float64") as caught:
        outputs(call)
    assert len(caught) == 1
    assert list(dispatched) == ["native"]


# training and the command line


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_uses_the_same_switch(precision, dispatched, tmp_path):
    folder = save_encoders(tmp_path) / "clip"
    trained = {}
    for name in (None, "native", "_native_math"):
        dispatched.clear()
        AcceleratorState._reset_state()
        adapter = diffx.IPAdapter("plain", image_encoder=folder)
        made = adapter_training(tiny_stable_diffusion(), adapter, attention=name, mixed_precision=precision, gradient_checkpointing=True)
        trained[name] = [*made.steps()], {key: weight.detach().clone() for key, weight in made.nets.parameters("student").items()}
        called = 2 * made.config.train_steps * len(made.nets.family.layout.network.attn_processors)  # and again for the gradients
        assert dispatched[name] >= (called if name else 0)
        assert sum(dispatched.values()) == 0 or name
    AcceleratorState._reset_state()
    goal = trained[None][1]
    assert all(torch.equal(weight, goal[key]) for key, weight in trained["native"][1].items())
    moved = [float((weight - goal[key]).abs().max()) for key, weight in trained["_native_math"][1].items()]
    assert 0 < max(moved) <= 4 * 0.02  # Adam takes steps of lr in the direction of a gradient, which rounding may turn where it is 0


def test_a_trained_model_comes_back_with_its_own_processors(tmp_path, dispatched):
    pipe = tiny_stable_diffusion()
    data = [{"image": picture_of(i), "text": "a"} for i in range(2)]
    options = dict(train_steps=1, batch_size=2, resolution=IMAGE_SIZE, device="cpu", progress=False, output=tmp_path / "run")
    trained = diffx.train(pipe, Diffusion(ema_decay=0.0), data, attention="_native_math", **options)
    assert dispatched["_native_math"] > 0
    dispatched.clear()
    run(trained.pipeline)
    assert not dispatched
    with pytest.raises(ValueError, match="attention: '_native_math' there, None now"):
        diffx.train(tiny_stable_diffusion(), Diffusion(ema_decay=0.0), data, **options)


def test_a_training_refuses_kernels_that_it_cannot_use():
    with pytest.raises(ValueError, match=r"attention kernel 'flesh' is not one of .* did you mean 'flash'"):
        split({"attention": "flesh"})
    with pytest.raises(ValueError, match=r"'flex' cannot run here .NotImplementedError: FlexAttention does not support backward on CPU"):
        choose_attention(tiny_stable_diffusion().unet, "flex", training=True)


def test_the_command_says_what_would_be_used():
    def said(*words):
        return CliRunner().invoke(app, ["attention", *words], prog_name="diffx")

    (of_unet,) = json.loads(said("--json", "--kernel", "_native_math").stdout)
    assert (of_unet["model"], of_unet["kernel"], of_unet["attentions"]) == ("unet", "_native_math", 8)
    assert "unet, 8 attentions 4 wide, float32 on cpu: native (no other one is tried on cpu)" in said("--device", "cpu").stdout
    assert said("--kernel", "sage").exit_code == 2 and "runs on CUDA devices" in said("--kernel", "sage").stderr


@pytest.mark.slow  # half a minute: the network is traced
@pytest.mark.parametrize("make", [with_ip_adapter, tiny_sd3, tiny_flux])
def test_compiled_networks_are_one_graph_and_reach_the_kernel(make):
    pipe = make()
    ((network, args, kwargs),) = network_calls(pipe)
    with set_attention(network, "_native_math"):
        goal = outputs([(network, args, kwargs)])
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert off(outputs([(compiled, args, kwargs)]), goal) < 1e-6  # as above
    torch._dynamo.reset()
