"""What adapters are shown of their data, and whether they follow it: held-out pictures, the gain, its curve, early stop, refusals."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from adapter_parts import IP_CASES, SIZE, ip_adapter, picture, save_encoders, training
from PIL import Image, ImageOps
from safetensors.torch import load_file
from test_cli import good, refused
from training_parts import run

import diffx
from diffx.conditioning import hints
from diffx.conditioning.hints import Hint
from diffx.families import family_of
from diffx.families.family import REFERENCE
from diffx.objectives import Diffusion
from diffx.testing import tiny_stable_diffusion
from diffx.training.adherence import Adherence, hold_out
from diffx.training.api import with_own_network
from diffx.training.cache import make_cache
from diffx.training.curve import GAIN, moment
from diffx.training.data import DataConfig
from diffx.training.run import Measured


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


@dataclass(frozen=True)
class Itself(Hint):
    """The picture itself: what is shown must be what is trained on."""

    name: ClassVar[str] = "itself"
    values: ClassVar = "colour"

    def draw(self, pixels):
        return pixels

    def distance(self, one, two):
        return float(np.abs(one - two).mean())


def wide(i: int) -> Image.Image:
    """A picture whose cuts of 16 x 16 need no resizing, all different."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 40, 3), np.uint8))


def rows(count: int = 6, **columns) -> list[dict]:
    return [{"image": wide(i), "text": f"no {i}", **{name: make(i) for name, make in columns.items()}} for i in range(count)]


def encoded(family, shown):
    """What pictures as they were shown are encoded to."""
    return family.encode_images(shown.float() / 127.5 - 1)


CUTS = dict(center_crop=False, random_flip=True, num_crops=3)


# what is shown


def test_hints_are_drawn_of_the_cut_picture(tmp_path):
    family = diffx.ControlNet(Itself()).wrap(family_of(tiny_stable_diffusion()))
    cache = make_cache(rows(), family, DataConfig(cache=tmp_path, **CUTS), progress=False)
    x0, condition = cache.read(range(len(cache)))
    assert len(cache) == 18 and condition["hint"].dtype == torch.uint8
    assert len({value.numpy().tobytes() for value in condition["hint"]}) == 18  # flips and cuts
    torch.testing.assert_close(encoded(family, condition["hint"]), x0, rtol=0, atol=1e-5)  # other batches sum in another order


def test_hints_of_a_column_are_cut_with_their_pictures(tmp_path):
    family = diffx.ControlNet(Itself(), hint_column="control").wrap(family_of(tiny_stable_diffusion()))
    data = rows(control=lambda i: ImageOps.invert(wide(i)))
    x0, condition = make_cache(data, family, DataConfig(cache=tmp_path, **CUTS), progress=False).read(range(18))
    torch.testing.assert_close(encoded(family, 255 - condition["hint"]), x0, rtol=0, atol=1e-5)


def test_lines_of_a_column_stay_lines(tmp_path):
    lines = Image.fromarray(np.eye(32, dtype=np.uint8) * 255)
    data = [{"image": picture(i, 32), "text": f"no {i}", "control": lines} for i in range(4)]
    family = diffx.ControlNet("canny", hint_column="control").wrap(family_of(tiny_stable_diffusion()))
    hint = make_cache(data, family, DataConfig(cache=tmp_path), progress=False).read([0])[1]["hint"]
    assert set(hint.unique().tolist()) == {0, 255}  # halved, and nothing between black and white


def test_references_are_embedded_once(tmp_path, encoders):
    config = DataConfig(cache=tmp_path, **CUTS)
    for column, pictures in ((None, rows()), ("reference", rows(reference=lambda i: picture(i, 50)))):
        adapter = ip_adapter("SD plus", encoders, reference_column=column)
        family = adapter.wrap(family_of(tiny_stable_diffusion()))
        found = make_cache(pictures, family, config, progress=False).read(range(18))[1][REFERENCE]
        family.encoder.network.forward = None  # whatever encodes again fails
        assert torch.equal(make_cache(pictures, family, config, progress=False).read(range(18))[1][REFERENCE], found)
        # A reference of its own is not cut: three examples of a picture are shown the same.
        assert torch.equal(found[0], found[1]) == (column is not None)


