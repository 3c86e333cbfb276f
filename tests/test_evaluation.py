"""Evaluation: closed forms of the metrics, the shipped encoder on glyphs nobody trained on, and ``compare`` on real pipelines."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import diffx
from diffx import glyphs
from diffx.calibration.fixed import calibration_of
from diffx.evaluation import (
    Comparison,
    GlyphEvaluator,
    GlyphFeatures,
    TransformersFeatures,
    compare,
    frechet_distance,
    halves,
    make_sampler,
    near_copy_share,
    parse_prompt,
    precision_recall,
    prototypes,
    psnr,
    r_precision,
    render,
    rms,
)
from diffx.evaluation.report import error_plot, picture_grid
from diffx.evaluation.samplers import split_count
from diffx.testing import call_inputs, tiny_flux, tiny_stable_diffusion


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def whitened(seed: int, count: int, dim: int) -> np.ndarray:
    """(count, dim) samples whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = normal(seed, count, dim)
    x -= x.mean(0)
    return np.linalg.qr(x)[0] * np.sqrt(count - 1)


# --- metrics


def test_rms_and_psnr_are_their_definitions():
    a, b = np.zeros((2, 3)), np.full((2, 3), 0.1)
    assert rms(a, b) == pytest.approx(0.1, rel=1e-15)
    assert psnr(a, b) == pytest.approx(20, rel=1e-14)  # 20 log10(1 / 0.1)
    assert psnr(a, b, peak=2.0) == pytest.approx(20 + 20 * np.log10(2), rel=1e-14)
    assert psnr(a, a) == float("inf")
    with pytest.raises(ValueError, match="same shape"):
        rms(a, b[:1])


def test_frechet_distance_of_samples_with_exact_moments_is_the_formula():
    x = whitened(0, 300, 6)
    mean, factor = normal(1, 6), normal(2, 6, 6)
    y = mean + whitened(3, 200, 6) @ factor  # covariance F^T F
    root = np.linalg.svd(factor, compute_uv=False)  # tr (I C)^(1/2) is the sum of C's root eigenvalues
    expected = mean @ mean + 6 + np.sum(root**2) - 2 * np.sum(root)
    # The moments are exact up to rounding of sums over 300 samples.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_equal_sets_is_zero_and_of_shifted_ones_the_squared_shift():
    x, shift = normal(0, 100, 5) @ normal(1, 5, 5), normal(2, 5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)  # rounding of traces near 50
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-10)


def test_frechet_distance_refuses_fewer_samples_than_features():
    assert frechet_distance(normal(0, 6, 5), normal(1, 6, 5)) > 0
    with pytest.raises(ValueError, match=r"5 samples of 5 features.*at least 6"):
        frechet_distance(normal(0, 6, 5), normal(1, 5, 5))
    with pytest.raises(ValueError, match="one D"):
        frechet_distance(normal(0, 6, 5), normal(1, 6, 4))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(normal(0, 6, 2), np.full((6, 2), np.nan))


def test_precision_and_recall_of_equal_and_of_distant_sets():
    x = normal(0, 50, 3)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    # One of two real clusters is covered: all that was made is real, half of what is real was made.
    assert precision_recall(np.concatenate([x, x + 100]), x) == (1.0, 0.5)
    assert precision_recall(x, np.concatenate([x, x + 100])) == (0.5, 1.0)


def test_precision_needs_more_than_k_samples():
    precision_recall(normal(0, 4, 2), normal(1, 4, 2), k=3)
    with pytest.raises(ValueError, match="k=4"):
        precision_recall(normal(0, 4, 2), normal(1, 4, 2), k=4)


def test_r_precision_counts_nearest_prototypes():
    table = np.eye(4)
    assert r_precision(table, table, range(4)) == 1.0
    assert r_precision(table, table, [0, 1, 3, 2]) == 0.5
    assert r_precision(0.6 * table + 0.1, table, range(4)) == 1.0
    with pytest.raises(ValueError, match=r"0\.\.3"):
        r_precision(table, table, [0, 1, 2, 4])


def test_near_copies_are_those_under_the_threshold_of_fresh_pictures():
    training, fresh = normal(0, 500, 8), normal(1, 400, 8)
    share, threshold = near_copy_share(fresh, training, fresh)
    assert share == pytest.approx(0.05, abs=1 / 400)  # the quantile itself, up to one sample
    assert near_copy_share(training[:100], training, fresh) == (1.0, threshold)
    assert near_copy_share(fresh + 100, training, fresh) == (0.0, threshold)


def test_halves_are_disjoint_and_equally_long():
    first, second = halves(11, seed=0)
    assert len(first) == len(second) == 5 and not set(first) & set(second)


