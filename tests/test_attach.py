"""Conditions in ordinary pipelines, attached and detached: bit for bit what the stock pipelines do, and nothing left behind."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from test_guidance import hooks, with_ip_adapter

import diffx
from diffx.conditioning.attach import Condition, Control, Reference, attach
from diffx.guidance import CFG, Interval, LossGuidance, Ramp
from diffx.guidance.run import Run
from diffx.testing import call_inputs, end_of, tiny_controlnet, tiny_flux, tiny_sd3, tiny_sd35, tiny_sdxl, tiny_stable_diffusion
from diffx.testing.parts import IMAGE_SIZE, quiet

LEFT = (torch.arange(IMAGE_SIZE) < IMAGE_SIZE // 2).float().expand(IMAGE_SIZE, IMAGE_SIZE)
ONE, NOTHING = torch.ones(IMAGE_SIZE, IMAGE_SIZE), torch.zeros(IMAGE_SIZE, IMAGE_SIZE)


@pytest.fixture(scope="module")
def stock():
    """A ControlNet pipeline, whose network the others share."""
    return tiny_controlnet()


@pytest.fixture(scope="module")
def plain(stock):
    parts = {name: part for name, part in stock.components.items() if name != "controlnet"}
    return quiet(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))


@pytest.fixture(scope="module")
def other(stock):
    """Another ControlNet for the same network."""
    return tiny_controlnet(seed=1).controlnet


def picture(seed):
    return torch.rand(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def run(pipe, *, steps=4, guidance_scale=3.0, batch_size=2, **more):
    inputs = call_inputs(pipe, batch_size) | more
    generator = torch.Generator().manual_seed(0)
    return end_of(pipe, **inputs, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator)


def with_conditions(pipe, *conditions, **more):
    with attach(pipe, *conditions):
        return run(pipe, **more)


# ControlNets


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_control_is_the_stock_controlnet_pipeline(stock, plain, guidance_scale):
    pictures = [picture(1), picture(2)]
    goal = run(stock, image=torch.stack(pictures), controlnet_conditioning_scale=0.7, guidance_scale=guidance_scale)
    found = with_conditions(plain, Control(stock.controlnet, pictures, weight=0.7), guidance_scale=guidance_scale)
    assert torch.equal(found, goal)
    assert not torch.equal(goal, run(plain, guidance_scale=guidance_scale))


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 1.0), (0.5, 0.75)])
def test_its_window_is_the_stock_one(stock, plain, start, end):
    goal = run(stock, image=picture(1)[None], control_guidance_start=start, control_guidance_end=end)
    assert torch.equal(with_conditions(plain, Control(stock.controlnet, picture(1), start=start, end=end)), goal)


def test_several_are_the_stock_multi_controlnet(stock, plain, other):
    both = MultiControlNetModel([stock.controlnet, other])
    parts = {**stock.components, "controlnet": both}
    multi = quiet(diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    call = dict(controlnet_conditioning_scale=[0.5, 1.0], control_guidance_start=[0.0, 0.25], control_guidance_end=[0.5, 1.0])
    goal = run(multi, image=[picture(1)[None], picture(2)[None]], **call)
    two = [Control(stock.controlnet, picture(1), weight=0.5, end=0.5), Control(other, picture(2), start=0.25)]
    assert torch.equal(with_conditions(plain, *two), goal)
    assert torch.equal(with_conditions(plain, *two[::-1]), goal)  # a sum of two has no order
    added = run(stock, image=picture(1)[None], controlnet_conditioning_scale=0.5, control_guidance_end=0.5)
    with attach(stock, two[1]):  # to the ControlNet that the pipeline has of its own
        assert torch.equal(run(stock, image=picture(1)[None], controlnet_conditioning_scale=0.5, control_guidance_end=0.5), goal)
    assert not torch.equal(added, goal)


def test_masks_of_one_and_zero_are_everything_and_nothing(stock, plain):
    base, full = run(plain), with_conditions(plain, Control(stock.controlnet, picture(1)))
    assert torch.equal(with_conditions(plain, Control(stock.controlnet, picture(1), mask=ONE)), full)
    assert torch.equal(with_conditions(plain, Control(stock.controlnet, picture(1), mask=NOTHING)), base)
    assert torch.equal(with_conditions(plain, Control(stock.controlnet, picture(1), weight=0.0)), base)
    half = with_conditions(plain, Control(stock.controlnet, picture(1), mask=LEFT, weight=0.2))
    left, right = (half - base).abs().mean((0, 1, 2)).chunk(2)
    assert left.mean() > 1.5 * right.mean()  # convolutions reach across the border, in eight columns far


def test_halves_of_two_controls_make_a_whole(stock, plain):
    halves = [Control(stock.controlnet, picture(1), mask=mask) for mask in (LEFT, 1 - LEFT)]
    full = with_conditions(plain, Control(stock.controlnet, picture(1)))
    # Sums of masked residuals round where the middle block's masks are fractions.
    torch.testing.assert_close(with_conditions(plain, *halves), full, rtol=1e-3, atol=1e-3)


def test_weights_of_each_call(stock, plain):
    constant = with_conditions(plain, Control(stock.controlnet, picture(1), weight=0.5))
    for same in ((0.5,) * 4, Ramp(0.5, 0.5)):
        assert torch.equal(with_conditions(plain, Control(stock.controlnet, picture(1), weight=same)), constant)
    window = with_conditions(plain, Control(stock.controlnet, picture(1), end=0.5))
    assert torch.equal(with_conditions(plain, Control(stock.controlnet, picture(1), weight=(1.0, 1.0, 0.0, 0.0))), window)
    four = Run(None, 4)
    assert [Condition(weight=Ramp(0.0, 3.0)).weight_at(four, call) for call in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("cls", [diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline])
def test_controls_act_in_pipelines_that_have_none(stock, plain, cls):
    pipe = quiet(cls.from_pipe(plain))
    control = Control(stock.controlnet, picture(1))
    twin = {
        diffusers.StableDiffusionImg2ImgPipeline: diffusers.StableDiffusionControlNetImg2ImgPipeline,
        diffusers.StableDiffusionInpaintPipeline: diffusers.StableDiffusionControlNetInpaintPipeline,
    }[cls]
    own = quiet(twin.from_pipe(plain, controlnet=stock.controlnet))
    assert torch.equal(with_conditions(pipe, control), run(own, control_image=picture(1)[None], controlnet_conditioning_scale=1.0))


def test_sdxl():
    pipe = tiny_sdxl()
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8)).eval()
    torch.manual_seed(0)
    for weight in net.controlnet_mid_block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    own = quiet(diffusers.StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=net, add_watermarker=False))
    goal = run(own, image=picture(1)[None])
    assert torch.equal(with_conditions(pipe, Control(net, picture(1))), goal)
    assert not torch.equal(run(pipe), goal)


# Stable Diffusion 3


def sd3_controlnet(pipe, seed=0, extra=0, **config):
    """One with random weights where a new one has zeros; without ``config`` of one layer, half of the network's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config:
            net = diffusers.SD3ControlNetModel.from_config({**pipe.transformer.config, "use_pos_embed": True, **config})
        else:
            net = diffusers.SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_extra_conditioning_channels=extra)
        for weights in (*net.controlnet_blocks.parameters(), *net.pos_embed_input.parameters()):
            torch.nn.init.normal_(weights, std=0.3)
    return net.eval()


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd35()