def folder(root, column=True, count=4):
    root.mkdir()
    for i in range(count):
        wide(i).save(root / f"{i}.png")
        ImageOps.invert(wide(i)).save(root / f"{i}-control.png")
    lines = [{"file_name": f"{i}.png", "text": f"no {i}"} | ({"control": f"{i}-control.png"} if column else {}) for i in range(count)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_a_column_of_a_folder_holds_paths(tmp_path):
    family = diffx.ControlNet(Itself(), hint_column="control").wrap(family_of(tiny_stable_diffusion()))
    cache = make_cache(folder(tmp_path / "data"), family, DataConfig(cache=tmp_path / "cache"), progress=False)
    x0, condition = cache.read(range(4))
    torch.testing.assert_close(encoded(family, 255 - condition["hint"]), x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows(), "column 'control' is not among the data's columns image, text"),
        (rows(control=lambda i: wide(i).resize((20, 8))), "row 0, column 'control': it has 20 x 8 pixels, and its picture 40 x 16"),
        (rows(control=lambda i: "nowhere.png"), r"row 0 does not open as a picture .*nowhere\.png"),
        (["a prompt"], "ControlNet learns from pictures, and the data has none"),
    ],
)
def test_data_without_control_images_is_refused(tmp_path, data, message):
    family = diffx.ControlNet(Itself(), hint_column="control").wrap(family_of(tiny_stable_diffusion()))
    with pytest.raises(ValueError, match=message):
        make_cache(data, family, DataConfig(cache=tmp_path), progress=False)


def test_folders_without_the_column_are_refused(tmp_path):
    family = diffx.ControlNet(Itself(), hint_column="control").wrap(family_of(tiny_stable_diffusion()))
    with pytest.raises(ValueError, match="column 'control' is not among the data's columns file_name, text"):
        make_cache(folder(tmp_path / "data", column=False), family, DataConfig(cache=tmp_path / "cache"), progress=False)
    (tmp_path / "data" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"a folder has columns where it has metadata\.jsonl or metadata\.csv, with paths in it"):
        make_cache(tmp_path / "data", family, DataConfig(cache=tmp_path / "cache"), progress=False)


def test_colours_are_no_canny_edges(tmp_path):
    family = diffx.ControlNet("canny", hint_column="control").wrap(family_of(tiny_stable_diffusion()))
    with pytest.raises(ValueError, match="row 0, column 'control': this is no canny hint, which has gray levels: it has colours"):
        make_cache(rows(control=wide), family, DataConfig(cache=tmp_path), progress=False)


# whether it is followed


def test_held_out_pictures_are_kept_from_training():
    family = diffx.ControlNet().wrap(family_of(tiny_stable_diffusion()))
    shown, held = hold_out(family, rows(30), None, DataConfig(num_held_out=5))
    numbers = [int(text.split()[1]) for part in (shown, held) for text in part.texts]
    assert sorted(numbers) == list(range(30)) and len(held) == 5
    assert [np.asarray(file).tolist() for file in held.files] == [np.asarray(wide(i)).tolist() for i in numbers[25:]]
    assert hold_out(family, rows(30), None, DataConfig(num_held_out=5))[1].texts == held.texts
    assert hold_out(family, rows(30), None, DataConfig(num_held_out=5, seed=1))[1].texts != held.texts
    given = hold_out(family, rows(30), rows(3), DataConfig())
    assert len(given[0]) == 30 and len(given[1]) == 3
    with pytest.raises(ValueError, match="num_held_out=20 of 30 pictures leaves fewer to train on"):
        hold_out(family, rows(30), None, DataConfig(num_held_out=20))


def test_likeness_is_to_what_each_was_shown(encoders):
    pictures = [picture(i, 32) for i in range(6)]
    for adapter, most in ((diffx.ControlNet(), 0.8), (ip_adapter("SD plain", encoders), 1.0)):
        family = adapter.wrap(family_of(tiny_stable_diffusion()))
        shown = [family.shown(each, None) for each in pictures]
        table = family.likeness(shown, pictures)
        assert table.shape == (6, 5)
        assert table[:, 0] == pytest.approx(1.0) and (table[:, 1:] < most).all()
        # A planted shuffle is seen at once: every sample is what the next one was shown.
        assert family.likeness(shown, pictures[1:] + pictures[:1])[:, 1] == pytest.approx(1.0)
    assert table[0, 1] == pytest.approx(hints_cosine(family, pictures[0], pictures[1]))


def hints_cosine(family, one, two):
    a, b = family.encoder.pooled(family.encoder.pixels([one, two]))
    return float(torch.nn.functional.cosine_similarity(a, b, 0))