# --- features


def test_shipped_encoder_tells_held_out_glyphs_and_backgrounds_apart():
    """Real against real: one rendering each of the 136 unseen glyphs on three backgrounds, 408 candidates (chance 0.2 %)."""
    backgrounds = ("white", "gray", "blue")
    prompts = [glyphs.Rendering(glyph, background).caption() for glyph in sorted(glyphs.held_out()) for background in backgrounds]
    features = GlyphFeatures()
    table = prototypes(prompts, features, seed=1, per_prompt=3)
    score = r_precision(features(render(prompts, seed=2)), table, range(len(prompts)))
    assert score > 0.95  # measured 0.983; 0.985 on all six; the misses are look-alikes such as "large red circle" and "octagonal sign"


def test_renderings_depend_on_the_seed_and_the_prompt_alone():
    both = render(["rocket", "ghost on pink"], seed=3, per_prompt=2)
    assert both.shape == (4, 3, 32, 32) and both.dtype == torch.float32 and 0 <= both.min() and both.max() <= 1
    assert torch.equal(both[2:], render(["ghost on pink"], seed=3, per_prompt=2))
    assert torch.equal(both[2:], render(["ghost on pink", "ghost on pink"], seed=3))
    assert not torch.equal(both[2], both[3]) and not torch.equal(both, render(["rocket", "ghost on pink"], seed=4, per_prompt=2))


def test_prompts_are_parsed_and_unknown_ones_refused():
    names = glyphs.names()
    assert parse_prompt("rocket on blue") == (names.index("rocket"), "blue")
    assert parse_prompt("meat on bone") == (names.index("meat on bone"), "white")
    assert parse_prompt("meat on bone on gray") == (names.index("meat on bone"), "gray")
    with pytest.raises(ValueError, match="'rocket'"):
        parse_prompt("rockt on blue")
    with pytest.raises(ValueError, match="gray, pink"):
        parse_prompt("rocket on purple")


def test_glyph_features_resize_and_refuse_what_is_no_picture():
    features, images = GlyphFeatures(), render(["rocket", "ghost on pink"], seed=0)
    found = features(images)
    assert found.shape == (2, 64) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)  # float32 normalisation
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert np.linalg.norm(features(large) - found, axis=1).max() < 0.25  # of sqrt(2) between strangers: resampling blurs a little
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        features(images * 2 - 1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        features(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match="uint8"):
        features((images * 255).byte())


def test_missing_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no encoder\.safetensors"):
        GlyphFeatures(tmp_path)


def test_transformers_features_of_a_clip_folder(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": 20},
        vision_config={**tiny, "image_size": 24, "patch_size": 8, "projection_dim": 12},
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "tiny-clip")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    (tmp_path / "tiny-clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))

    features = TransformersFeatures(tmp_path / "tiny-clip")
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    assert features.name == "tiny-clip"
    np.testing.assert_allclose(features(images), expected.numpy(), atol=1e-6)  # the same float32 graph
    assert features(torch.rand(2, 3, 40, 30)).shape == (2, 12)
    with pytest.raises(ValueError, match="cannot load an image model"):
        TransformersFeatures(tmp_path / "nothing-here")


# --- samplers


CONFIG = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", timestep_spacing="trailing").config


def test_samplers_by_name_with_options():
    ours = make_sampler("DPMSolver:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true", CONFIG)
    assert type(ours) is diffx.DPMSolver and ours.config.use_karras_sigmas is True
    assert (ours.config.algorithm_type, ours.config.prediction_type) == ("sde-dpmsolver++", "v_prediction")
    stock = make_sampler("diffusers:UniPCMultistepScheduler?solver_order=3", CONFIG)
    assert type(stock) is UniPCMultistepScheduler and stock.config.solver_order == 3
    assert stock.config.timestep_spacing == "trailing"


def test_samplers_from_folders(tmp_path):
    saved = UniPCMultistepScheduler.from_config(CONFIG, solver_order=3)
    saved.save_pretrained(tmp_path / "pipeline" / "scheduler")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "scheduler"):
        assert make_sampler(str(folder), CONFIG).config.solver_order == 3
    assert make_sampler(f"{tmp_path / 'pipeline'}?solver_order=1", CONFIG).config.solver_order == 1
    diffx.UniPC.from_config(CONFIG).save_pretrained(tmp_path / "ours")
    assert type(make_sampler(str(tmp_path / "ours"), CONFIG)) is diffx.UniPC
    with pytest.raises(ValueError, match="prediction_type='v_prediction', the model has 'epsilon'"):
        make_sampler(str(tmp_path / "ours"), DDIMScheduler(beta_schedule="scaled_linear").config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Unipc", "nearest is 'UniPC'; known: DDIM"),
        ("DDIMScheduler", "nearest is 'diffusers:DDIMScheduler'"),
        ("diffusers:DDIMSchedulr", "nearest is 'diffusers:DDIMScheduler'"),
        ("diffusers:StableDiffusionPipeline", "unknown sampler"),
        ("UniPC:solver_ordr=2", "no option 'solver_ordr'; did you mean 'solver_order'"),
        ("diffusers:DDIMScheduler:etas=1", "DDIMScheduler has no option 'etas'"),
        ("UniPC:solver_order=two", "kind of its default, 2"),
        ("UniPC:use_karras_sigmas=yes", "kind of its default, False"),
        ("UniPC:solver_order", "key=value"),
        ("UniPC:solver_order=1,solver_order=2", "each key once"),
        ("diffusers:UniPCMultistepScheduler:solver_type=sideways", "refuses its options"),
        ("/no/such/folder", "no folder here"),
        ("UniPC@6", "only comparisons take steps after @"),
        ("emoji_calibrated", "nearest is 'emoji_calibrated_6'"),
        ("emoji_calibrated_6", "sampler 'emoji_calibrated_6' was made for num_train_timesteps=1024, the model has 1000"),
    ],
)
def test_bad_samplers_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(spec, CONFIG)


