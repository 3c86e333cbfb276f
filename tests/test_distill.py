"""``distill`` as it is called: data of each kind, options, refusals, costs."""

import copy
import dataclasses
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer
import yaml
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from training_parts import Pictures, pipeline
from typer.testing import CliRunner

import diffx
from diffx.cli import app
from diffx.cli.train import NAMES
from diffx.families import family_of
from diffx.loading import EMBEDDED_STUDENT, load_pipeline
from diffx.objectives import DMD2, LCM, PCM, Progressive
from diffx.testing import IMAGE_SIZE, tiny_flux, tiny_stable_diffusion
from diffx.training.api import cost, fuse_loras, make_lora
from diffx.training.config import TrainConfig
from diffx.training.networks import Lora, Networks

SMALL = dict(train_steps=2, batch_size=2, resolution=IMAGE_SIZE, progress=False, device="cpu")
METHOD = PCM(calls=2, teacher_steps=4, guidance_range=(2.0, 3.0), guidance_scale=2.5, embed_guidance=False)


def pictures():
    rng = np.random.default_rng(0)
    return [{"image": rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), "text": word} for word in ("one", "two")]


def test_pictures_in_memory_train_and_the_same_call_finds_the_result(tmp_path):
    options = dict(output=tmp_path / "run", cache=tmp_path / "cache", **SMALL)
    made = diffx.distill(tiny_stable_diffusion(), METHOD, pictures(), **options)
    assert made.call_kwargs == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert (made.folder / "model" / "model_index.json").is_file()
    again = diffx.distill(tiny_stable_diffusion(), METHOD, pictures(), **options)
    for one, two in zip(made.pipeline.unet.parameters(), again.pipeline.unet.parameters()):
        assert (one == two).all()


def test_a_run_with_other_settings_is_refused_by_what_differs(tmp_path):
    options = dict(output=tmp_path / "run", cache=tmp_path / "cache", **SMALL)
    diffx.distill(tiny_stable_diffusion(), METHOD, pictures(), **options)
    with pytest.raises(ValueError, match=r"train\.lr: None there, 0\.001 now"):
        diffx.distill(tiny_stable_diffusion(), METHOD, pictures(), lr=1e-3, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((METHOD, ["one"]), dict(train_step=2), "unknown option 'train_step'; did you mean 'train_steps'"),
        ((METHOD, ["one"]), dict(lora_ranks=2), "unknown option 'lora_ranks'; did you mean 'lora_rank'"),
        ((diffx.LCM(), ["one"]), {}, "is no training method"),
        ((diffx.objectives.Diffusion(), ["one"]), {}, "Diffusion has no teacher"),
        ((METHOD, ["one"]), dict(lora_alpha=4.0), "lora_alpha=4.0 without lora_rank"),
        ((METHOD, ["one"]), dict(lora_rank=8, lora_start="emoji_progresive_4"), "lora_start='emoji_progresive_4' is not there"),
        ((METHOD, ["one"]), dict(batch_size=0), "batch_size=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        diffx.distill(tiny_stable_diffusion(), *arguments, output=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_adapters_go_on_from_those_of_another_run(tmp_path):
    options = dict(cache=tmp_path / "cache", lora_targets=["to_q"], lora_alpha=3.0, **SMALL)
    first = diffx.distill(tiny_stable_diffusion(), METHOD, pictures(), output=tmp_path / "first", lora_rank=2, lr=1e-2, **options)
    start = tmp_path / "first" / "model"
    still = diffx.distill(  # by so little that no bit of a float32 moves
        tiny_stable_diffusion(), METHOD, pictures(), output=tmp_path / "still", lora_rank=2, lora_start=start, lr=1e-30, **options
    )
    one, two = (load_file(run.folder / "model" / "pytorch_lora_weights.safetensors") for run in (first, still))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.any() for name, value in one.items() if "lora_B" in name)
    for rank, alpha, message in ((4, 3.0, r"\(2, 16\) there, \(4, 16\) here"), (2, 2.0, "its alpha is 3")):
        with pytest.raises(ValueError, match=f"another kind of adapter .*{message}"):
            Networks(family_of(tiny_stable_diffusion()), METHOD, make_lora(rank, alpha, ["to_q"], start), size=(IMAGE_SIZE, IMAGE_SIZE))
    with pytest.raises(ValueError, match="holds no LoRA that Diffusers reads"):
        diffx.distill(tiny_stable_diffusion(), METHOD, pictures(), output=tmp_path / "x", lora_rank=2, lora_start=tmp_path, **SMALL)


def test_adapters_go_on_from_the_shipped_student_by_its_name():
    found = []
    for start in ("emoji_progressive_4", EMBEDDED_STUDENT):
        pipe: Any = load_pipeline(device="cpu")
        Networks(family_of(pipe), METHOD, make_lora(8, start=start), size=(32, 32))
        found.append({name: value for name, value in pipe.unet.state_dict().items() if ".student." in name})
    one, two = found
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.any() for name, value in one.items() if "lora_B" in name)


