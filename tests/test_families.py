"""Each family calls its network as the stock pipeline does: the same inputs, the same bits out."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FluxPipeline, FluxTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from diffx.families import batched, family_of, joined
from diffx.testing import (
    IMAGE_SIZE,
    call_inputs,
    tiny_dit,
    tiny_flux,
    tiny_latent_consistency,
    tiny_pixart,
    tiny_sd3,
    tiny_sd35,
    tiny_sdxl,
    tiny_stable_diffusion,
)
from diffx.testing.parts import weights_from

SIZE = (IMAGE_SIZE, IMAGE_SIZE)


def tiny_unet2d() -> DDPMPipeline:
    with weights_from(0):
        unet = UNet2DModel(
            sample_size=IMAGE_SIZE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
    return DDPMPipeline(unet, DDIMScheduler())


def tiny_v_prediction():
    pipe = tiny_stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def tiny_sdxl_empty_prompt():
    pipe = tiny_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    return pipe


def tiny_flux_dev():
    pipe = tiny_flux()
    with weights_from(0):
        pipe.transformer = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=True).eval()
    return pipe


def tiny_told(build):
    """A pipeline whose network is told the guidance scale, its new weights random, as after training."""
    pipe = build()
    pipe.unet = family_of(pipe).with_guidance_embedding(pipe.unet)
    with weights_from(0):
        nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight)
    return pipe


@dataclass(frozen=True)
class Case:
    """A pipeline, and how a call with guidance reaches its network."""

    name: str
    build: Callable[[], Any]
    # of the network's calls: one per step with both halves in that order, two per step, or the scale told
    guided: str

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("UNet2D", tiny_unet2d, "never"),
    Case("SD", tiny_stable_diffusion, "null, condition"),
    Case("SD v", tiny_v_prediction, "null, condition"),
    Case("LCM", tiny_latent_consistency, "told"),
    Case("SD told", lambda: tiny_told(tiny_stable_diffusion), "told"),
    Case("SDXL", tiny_sdxl, "null, condition"),
    Case("SDXL without zeros", tiny_sdxl_empty_prompt, "null, condition"),
    Case("SDXL told", lambda: tiny_told(tiny_sdxl), "told"),
    Case("DiT", tiny_dit, "condition, null"),
    Case("SD3", tiny_sd3, "null, condition"),
    Case("SD3.5", tiny_sd35, "null, condition"),
    Case("Flux schnell", tiny_flux, "two calls"),
    Case("Flux dev", tiny_flux_dev, "told"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def recorded(network, call: Callable[[], Any]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Inputs by name, and the output, of every call of the network inside ``call``."""
    signature, calls = inspect.signature(type(network).forward), []

    def keep(module, args, kwargs, output):
        given = signature.bind(module, *args, **kwargs).arguments
        given |= given.pop("added_cond_kwargs", None) or {}
        calls.append(({name: value for name, value in given.items() if isinstance(value, Tensor)}, output[0]))

    handle = network.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        call()
    handle.remove()
    return calls


