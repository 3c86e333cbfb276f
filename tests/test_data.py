"""Data and its cache: every source gives the same examples, nothing is encoded twice, and what is read is what was encoded."""

import csv
import json
import multiprocessing
import os
import random
import signal
import time
import weakref

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, UNet2DModel
from peft import LoraConfig
from PIL import Image

from diffx import glyphs
from diffx.families import family_of
from diffx.objectives.diffusion import Diffusion
from diffx.testing import IMAGE_SIZE, tiny_dit, tiny_flux, tiny_sd3, tiny_sdxl, tiny_stable_diffusion
from diffx.testing.parts import weights_from
from diffx.training.cache import Cache, default_cache, make_cache
from diffx.training.config import TrainConfig
from diffx.training.data import DataConfig
from diffx.training.draws import batch_order, order
from diffx.training.generated import Wanted, noise_generator
from diffx.training.loop import Training
from diffx.training.networks import Networks
from diffx.training.pictures import Cut, buckets, cuts_of, open_picture, picture_size, pixels_of
from diffx.training.store import Store

NUM = 12
CAPTIONS = [f"picture {i // 2}" for i in range(NUM)]  # every caption twice


def picture(i: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8))


def rows(num: int = NUM) -> list[dict]:
    return [dict(image=picture(i), text=f"picture {i // 2}", label=i % 3) for i in range(num)]