def outcome(pipe):
    call = dict(num_inference_steps=2, height=IMAGE_SIZE, width=IMAGE_SIZE, output_type="pt")
    return pipe("one", generator=torch.Generator().manual_seed(0), **call).images


def test_the_pipeline_that_is_handed_in_keeps_its_network(tmp_path):
    pipe = tiny_stable_diffusion()
    layers, before = [(name, type(module)) for name, module in pipe.unet.named_modules()], outcome(pipe)
    made = diffx.distill(pipe, METHOD, pictures(), lora_rank=2, lr=1e-2, gradient_checkpointing=True, output=tmp_path / "run", **SMALL)
    assert [(name, type(module)) for name, module in pipe.unet.named_modules()] == layers
    assert not pipe.unet.is_gradient_checkpointing and torch.equal(outcome(pipe), before)
    assert not torch.equal(outcome(made.pipeline), before)
    # The student is other modules on the same weights: memory holds one base.
    assert made.pipeline.unet.conv_in.weight.data_ptr() == pipe.unet.conv_in.weight.data_ptr()


def test_each_training_of_a_process_has_its_own_precision(tmp_path):
    def trained(precision, name):
        options = dict(train_steps=2, batch_size=4, lr=1e-2, mixed_precision=precision, progress=False, device="cpu")
        made = diffx.train(pipeline(), diffx.objectives.Diffusion(), Pictures(), output=tmp_path / name, **options)
        return made.pipeline.unet.state_dict()

    mine = Accelerator(cpu=True)  # the caller's own
    first, half, again = trained("no", "first"), trained("bf16", "half"), trained("no", "again")
    assert mine.mixed_precision == "no" and Accelerator(cpu=True).mixed_precision == "no"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], half[name]) for name in first)
    with pytest.raises(ValueError, match="batch_size=3 does not divide"):  # and after a refusal, too
        diffx.train(
            pipeline(), diffx.objectives.Diffusion(), Pictures(), output=tmp_path / "x", batch_size=3, gradient_accumulation_steps=2,
            mixed_precision="bf16", device="cpu",
        )  # fmt: skip
    assert mine.mixed_precision == "no"


def with_lora(pipe, folder, *parts):
    """The pipeline with a LoRA loaded from a file, on some of its parts, acting at 0.7 of its strength."""
    layers, told = {}, {}
    for part in parts:
        network = copy.deepcopy(getattr(pipe, part))
        linear = sorted({name.rsplit(".", 1)[-1] for name, layer in network.named_modules() if name.endswith(("to_q", "q_proj"))})
        config = LoraConfig(r=2, lora_alpha=6, target_modules=linear, init_lora_weights=False)
        network.add_adapter(config)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network, adapter_name="default")
        told[f"{part}_lora_adapter_metadata"] = {**config.to_dict(), "target_modules": linear}
    pipe.save_lora_weights(folder, **layers, **told)
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.set_adapters("style", 0.7)
    return pipe


def said_of(pipe):
    """What a Stable Diffusion pipeline's parts say of one caption and one picture."""
    ids = pipe.tokenizer(["one"], padding="max_length", return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        told = pipe.text_encoder(ids)[0]
        x = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=generator)
        return pipe.unet(x, torch.tensor([500]), told).sample


@pytest.mark.parametrize("acts", [True, False])
def test_a_teacher_with_a_lora_teaches_as_it_is(tmp_path, acts):
    plain = said_of(tiny_stable_diffusion())
    pipe = with_lora(tiny_stable_diffusion(), tmp_path / "lora", "unet", "text_encoder")
    if not acts:
        pipe.disable_lora()
        pipe.text_encoder.disable_adapters()
    expected = said_of(pipe)
    assert torch.equal(expected, plain) != acts
    options = dict(output=tmp_path / "run", cache=tmp_path / "cache", **SMALL)
    made = diffx.distill(pipe, METHOD, pictures(), lr=1e-30, **options)  # a student that stays its teacher
    assert made.networks.modules["teacher"].conv_in.weight is pipe.unet.conv_in.weight and not hasattr(pipe.unet, "peft_config")
    for each in (pipe, made.pipeline):
        # Of about 1, in float32: W x + B A x in another order.
        torch.testing.assert_close(said_of(each), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-3 or not acts


def test_text_encoders_whose_pipeline_does_not_fuse_them_are_fused(tmp_path):
    pipe = with_lora(tiny_flux(), tmp_path, "text_encoder")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = pipe.text_encoder(ids).pooler_output
        fuse_loras(pipe)
        torch.testing.assert_close(pipe.text_encoder(ids).pooler_output, expected, atol=1e-5, rtol=0)
    plain = tiny_flux().text_encoder(ids).pooler_output
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        (LCM(calls=2, embed_guidance=False), {"teacher": 2, "student": 1, "target": 1}),  # a guided pair counts two
        (Progressive(start=4, end=2), {"teacher": 2, "student": 1}),
        (Progressive(start=4, end=2, guidance_scale=3.0), {"teacher": 4, "student": 1}),
        (DMD2(calls=1, fake_steps=1), {"student": 1, "fake": 1, "teacher": 0.5}),  # every second update is the student's
    ],
)
def test_the_cost_counts_what_an_update_calls(method, calls):
    assert cost(tiny_stable_diffusion(), method, resolution=IMAGE_SIZE).calls == pytest.approx(calls)  # exact in binary