def test_steps_of_a_sampler_follow_its_name(tmp_path):
    options = "DPMSolver:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true"
    folder = tmp_path / "run@3"
    folder.mkdir()
    for spec in ("UniPC", options, "diffusers:DDIMScheduler?eta=1", "owner/name", str(folder), f"{folder}?solver_order=1"):
        assert split_count(spec) == (spec, None)
        assert split_count(f"{spec}@12") == (spec, 12)
    for count in ("", "0", "-1", "2.5", "six"):
        with pytest.raises(ValueError, match="after @ comes a number of steps from 1 on, as in UniPC@6"):
            split_count(f"UniPC@{count}")


def test_broken_sampler_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no scheduler_config\.json"):
        make_sampler(str(tmp_path), CONFIG)
    file = tmp_path / "scheduler_config.json"
    for content, message in (("{", "not readable JSON"), ("[]", "holds a list"), ('{"_class_name": "os.system"}', "no other code is run")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            make_sampler(str(tmp_path), CONFIG)


# --- compare

SAMPLERS = ("UniPC", "DPMSolver:algorithm_type=sde-dpmsolver++", "diffusers:UniPCMultistepScheduler", "diffusers:HeunDiscreteScheduler")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    pipe = tiny_stable_diffusion()
    inputs = call_inputs(pipe)
    inputs.pop("prompt")
    return compare(
        pipe, SAMPLERS, num_inference_steps=(3, 5), guidance_scale=(1.0, 4.0), prompts=("a cat", "a dog"), num_images_per_prompt=2,
        reference_steps=12, batch_size=3, progress=False, negative_prompt="bad", **inputs,
    )  # fmt: skip


def find(comparison: Comparison, sampler: str, steps: int, scale: float = 4.0):
    return next(r for r in comparison.rows if (r.sampler, r.num_inference_steps, r.guidance_scale) == (sampler, steps, scale))


def test_every_run_is_there_once(comparison):
    assert len(comparison.rows) == 2 * (2 + 2 * len(SAMPLERS))
    assert [row.role for row in comparison.rows[:3]] == ["reference", "floor", "sampler"]
    assert find(comparison, SAMPLERS[2], 3).role == "control"
    assert len(comparison.images) == 2 * (1 + 2 * len(SAMPLERS))
    assert {pixels.shape for pixels in comparison.images.values()} == {(2, 16, 16, 3)}


def test_network_calls_are_counted(comparison):
    assert find(comparison, "UniPC", 5).nfe == 5
    assert find(comparison, "diffusers:HeunDiscreteScheduler", 5).nfe == 9  # two a step, one in the last
    assert (find(comparison, "UniPC", 5, 4.0).batch_factor, find(comparison, "UniPC", 5, 1.0).batch_factor) == (2, 1)


def test_all_samplers_start_from_the_same_noise_and_meet_the_reference(comparison):
    reference, floor = comparison.rows[:2]
    assert (reference.rms, reference.latent_rms, reference.psnr) == (0.0, 0.0, None)
    assert 0 < floor.rms < find(comparison, "UniPC", 3).rms * 3
    ours, twin = find(comparison, "UniPC", 5), find(comparison, "diffusers:UniPCMultistepScheduler", 5)
    assert ours.latent_rms == pytest.approx(twin.latent_rms, rel=1e-3)  # drop-ins agree to 1e-5 of the sample
    assert ours.latent_rms < find(comparison, "UniPC", 3).latent_rms


def test_fresh_noise_is_noticed(comparison):
    assert {row.sampler for row in comparison.rows if row.stochastic} == {SAMPLERS[1]}
    assert find(comparison, SAMPLERS[1], 3).rms is None


def test_keyed_noise_of_a_pipeline_without_generator_for_the_scheduler_is_noticed_too():
    pipe = tiny_flux()
    inputs = call_inputs(pipe)
    inputs.pop("prompt")
    found = compare(
        pipe, ["DPMSolver:algorithm_type=sde-dpmsolver++", "Euler"], num_inference_steps=(2,), prompts=["no"], progress=False,
        reference="diffusers:FlowMatchEulerDiscreteScheduler", reference_steps=4, **inputs,
    )  # fmt: skip
    assert [row.stochastic for row in found.rows] == [False, False, True, False]
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)