def pixel_pipeline(num_classes: int | None = None, scheduler=None, channels: int = 3) -> DDPMPipeline:
    with weights_from(0):
        unet = UNet2DModel(
            sample_size=IMAGE_SIZE, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=num_classes,
        ).eval()  # fmt: skip
    pipe = DDPMPipeline(unet, scheduler or DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def text_family():
    return family_of(tiny_stable_diffusion())


@pytest.fixture(scope="module")
def class_family():
    return family_of(pixel_pipeline(num_classes=3))


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stores(folder, kind: str) -> set[str]:
    return {path.name for path in folder.glob(f"{kind}-*")}


def everything(cache: Cache):
    x0, condition = cache.read(range(len(cache)))
    return {"x0": x0, **condition}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# sources


def folder_with_metadata(folder, suffix: str):
    folder.mkdir()
    for i in range(NUM):
        (folder / "deep").mkdir(exist_ok=True)
        picture(i).save(folder / "deep" / f"{i:02d}.png")
    lines = [dict(file_name=f"deep/{i:02d}.png", text=CAPTIONS[i], label=i % 3) for i in range(NUM)]
    if suffix == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    return folder


def folder_with_texts(folder):
    folder.mkdir()
    for i in range(NUM):
        picture(i).save(folder / f"{i:02d}.bmp")  # another format, the same picture
        (folder / f"{i:02d}.txt").write_text(CAPTIONS[i] + "\n")
    return folder


def saved_dataset(folder, **splits):
    (datasets.DatasetDict(splits) if splits else datasets.Dataset.from_list(rows())).save_to_disk(folder)
    return folder


class Rows:
    """A sequence that makes a row when it is asked for one, as users' own data sets do."""

    def __len__(self):
        return NUM

    def __getitem__(self, i):
        if not 0 <= i < NUM:
            raise IndexError(i)
        return dict(image=np.asarray(picture(i)), text=CAPTIONS[i], label=np.int64(i % 3))


SOURCES = {
    "dicts": lambda at: rows(),
    "arrays made when asked for": lambda at: Rows(),
    "Dataset": lambda at: datasets.Dataset.from_list(rows()),
    "Dataset of files": lambda at: datasets.Dataset.from_list(
        [row | {"image": str(folder)} for row, folder in zip(rows(), sorted(folder_with_texts(at / "files").glob("*.bmp")))]
    ).cast_column("image", datasets.Image()),
    "saved Dataset": lambda at: saved_dataset(at / "saved"),
    "split of a saved DatasetDict": lambda at: saved_dataset(at / "dict", train=datasets.Dataset.from_list(rows())),
    "metadata.jsonl": lambda at: str(folder_with_metadata(at / "jsonl", "jsonl")),
    "metadata.csv": lambda at: folder_with_metadata(at / "csv", "csv"),
}


@pytest.mark.parametrize("told", ["text", "label"])
def test_every_source_gives_the_same_cache(tmp_path, text_family, class_family, told):
    family = text_family if told == "text" else class_family
    sources = SOURCES | ({"texts beside": lambda at: folder_with_texts(at / "texts")} if told == "text" else {})
    config = DataConfig(cache=tmp_path / "cache")
    expected = everything(make_cache(rows(), family, config))
    for name, make in sources.items():
        assert_equal(everything(make_cache(make(tmp_path), family, config)), expected)
        for kind in ("samples", "conditions"):  # by content: nothing was encoded again
            assert len(stores(tmp_path / "cache", kind)) == 1, name


def test_class_folders_are_labels_in_order_of_their_names(tmp_path, class_family):
    for i in range(NUM):
        (tmp_path / "data" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "data" / "abc"[i % 3] / f"test_{i:02d}.png")  # `datasets` would make a test split of these
    found = everything(make_cache(tmp_path / "data", class_family, DataConfig(cache=tmp_path / "cache")))
    assert found["class_labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(found["x0"][4], pixels(picture(1)))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def test_a_model_that_is_told_nothing_needs_no_column_but_the_picture(tmp_path):
    family = family_of(pixel_pipeline())
    cache = make_cache([dict(picture=picture(i)) for i in range(3)], family, DataConfig(cache=tmp_path, image_column="picture"))
    x0, condition = cache.read([2, 0])
    assert condition == {} and torch.equal(x0[1], pixels(picture(0)))


# pictures


def test_gray_transparent_turned_and_float_pictures():
    cut = Cut((2, 3), (2, 3), (0, 0), False)
    gray = Image.fromarray(np.array([[0, 128, 255], [1, 2, 3]], np.uint8))
    assert torch.equal(pixels_of(gray, cut, 3), pixels(gray.convert("RGB")))
    assert pixels_of(gray, cut, 1).shape == (1, 2, 3)
    clear = Image.new("RGBA", (3, 2), (9, 9, 9, 0))  # nothing is to be seen of this colour
    assert (pixels_of(clear, cut, 3) == 1).all() and pixels_of(clear, cut, 4)[:, 0, 0].tolist() == pytest.approx([9 / 127.5 - 1] * 3 + [-1])
    floats = open_picture(np.array([[0, 0.5, 1], [0, 0, 0]]))
    assert np.asarray(floats).tolist() == [[0, 128, 255], [0, 0, 0]]
    turned = picture(0, 2, 3)
    turned.getexif()[274] = 3  # upside down
    assert np.array_equal(np.asarray(open_picture(turned)), np.asarray(picture(0, 2, 3))[::-1, ::-1])


def test_a_cut_lies_where_it_says(text_family):
    image = picture(0, 40, 60)
    for center in (True, False):
        for cut in cuts_of((40, 60), [(16, 16)], 6, center=center, flip=True, rng=np.random.default_rng(0))[: 2 if center else 6]:
            assert cut.resized == (16, 24) and cut.corner[0] == 0 and 0 <= cut.corner[1] <= 8
            seen = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if cut.flip else image
            whole = seen.resize((24, 16), Image.Resampling.LANCZOS)
            left = cut.corner[1]
            assert torch.equal(pixels_of(image, cut, 3), pixels(whole.crop((left, 0, left + 16, 16))))
    assert picture_size(text_family, None) == (16, 16) and picture_size(text_family, (8, 20)) == (8, 20)


def test_crops_and_flips_are_stored_as_asked_for(tmp_path, text_family):
    data = [dict(image=picture(i, 16, 32), text="x") for i in range(4)]
    both = everything(make_cache(data, text_family, DataConfig(cache=tmp_path, random_flip=True, num_crops=2)))["x0"]
    plain = [pixels(picture(i, 16, 32).crop((8, 0, 24, 16))) for i in range(4)]
    sides = torch.stack([x for each in plain for x in (each, each.flip(-1))])
    encoded = text_family.encode_images(sides)
    for k in range(8):  # each picture in both orientations, in either order; batches differ, so bits may
        distances = [(both[k] - encoded[j]).abs().max() for j in (k - k % 2, k - k % 2 + 1)]
        assert min(distances) < 1e-5 < max(distances)
    wide = make_cache(data, text_family, DataConfig(cache=tmp_path, center_crop=False, num_crops=3))
    assert len(wide) == 12 and len({x.numpy().tobytes() for x in wide.read(range(12))[0]}) > 8
    again = make_cache(data[1:], text_family, DataConfig(cache=tmp_path, center_crop=False, num_crops=3))
    assert torch.allclose(again.read(range(9))[0], wide.read(range(3, 12))[0], atol=1e-5)  # a picture's cuts do not depend on the others


def test_sdxl_is_told_of_sizes_and_corners(tmp_path):
    family = family_of(tiny_sdxl())
    data = [dict(image=picture(i, 20 + i, 40), text="x") for i in range(4)]
    cache = make_cache(data, family, DataConfig(cache=tmp_path, center_crop=False, random_flip=True, num_crops=2))
    told = cache.read(range(8))[1]["time_ids"]
    assert told[:, 0].tolist() == [20, 20, 21, 21, 22, 22, 23, 23] and told[:, 1].tolist() == [40] * 8
    assert told[:, 4:].tolist() == [[16, 16]] * 8
    assert len(set(told[:, 3].tolist())) > 2 and told[:, 2].tolist() == [0] * 8  # these pictures are wide: corners differ along the row


# what is read


def test_random_access_is_direct_encoding_bit_for_bit(tmp_path, embedded):
    family = family_of(embedded)
    made = [glyphs.Rendering(glyph, background) for glyph in glyphs.seen()[:4] for background in ("white", "blue")]
    data = [dict(image=Image.fromarray(each.image()), text=each.caption()) for each in made]
    cache = make_cache(data, family, DataConfig(cache=tmp_path))
    with torch.no_grad():  # eight pictures and eight captions are one batch here and there
        x0 = family.encode_images(torch.stack([pixels(row["image"]) for row in data]))
        condition = family.encode_condition([row["text"] for row in data], None, size=(32, 32))
    for some in ([3], [7, 0, 0, 5], range(8)):
        got, told = cache.read(list(some))
        assert got.dtype == torch.float32 and torch.equal(got, x0[list(some)])
        assert torch.equal(told["encoder_hidden_states"], condition["encoder_hidden_states"][list(some)])


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd3, tiny_flux, tiny_dit])
def test_every_family_reads_its_own_condition(tmp_path, build):
    family = family_of(build())
    size = picture_size(family, None if build is tiny_dit else IMAGE_SIZE)
    cache = make_cache(rows(4), family, DataConfig(cache=tmp_path, resolution=size))
    texts, labels = (None, torch.tensor([2, 0])) if build is tiny_dit else (["picture 1", "picture 0"], None)
    got, told = cache.read([2, 0])
    expected = family.encode_condition(texts, labels, size=size)
    assert got.shape[1:] == family.sample_shape(size) and told.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(told[name], value, atol=1e-5), name  # another batch, other last bits