def test_dmd2_with_adapters_holds_one_base():
    base = sum(weight.numel() for weight in tiny_stable_diffusion().unet.parameters())
    found = cost(tiny_stable_diffusion(), DMD2(calls=1), lora=Lora(rank=2, targets=["to_q"]), resolution=IMAGE_SIZE)
    assert found.frozen_parameters == base and 0 < found.trained_parameters < base


def test_what_dump_config_prints_is_a_config_and_flags_win_over_it(tmp_path):
    words = ["distill", "progressive", "--dump-config"]
    first = CliRunner().invoke(app, [*words, "--start", "8", "--end", "4", "--lr", "0.001"])
    assert first.exit_code == 0, first.output
    (tmp_path / "run.yaml").write_text(first.stdout)
    assert CliRunner().invoke(app, [*words, "--config", str(tmp_path / "run.yaml")]).stdout == first.stdout
    other = CliRunner().invoke(app, [*words, "--config", str(tmp_path / "run.yaml"), "--lr", "0.01"]).stdout
    assert other == first.stdout.replace("lr: 0.001", "lr: 0.01")


def unconditional(folder, *words):
    """What ``diffx distill progressive`` comes to, with a tiny unconditional model in ``folder / "model"``."""
    pipeline().save_pretrained(folder / "model")
    fixed = ["--device", "cpu", "--cache", folder / "cache", "--json"]
    return CliRunner().invoke(app, [str(word) for word in ("distill", "progressive", *fixed, *words)])


def test_the_run_yaml_of_a_run_makes_it_again_bit_for_bit(tmp_path):
    words = ["--start", 4, "--end", 2, "--train-steps", 4, "--batch-size", 4, "--num-generated", 8, "--generation-steps", 2, "--seed", 3]
    words += ["--lora-rank", 2, "--lora-alpha", 4, "--lora-targets", "conv1,conv2", "--lr", "0.01", "--lr-schedule", "linear"]
    first = unconditional(tmp_path, "--teacher", tmp_path / "model", *words, "--output", tmp_path / "first")
    assert first.exit_code == 0, first.output
    config = tmp_path / "first" / "run.yaml"
    again = unconditional(tmp_path, "--config", config, "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    one, two = (load_file(tmp_path / name / "checkpoints" / "step-00000004" / "weights.safetensors") for name in ("first", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "again" / "run.yaml").read_text() == config.read_text()
    shown = yaml.safe_load(unconditional(tmp_path, "--config", config, "--seed", 4, "--dump-config").stdout)
    assert shown["seed"] == 4 and shown["lora_targets"] == ["conv1", "conv2"] and shown["teacher"] == str(tmp_path / "model")


RUN = {"method": {"name": "Progressive", "start": 4, "end": 2}, "train": {"seed": 1}, "data": {"seed": 1}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RUN | {"trian": {"lr": 1e-3}}, "the config has trian beside method"),
        (RUN | {"train": {"lrr": 1e-3, "seed": 1}}, "has lrr; it may have data, teacher"),
        (RUN | {"train": {"seed": 2}}, "has seed=2 in train and 1 in data"),
        (RUN | {"train": 3}, "has 3 for train, which is a section"),
        (RUN | {"method": {"name": "LCM"}}, "is of the method LCM, and this command is Progressive's"),
        ({"star": 4}, "has star; it may have data, teacher"),
        ([1], "has no mapping; it may have"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_what_is_wrong(tmp_path, config, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["distill", "progressive", "--config", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2 and message in result.stderr


def test_a_config_may_write_small_numbers_as_people_do(tmp_path):
    (tmp_path / "run.yaml").write_text("start: 4\nend: 2\nlr: 1e-4\n")
    shown = CliRunner().invoke(app, ["distill", "progressive", "--config", str(tmp_path / "run.yaml"), "--dump-config"]).stdout
    assert yaml.safe_load(shown)["lr"] == 1e-4


def test_every_field_is_a_flag_of_its_command():
    shown = CliRunner().invoke(app, ["distill", "pcm", "--dump-config"]).stdout
    names = {line.split(":")[0] for line in shown.splitlines()}
    assert {field.name for field in dataclasses.fields(PCM)} <= names


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in NAMES.items() for name in names])
def test_help_explains_every_flag_and_says_its_default(group, name):
    root: Any = typer.main.get_command(app)
    command = root.commands[group].get_command(click.Context(root.commands[group], info_name=group), name)
    silent = [flag.name for flag in command.params if not (flag.help or "").split("\\[default")[0].strip()]
    assert silent == []
    shown = CliRunner().invoke(app, [group, name, "--help"], env={"COLUMNS": "300"}).output
    default = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for field in ("lr_schedule", "batch_size", "grad_clip"):
        (line,) = [line for line in shown.splitlines() if f"--{field.replace('_', '-')} " in line]
        assert f"[default: {default[field]}]" in line