def test_batch_size_and_other_prompts_do_not_change_a_picture(comparison):
    pipe = tiny_stable_diffusion()
    inputs = call_inputs(pipe)
    inputs.pop("prompt")
    alone = compare(
        pipe, ["UniPC"], num_inference_steps=(3,), guidance_scale=(4.0,), prompts=("a cat",), reference_steps=3, batch_size=1,
        progress=False, negative_prompt="bad", **inputs,
    )  # fmt: skip
    a, b = alone.images["UniPC", 3, 4.0][0], comparison.images["UniPC", 3, 4.0][0]
    assert np.abs(a.astype(int) - b).max() <= 1  # another batch size sums in another order


def test_report_is_json_markdown_and_two_pictures(comparison, tmp_path):
    comparison.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.png", "error.png", "report.json", "report.md"]
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["rows"] == [asdict(row) | {"measures": []} for row in comparison.rows]
    assert content["prompts"] == ["a cat", "a dog"] and content["settings"]["seed"] == 0
    report = (tmp_path / "report.md").read_text()
    assert report == comparison.markdown() and report.count("\n| ") == 1 + len(comparison.rows)
    with Image.open(tmp_path / "compare.png") as grid, Image.open(tmp_path / "error.png") as plot:
        assert grid.height > 4 * 96 and grid.width > 9 * 96  # 2 prompts x 2 scales; 9 columns of pictures scaled up to 96
        assert plot.width > 500
    comparison.save(tmp_path)  # again, over the old files
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture
def table(tmp_path):
    """A folder with a calibrated table of 4 steps for ``tiny_stable_diffusion``: DPM-Solver's own."""
    config = tiny_stable_diffusion().scheduler.config
    solver = diffx.DPMSolver.from_config(config)
    solver.set_timesteps(4)
    diffx.Calibrated.from_config(config, calibration=calibration_of(solver).to_dict()).save_pretrained(tmp_path / "table")
    return str(tmp_path / "table")


def test_samplers_with_steps_of_their_own_stand_beside_the_others(table, recwarn):
    pipe, heun = tiny_stable_diffusion(), "diffusers:HeunDiscreteScheduler"
    inputs = call_inputs(pipe)
    inputs.pop("prompt")
    words = ["UniPC", f"{heun}@3", table, "DPMSolver@4", "UniPC@5"]
    found = compare(pipe, words, num_inference_steps=(2, 3), prompts=["a"], reference_steps=6, progress=False, **inputs)
    assert not [str(warning.message) for warning in recwarn if "calibrated" in str(warning.message)]
    runs = [(row.sampler, row.num_inference_steps, row.nfe) for row in found.rows[2:]]
    assert runs == [("UniPC", 2, 2), ("UniPC", 3, 3), (heun, 3, 5), (table, 4, 4), ("DPMSolver", 4, 4), ("UniPC", 5, 5)]
    ours, twin = find(found, table, 4, 3.0), find(found, "DPMSolver", 4, 3.0)
    assert ours.latent_rms == pytest.approx(twin.latent_rms, rel=1e-4)  # one table, but for the rounding of its weights in JSON

    grid = np.asarray(picture_grid(found))
    places = {}
    for (sampler, n, _), (pixels,) in found.images.items():
        shown = pixels.repeat(6, 0).repeat(6, 1)  # 16 pixels, enlarged to 96
        top = grid.shape[0] - 96 - 3
        places[sampler, n] = [x for x in range(grid.shape[1] - 95) if np.array_equal(grid[top : top + 96, x : x + 96], shown)]
    order = [("diffusers:DDIMScheduler", 6), ("UniPC", 2), ("UniPC", 3), ("UniPC", 5), (heun, 3), (table, 4)]
    assert [places[key][0] for key in order] == sorted(places[key][0] for key in order)
    assert places["UniPC", 5][0] - places["UniPC", 3][0] == 96 + 3  # one group, under one name
    lines = {line.get_label(): list(line.get_xdata()) for line in error_plot(found).axes[0].lines}
    assert (lines["UniPC"], lines[heun], lines[table]) == ([2, 3, 5], [5], [4])
    assert f"| {table} | 4 |" in found.markdown()