def test_equal_captions_are_stored_once(tmp_path, text_family):
    cache = make_cache(rows(), text_family, DataConfig(cache=tmp_path))
    assert len(cache) == 12 and len(cache.groups[0].conditions) == 6


def test_half_precision_is_stored_in_half_the_bytes_without_loss(tmp_path):
    values = torch.randn(100, 3, 200)
    sizes = {}
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        shown = values.to(dtype).float()
        store = Store(tmp_path / name, 100)
        store.fill(lambda some, shown=shown: {"x": shown[some.start : some.stop], "n": torch.arange(some.start, some.stop)})
        got = store.read([99, 0, 64])
        assert torch.equal(got["x"], shown[[99, 0, 64]]) and got["n"].tolist() == [99, 0, 64] and got["x"].dtype == torch.float32
        assert torch.equal(store.read_all()["x"], shown)
        sizes[name] = sum(file.stat().st_size for file in store.folder.iterdir())
    assert sizes["float16"] == sizes["bfloat16"] < 0.51 * sizes["float32"]


def test_half_precision_weights_encode_in_their_own_types(tmp_path):
    pipe = tiny_stable_diffusion().to(torch.bfloat16)
    cache = make_cache(rows(4), family_of(pipe), DataConfig(cache=tmp_path))
    x0, told = cache.read([0, 1])
    assert x0.dtype == told["encoder_hidden_states"].dtype == torch.float32
    assert pipe.vae.dtype == torch.bfloat16  # it encoded in float32, and is as it was


def test_few_pictures_are_in_memory_at_once(tmp_path, text_family):
    alive = most = 0

    class Many:
        def __len__(self):
            return 300

        def __getitem__(self, i):
            nonlocal alive, most
            if not 0 <= i < 300:
                raise IndexError(i)
            array = np.full((16, 16, 3), i % 256, np.uint8)
            alive, most = alive + 1, max(most, alive + 1)
            weakref.finalize(array, gone)
            return dict(image=array, text="x")

    def gone():
        nonlocal alive
        alive -= 1

    make_cache(Many(), text_family, DataConfig(cache=tmp_path))
    assert most <= 66  # the pictures of one file


# what the name of a cache depends on


def changed(data, i: int, **entries):
    return [row | entries if k == i else row for k, row in enumerate(data)]


def nudged(component: str):
    pipe = tiny_stable_diffusion()
    with torch.no_grad():
        next(iter(pipe.components[component].parameters())).mul_(1.001)
    return family_of(pipe)


def wide() -> list[dict]:
    return [row | {"image": picture(i, 16, 24)} for i, row in enumerate(rows(4))]