def test_edge_f1_is_the_likeness_to_edges():
    family, canny = diffx.ControlNet().wrap(family_of(tiny_stable_diffusion())), hints.get("canny")
    one, two = canny(picture(0)), picture(1)
    assert family.likeness([one, canny(two)], [two, two])[0, 0] == pytest.approx(1 - canny.error(one, two))


@pytest.mark.parametrize("stepped_at", [2, 5, 9])
def test_a_jump_is_found_where_it_is(stepped_at):
    noise = np.random.default_rng(0).normal(0, 0.01, 12)
    assert moment({100 * i: 0.3 * (i >= stepped_at) + noise[i] for i in range(12)}) == 100 * stepped_at


def test_what_is_no_jump_is_not_found():
    rng = np.random.default_rng(0)
    for count in range(2, 40):
        assert moment({i: i * 0.1 for i in range(count)}) is None  # a steady rise
    assert moment({i: -0.3 * (i >= 5) for i in range(12)}) is None  # a fall
    assert moment({i: 0.2 for i in range(12)}) is None
    assert sum(moment(dict(enumerate(rng.normal(size=20)))) is not None for _ in range(200)) <= 2  # noise


def values(found):
    """A metric that finds these, one after the other."""
    told = iter(found)
    return lambda pipe, call_kwargs: Measured(-(gain := next(told)), {GAIN: gain})


def test_a_run_ends_where_nothing_gets_better(tmp_path):
    options = dict(train_steps=8, evaluate_every=1, patience=2)
    made = run(tmp_path, Diffusion(), metric=values([0.1, 0.3, 0.2, 0.25]), **options)
    report = made.go()
    assert report["kept_step"] == 2 and list(report["metric"]) == ["1", "2", "3", "4"]
    assert report["figures"]["2"] == {GAIN: 0.3}
    again = run(tmp_path, Diffusion(), metric=values([]), **options)  # it measures nothing more
    assert again.go() == report
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_patience_counts_measurements():
    with pytest.raises(ValueError, match="patience=2 counts measurements: at least 0, and with evaluate_every"):
        run("nowhere", Diffusion(), patience=2)


def test_an_adapter_is_measured_from_the_start(tmp_path):
    data = [{"image": picture(i), "text": f"no {i}"} for i in range(8)]
    options = dict(train_steps=2, evaluate_every=1, batch_size=2, num_held_out=3, cache=tmp_path / "cache", device="cpu", progress=False)
    calls = []

    def metric(pipe, call_kwargs):
        calls.append(call_kwargs["num_inference_steps"])
        return len(calls)

    made = diffx.train(tiny_stable_diffusion(), diffx.ControlNet(), data, metric=metric, output=tmp_path / "run", **options)
    assert made.report["metric"] == {"0": 1, "1": 2, "2": 3} and calls == [50] * 3
    figures = made.report["figures"]
    assert set(figures) == {"0", "1", "2"} and all(set(found) == {"true", "shuffled", "gain"} for found in figures.values())
    # Zero convolutions: the first update cannot show, and the untrained one was kept as the best.
    assert made.report["kept_step"] == 0
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [f"step-{i:08d}.png" for i in range(3)]
    assert Image.open(tmp_path / "run" / "curve.png").width == 700
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_the_measured_pipeline_is_the_stock_one(tmp_path):
    family = diffx.ControlNet().wrap(family_of(tiny_stable_diffusion()))
    _, held = hold_out(family, [{"image": picture(i), "text": f"no {i}"} for i in range(6)], None, DataConfig(num_held_out=3))
    measure = Adherence(family, held, SIZE, calls=2, seed=7)
    pipe = family.pipeline(family.base, family.pipe.scheduler)
    made = measure.draw(pipe, {"num_inference_steps": 2, "guidance_scale": 3.0})
    generators = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    given = dict(image=measure.shown, num_inference_steps=2, guidance_scale=3.0, generator=generators, height=16, width=16)
    expected = pipe(list(held.texts), **given).images
    assert [np.asarray(each).tolist() for each in made] == [np.asarray(each).tolist() for each in expected]


