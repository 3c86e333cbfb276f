"""``pipelines/controlled``: bit for bit what Diffusers does with several ControlNets, IP-Adapters and hard masks; regions beyond it."""

import sys

import diffusers
import numpy as np
import pytest
import torch
from adapter_parts import clip, picture
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor

from diffx.loading import EMBEDDED
from diffx.testing import IMAGE_SIZE, tiny_controlnet, tiny_stable_diffusion
from diffx.testing.parts import WIDTH, quiet, weights_from

FOLDER = EMBEDDED.parents[2] / "pipelines" / "controlled"
SIZE = (IMAGE_SIZE, IMAGE_SIZE)
WHITE, BLACK = Image.new("L", SIZE, 255), Image.new("L", SIZE, 0)
LEFT, RIGHT = BLACK.copy(), WHITE.copy()
for image, value in ((LEFT, 255), (RIGHT, 0)):
    image.paste(value, (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
OPTIONS = {"num_inference_steps": 4, "output_type": "latent"}
EMBEDDED_WIDTH, TOKENS = 10, 4  # the first is that of ``clip``


def ip_adapter_of(unet, seed):
    """Random weights of an IP-Adapter, as they lie in a file."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng) * 0.2

    names = [name.removesuffix("processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    shapes = [unet.state_dict()[name + "to_k.weight"].shape for name in names]
    layers = {f"{2 * i + 1}.to_{kind}_ip.weight": normal(*shape) for i, shape in enumerate(shapes) for kind in "kv"}
    projection = {"proj.weight": normal(TOKENS * WIDTH, EMBEDDED_WIDTH), "proj.bias": normal(TOKENS * WIDTH)}
    projection |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.fixture(scope="module")
def cls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_stable_diffusion().save_pretrained(folder)
    return type(DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FOLDER), trust_remote_code=True))


@pytest.fixture(scope="module")
def nets():
    return [tiny_controlnet(seed).controlnet for seed in (0, 1)]


@pytest.fixture(scope="module")
def pipe(cls):
    return quiet(cls(**tiny_stable_diffusion().components, requires_safety_checker=False))


@pytest.fixture(scope="module")
def adapted(cls):
    """With two IP-Adapters and an encoder of what they are shown."""
    crop = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    components = tiny_stable_diffusion().components | {
        "image_encoder": clip(),
        "feature_extractor": CLIPImageProcessor(**crop),
    }
    pipe = quiet(cls(**components, requires_safety_checker=False))
    pipe.unet._load_ip_adapter_weights([ip_adapter_of(pipe.unet, seed) for seed in (1, 2)], low_cpu_mem_usage=False)
    return pipe


def twin(kind, pipe, **more):
    return quiet(kind(**pipe.components, **more, requires_safety_checker=False))


def run(pipe, *given, **options):
    return pipe("x", *given, **({"generator": torch.Generator().manual_seed(0)} | OPTIONS | options)).images


# ControlNets

TWO = {
    "controlnet_conditioning_scale": [0.7, 1.0],
    "control_guidance_start": [0.0, 0.3],
    "control_guidance_end": [0.6, 1.0],
}
PICTURES = [picture(0), picture(1)]


@pytest.mark.parametrize("control_mask", [None, WHITE, [WHITE, None]])
def test_several_controlnets_are_those_of_diffusers(pipe, nets, control_mask):
    want = run(twin(diffusers.StableDiffusionControlNetPipeline, pipe, controlnet=nets), PICTURES, **TWO)
    assert torch.equal(run(pipe, controlnet=nets, control_image=PICTURES, control_mask=control_mask, **TWO), want)
    assert not torch.equal(want, run(pipe))


def test_one_controlnet_and_none(pipe, nets):
    one = twin(diffusers.StableDiffusionControlNetPipeline, pipe, controlnet=nets[0])
    assert torch.equal(run(pipe, controlnet=nets[0], control_image=picture(0)), run(one, picture(0)))
    assert torch.equal(run(pipe), run(twin(diffusers.StableDiffusionPipeline, pipe)))


def test_a_controlnet_acts_in_its_region(pipe, nets):
    def found(*masks):
        same = dict(controlnet=nets[:1] * len(masks), control_image=picture(0), guidance_scale=1.0, num_inference_steps=1)
        return run(pipe, **same, control_mask=list(masks))

    assert torch.equal(found(BLACK), run(pipe, num_inference_steps=1, guidance_scale=1.0))
    # One network in two regions that make up the picture; masked residuals round where they are added.
    torch.testing.assert_close(found(LEFT, RIGHT), found(None), rtol=1e-3, atol=1e-3)
    # What is added is there in the left half, and nowhere else.
    half = torch.zeros(1, 1, *SIZE)
    half[..., : IMAGE_SIZE // 2] = 1
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=rng) for shape in ((1, 4, 8, 8), (1, 8, WIDTH))]
    shown = torch.rand(1, 3, *SIZE, generator=rng)
    masked = sys.modules[type(pipe).__module__].RegionalControlNets(nets[:1], [half])
    down, middle = masked(given[0], 500, given[1], [shown], [1.0], return_dict=False)
    whole_down, whole_middle = nets[0](given[0], 500, given[1], shown, 1.0, return_dict=False)
    for part, whole in zip((*down, middle), (*whole_down, whole_middle), strict=True):
        columns = part.shape[-1] // 2
        assert torch.equal(part[..., :columns], whole[..., :columns]) and not part[..., columns:].any() and whole[..., columns:].any()


# IP-Adapters


def test_ip_adapters_are_those_of_diffusers(adapted):
    stock = twin(diffusers.StableDiffusionPipeline, adapted)
    shown = [picture(2), picture(3)]
    adapted.set_ip_adapter_scale([0.6, 0.9])
    want = run(stock, ip_adapter_image=shown)
    assert torch.equal(run(adapted, ip_adapter_image=shown), want)
    for mask in (WHITE, [WHITE, None]):
        assert torch.equal(run(adapted, ip_adapter_image=shown, ip_adapter_mask=mask), want)
    halves = [torch.from_numpy(np.asarray(mask) / 255).float()[None, None] for mask in (LEFT, RIGHT)]
    want = run(stock, ip_adapter_image=shown, cross_attention_kwargs={"ip_adapter_masks": halves})
    assert torch.equal(run(adapted, ip_adapter_image=shown, ip_adapter_mask=[LEFT, RIGHT]), want)


def test_an_ip_adapter_has_a_scale_and_a_part_of_the_run(adapted):
    shown = {"ip_adapter_image": [picture(2), picture(3)]}
    adapted.set_ip_adapter_scale([0.6, 0.0])
    first, nothing = run(adapted, **shown), run(adapted, **shown, ip_adapter_scale=0.0)
    adapted.set_ip_adapter_scale([0.6, 0.9])
    assert torch.equal(run(adapted, **shown, ip_adapter_end=[1.0, 0.0]), first)
    assert torch.equal(run(adapted, **shown, ip_adapter_start=1.0), nothing)
    assert torch.equal(run(adapted, **shown, ip_adapter_mask=BLACK), nothing)
    assert torch.equal(run(adapted, **shown, ip_adapter_scale=[0.6, 0.0]), first)

    def by_hand(pipe, step, t, given):
        if step == 1:
            pipe.set_ip_adapter_scale([0.0, 0.9])
        return given

    def note(pipe, step, t, given):
        seen.append(step)
        return given

    seen = []
    want = run(twin(diffusers.StableDiffusionPipeline, adapted), **shown, callback_on_step_end=by_hand)
    adapted.set_ip_adapter_scale([0.6, 0.9])
    assert torch.equal(run(adapted, **shown, ip_adapter_end=[0.5, 1.0], callback_on_step_end=note), want)
    assert seen == [0, 1, 2, 3]
    (scales,) = {tuple(p.scale) for p in adapted.unet.attn_processors.values() if "scale" in vars(p)}
    assert scales == (0.6, 0.9)  # as they were before the call


def test_all_conditions_in_one_call(adapted, nets):
    conditions = dict(controlnet=nets, control_image=PICTURES, ip_adapter_image=[picture(2), picture(3)])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    adapted.set_ip_adapter_scale([1.0, 1.0])
    stock = twin(diffusers.StableDiffusionControlNetInpaintPipeline, adapted, controlnet=nets)
    shown = conditions["ip_adapter_image"]
    want = run(stock, picture(4), LEFT, PICTURES, ip_adapter_image=shown, controlnet_conditioning_scale=1.0, **size)
    assert torch.equal(run(adapted, picture(4), LEFT, **conditions, control_mask=WHITE, ip_adapter_mask=WHITE, **size), want)


# pictures that are changed


@pytest.mark.parametrize("strength", [1.0, 0.8])
def test_hard_masks_are_those_of_diffusers(pipe, strength):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "strength": strength}
    want = run(twin(diffusers.StableDiffusionInpaintPipeline, pipe), picture(4), LEFT, **size)
    assert torch.equal(run(pipe, picture(4), LEFT, **size), want)


def test_a_network_made_for_inpainting_is_served_as_by_diffusers(cls):
    components = tiny_stable_diffusion().components
    with weights_from(0):
        components["unet"] = diffusers.UNet2DConditionModel.from_config({**components["unet"].config, "in_channels": 9}).eval()
    nine, size = quiet(cls(**components, requires_safety_checker=False)), {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    grey = Image.blend(LEFT, WHITE, 0.3)  # rounded to black and white
    assert torch.equal(
        run(nine, picture(4), grey, **size), run(twin(diffusers.StableDiffusionInpaintPipeline, nine), picture(4), grey, **size)
    )


def test_a_soft_mask_keeps_black_exactly_and_frees_grey_later(pipe):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    grey = Image.fromarray(np.repeat(np.linspace(0, 255, IMAGE_SIZE).round().astype(np.uint8)[None], IMAGE_SIZE, 0))
    kept, soft, free = (run(pipe, picture(4), mask, **size) for mask in (BLACK, grey, WHITE))
    assert torch.equal(soft[..., 0], kept[..., 0])  # the only column that is black
    assert not torch.equal(soft[..., 1], kept[..., 1])
    away = (soft - kept).abs().mean(dim=(0, 1, 2))
    assert away[-1] > away[1]
    assert not torch.equal(soft, free)


def test_outpainting_continues_a_picture(pipe):
    module = sys.modules[type(pipe).__module__]
    part = picture(4).crop((0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    canvas, change = module.extend(part, right=IMAGE_SIZE // 2, feather=3)
    assert canvas.size == change.size == SIZE
    assert canvas.crop((0, 0, IMAGE_SIZE // 2, IMAGE_SIZE)).tobytes() == part.tobytes()
    assert np.asarray(change)[0].tolist() == [0] * 5 + [64, 128, 191] + [255] * 8
    drawn = pipe.outpaint("x", part, right=IMAGE_SIZE // 2, feather=3, generator=torch.Generator().manual_seed(0), **OPTIONS).images
    assert torch.equal(drawn, run(pipe, canvas, change, height=IMAGE_SIZE, width=IMAGE_SIZE))
    corner = module.extend(part, top=2, left=1)[1]
    assert np.asarray(corner)[:4, :3].tolist() == [[255] * 3, [255] * 3, [255, 0, 0], [255, 0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, n: run(p, picture(0)), "image and mask_image go together"),
        (lambda p, n: run(p, None, LEFT), "image and mask_image go together"),
        (lambda p, n: run(p, controlnet=n, control_image=[picture(0)]), "control_image holds 1 entries for 2 conditions"),
        (lambda p, n: run(p, controlnet=n, control_image=PICTURES, control_mask=[LEFT]), "control_mask holds 1 entries for 2"),
        (lambda p, n: run(p, ip_adapter_image=picture(0)), "no IP-Adapter is loaded"),
        (lambda p, n: p.outpaint("x", picture(0)), "nothing to add"),
        (lambda p, n: p.outpaint("x", picture(0), left=-8), r"{'left': -8} must not be negative"),
    ],
)
def test_bad_input_is_refused(pipe, nets, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, nets)