CHANGES = {  # name: (data, family or None, settings, which stores are made again)
    "nothing": (wide, None, {}, ""),
    "one pixel": (lambda: changed(wide(), 2, image=pixel_changed(wide()[2]["image"])), None, {}, "samples"),
    "a caption": (lambda: changed(wide(), 2, text="other"), None, {}, "conditions"),
    "which picture has which caption": (lambda: changed(changed(wide(), 0, text="picture 1"), 2, text="picture 0"), None, {}, "conditions"),
    "one picture less": (lambda: wide()[:3], None, {}, "samples"),
    "a label that nobody reads": (lambda: changed(wide(), 2, label=7), None, {}, ""),
    "the VAE": (wide, "vae", {}, "samples"),
    "the text encoder": (wide, "text_encoder", {}, "conditions"),
    "the network": (wide, "unet", {}, ""),
    "resolution": (wide, None, dict(resolution=8), "samples conditions"),
    "center_crop": (wide, None, dict(center_crop=False), "samples"),
    "random_flip": (wide, None, dict(random_flip=True), "samples"),
    "num_crops": (wide, None, dict(random_flip=True, num_crops=2), "samples"),
    "aspect_buckets": (wide, None, dict(aspect_buckets=True), "samples conditions"),
    "seed, which nothing is drawn from": (wide, None, dict(seed=1), ""),
    "how samples would be generated": (wide, None, dict(generation_steps=3, generation_guidance_scale=2.0, num_generated=5), ""),
    "center_crop of pictures that need no cut": (lambda: rows(4), None, dict(center_crop=False), "samples conditions"),
}