@pytest.mark.parametrize("name", IP_CASES)
def test_each_measured_sample_is_shown_its_own_reference(name, encoders):
    """Pipelines repeat the embeddings they are given for each prompt: samples of one call would be shown all references."""
    family = ip_adapter(name, encoders, init="text").wrap(family_of(IP_CASES[name][0]()))
    _, held = hold_out(family, [{"image": picture(i), "text": f"no {i}"} for i in range(4)], None, DataConfig(num_held_out=2))
    measure = Adherence(family, held, SIZE, calls=2, seed=7)
    pipe = family.pipeline(family.base, family.pipe.scheduler)
    call = family.call_kwargs(2, 3.0)
    made = measure.draw(pipe, call)
    for i, picked in enumerate(held.texts):
        alone = {"height": SIZE[0], "width": SIZE[1], "generator": torch.Generator().manual_seed(7 + i)}
        expected = pipe(**{**call, "prompt": picked}, ip_adapter_image=measure.shown[i], **alone).images[0]
        assert np.asarray(made[i]).tolist() == np.asarray(expected).tolist()


# going on


@pytest.mark.parametrize("name", ["ControlNet", "SD plain", "SD3"])
def test_a_training_goes_on_bit_for_bit(name, encoders):
    from diffx.testing import tiny_sd3

    def fresh():
        adapter = diffx.ControlNet() if name == "ControlNet" else ip_adapter(name, encoders)
        return training((tiny_sd3 if name == "SD3" else tiny_stable_diffusion)(), adapter, Diffusion(ema_decay=0.5), train_steps=4)

    whole = fresh()
    steps = whole.steps()
    next(steps), next(steps)
    tensors, state = whole.state()
    saved = {key: value.clone() for key, value in tensors.items()}
    list(steps)
    other = fresh()
    other.load_state(saved, state)
    list(other.steps())
    one, two = whole.state()[0], other.state()[0]
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_gradient_checkpointing_gives_the_same_update(encoders):
    for adapter in (diffx.ControlNet(), ip_adapter("SD plus", encoders)):
        made = [training(tiny_stable_diffusion(), adapter, train_steps=3, gradient_checkpointing=on) for on in (False, True)]
        for each in made:
            list(each.steps())
        one, two = (each.state()[0] for each in made)
        assert made[1].nets.family.inner.denoiser.is_gradient_checkpointing
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)  # what is computed again is summed in another order


def test_a_controlnet_goes_on_from_one_that_exists(tmp_path):
    first = training(tiny_stable_diffusion(), diffx.ControlNet(), lr=0.05)
    list(first.steps())
    first.nets.modules["student"].save_pretrained(tmp_path / "one")
    again = diffx.ControlNet(start=tmp_path / "one").wrap(family_of(tiny_stable_diffusion())).base
    trained = first.nets.modules["student"].state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in again.state_dict().items())
    from diffx.testing import tiny_sdxl

    with pytest.raises(ValueError, match="has cross_attention_dim=16, and the model 32: it is another model's"):
        diffx.ControlNet(start=tmp_path / "one").wrap(family_of(tiny_sdxl()))
    with pytest.raises(ValueError, match="did not load as a ControlNet"):
        diffx.ControlNet(start=tmp_path).wrap(family_of(tiny_stable_diffusion()))


# bad input, before any work


@pytest.mark.parametrize(
    ("trains", "options", "message"),
    [
        (diffx.ControlNet(), dict(lora_rank=4), "lora_rank=4 trains a LoRA in the network, which stays as it is beside a ControlNet"),
        (diffx.ControlNet(), dict(sample_prompts=["a"]), "the sheets of adapters show the held-out pictures"),
        (None, dict(objective=Diffusion()), "is for adapters; what trains the network is the second argument"),
        (None, dict(held_out=[]), "held_out is for adapters"),
        (None, dict(num_held_out=4), "num_held_out is for adapters"),
        ("canny", {}, "trains='canny' is nothing to train; pass Diffusion\\(\\), ControlNet\\(\\) or IPAdapter\\(\\)"),
        (diffx.ControlNet(), dict(num_held_out=1), "num_held_out=1 must be at least 2"),
    ],
)
def test_calls_that_make_no_sense_are_refused(tmp_path, trains, options, message):
    with pytest.raises(ValueError, match=message):
        diffx.train(tiny_stable_diffusion(), trains, rows(), output=tmp_path / "run", device="cpu", **options)
    assert not (tmp_path / "run").exists()


def test_the_command_line_has_the_same_words():
    told = good("train", "ip-adapter", "--dump-config", "--kind", "plus", "--image-dropout", "0.2", "--condition-dropout", "0.1")
    assert "kind: plus\n" in told and "image_dropout: 0.2\n" in told and "condition_dropout: 0.1\n" in told and "init: zero\n" in told
    cost = json.loads(good("train", "controlnet", "--dry-run", "--json"))
    assert cost["trained_parameters"] == 2_004_016 and cost["calls"] == {"student": 1.0}
    assert json.loads(good("train", "ip-adapter", "--dry-run", "--json"))["trained_parameters"] < 500_000
    assert "unknown hint 'cany'" in refused("train", "controlnet", "--hint", "cany")
    assert "No such option: --lora-rank" in refused_flag("train", "controlnet", "--lora-rank", "4")