@pytest.mark.parametrize(
    ("samplers", "arguments", "message"),
    [
        (["{table}@5"], {}, "was made for 4 steps alone, asked were 5; leave out '@5', or make another one"),
        (["UniPC"], dict(reference="{table}"), "was made for few steps; use a sampler that takes 6"),
        (["UniPC@7"], {}, "no fewer than the most steps of any sampler, 7"),
        (["UniPC", "UniPC@3"], {}, "sampler 'UniPC' is listed twice at 3 steps"),
        (["{table}", "{table}@4"], {}, "is listed twice at 4 steps"),
    ],
)
def test_steps_that_cannot_be_are_refused(table, samplers, arguments, message):
    arguments = {key: value.format(table=table) for key, value in arguments.items()}
    words = [word.format(table=table) for word in samplers]
    with pytest.raises(ValueError, match=message):
        compare(tiny_stable_diffusion(), words, num_inference_steps=(3,), prompts=["a"], reference_steps=6, progress=False, **arguments)


def test_pipeline_is_given_back_as_it_was_also_after_an_error():
    pipe = tiny_stable_diffusion()
    scheduler, inputs = pipe.scheduler, call_inputs(pipe)
    inputs.pop("prompt")
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="diffusers:DDIMScheduler at 4 steps and guidance 3"):
        compare(pipe, ["UniPC"], num_inference_steps=(2,), prompts=["a"], reference_steps=4, progress=False, **inputs)
    assert pipe.scheduler is scheduler
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(samplers=["UniPV"]), "nearest is 'UniPC'"),
        (dict(samplers=[]), "at least one"),
        (dict(prompts=[]), "at least one"),
        (dict(prompts="a cat"), "not one string"),
        (dict(samplers=["UniPC", "UniPC"]), "listed twice"),
        (dict(num_inference_steps=(0,)), "from 1 on, got 0"),
        (dict(batch_size=0), "from 1 on, got 0"),
        (dict(guidance_scale=(float("nan"),)), "not a finite number"),
        (dict(reference_steps=3), "no fewer than the most steps"),
        (dict(reference="DDIM:etta=1"), "no option 'etta'"),
        (dict(reference="diffusers:EulerAncestralDiscreteScheduler"), "draws fresh noise"),
        (dict(heigth=16), "takes no 'heigth'"),
        (dict(latents=None), "passes this itself"),
    ],
)
def test_bad_comparisons_are_refused(arguments, message):
    pipe = tiny_stable_diffusion()
    inputs = call_inputs(pipe)
    good = dict(samplers=["UniPC"], num_inference_steps=(4,), prompts=["a"], reference_steps=4, progress=False)
    good |= {"height": inputs["height"], "width": inputs["width"]}
    with pytest.raises(ValueError, match=message):
        compare(pipe, **(good | arguments))
    assert type(pipe.scheduler) is DDIMScheduler


def test_ancestral_noise_from_the_generator_is_noticed():
    pipe = tiny_stable_diffusion()
    inputs = call_inputs(pipe)
    inputs.pop("prompt")
    spec = "diffusers:" + EulerAncestralDiscreteScheduler.__name__
    found = compare(pipe, [spec], num_inference_steps=(2,), prompts=["a"], reference_steps=2, progress=False, **inputs)
    assert [row.stochastic for row in found.rows] == [False, False, True]


def test_evaluator_measures_each_run_beside_its_floor():
    images = render(["rocket", "ghost on pink"] * 40, seed=9)
    prompts = ["rocket", "ghost on pink"] * 40
    precision, distance = GlyphEvaluator(seed=1).evaluate(images, prompts)
    assert (precision.name, precision.value, precision.floor, precision.count, precision.seed) == ("R-precision@1", 1.0, 1.0, 80, 1)
    assert distance.name == "FD (glyph encoder)" and 0 < distance.value < 3 * distance.floor
    (swapped,) = GlyphEvaluator(seed=1).evaluate(images[:2].flip(0), prompts[:2])  # two pictures: too few for a distance
    assert swapped.value == 0.0