def pixel_changed(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putpixel((12, 8), (0, 0, 0))
    return image


def test_the_key_depends_on_what_matters_and_on_nothing_else(tmp_path, text_family):
    make_cache(wide(), text_family, DataConfig(cache=tmp_path))
    for name, (data, component, settings, expected) in CHANGES.items():
        if "need no cut" in name:
            make_cache(data(), text_family, DataConfig(cache=tmp_path))
            expected = ""
        before = {kind: stores(tmp_path, kind) for kind in ("samples", "conditions")}
        make_cache(data(), nudged(component) if component else text_family, DataConfig(cache=tmp_path, **settings))
        made = " ".join(kind for kind in before if stores(tmp_path, kind) != before[kind])
        assert made == expected, name


def test_the_default_place_is_the_users_cache(tmp_path, monkeypatch, text_family):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_cache(rows(2), text_family)
    assert default_cache() == tmp_path / "diffx" / "data" and len(list(default_cache().iterdir())) == 2


def test_a_changed_file_is_seen_and_an_unchanged_one_is_not_read_again(tmp_path, text_family):
    folder = folder_with_texts(tmp_path / "data")
    config = DataConfig(cache=tmp_path / "cache")
    before = everything(make_cache(folder, text_family, config))["x0"]
    known = contents(tmp_path / "cache")
    assert_equal({"x0": everything(make_cache(folder, text_family, config))["x0"]}, {"x0": before})
    assert contents(tmp_path / "cache") == known
    picture(99).save(folder / "03.bmp")
    after = everything(make_cache(folder, text_family, config))["x0"]
    assert [i for i in range(NUM) if not torch.allclose(after[i], before[i], atol=1e-5)] == [3]


# interruptions and several writers


class Stops:
    """Pictures of which the ``last`` one that is asked for never comes."""

    def __init__(self, num: int, last: int):
        self.num, self.left = num, last

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return dict(image=picture(i), text=f"picture {i // 2}")


def test_an_interrupted_call_goes_on_to_equal_bytes(tmp_path, text_family):
    num = 200  # four files
    make_cache(Stops(num, 10**9), text_family, DataConfig(cache=tmp_path / "whole"))
    config = DataConfig(cache=tmp_path / "parts")
    chance = random.Random(0)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):  # after columns, captions and digests were read, at most one file later
            make_cache(Stops(num, 2 * num + 2 + chance.randrange(70)), text_family, config)
    assert 0 < len(contents(tmp_path / "parts")) < len(contents(tmp_path / "whole"))
    make_cache(Stops(num, 10**9), text_family, config)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_damaged_file_is_made_again(tmp_path, text_family):
    config = DataConfig(cache=tmp_path)
    make_cache(rows(), text_family, config)
    whole = contents(tmp_path)
    file = next(tmp_path.glob("samples-*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    make_cache(rows(), text_family, config)
    assert contents(tmp_path) == whole


def slow_rows(some: range, log=None):
    time.sleep(0.01)
    if log:
        with open(log, "a") as file:
            file.write(f"{some.start}\n")
    return {"x": torch.arange(some.start, some.stop, dtype=torch.float32)[:, None] + 0.1}


def fill(folder, num, log):
    Store(folder, num, rows_per_file=4).fill(lambda some: slow_rows(some, log))


def test_two_writers_share_the_work(tmp_path):
    # Forked: a child has torch already, and calls nothing of it that has threads.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path / "store", 203, tmp_path / "log")) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    made = (tmp_path / "log").read_text().split()
    assert sorted(map(int, made)) == list(range(0, 203, 4))  # each file once
    store = Store(tmp_path / "store", 203, rows_per_file=4)
    assert torch.equal(store.read_all()["x"], slow_rows(range(203))["x"])
    assert {file.suffix for file in store.folder.iterdir()} == {".safetensors"}


def test_a_writer_that_was_killed_leaves_nothing_in_the_way(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(3):
        worker = context.Process(target=fill, args=(tmp_path / "store", 400, tmp_path / "log"))
        worker.start()
        started = time.monotonic()
        while len(list((tmp_path / "store").glob("0*.safetensors"))) < 5 * (round_ + 1) and time.monotonic() < started + 30:
            time.sleep(0.003)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    made = len(list((tmp_path / "store").glob("0*.safetensors")))
    assert 15 <= made < 100
    counted = []
    store = Store(tmp_path / "store", 400, rows_per_file=4)
    store.fill(lambda some: counted.append(some.start) or slow_rows(some))
    assert len(counted) == 100 - made
    assert torch.equal(store.read_all()["x"], slow_rows(range(400))["x"])


# samples that the model makes


def flux_samples(latents):
    side = IMAGE_SIZE // 2
    return FluxPipeline._unpack_latents(latents, side, side, vae_scale_factor=1)


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_sdxl, tiny_sd3, tiny_flux])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_prompts_alone_give_the_pipelines_own_latents(tmp_path, build, guidance_scale):
    pipe = build()
    family = family_of(pipe)
    config = DataConfig(
        cache=tmp_path, resolution=IMAGE_SIZE, num_generated=4, generation_steps=3, generation_guidance_scale=guidance_scale, seed=5
    )
    x0, told = make_cache(["one", "two"], family, config).read(range(4))
    wanted = [Wanted("one", 0), Wanted("two", 0), Wanted("one", 1), Wanted("two", 1)]
    arguments = family.call_kwargs(3, guidance_scale)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * 4  # this pipeline wants one for each
    latents = pipe(
        prompt=[each.word for each in wanted], generator=[noise_generator(5, each) for each in wanted], output_type="latent",
        height=IMAGE_SIZE, width=IMAGE_SIZE, **arguments,
    ).images  # fmt: skip
    assert torch.equal(x0, flux_samples(latents) if build is tiny_flux else latents)
    assert x0.shape[1:] == family.sample_shape((IMAGE_SIZE, IMAGE_SIZE))
    for name, value in family.encode_condition(["two"], None, size=(IMAGE_SIZE, IMAGE_SIZE)).items():
        assert torch.allclose(told[name][3:], value, atol=1e-5)  # encoded in another batch


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), DDPMScheduler(), FlowMatchEulerDiscreteScheduler()],
    ids=["DDIM", "DDPM, which draws noise on the way", "flow"],
)
def test_nothing_at_all_gives_an_unconditional_models_samples(tmp_path, scheduler):
    pipe = pixel_pipeline(scheduler=scheduler)
    x0, told = make_cache(None, family_of(pipe), DataConfig(cache=tmp_path, num_generated=3, generation_steps=4)).read(range(3))
    generators = [noise_generator(0, Wanted(None, i)) for i in range(3)]
    images = pipe(batch_size=3, generator=generators, num_inference_steps=4, output_type="np").images
    assert told == {}
    assert np.allclose((x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), images, atol=1e-6)  # the map to [0, 1] rounds


def test_classes_give_their_samples(tmp_path, class_family):
    config = DataConfig(cache=tmp_path, num_generated=6, generation_steps=4)
    x0, told = make_cache([0, 1, 2], class_family, config).read(range(6))
    assert told["class_labels"].tolist() == [0, 1, 2, 0, 1, 2]
    scheduler, pipe = DDIMScheduler(), class_family.pipe
    scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 16, 16, generator=noise_generator(0, Wanted(1, 1)))
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, t, class_labels=torch.tensor([1])).sample, t, x).prev_sample
    assert torch.allclose(x0[4:5], x, atol=1e-5)  # another batch, other last bits