def sd3_run(pipe, **more):
    """The stock pipeline reads its picture with noise of the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run(pipe, steps=3, **more)


def sd3_with(pipe, *conditions, **more):
    with attach(pipe, *conditions):
        return sd3_run(pipe, **more)


def drawn(seed):
    return Image.fromarray((picture(seed).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


SD3_NETS = {
    "InstantX": {},
    "with pooled text": dict(num_layers=2, force_zeros_for_pooled_projection=False),
    # As Stability's for 3.5 large, but for their one-stream blocks: positions are the network's.
    "without positions": dict(num_layers=1, use_pos_embed=False, pos_embed_type=None, force_zeros_for_pooled_projection=False),
}


@pytest.mark.parametrize("name", SD3_NETS)
def test_sd3_is_the_stock_controlnet_pipeline(sd3, name):
    net, call = sd3_controlnet(sd3, **SD3_NETS[name]), dict(controlnet_conditioning_scale=0.7, control_guidance_start=0.3)
    attached = [Control(net, drawn(1), weight=0.7, start=0.3, mask=mask) for mask in (None, ONE)]
    before, base = list(sd3.transformer._forward_pre_hooks), sd3_run(sd3)
    found = [sd3_with(sd3, each) for each in attached]
    assert list(sd3.transformer._forward_pre_hooks) == before and torch.equal(sd3_run(sd3), base)
    own = quiet(diffusers.StableDiffusion3ControlNetPipeline(**sd3.components, controlnet=net))
    goal = sd3_run(own, control_image=drawn(1), **call)
    assert all(torch.equal(each, goal) for each in found) and not torch.equal(goal, base)


def test_sd3_masks_weights_and_several(sd3):
    one, two = sd3_controlnet(sd3), sd3_controlnet(sd3, seed=1, num_layers=2)
    base, full = sd3_run(sd3), sd3_with(sd3, Control(one, picture(1)))
    assert torch.equal(sd3_with(sd3, Control(one, picture(1), mask=NOTHING)), base)
    assert torch.equal(sd3_with(sd3, Control(one, picture(1), weight=0.0)), base)
    assert torch.equal(sd3_with(sd3, Control(one, picture(1), weight=(1.0, 1.0, 1.0))), full)
    half = sd3_with(sd3, Control(one, picture(1), mask=LEFT, weight=0.2))
    left, right = (half - base).abs().mean((0, 1, 2)).chunk(2)
    assert left.mean() > 1.2 * right.mean()  # every token attends to all others
    own = quiet(diffusers.StableDiffusion3ControlNetPipeline(**sd3.components, controlnet=one))
    with attach(own, Control(two, drawn(2), mask=LEFT)):  # beside the one that the pipeline has; of other depth
        both = sd3_run(own, control_image=drawn(1))
    conditions = Control(one, drawn(1)), Control(two, drawn(2), mask=LEFT)
    assert torch.equal(sd3_with(sd3, *conditions), both)
    with attach(sd3, conditions[1]), diffx.guide(sd3, Interval(CFG(3.0), high=0.8)) as guided:
        assert torch.isfinite(sd3_run(sd3)).all()
    assert guided.uncond_calls < guided.calls == 3


def test_sd3_image_to_image(sd3):
    pipe, net = quiet(diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(sd3)), sd3_controlnet(sd3)
    base, found = sd3_run(pipe, strength=1.0), sd3_with(pipe, Control(net, picture(1)), strength=1.0)
    assert torch.isfinite(found).all() and not torch.equal(found, base) and torch.equal(sd3_run(pipe, strength=1.0), base)


# IP-Adapters


def image_embeds(seed=2):
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(seed))]}


def test_references_have_weights_and_masks_in_calls():
    pipe = with_ip_adapter()
    full, half_scale = run(pipe, **image_embeds()), None
    pipe.set_ip_adapter_scale(0.5)
    half_scale = run(pipe, **image_embeds())
    pipe.set_ip_adapter_scale(0.0)
    base = run(pipe, **image_embeds())
    pipe.set_ip_adapter_scale(1.0)
    assert len({float(each.sum()) for each in (full, half_scale, base)}) == 3

    def found(**more):
        return with_conditions(pipe, Reference(**more), **image_embeds())

    assert torch.equal(found(), full) and torch.equal(found(mask=ONE), full)
    assert torch.equal(found(weight=0.5), half_scale) and torch.equal(found(weight=Ramp(0.5, 0.5)), half_scale)
    assert torch.equal(found(weight=0.0), base) and torch.equal(found(mask=NOTHING), base)
    assert torch.equal(found(weight=(0.0,) * 4), base)
    for part in (found(end=0.5), found(mask=LEFT)):
        assert not torch.equal(part, full) and not torch.equal(part, base)
    # Diffusers' own way to a mask
    masks = {"ip_adapter_masks": [LEFT[None, None]]}
    assert torch.equal(found(mask=LEFT), run(pipe, **image_embeds(), cross_attention_kwargs=masks))
    assert torch.equal(run(pipe, **image_embeds()), full)


def test_all_at_once_and_the_order_of_detaching(stock):
    pipe = with_ip_adapter()
    net = stock.controlnet  # of another network with the same widths
    before, scales = hooks(pipe), [each.scale for each in pipe.unet.attn_processors.values() if "scale" in vars(each)]
    base = run(pipe, **image_embeds())
    conditions = (
        Control(net, picture(1), mask=LEFT),
        Control(net, picture(2), mask=1 - LEFT, end=0.5),
        Reference(mask=1 - LEFT, weight=0.8),
    )
    with attach(pipe, *conditions), diffx.guide(pipe, Interval(CFG(3.0), high=2.0)) as guided:
        found = run(pipe, **image_embeds())
    assert guided.uncond_calls < guided.calls == 4
    assert torch.isfinite(found).all() and not torch.equal(found, base)
    assert hooks(pipe) == before
    assert all(each.scale is scale for each, scale in zip([p for p in pipe.unet.attn_processors.values() if "scale" in vars(p)], scales))
    assert torch.equal(run(pipe, **image_embeds()), base)

    one, two = attach(pipe, conditions[0]).attach(), attach(pipe, conditions[2]).attach()
    one.detach()
    assert torch.equal(run(pipe, **image_embeds()), with_conditions_after(two, pipe, conditions[2]))
    assert hooks(pipe) == before


def with_conditions_after(attached, pipe, condition):
    attached.detach()
    return with_conditions(pipe, condition, **image_embeds())


def test_a_gradient_through_the_network_sees_the_conditions_once(stock, plain):
    # Were they added again in the rule's own call, the gradient would be that of twice the residuals.
    def size(x0):
        return x0.square().flatten(1).sum(1)

    def found(pipe, **more):
        with diffx.guide(pipe, LossGuidance(size, 0.01, CFG(3.0), through_network=True)):
            return run(pipe, steps=2, **more)

    goal = found(stock, image=picture(1)[None])
    with attach(plain, Control(stock.controlnet, picture(1))):
        assert torch.equal(found(plain), goal)


def test_guided_pipelines_take_no_more_conditions(stock, plain):
    with diffx.guide(plain, CFG(3.0)), pytest.raises(ValueError, match="attach conditions outside of it"):
        attach(plain, Control(stock.controlnet, picture(1))).attach()


# bad input


def test_refused_at_once(stock, plain):
    net = stock.controlnet
    wide = tiny_sdxl()
    cases = [
        (lambda: attach(tiny_flux(), Control(net, picture(1))), "has a FluxTransformer2DModel; attach.. knows Stable Diffusion 1 to 3.5"),
        (lambda: attach(tiny_sd3(), Control(net, picture(1))), "net=ControlNetModel is no SD3ControlNetModel"),
        (lambda: attach(tiny_sd3(), Reference()), "a SD3Transformer2DModel has one scale for all, and no masks"),
        (lambda: attach(tiny_sd3(), Control(sd3_controlnet(tiny_sd35(), extra=1), picture(1))), "reads 1 more channels than a picture has"),
        (lambda: attach(wide, Control(net, picture(1))), "was trained for another model"),
        (lambda: attach(plain, net), "is no condition"),
        (lambda: attach(plain, Control(MultiControlNetModel([net]), picture(1))), "is no ControlNetModel"),
        (lambda: attach(plain, Control(net, picture(1) * 255)), "must lie between 0 and 1"),
        (lambda: attach(plain, Control(net, picture(1), mask=LEFT * 2)), "mask has values from 0 to 2"),
        (lambda: attach(plain, Control(net, picture(1)[:1])), "3 channels of height and width are needed"),
        (lambda: attach(plain, Control(net, [])), "or there is none"),
        (lambda: attach(plain, Reference()), "has no IP-Adapter"),
        (lambda: attach(with_ip_adapter(), Reference(1)), "index=1: the pipeline has 1 IP-Adapters"),
        (lambda: attach(with_ip_adapter(), Reference(), Reference()), "several references to IP-Adapter 0"),
        (lambda: Control(net, picture(1), start=0.5, end=0.5), "0 <= start < end <= 1"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_refused_at_the_first_call(stock, plain):
    net, small = stock.controlnet, torch.rand(3, 8, 8)
    for condition, message in (
        (Control(net, small), "the control picture has 8 x 8 pixels and what is made 16 x 16"),
        (Control(net, picture(1), mask=torch.ones(8, 16)), "the mask has 16 x 8 pixels"),
        (Control(net, [picture(1)] * 3), "3 control pictures for a batch of 4"),
        (Control(net, picture(1), weight=(1.0,)), "weight has 1 numbers and this run 4 calls"),
    ):
        with pytest.raises(ValueError, match=message):
            with_conditions(plain, condition)
        assert not plain.unet._forward_pre_hooks


def test_a_second_call_in_a_step_is_refused(sd3):
    own_guidance = dict(skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    with pytest.raises(ValueError, match="skip_guidance_layers calls the network once more in a step"):
        sd3_with(sd3, Control(sd3_controlnet(sd3), picture(1)), **own_guidance)


def test_pictures_come_as_pil_arrays_and_tensors(stock, plain):
    drawn = Image.fromarray((picture(1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    array = np.asarray(drawn, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    one, *others = [with_conditions(plain, Control(stock.controlnet, each)) for each in (drawn, array, tensor, tensor[None])]
    assert all(torch.equal(one, each) for each in others)
    stock_way = run(stock, image=[drawn] * 2)
    assert torch.equal(one, stock_way)


def test_the_unattached_pipeline_is_untouched(stock, plain):
    before, base = hooks(plain), run(plain)
    with pytest.raises(RuntimeError, match="stop"), attach(plain, Control(stock.controlnet, picture(1))):
        raise RuntimeError("stop")
    assert hooks(plain) == before and torch.equal(run(plain), base)
    assert tiny_stable_diffusion().unet.config == plain.unet.config