def refused_flag(*words):
    from test_cli import run as call

    result = call(*words)
    assert result.exit_code == 2
    return result.output


def test_an_ip_adapter_is_put_into_modules_of_its_own(encoders):
    pipe = tiny_stable_diffusion()
    processors = {name: type(each) for name, each in pipe.unet.attn_processors.items()}
    for _ in range(2):  # one after another
        made = with_own_network(pipe)
        diffx.IPAdapter("plain", image_encoder=encoders / "clip").wrap(family_of(made))
        assert made.unet.encoder_hid_proj is not None and made.unet.conv_in.weight is pipe.unet.conv_in.weight
        assert pipe.unet.encoder_hid_proj is None and {name: type(each) for name, each in pipe.unet.attn_processors.items()} == processors


# The run.yaml of a run as --config


@pytest.mark.parametrize("name", ["controlnet", "ip-adapter"])
def test_the_run_yaml_of_an_adapter_makes_it_again_bit_for_bit(tmp_path, encoders, name):
    tiny_stable_diffusion().save_pretrained(tmp_path / "model")
    adapters = {
        "controlnet": diffx.ControlNet(hints.get("tile", factor=2.0), hint_column="control"),  # no flag says the factor
        "ip-adapter": diffx.IPAdapter("plus", image_encoder=encoders / "clip", text_dropout=0.2),
    }
    pictures, few = folder(tmp_path / "pictures"), folder(tmp_path / "few", count=2)
    options = dict(train_steps=2, batch_size=2, lr=0.01, resolution=16, seed=3, device="cpu", cache=tmp_path / "cache")
    objective = Diffusion(ema_decay=0.5)
    diffx.train(
        tmp_path / "model",
        adapters[name],
        pictures,
        objective=objective,
        held_out=few,
        output=tmp_path / "first",
        progress=False,
        **options,
    )
    config = tmp_path / "first" / "run.yaml"
    words = ["train", name, "--config", config, "--device", "cpu", "--cache", tmp_path / "cache"]
    good(*words, "--output", tmp_path / "again", "--json")
    assert (tmp_path / "again" / "run.yaml").read_text() == config.read_text()
    one, two = (load_file(tmp_path / run / "checkpoints" / "step-00000002" / "weights.safetensors") for run in ("first", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    one, two = (json.loads((tmp_path / run / "report.json").read_text()) for run in ("first", "again"))
    assert one == two  # measured on the same pictures

    shown = good(*words, "--seed", 4, "--dump-config")
    (tmp_path / "flags.yaml").write_text(shown)
    assert yaml.safe_load(shown)["seed"] == 4 and yaml.safe_load(shown)["held_out"] == str(few)
    assert good("train", name, "--config", tmp_path / "flags.yaml", "--dump-config") == shown


class Plain(Hint):
    """A hint that is no dataclass, as controlnet-aux's are."""

    name: ClassVar[str] = "plain"
    values: ClassVar = "colour"

    draw = Itself.draw
    distance = Itself.distance


def test_a_hint_without_options_is_described_by_its_name():
    assert diffx.ControlNet(Plain()).describe()["hint"] == {"name": "plain"}
    model = hints.get("tile", factor=2.0)
    assert diffx.ControlNet(model).describe()["hint"] == {"name": "tile", "factor": 2.0}


def test_the_run_yaml_of_another_kind_is_refused(tmp_path):
    run = {"method": {"name": "Diffusion"}, "adapter": {"name": "ControlNet"}}
    for name, config, message in (
        ("ip-adapter", run, "is of the adapter ControlNet, and this command is IPAdapter's"),
        ("controlnet", {"method": {"name": "Diffusion"}}, "is of no adapter, and this command is ControlNet's"),
        ("base", run, "is of the adapter ControlNet, and this command is for none"),
        ("base", {"held_out": "photos"}, "has held_out; it may have data, teacher"),
        ("controlnet", {"lora_rank": 4}, "has lora_rank; it may have data, teacher, held_out"),
        ("controlnet", run | {"adapter": {"name": "ControlNet", "hint": {"name": "cany"}}}, "unknown hint 'cany'"),
    ):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        assert message in refused("train", name, "--config", tmp_path / "run.yaml")