def told(pipe, num: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the pipeline is asked for ``num`` pictures, and what training would have of them."""
    inputs = call_inputs(pipe, batch_size=num)
    inputs.pop("max_sequence_length", None)  # training embeds prompts at the pipeline's own length
    labels = torch.tensor(inputs["class_labels"]) if "class_labels" in inputs else None
    return inputs, dict(texts=inputs.get("prompt"), labels=labels, size=SIZE)


@each_case
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_call_is_the_pipelines_own(case, guidance_scale):
    pipe = case.build()
    family = family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    # Encoders give other last bits in a batch of two than for one prompt, and the null condition is encoded once.
    num = 1 if guidance_scale > 1 and case.guided != "told" else 2
    inputs, asked = told(pipe, num)
    call = family.call_kwargs(2, guidance_scale) | dict(generator=torch.Generator().manual_seed(0), output_type="np")
    theirs = recorded(family.base, lambda: pipe(**inputs, **call))
    condition = family.encode_condition(**asked)
    scale, layouts = None, [condition]
    if guidance_scale > 1 and case.guided != "never":
        if case.guided == "told":
            scale = torch.full((num,), guidance_scale)
        else:
            null = condition | batched(family.null_condition(size=SIZE), num)
            halves = {"null, condition": [joined(null, condition)], "condition, null": [joined(condition, null)]}
            layouts = halves.get(case.guided, [condition, null])
    assert len(theirs) == 2 * len(layouts)
    for k, (expected, expected_out) in enumerate(theirs):
        x = expected.get("sample", expected.get("hidden_states"))
        if isinstance(pipe, FluxPipeline):
            x = pipe._unpack_latents(x, *SIZE, pipe.vae_scale_factor)
        t = pipe.scheduler.timesteps[k // len(layouts)].expand(len(x)).float()
        layout = layouts[k % len(layouts)]
        ((found, found_out),) = recorded(family.base, functools.partial(family.forward, family.base, x, t, layout, scale))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            # Some pipelines give one time for all samples, and it may be a whole number.
            assert torch.equal(value, expected[name].expand_as(value).to(value.dtype)), name
        assert torch.equal(found_out, expected_out)


@each_case
def test_output_has_the_shape_of_the_sample(case):
    pipe = case.build()
    family = family_of(pipe)
    x = torch.zeros(2, *family.sample_shape(SIZE))
    _, asked = told(pipe, 2)
    with torch.no_grad():
        out = family.forward(family.base, x, torch.tensor([10.0, 900.0]), family.encode_condition(**asked))
    assert out.shape == x.shape and not torch.equal(out[0], out[1])


DIT_NULL = 1000  # what DiTPipeline tells, whatever the network's config says


def test_class_families_know_their_numbers():
    dit = family_of(tiny_dit())
    assert dit.num_classes == DIT_NULL and dit.null_condition(size=SIZE)["class_labels"].tolist() == [DIT_NULL]
    assert family_of(tiny_unet2d()).num_classes is None


def test_sizes_and_crops_are_told_in_the_pipelines_order():
    pipe = tiny_sdxl()
    inputs, _ = told(pipe)
    own = dict(original_size=(40, 30), crops_coords_top_left=(5, 7), target_size=SIZE)
    ((expected, _),) = recorded(pipe.unet, lambda: pipe(**inputs, **own, num_inference_steps=1, guidance_scale=1.0, output_type="latent"))
    assert torch.equal(family_of(pipe).size_condition(SIZE, (40, 30), (5, 7))["time_ids"], expected["time_ids"])
    assert family_of(tiny_sd3()).size_condition(SIZE) == {}


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_sdxl])
def test_a_guidance_embedding_changes_nothing_before_training(build):
    pipe = build()
    family = family_of(pipe)
    made = family.with_guidance_embedding(pipe.unet)
    assert made.config.time_cond_proj_dim == 256 and pipe.unet.config.time_cond_proj_dim is None
    assert family.with_guidance_embedding(made) is made
    assert not any(weight.requires_grad for weight in made.parameters())
    assert made.conv_in.weight.data_ptr() == pipe.unet.conv_in.weight.data_ptr()  # no second copy in memory
    condition = family.encode_condition(["a"], None, size=SIZE)
    x, t = torch.randn(1, *family.sample_shape(SIZE), generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    with torch.no_grad():
        expected = family.forward(pipe.unet, x, t, condition)
        assert torch.equal(family.forward(made, x, t, condition, torch.tensor([7.0])), expected)
        nn.init.normal_(made.time_embedding.cond_proj.weight)
        assert not torch.equal(family.forward(made, x, t, condition, torch.tensor([7.0])), expected)
        # A network that is told a scale is told 1, off, where none is given: what a pipeline tells it at guidance_scale=1.
        assert torch.equal(family.forward(made, x, t, condition), family.forward(made, x, t, condition, torch.ones(1)))


@pytest.mark.parametrize("build", [tiny_unet2d, tiny_dit, tiny_sd3, tiny_flux])
def test_networks_without_a_guidance_embedding_say_so(build):
    family = family_of(build())
    assert not family.takes_guidance
    with pytest.raises(ValueError, match=rf"{type(family.base).__name__} cannot be told a guidance scale; distil one fixed scale"):
        family.with_guidance_embedding(family.base)


def test_flux_with_a_guidance_embedding_is_ready():
    family = family_of(tiny_flux_dev())
    assert family.takes_guidance and family.with_guidance_embedding(family.base) is family.base


# pictures


PICTURES = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


NORMED: dict[str, Any] = dict(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tiny_stable_diffusion, {}),
        (tiny_sdxl, {}),
        (tiny_sdxl, NORMED),
        (tiny_sd3, {"shift_factor": 0.3}),
        (tiny_flux, {"shift_factor": 0.3}),
    ],
)
def test_the_pipeline_decodes_what_was_encoded(build, config):
    pipe = build()
    pipe.vae.register_to_config(scaling_factor=0.4, **config)
    family = family_of(pipe)
    latents = family.encode_images(PICTURES)
    assert latents.shape[1:] == family.sample_shape(SIZE)
    if isinstance(pipe, FluxPipeline):
        latents = pipe._pack_latents(latents, *latents.shape)
    inputs, _ = told(pipe, 2)

    def end(pipe, step, t, tensors):
        return {"latents": latents}

    decoded = pipe(**inputs, num_inference_steps=1, callback_on_step_end=end, output_type="pt").images
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(PICTURES).latent_dist.mean).sample
    # Scaling and shifting there and back rounds twice in float32.
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_dit_latents_have_the_vaes_scale():
    family = family_of(tiny_dit())
    with torch.no_grad():
        mean = family.pipe.vae.encode(PICTURES).latent_dist.mean
    assert torch.equal(family.encode_images(PICTURES), mean * family.pipe.vae.config.scaling_factor)


def test_a_half_precision_vae_encodes_in_float32_and_comes_back():
    pipe, full = tiny_sdxl(), tiny_sdxl()
    pipe.vae.to(torch.float16)
    full.vae.load_state_dict(pipe.vae.state_dict())
    assert pipe.vae.config.force_upcast
    assert torch.equal(family_of(pipe).encode_images(PICTURES), family_of(full).encode_images(PICTURES))
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("build", "good", "bad", "message"),
    [
        (tiny_stable_diffusion, (16, 18), (16, 17), r"size=\(16, 17\): StableDiffusionPipeline .* multiples of 2"),
        (tiny_sd3, (16, 20), (16, 18), r"size=\(16, 18\): StableDiffusion3Pipeline .* multiples of 4"),
        (tiny_flux, (16, 20), (16, 18), r"size=\(16, 18\): FluxPipeline .* multiples of 4"),
        (tiny_dit, (16, 16), (16, 32), r"size=\(16, 32\): this DiTPipeline makes pictures of \(16, 16\) only"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, good, bad, message):
    family = family_of(build())
    assert family.sample_shape(good)
    with pytest.raises(ValueError, match=message):
        family.sample_shape(bad)


# adapters, and what is unknown


@pytest.mark.parametrize("build", [tiny_unet2d, tiny_stable_diffusion, tiny_sdxl, tiny_dit, tiny_sd35, tiny_flux])
def test_every_lora_target_is_there(build):
    family = family_of(build())
    names = [name for name, module in family.base.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for end in family.lora_targets:
        assert any(name.endswith(f".{end}") for name in names), end
    assert family.loads_lora == (build not in (tiny_unet2d, tiny_dit))


def test_unknown_networks_and_missing_data_are_refused_by_name():
    with pytest.raises(ValueError, match=r"PixArtAlphaPipeline has a PixArtTransformer2DModel, and training knows UNet2DModel, .*Flux"):
        family_of(tiny_pixart())
    for build in (tiny_stable_diffusion, tiny_sdxl, tiny_sd3, tiny_flux):
        with pytest.raises(ValueError, match="is told a caption of every picture, and the data has none"):
            family_of(build()).encode_condition(None, torch.zeros(1), size=SIZE)
    with pytest.raises(ValueError, match="DiTPipeline is told a class of every picture"):
        family_of(tiny_dit()).encode_condition(["a"], None, size=SIZE)


def test_the_unconditional_half_keeps_the_sizes_of_its_sample():
    from diffx.objectives import Progressive
    from diffx.training.networks import Networks

    family = family_of(tiny_sdxl())
    nets = Networks(family, Progressive(start=2, end=1), None, size=SIZE)
    condition = dict(family.encode_condition(["a"], None, size=SIZE)) | family.size_condition(SIZE, (64, 48), (3, 4))
    x, level = torch.zeros(1, *family.sample_shape(SIZE)), nets.times.at(np.array([500.0]))
    ((both, _),) = recorded(family.base, lambda: nets.guided("teacher", x, level, condition, np.array([3.0])))
    assert torch.equal(both["time_ids"], condition["time_ids"].expand(2, 6))
    assert not both["text_embeds"][1].any()
    dropped = nets.without(condition, np.array([True]))
    assert torch.equal(dropped["time_ids"], condition["time_ids"]) and not dropped["text_embeds"].any()