def test_dit_gives_its_samples(tmp_path):
    family = family_of(tiny_dit())
    x0, _ = make_cache([5, 7], family, DataConfig(cache=tmp_path, num_generated=2, generation_steps=3)).read([0, 1])
    generators = [noise_generator(0, Wanted(label, 0)) for label in (5, 7)]
    images = family.pipe(class_labels=[5, 7], generator=generators, num_inference_steps=3, guidance_scale=3.0, output_type="np").images
    shown = family.pipe.vae.decode(x0 / family.pipe.vae.config.scaling_factor).sample
    assert np.allclose((shown.detach() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), images, atol=1e-5)


def test_generated_samples_depend_on_everything_that_makes_them(tmp_path):
    def made(family, prompts=("one", "two"), **settings):
        settings = dict(num_generated=2, generation_steps=2) | settings
        before = stores(tmp_path, "generated")
        make_cache(list(prompts), family, DataConfig(cache=tmp_path, **settings))
        return stores(tmp_path, "generated") != before

    pipe = tiny_stable_diffusion()
    family = family_of(pipe)
    assert made(family) and not made(family)
    for settings in (
        dict(seed=1),
        dict(generation_steps=3),
        dict(generation_guidance_scale=2.0),
        dict(num_generated=3),
        dict(prompts=["one"]),
    ):
        assert made(family, **settings), settings
    assert made(nudged("unet")) and made(nudged("text_encoder")) and not made(nudged("vae"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert made(family)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    assert made(family)
    pipe.unet.set_adapters(["default"], [0.5])
    assert made(family) and not made(family)
    assert not made(family, split="other", image_column="other")  # of pictures


# batches of one size


def test_buckets_are_multiples_of_about_one_area():
    for size, multiple in (((1024, 1024), 8), ((512, 512), 8), ((32, 32), 4), ((768, 512), 16)):
        found = buckets(size, multiple)
        assert size in found and len(found) == len(set(found)) >= 5
        for height, width in found:
            assert height % multiple == width % multiple == 0
            assert 0.5 <= height / width <= 2
            assert 0.85 * size[0] * size[1] <= height * width <= size[0] * size[1]
            assert (width, height) in found or (height, width) == size
    assert len(buckets((1024, 1024), 8)) < 25 and (1024, 1024) in buckets((1024, 1024), 8) and (832, 1216) in buckets((1024, 1024), 8)


def mixed(num: int = 60) -> list[dict]:
    shapes = [(20, 20), (20, 20), (18, 34), (40, 22)]
    return [dict(image=picture(i, *shapes[i % 4]), text=f"number {i}") for i in range(num)]


def test_pictures_of_all_shapes_come_in_batches_of_one(tmp_path, text_family):
    cache = make_cache(mixed(), text_family, DataConfig(cache=tmp_path, aspect_buckets=True))
    assert sum(cache.group_sizes) == len(cache) == 60 and len(cache.group_sizes) == 3
    assert [group.size for group in cache.groups] == [(12, 20), (16, 16), (20, 12)]
    shapes = set()
    for step in range(12):
        x0, told = cache.read(batch_order(0, cache.group_sizes, 4, step, range(4)))
        assert len(x0) == len(told["encoder_hidden_states"]) == 4
        shapes.add(tuple(x0.shape[2:]))
    assert shapes == {(6, 10), (8, 8), (10, 6)}
    with pytest.raises(ValueError, match="have 2 picture sizes"):
        cache.read([0, 59])
    direct = text_family.encode_images(torch.stack([pixels_of(picture(2, 18, 34), Cut((12, 20), (12, 23), (0, 1), False), 3)]))
    assert torch.allclose(cache.read([0])[0], direct, atol=1e-5)  # the first wide picture; encoded in another batch


def test_the_order_of_groups():
    assert [batch_order(3, [50], 8, step, range(8)) for step in range(20)] == [
        order(3, 50, range(8 * step, 8 * step + 8)) for step in range(20)
    ]
    sizes, batch = [40, 3, 17], 4
    per_epoch = [10, 1, 4]  # batches: rounded, and at least one
    owner = np.repeat(range(3), sizes)
    for epoch in range(4):
        steps = [batch_order(0, sizes, batch, step, range(batch)) for step in range(15 * epoch, 15 * epoch + 15)]
        assert all(len(set(owner[found])) == 1 for found in steps)
        assert [sum(owner[found[0]] == g for found in steps) for g in range(3)] == per_epoch
        assert sorted(i for found in steps for i in found if owner[i] == 0) == list(range(40))  # one that divides: each once an epoch
    counts = np.bincount([i for step in range(15 * 51) for i in batch_order(0, sizes, batch, step, range(batch))], minlength=60)
    assert all(np.ptp(counts[owner == g]) <= 1 for g in range(3))  # nobody in a group comes more often
    first, second = (batch_order(0, sizes, batch, 7, half) for half in (range(2), range(2, 4)))  # two processes
    assert first + second == batch_order(0, sizes, batch, 7, range(4))
    assert [batch_order(1, sizes, batch, step, range(4)) for step in range(9)] != [
        batch_order(0, sizes, batch, step, range(4)) for step in range(9)
    ]


def test_training_on_a_cache_of_several_sizes(tmp_path, text_family):
    cache = make_cache(mixed(24), text_family, DataConfig(cache=tmp_path, aspect_buckets=True))
    nets = Networks(text_family, Diffusion(), None, size=(16, 16))
    training = Training(nets, cache, TrainConfig(train_steps=6, batch_size=4), Accelerator(cpu=True))
    assert all(np.isfinite(now.losses["student"]) for now in training.steps())


# bad input


def refused(data, family, match: str, tmp_path, **settings):
    with pytest.raises(ValueError, match=match):
        make_cache(data, family, DataConfig(cache=tmp_path / "cache", **settings))
    assert not stores(tmp_path / "cache", "samples")  # nothing was encoded


def test_what_is_no_data(tmp_path, text_family):
    refused(7, text_family, "data is a int; a folder, a datasets.Dataset, its Hub id", tmp_path)
    refused([], text_family, "data is empty", tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    refused(tmp_path / "rows.jsonl", text_family, "is a file; a .txt file with one prompt a line, or a folder", tmp_path)
    refused([7.0], text_family, "sequence of float; dicts", tmp_path)
    refused("a red fox", text_family, "'a red fox' is no folder or file here, and a Hub id has the form owner/name", tmp_path)
    refused(tmp_path / "no" / "where", text_family, "is no folder or file here", tmp_path)
    refused("someone/something", text_family, "did not load from the Hub", tmp_path)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", text_family, "holds no picture .it holds nothing.", tmp_path)
    (tmp_path / "empty" / "notes.md").touch()
    refused(tmp_path / "empty", text_family, "holds no picture .it holds .md.", tmp_path)
    stream = datasets.Dataset.from_list(rows(2)).to_iterable_dataset()
    refused(stream, text_family, "no random access; load it without streaming", tmp_path)
    splits = datasets.DatasetDict(one=datasets.Dataset.from_list(rows(2)), two=datasets.Dataset.from_list(rows(2)))
    refused(splits, text_family, "no split 'train'; it has one, two", tmp_path)
    assert len(make_cache(splits, text_family, DataConfig(cache=tmp_path, split="two"))) == 2


def test_columns_that_are_not_there(tmp_path, text_family, class_family):
    renamed = [dict(picture=row["image"], caption=row["text"]) for row in rows(2)]
    refused(renamed, text_family, "image_column='image' is not among the data's columns picture, caption; give image_column", tmp_path)
    refused(renamed, text_family, "caption_column='text' is not among", tmp_path, image_column="picture")
    refused(datasets.Dataset.from_list(renamed), text_family, "caption_column='text' is not among", tmp_path, image_column="picture")
    refused(renamed, class_family, "label_column='label' is not among", tmp_path, image_column="picture")
    config = DataConfig(cache=tmp_path, image_column="picture", caption_column="caption")
    assert len(make_cache(renamed, text_family, config)) == 2
    metadata = folder_with_metadata(tmp_path / "data", "jsonl")
    refused(
        metadata,
        text_family,
        "caption_column='caption' is not among the data's columns file_name, label, text",
        tmp_path,
        caption_column="caption",
    )


def test_missing_captions_are_counted_and_named(tmp_path, text_family, class_family):
    folder = folder_with_texts(tmp_path / "data")
    for i in range(3, 10):
        (folder / f"{i:02d}.txt").unlink()
    (folder / "11.txt").write_text("  \n")
    refused(folder, text_family, r"8 of 12 pictures have no caption.*: 03.bmp, 04.bmp, 05.bmp, 06.bmp, 07.bmp, \.\.\.", tmp_path)
    refused([*rows(2), dict(image=picture(5), text=None)], text_family, "1 of 3 pictures have no caption.*: row 2", tmp_path)
    refused(
        [dict(image=picture(5), text=["a", "b"])], text_family, "row 0: .'a', 'b'. is no caption; str is needed, here is list", tmp_path
    )
    refused([dict(image=picture(5), label="cat")], class_family, "row 0: 'cat' is no class number; int is needed", tmp_path)
    refused([dict(image=picture(5), label=3)], class_family, "row 0 has the label 3, and the model's classes are 0 to 2", tmp_path)
    refused(folder, class_family, "12 of 12 pictures have no class number", tmp_path)
    assert len(make_cache([dict(image=picture(5), label=2)], class_family, DataConfig(cache=tmp_path))) == 1


def test_pictures_that_do_not_open_are_named(tmp_path, text_family):
    folder = folder_with_texts(tmp_path / "data")
    (folder / "04.bmp").write_bytes(b"no picture")
    (folder / "07.bmp").write_bytes((folder / "07.bmp").read_bytes()[:300])
    refused(folder, text_family, "04.bmp does not open as a picture .*; 07.bmp does not open as a picture", tmp_path)
    for image, match in (
        (np.zeros((4, 4, 2), np.uint8), r"row 0 is an array \(4, 4, 2\); \(H, W\) or"),
        (np.zeros((4, 4, 3), np.int64), "row 0 is an array of int64; uint8 or floats"),
        (np.full((4, 4, 3), 255.0), "row 0 is an array of floats from 255 to 255; they must lie in"),
        (np.full((4, 4, 3), np.nan), "they must lie in"),
        (Image.new("I;16", (4, 4)), "row 0 has pixels of mode 'I;16'; 8 bits a channel are needed"),
        (None, "row 0 is a NoneType; a Pillow picture"),
    ):
        refused([dict(image=image, text="x")], text_family, match, tmp_path)
    with pytest.warns(UserWarning, match="1 of 1 pictures are smaller than the resolution"):
        make_cache([dict(image=np.full((4, 4, 3), 1.0), text="x")], text_family, DataConfig(cache=tmp_path))
    metadata = folder_with_metadata(tmp_path / "listed", "csv")
    (metadata / "deep" / "05.png").unlink()
    refused(metadata, text_family, "metadata.csv lists 1 files that are not there: deep/05.png", tmp_path)
    (metadata / "metadata.csv").write_text("name,text\na.png,x\n")
    refused(metadata, text_family, "needs a column file_name", tmp_path)


def test_prompts_that_do_not_fit_the_model(tmp_path, text_family, class_family):
    nothing = family_of(pixel_pipeline())
    refused(None, text_family, "told a caption of every sample that it is to make; give a list of captions", tmp_path)
    refused([1, 2], text_family, "give a list of captions", tmp_path)
    refused(None, class_family, "give a list of class numbers", tmp_path)
    refused(["one"], nothing, "told nothing of its samples, so that 'one' has no use; data=None", tmp_path)
    refused([0, 3], class_family, "entry 1 has the label 3", tmp_path)
    refused(None, nothing, "generation_guidance_scale=2.0, but UNet2DModel cannot be guided", tmp_path, generation_guidance_scale=2.0)
    refused(["one", "two"], text_family, "num_generated=1 is less than the 2 prompts", tmp_path, num_generated=1)
    refused(["one"], text_family, "aspect_buckets, num_crops and random_flip are for pictures", tmp_path, aspect_buckets=True)
    refused(
        ["one"],
        text_family,
        r"resolution=\(15, 15\): this UNet2DConditionModel takes multiples of 2, such as \(16, 16\)",
        tmp_path,
        resolution=15,
    )
    refused(rows(2), family_of(tiny_dit()), "makes pictures of .16, 16. only", tmp_path, resolution=32)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    config = DataConfig(cache=tmp_path, num_generated=2, generation_steps=1)
    assert len(make_cache(tmp_path / "prompts.txt", text_family, config)) == 2


def test_samples_that_are_not_finite_are_named(tmp_path):
    pipe = tiny_stable_diffusion()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
        pipe.vae.quant_conv.bias.fill_(torch.inf)
    family = family_of(pipe)
    with pytest.raises(FloatingPointError, match="the sample of 'one' became NaN or infinity"):
        make_cache(["one"], family, DataConfig(cache=tmp_path, num_generated=1, generation_steps=1))
    with pytest.raises(FloatingPointError, match="row 0 became NaN or infinity; load the model in float32 or bfloat16"):
        make_cache(rows(2), family, DataConfig(cache=tmp_path))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(resolution=0), "resolution=0 must be a positive number"),
        (dict(resolution=(8, 8, 8)), "must be a positive number of pixels, or .height, width."),
        (dict(num_crops=0), "num_crops=0 must be at least 1"),
        (dict(num_generated=0), "num_generated=0 must be at least 1"),
        (dict(generation_steps=0), "generation_steps=0 must be at least 1"),
        (dict(generation_guidance_scale=float("nan")), "generation_guidance_scale=nan is not a finite number"),
        (dict(num_crops=2), "num_crops=2, but with center_crop there are 1 different ones"),
        (dict(num_crops=3, random_flip=True), "there are 2 different ones"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        DataConfig(**settings)
    DataConfig(resolution=(8, 16), num_crops=2, random_flip=True, generation_guidance_scale=1.0)
    DataConfig(num_crops=9, center_crop=False)
