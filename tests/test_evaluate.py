"""Evaluations: pictures in folders, encoders with known answers, floors, and whole evaluations of folders and real pipelines."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from diffx.evaluation import (
    PictureFolder,
    PictureTensor,
    TransformersClassifier,
    TransformersFeatures,
    alignment,
    compare,
    evaluate,
    evaluate_pictures,
    frechet_distance,
    inception_score,
    random_pictures,
)
from diffx.testing import call_inputs, tiny_stable_diffusion
from diffx.testing.parts import MAX_TOKENS, byte_tokenizer, weights_from


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(folder, images, captions=None):
    """Each picture as a file, and its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
        if captions:
            (folder / f"{i:03}.txt").write_text(captions[i] + "\n")
    return folder


# pictures


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    images = pixels(0, 3, 6, 8, 3)
    save(tmp_path / "b", images[1:])
    save(tmp_path / "a", images[:1])
    (tmp_path / "notes.md").write_text("no picture")
    folder = PictureFolder(tmp_path)
    assert len(folder) == 3 and folder.captions is None
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(folder.read([0, 1, 2]), expected)
    assert torch.equal(folder.read([2, 0]), expected[[2, 0]])


def test_captions_are_the_texts_beside_the_pictures_if_all_have_one(tmp_path):
    save(tmp_path, pixels(0, 2, 4, 4, 3), ["a cat", "a dog"])
    assert PictureFolder(tmp_path).captions == ["a cat", "a dog"]
    (tmp_path / "000.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"000\.txt.*UTF-8"):
        PictureFolder(tmp_path)
    (tmp_path / "000.txt").unlink()
    assert PictureFolder(tmp_path).captions is None


def test_transparency_is_white_and_gray_has_three_channels(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 51).save(tmp_path / "gray.png")
    clear, gray = PictureFolder(tmp_path).read([0, 1])
    assert torch.equal(clear, torch.ones(3, 4, 4)) and torch.equal(gray, torch.full((3, 4, 4), 0.2))


def test_a_resolution_takes_the_middle_square(tmp_path):
    image = np.zeros((4, 10, 3), np.uint8)
    image[:, 3:7] = 200
    save(tmp_path, [image])
    assert torch.equal(PictureFolder(tmp_path, 4).read([0]), torch.full((1, 3, 4, 4), 200 / 255))
    large = PictureFolder(tmp_path, 9).read([0])
    assert large.shape == (1, 3, 9, 9)
    np.testing.assert_allclose(large, 200 / 255, rtol=1e-6)  # float32 weights of the resampling have sum 1 up to rounding


def test_pictures_of_two_sizes_are_refused_by_name(tmp_path):
    save(tmp_path, [pixels(0, 8, 8, 3), pixels(1, 8, 6, 3)])
    with pytest.raises(ValueError, match=r"001\.png' has 6 x 8 pixels.*000\.png' 8 x 8; give a resolution"):
        PictureFolder(tmp_path)
    assert PictureFolder(tmp_path, 6).read([0, 1]).shape == (2, 3, 6, 6)


def test_unreadable_pictures_are_refused_by_name(tmp_path):
    save(tmp_path, pixels(0, 2, 40, 40, 3))
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2])
    folder = PictureFolder(tmp_path)  # the head is whole
    with pytest.raises(ValueError, match=r"001\.png' cannot be read .*remove it"):
        folder.read([0, 1])
    (tmp_path / "001.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"001\.png' cannot be read"):
        PictureFolder(tmp_path)


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no picture \(\.png"):
        PictureFolder(tmp_path)
    with pytest.raises(ValueError, match="no folder here"):
        PictureFolder(tmp_path / "none")


def test_random_pictures_do_not_change_with_their_number():
    few, many = random_pictures(3, seed=1), random_pictures(5, seed=1)
    assert torch.equal(few.images, many.images[:3]) and few.captions == many.captions[:3]
    assert not torch.equal(few.images, random_pictures(3, seed=2).images)


# encoders

TINY = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
VISION = {**TINY, "image_size": 24, "patch_size": 8}
WORDS = ["a cat", "a dog that is much longer than this model reads"]


def text_config() -> dict:
    tokenizer = byte_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, **special}


def saved(model, folder, tokenizer: bool = True):
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def clip_folder(folder, tokenizer: bool = True):
    with weights_from(0):
        config = CLIPConfig(
            text_config={**text_config(), "projection_dim": 12}, vision_config={**VISION, "projection_dim": 12}, projection_dim=12
        )
        return saved(CLIPModel(config).eval(), folder, tokenizer)


def siglip_folder(folder):
    with weights_from(0):
        return saved(SiglipModel(SiglipConfig(text_config=text_config(), vision_config=VISION)).eval(), folder)


@pytest.mark.parametrize("make", [clip_folder, siglip_folder])
def test_pictures_and_texts_meet_in_the_models_own_similarity(make, tmp_path):
    features = TransformersFeatures(make(tmp_path))
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    embedded, texts = features(images), features.texts(WORDS)
    cosine = (embedded / np.linalg.norm(embedded, axis=1)[:, None]) @ (texts / np.linalg.norm(texts, axis=1)[:, None]).T

    model = {clip_folder: CLIPModel, siglip_folder: SiglipModel}[make].from_pretrained(tmp_path).eval()
    tokens = byte_tokenizer()(WORDS, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    if make is siglip_folder:
        tokens.pop("attention_mask")
    with torch.no_grad():
        output = model(pixel_values=(images - mean) / std, **tokens)
        expected = output.logits_per_image - (model.logit_bias if make is siglip_folder else 0)
    scale = model.logit_scale.exp().item()
    np.testing.assert_allclose(cosine * scale, expected.numpy(), rtol=2e-5, atol=1e-5)  # float32


def test_a_folder_without_tokenizer_reads_no_text(tmp_path):
    features = TransformersFeatures(clip_folder(tmp_path, tokenizer=False))
    assert not features.reads_text
    with pytest.raises(ValueError, match="tokenizer included"):
        features.texts(["a"])


def test_weights_that_are_not_there_are_never_drawn_at_random(tmp_path):
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    classifier = ViTForImageClassification(ViTConfig(**VISION, num_labels=5)).eval()
    folder = saved(classifier, tmp_path / "vit", tokenizer=False)  # a ViT without the pooler that ViTModel has
    settings = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with torch.no_grad():
        expected = classifier.vit(pixel_values=images).last_hidden_state[:, 0]
        logits = classifier(pixel_values=images).logits
    np.testing.assert_allclose(TransformersFeatures(folder)(images), expected.numpy(), atol=1e-6)  # the same float32 graph
    probabilities = TransformersClassifier(folder)(images)
    np.testing.assert_allclose(probabilities, logits.softmax(1).numpy(), atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)  # a float64 softmax
    with pytest.raises(ValueError, match="lacks weights that ViTForImageClassification needs: classifier"):
        TransformersClassifier(saved(ViTModel(ViTConfig(**VISION)), tmp_path / "bare", tokenizer=False))


def test_dino_is_fed_at_the_size_of_its_preprocessor(tmp_path):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=40, patch_size=8)
    model = Dinov2Model(config).eval()
    folder = saved(model, tmp_path / "dino", tokenizer=False)
    settings = {"crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 28}, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=images).pooler_output
    np.testing.assert_allclose(TransformersFeatures(folder)(images), expected.numpy(), atol=1e-6)  # the same float32 graph


def test_folders_without_safetensors_or_without_an_image_tower_are_refused(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    torch.save(CLIPModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    TransformersFeatures(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        TransformersFeatures(folder)
    bert = saved(BertModel(BertConfig(vocab_size=20, **TINY)), tmp_path / "bert", tokenizer=False)
    with pytest.raises(ValueError, match="'bert' model without an image size; use a CLIP, SigLIP, DINO or ViT"):
        TransformersFeatures(bert)


# folders of pictures


class Corners:
    """Two features of a picture: the red of its first pixel and the green of its last."""

    name = "corners"

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        return torch.stack([images[:, 0, 0, 0], images[:, 1, -1, -1]], dim=1).numpy()


def measured(evaluation, row: int = 1) -> dict[str, float]:
    return {measure.name: measure.value for measure in evaluation.rows[row].measures}


def test_other_real_pictures_score_like_the_floor_strange_and_repeated_ones_do_not():
    real, other = random_pictures(300, seed=0), random_pictures(150, seed=1)
    floor, same = (measured(evaluate_pictures(other, real, progress=False), row) for row in (0, 1))
    # Two draws of one distribution: the figures are equal up to their scatter, a tenth of FD and some per cent of shares here.
    assert same["FD"] == pytest.approx(floor["FD"], rel=0.25) and abs(same["KID"]) < 4 * floor["KID sd"]
    for name in ("precision", "recall", "density", "coverage"):
        assert same[name] == pytest.approx(floor[name], abs=0.15)
    assert floor["R-precision@1"] > 0.98 and same["R-precision@1"] > 0.98

    strange = measured(evaluate_pictures(1 - other.images, real, progress=False))  # negatives; measured 4 times FD's floor
    assert strange["FD"] > 2 * floor["FD"] and strange["KID"] > 10 * floor["KID sd"] and "R-precision@1" not in strange
    assert all(strange[name] < floor[name] - 0.3 for name in ("precision", "recall", "density", "coverage"))
    few = measured(evaluate_pictures(other.images[:30].repeat(5, 1, 1, 1), real, progress=False))
    assert few["precision"] > floor["precision"] - 0.1  # all are like real ones, and all kinds are not there
    assert few["recall"] < floor["recall"] - 0.5 and few["coverage"] < floor["coverage"] - 0.1


def test_figures_are_those_of_the_features(tmp_path):
    real, made = pixels(0, 40, 4, 4, 3), pixels(1, 20, 4, 4, 3)
    found = evaluate_pictures(save(tmp_path / "made", made), save(tmp_path / "real", real), features=Corners(), progress=False)
    assert [row.role for row in found.rows] == ["reference", "pictures"]
    assert {(m.count, m.seed) for row in found.rows for m in row.measures} == {(20, 0)}
    order = np.random.default_rng(0).permutation(40)

    def corners(images):
        return Corners()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)

    expected = frechet_distance(corners(made), corners(real[order[:20]]))
    assert measured(found)["FD"] == pytest.approx(expected, rel=1e-9)  # sums in another order
    assert measured(found, 0)["FD"] == pytest.approx(frechet_distance(corners(real[order[20:]]), corners(real[order[:20]])), rel=1e-9)


def test_a_tensor_a_folder_and_any_batch_size_give_the_same_figures(tmp_path):
    real, made = pixels(0, 30, 4, 4, 3), pixels(1, 15, 4, 4, 3)
    tensors = [torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 for images in (made, real)]
    folders = save(tmp_path / "made", made), save(tmp_path / "real", real)
    rows = [
        [row.measures for row in evaluate_pictures(*sets, features=Corners(), progress=False, batch_size=size).rows]
        for sets, size in ((tensors, 16), (folders, 16), (folders, 4))
    ]
    assert rows[0] == rows[1] == rows[2]


def test_text_alignment_and_inception_score_stand_beside_those_of_real_pictures(tmp_path):
    clip = TransformersFeatures(clip_folder(tmp_path / "clip"))
    classifier = TransformersClassifier(
        saved(ViTForImageClassification(ViTConfig(**VISION, num_labels=5)), tmp_path / "vit", tokenizer=False)
    )
    captions = [f"thing {i}" for i in range(12)]
    real = save(tmp_path / "real", pixels(0, 12, 24, 24, 3), captions)
    made = save(tmp_path / "made", pixels(1, 6, 24, 24, 3), captions[:6])
    options = dict(features=clip, classifier=classifier, measures=["KID"], progress=False)
    found = evaluate_pictures(made, real, **options)
    assert [m.name for m in found.rows[1].measures] == ["KID", "KID sd", "IS (vit)", "alignment"]
    images = PictureFolder(made).read(range(6))
    assert measured(found)["alignment"] == pytest.approx(alignment(clip(images), clip.texts(captions[:6])), rel=1e-6)  # other batches
    assert measured(found)["IS (vit)"] == pytest.approx(inception_score(classifier(images)), rel=1e-6)
    assert all(m.floor == f.value for m, f in zip(found.rows[1].measures, found.rows[0].measures, strict=True))
    for file in real.glob("*.txt"):
        file.unlink()
    without = evaluate_pictures(made, real, **options)
    assert "alignment" not in measured(without) and "no captions" in without.markdown()


def test_a_folder_evaluation_writes_its_report(tmp_path):
    made, real = (PictureTensor(torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))) for n in (10, 20))
    found = evaluate_pictures(made, real, features=Corners(), progress=False)
    assert [path.name for path in found.save(tmp_path)] == ["report.md", "report.json", "pictures.png"]  # no steps, no plot
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["rows"] == json.loads(json.dumps([asdict(row) for row in found.rows])) and content["settings"]["width"] == 2
    assert (tmp_path / "report.md").read_text().count("\n| ") == 1 + 2
    with Image.open(tmp_path / "pictures.png") as grid:
        assert np.asarray(grid.convert("L")).std() > 10  # of 255: not an empty sheet


@pytest.mark.parametrize(
    ("made", "real", "options", "message"),
    [
        (
            (10, 8),
            (20, 8),
            dict(features=None),
            r"FD of 64 features needs at least 65 pictures in each set, there are 10: .* 130 real ones",
        ),
        ((10, 8), (20, 9), {}, r"have 8 x 8 pixels, the real ones 9 x 9; give a resolution"),
        ((5, 8), (20, 8), {}, "5 pictures to measure and 20 real ones .*at least 6 are needed, and twice as many"),
        ((10, 8), (10, 8), {}, "5 pictures to measure and 10 real ones"),
        ((10, 8), (20, 8), dict(measures=["FID"]), "measure 'FID' is not one of FD, KID"),
        ((10, 8), (20, 8), dict(measures=[]), "at least one is needed"),
        ((10, 8), (20, 8), dict(batch_size=0), "batch_size=0 must be at least 1"),
        ((10, 8), (20, 8), dict(resolution=0), "resolution=0 must be at least 1"),
    ],
)
def test_bad_sets_of_pictures_are_refused(made, real, options, message):
    sets = [torch.rand(count, 3, size, size) for count, size in (made, real)]
    with pytest.raises(ValueError, match=message):
        evaluate_pictures(*sets, **(dict(features=Corners(), progress=False) | options))


def test_a_resolution_lets_two_sizes_meet():
    found = evaluate_pictures(torch.rand(10, 3, 8, 8), torch.rand(20, 3, 9, 7), features=Corners(), resolution=6, progress=False)
    assert found.rows[1].measures[0].count == 10


# models


@pytest.fixture(scope="module")
def tiny():
    """A tiny pipeline, what to call it with, and real pictures of its size."""
    pipe = tiny_stable_diffusion()
    inputs = call_inputs(pipe)
    inputs.pop("prompt")
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe, inputs, PictureTensor(images, [f"thing {i}" for i in range(20)], "things")


SAMPLERS = ("UniPC", "diffusers:HeunDiscreteScheduler")


@pytest.fixture(scope="module")
def evaluation(tiny):
    pipe, inputs, real = tiny
    options = dict(samplers=SAMPLERS, num_inference_steps=(2, 3), guidance_scale=(1.0, 4.0), features=Corners(), progress=False)
    return evaluate(pipe, real, batch_size=4, **options, **inputs)


def test_every_run_is_measured_once(evaluation, tiny):
    assert len(evaluation.rows) == 1 + 2 * 2 * 2
    assert [row.role for row in evaluation.rows[:5]] == ["reference", "sampler", "sampler", "control", "control"]
    assert [row.nfe for row in evaluation.rows[:5]] == [None, 2, 3, 3, 5]  # Heun calls twice a step, once in the last
    assert {m.count for row in evaluation.rows for m in row.measures} == {10}  # half of the real ones
    assert set(evaluation.prompts) < set(tiny[2].captions) and len(evaluation.prompts) == 8
    assert {pixels.shape for pixels in evaluation.images.values()} == {(8, 16, 16, 3)}
    assert type(tiny[0].scheduler).__name__ == "DDIMScheduler"


def test_pictures_are_those_of_a_comparison_and_of_a_saved_folder(evaluation, tiny, tmp_path):
    pipe, inputs, real = tiny
    order = sorted(np.random.default_rng(0).permutation(20)[10:])
    prompts = [real.captions[i] for i in order]
    compared = compare(
        pipe, ["UniPC"], num_inference_steps=(3,), guidance_scale=(4.0,), prompts=prompts, reference_steps=3, progress=False, batch_size=4,
        **inputs,
    )  # fmt: skip
    images = compared.images["UniPC", 3, 4.0]
    assert np.array_equal(images[:8], evaluation.images["UniPC", 3, 4.0])
    folder = evaluate_pictures(save(tmp_path, images), real, features=Corners(), progress=False)
    (row,) = (row for row in evaluation.rows if (row.sampler, row.num_inference_steps, row.guidance_scale) == ("UniPC", 3, 4.0))
    assert folder.rows[1].measures == row.measures


def test_given_prompts_are_repeated_and_needed_without_captions(tiny):
    pipe, inputs, real = tiny
    options = dict(samplers=["UniPC"], num_inference_steps=(2,), features=Corners(), progress=False, **inputs)
    found = evaluate(pipe, real.images, prompts=["a", "b", "c"], num_images=7, **options)
    assert found.prompts == ("a", "b", "c", "a", "b", "c", "a")
    # The shipped encoder could judge these prompts, but not the real pictures' captions: no floor, no figure.
    options |= dict(features=None, measures=["KID"])
    assert set(measured(evaluate(pipe, real, prompts=["rocket"], num_images=7, **options))) == {"KID", "KID sd"}
    with pytest.raises(ValueError, match=r"no captions \(name\.txt beside name\.png, for every picture\), so prompts are needed"):
        evaluate(pipe, real.images, num_images=7, **options)


def test_an_evaluation_writes_table_pictures_and_plot(evaluation, tmp_path):
    assert [path.name for path in evaluation.save(tmp_path)] == ["report.md", "report.json", "pictures.png", "quality.png"]
    report = (tmp_path / "report.md").read_text()
    assert report == evaluation.markdown() and report.count("\n| ") == 1 + len(evaluation.rows)
    with Image.open(tmp_path / "pictures.png") as grid, Image.open(tmp_path / "quality.png") as plot:
        assert grid.height > 16 * 96 and grid.width > 5 * 96  # 8 prompts x 2 scales; 5 columns of pictures scaled up to 96
        assert plot.width > 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(samplers=["UniPV"]), "nearest is 'UniPC'"),
        (dict(samplers="UniPC"), "not one string"),
        (dict(num_inference_steps=(0,)), "from 1 on, got 0"),
        (dict(num_images=11), "11 pictures to measure and 20 real ones"),
        (dict(heigth=16), "takes no 'heigth'"),
        (dict(real="nowhere"), "no folder here"),
        (dict(features=None), "FD of 64 features"),
    ],
)
def test_bad_evaluations_are_refused_before_a_run(options, message, tiny):
    pipe, inputs, real = tiny
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    good = dict(real=real, samplers=["UniPC"], num_inference_steps=(2,), features=Corners(), progress=False, **inputs)
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, **(good | options))
    hook.remove()
    assert not calls
