"""Control images: beside scikit-image and transformers, on surfaces and poses that are known, and bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import skimage.data
import skimage.feature
import skimage.measure
import skimage.morphology
import skimage.segmentation
import torch
import transformers
from hint_networks import save
from PIL import Image
from typer.testing import CliRunner

from diffx import glyphs
from diffx.cli import app
from diffx.conditioning import hints
from diffx.conditioning.hints import bridge, depth, metrics, pose, regions, sheet

NETWORKS = [
    ("depth", {"model": "depth_anything"}), ("depth", {"model": "dpt"}), ("depth", {"model": "zoedepth"}),
    ("normals", {"model": "dpt"}), ("normals", {"model": "zoedepth"}), ("segmentation", {"model": "segformer"}),
    ("segmentation", {"model": "mask2former"}), ("objects", {"model": "sam", "sure": -9, "points": 4}),
    ("openpose", {"model": "vitpose", "sure": 0}), ("openpose", {"model": "vitpose_plus", "people": "rt_detr", "sure": 0}),
]  # fmt: skip


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(skimage.data.astronaut()[:96, 160:290])  # 130 x 96: sides differ and are no multiples of 32


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


def with_network(name, options, folder):
    return hints.get(name, **{key: save(word, folder) if key in ("model", "people") else word for key, word in options.items()})


def glyph(index=0):
    return Image.fromarray(glyphs.Rendering(sorted(glyphs.held_out())[index]).image())


def pixels(image):
    return np.asarray(image, np.float32) / 255


# every hint


def check(hint, image):
    """What holds for each: size, mode, meaning of the pixels, the same twice, no error on itself."""
    drawn = hint(image)
    assert drawn.size == image.size and drawn.mode == "RGB"
    assert hint(image).tobytes() == drawn.tobytes()
    assert hint(image, at=(48, 64)).size == (64, 48)
    levels = np.asarray(drawn)
    if hint.values in ("binary", "gray"):
        assert (levels == levels[..., :1]).all()
    if hint.values == "binary":
        assert set(np.unique(levels)) == {0, 255}
    if hint.values == "normal":
        # Rounding to 8 bits moves each part by 1/255 at most, the length by sqrt(3) times that.
        assert np.abs(np.linalg.norm(levels / 127.5 - 1, axis=-1) - 1).max() < 0.01
    if hint.values == "labels":
        assert {tuple(colour) for colour in levels.reshape(-1, 3)} <= {(0, 0, 0), *map(tuple, regions.palette())}
    assert hint.error(drawn, image) == pytest.approx(0, abs=1e-6)  # sums of floats
    return drawn


@pytest.mark.parametrize("name", sheet.COMPUTED)
def test_computed_hints(name, photo):
    hint = hints.get(name)
    drawn = check(hint, photo)
    assert hint.error(drawn, photo.transpose(Image.Transpose.ROTATE_180)) > 0.05 or name == "shuffle", "another picture is off"
    assert hint.error(drawn, Image.new("RGB", photo.size, "teal")) > 0.05
    check(hint, glyph())


@pytest.mark.parametrize("name, options", NETWORKS, ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part.values())))
def test_hints_of_networks(name, options, networks, photo):
    check(with_network(name, options, networks), photo)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sheet.COMPUTED)
def test_flat_and_tiny_pictures(name):
    for size in ((1, 1), (2, 3), (32, 32)):
        image, hint = Image.new("RGB", size, "orange"), hints.get(name)
        assert hint(image).size == size and hint.error(hint(image), image) == 0


def test_transparent_gray_and_palette_pictures(photo):
    canny = hints.get("canny")
    clear = photo.copy()
    clear.putalpha(0)
    assert canny(clear).tobytes() == canny(Image.new("RGB", photo.size, "white")).tobytes()
    gray = photo.convert("L")
    assert canny(gray).tobytes() == canny(gray.convert("RGB")).tobytes()
    few = photo.quantize(16)
    assert canny(few).tobytes() == canny(few.convert("RGB")).tobytes()


def test_at_draws_at_that_size(photo):
    small = photo.resize((64, 48), Image.Resampling.BICUBIC)
    assert hints.get("canny")(photo, at=(48, 64)).tobytes() == hints.get("canny")(small).tobytes()


# references


def test_canny_is_scikit_images(photo):
    for image in (photo, glyph()):
        expected = skimage.feature.canny(skimage.color.rgb2gray(pixels(image)), sigma=0.7, low_threshold=0.2, high_threshold=0.4)
        np.testing.assert_array_equal(np.asarray(hints.get("canny")(image)), expected[..., None].repeat(3, -1) * 255)


def test_canny_of_glyphs_is_lines():
    shares = [np.asarray(hints.get("canny")(glyph(i)), float).mean() / 255 for i in range(40)]
    assert 0.01 < min(shares) and max(shares) < 0.35, "neither empty nor a filled picture"


def test_scribble_is_thick_canny_of_a_blurred_picture(photo):
    lines = skimage.feature.canny(skimage.color.rgb2gray(pixels(photo)), sigma=1.5, low_threshold=0.2, high_threshold=0.4)
    expected = scipy.ndimage.binary_dilation(lines, scipy.ndimage.generate_binary_structure(2, 1))  # the disk of 3 pixels is a cross
    np.testing.assert_array_equal(hints.get("scribble").draw(pixels(photo)), expected)


@pytest.mark.parametrize("sigma", [1.0, 2.5])
@pytest.mark.parametrize("height", [0.2, 1.0])
def test_a_step_has_its_height_as_soft_edge(sigma, height):
    step = np.zeros((31, 60, 3), np.float32)
    step[:, 30:, 1] = height  # in green alone: the steepest channel counts
    drawn = hints.get("softedge", sigma=sigma).draw(step)
    x = np.arange(60) - 29.5
    # The Gaussian over the pixels; SciPy's kernel is cut at 4 sigma and sampled, and central pixels sit half a pixel off the step.
    np.testing.assert_allclose(drawn[15], height * np.exp(-(x**2) / (2 * sigma**2)), atol=0.08 * height)
    assert drawn.max() == pytest.approx(height * np.exp(-0.125 / sigma**2), rel=0.08)


def test_softedge_is_the_steepest_channel_of_scipys(photo):
    slopes = [scipy.ndimage.gaussian_gradient_magnitude(pixels(photo)[..., c].astype(float), 1, mode="nearest") for c in range(3)]
    np.testing.assert_array_equal(hints.get("softedge").draw(pixels(photo)), np.minimum(np.max(slopes, 0) * np.sqrt(2 * np.pi), 1))


def test_line_art_by_hand():
    # A dark line on gray: what is around is lighter by the line's blurred share; the median of all lines is drawn at 127.
    image = np.full((41, 41, 3), 0.5, np.float32)
    image[:, 20] = 0.1
    drawn = hints.get("lineart").draw(image)
    darker = 0.4 - 0.4 * scipy.ndimage.gaussian_filter1d(np.eye(41)[20], 6, mode="mirror")[20]
    assert drawn[20, 20] == pytest.approx(127 / 255, rel=1e-5) and darker > 16 / 255  # float32 picture
    assert (np.delete(drawn, 20, 1) == 0).all(), "the rest is lighter than around it"
    assert hints.get("lineart").draw(image * 0.05).max() < 0.25, "faint lines stay faint"


def test_regions_are_scikit_images_superpixels(photo):
    labels = skimage.segmentation.slic(pixels(photo).astype(float), 60, 10.0, start_label=0)
    expected = skimage.color.label2rgb(labels, pixels(photo).astype(float), kind="avg", bg_label=-1)
    np.testing.assert_allclose(hints.get("regions").draw(pixels(photo)), expected, atol=1e-12)


def test_tile_and_colour_average_blocks():
    image = pixels(glyph(3))
    blocks = skimage.measure.block_reduce(image, (4, 4, 1), np.mean)
    np.testing.assert_allclose(hints.get("colour", cells=8).draw(image), blocks.repeat(4, 0).repeat(4, 1), atol=1e-6)  # float32 sums
    enlarged = hints.get("tile", factor=4).draw(image)
    assert np.abs(skimage.measure.block_reduce(enlarged, (4, 4, 1), np.mean) - blocks).mean() < 0.02, "detail is gone, areas are kept"
    np.testing.assert_array_equal(hints.get("tile", factor=1).draw(image), image)


def test_shuffle_moves_colours_and_makes_none(photo):
    flat = np.full((20, 30, 3), 0.3, np.float32)
    np.testing.assert_allclose(hints.get("shuffle").draw(flat), flat, atol=1e-6)
    drawn = hints.get("shuffle").draw(pixels(photo))
    assert drawn.min() >= pixels(photo).min() and drawn.max() <= pixels(photo).max()
    assert metrics.colour_difference(drawn, pixels(photo)) > 15
    assert hints.get("shuffle", seed=1)(photo).tobytes() != hints.get("shuffle")(photo).tobytes()


# depth and normals


def plane(normal, size, focal=None):
    """Depth of the plane through (0, 0, -100) with that normal, seen along parallel rays or from a point."""
    rows, columns = np.indices(size, float)
    if focal is None:  # n . (u, -v, 100 - z) = 0
        return 100 + (normal[0] * columns - normal[1] * rows) / normal[2]
    ray = np.stack([(columns - (size[1] - 1) / 2) / focal, ((size[0] - 1) / 2 - rows) / focal, -np.ones(size)], -1)
    return -100 * normal[2] / (ray @ normal)


@pytest.mark.parametrize("focal", [None, 40.0])
@pytest.mark.parametrize("normal", [(0, 0, 1), (0.6, 0, 0.8), (0, -0.6, 0.8), (-0.48, 0.6, 0.64)])
def test_normals_of_a_plane_are_its_own(normal, focal):
    normals = depth.normals_from_depth(plane(np.array(normal), (24, 33), focal), focal=focal)
    # Differences of points of a plane lie in it: only float64 rounding is left, border included.
    np.testing.assert_allclose(normals, np.broadcast_to(normal, normals.shape), atol=1e-11)


def sphere(size, focal=None):
    """Depth of a ball in the middle of the picture, its normals, and where these are at most 60 degrees from the axis."""
    grid = (np.arange(size) - (size - 1) / 2) / (size / 2)
    x, y = np.meshgrid(grid, -grid)
    if focal is None:
        z = np.sqrt(np.maximum(0.81 - x**2 - y**2, 0))
        normals = np.stack([x, y, z], -1) / 0.9
        found, hit = -z * size / 2, z > 0  # in pixels
    else:  # a ball of radius 0.9 around (0, 0, -3), rays (x / f, y / f, -1)
        f = focal / (size / 2)
        square = (x**2 + y**2) / f**2 + 1
        under = 9 - square * (9 - 0.81)
        found, hit = (3 - np.sqrt(np.maximum(under, 0))) / square, under > 0
        normals = (np.stack([x / f, y / f, -np.ones_like(x)], -1) * found[..., None] + [0, 0, 3]) / 0.9
    return found, normals, hit & (normals[..., 2] > 0.5)


@pytest.mark.parametrize("perspective", [False, True])
def test_normals_of_a_sphere_converge_to_its_own(perspective):
    errors = []
    for size in (64, 128, 256):
        focal = size if perspective else None
        found, normals, inside = sphere(size, focal)
        errors.append(metrics.normal_error(depth.normals_from_depth(found, focal=focal)[inside][None], normals[inside][None]))
    assert errors[-1] < 0.03, "degrees"
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes - 2).max() < 0.15, "central differences are of second order; the edge of the ball moves by whole pixels"


def test_normals_from_real_disparity():
    # scikit-image's wheel has the file. Where disparity is a u + b v + c, the surface is the plane with normal (f a, f b, c') there.
    _, _, disparity = skimage.data.stereo_motorcycle()
    disparity = np.where(np.isfinite(disparity), disparity, np.nan)[:300, :400].astype(float)
    f, u0, v0, dx, baseline = 994.978, 311.193, 254.877, 31.086, 193.001  # from the data's description
    normals = depth.normals_from_depth(baseline * f / (disparity + dx), focal=f, centre=(v0, u0))
    known = np.isfinite(normals).all(-1)
    assert known.mean() > 0.75
    np.testing.assert_allclose(np.linalg.norm(normals[known], axis=-1), 1, atol=1e-12)
    rows, columns = np.indices(disparity.shape)
    rays = np.stack([(columns - u0) / f, (v0 - rows) / f, -np.ones(disparity.shape)], -1)
    assert ((normals * rays).sum(-1)[known] < 0).all(), "every surface that is seen faces the viewer"

    window = np.stack(np.indices((9, 9)).reshape(2, -1)).T - 4  # fits of planes to disparity in windows
    design = np.column_stack([window[:, ::-1], np.ones(81)])
    angles = []
    for v in range(20, 280, 10):
        for u in range(20, 380, 10):
            patch = disparity[v - 4 : v + 5, u - 4 : u + 5].ravel()
            if not np.isfinite(disparity[v - 5 : v + 6, u - 5 : u + 6]).all():
                continue
            (a, b, c), residual, *_ = np.linalg.lstsq(design, patch)
            if np.sqrt(residual[0] / 81) < 0.02:  # pixels of disparity: it is a plane
                expected = np.array([-f * a, f * b, a * (u0 - u) + b * (v0 - v) + c + dx])
                mean = normals[v - 4 : v + 5, u - 4 : u + 5].mean((0, 1))
                angles.append(metrics.normal_error(mean[None, None], expected[None, None]))
    assert len(angles) > 200
    assert np.median(angles) < 2, "degrees, measured 1.0: 0.01 pixels of noise tilt a single normal by about 5, a window's mean by less"


def test_unknown_depths_are_unknown_normals_next_to_them_only():
    flat = np.full((9, 9), 5.0)
    flat[4, 4] = np.nan
    unknown = np.isnan(depth.normals_from_depth(flat)).any(-1)
    assert sorted(zip(*np.nonzero(unknown))) == [(3, 4), (4, 3), (4, 4), (4, 5), (5, 4)]
    np.testing.assert_array_equal(depth.paint_normals(depth.normals_from_depth(flat)), np.broadcast_to([0.5, 0.5, 1], (9, 9, 3)))


def test_painted_normals():
    left = np.array([[[-1.0, 0, 0]]])
    assert depth.paint_normals(left)[0, 0, 0] == 1 and depth.paint_normals(left, red="right")[0, 0, 0] == 0
    assert depth.paint_normals(np.array([[[0, 1.0, 0]]]))[0, 0].tolist() == [0.5, 1, 0.5], "green is up"


def test_painted_depth():
    np.testing.assert_allclose(depth.paint_depth(np.array([[1.0, 2, 4, np.inf]]), tells="distance"), [[1, 0.5, 0.25, 0]])
    np.testing.assert_allclose(depth.paint_depth(np.array([[-1.0, 0, 3, np.nan]])), [[0, 0.25, 1, 0]])
    np.testing.assert_allclose(depth.paint_depth(np.full((2, 2), 7.0)), 0.5)


@pytest.mark.parametrize("name", ["depth_anything", "dpt"])
def test_depth_is_what_transformers_pipeline_tells(name, networks, photo):
    folder = save(name, networks)
    theirs = transformers.pipeline("depth-estimation", model=folder, device="cpu")(photo)["predicted_depth"].numpy()
    expected = (theirs - theirs.min()) / (theirs.max() - theirs.min())
    np.testing.assert_allclose(
        hints.get("depth", model=folder).draw(pixels(photo)), expected, atol=1e-6
    )  # their post-processing is float32


def test_distances_are_turned_round(networks, photo):
    folder = save("zoedepth", networks)
    found, tells = depth.predict_depth(pixels(photo), folder, None, None)
    assert tells == "distance" and found.shape == (96, 130)
    drawn = hints.get("depth", model=folder).draw(pixels(photo))
    assert drawn[np.unravel_index(found.argmin(), found.shape)] == 1 and drawn[np.unravel_index(found.argmax(), found.shape)] == 0


def test_depth_error_by_hand():
    rng = np.random.default_rng(0)
    one, noise = rng.standard_normal((2, 40, 50))
    assert metrics.depth_error(one, 3 * one + 7) == pytest.approx(0, abs=1e-7)  # sqrt of a rounding of 1e-16
    assert metrics.depth_error(one, -one) == 1, "near and far are not interchangeable"
    design = np.column_stack([one.ravel(), np.ones(one.size)])
    two = one + noise
    _, residual, *_ = np.linalg.lstsq(design, two.ravel())
    assert metrics.depth_error(one, two) == pytest.approx(np.sqrt(residual[0] / ((two - two.mean()) ** 2).sum()))
    assert metrics.depth_error(one, two) == pytest.approx(metrics.depth_error(two, one))
    assert metrics.depth_error(one * 0, one * 0 + 1) == 0 and metrics.depth_error(one * 0, one) == 1


def test_normal_error_by_hand():
    one = np.broadcast_to([0.0, 0, 1], (3, 4, 3))
    tilted = np.broadcast_to([np.sin(0.3), 0, np.cos(0.3)], (3, 4, 3)).copy()
    assert metrics.normal_error(one, tilted) == pytest.approx(np.degrees(0.3))
    assert metrics.normal_error(one, -one) == 180 and metrics.normal_error(one, 5 * one) == 0
    tilted[0, 0] = np.nan
    assert metrics.normal_error(one, tilted) == pytest.approx(np.degrees(0.3))


# segments


@pytest.mark.parametrize("name", ["segformer", "mask2former"])
def test_segmentation_is_what_transformers_pipeline_tells(name, networks, photo):
    folder = save(name, networks)
    theirs = transformers.pipeline("image-segmentation", model=folder, device="cpu")(photo, subtask="semantic")
    drawn = np.asarray(hints.get("segmentation", model=folder)(photo))
    for found in theirs:
        colour = regions.palette()[int(found["label"].removeprefix("LABEL_"))]
        np.testing.assert_array_equal((drawn == colour).all(-1), np.asarray(found["mask"]) > 0)
    assert theirs


def test_palette_is_ade20ks():
    # Wall, building, sky, floor, tree as documented with ControlNet's segmentation checkpoints; two classes share a gray.
    assert regions.palette()[:5].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230], [80, 50, 50], [4, 200, 3]]
    assert regions.palette().shape == (150, 3) and len(np.unique(regions.palette(), axis=0)) == 149
    painted = regions.paint_labels(np.array([[0, 149, 150, 255, -1]]), background=149) * 255
    np.testing.assert_allclose(painted[0], [[120, 120, 120], [0, 0, 0], [120, 120, 120], [0, 0, 0], [0, 0, 0]])


def test_stacked_masks():
    masks = np.zeros((4, 6, 6), bool)
    masks[1, :, :4], masks[2, 1:3, 1:3], masks[3, 1:3, 1:3] = True, True, True
    masks[3, 1, 3] = True  # nearly mask 2, and worse; 0 is empty
    labels = regions.stacked(masks, np.array([1, 0.9, 0.95, 0.9]), same=0.7)
    expected = np.zeros((6, 6), int)
    expected[:, :4] = 1
    expected[1:3, 1:3] = 2
    np.testing.assert_array_equal(labels, expected)


def test_objects_are_the_networks_best_answers_at_a_grid_of_points(networks, photo):
    folder = save("sam", networks)
    network = transformers.SamModel.from_pretrained(folder).eval()
    processor = transformers.SamProcessor.from_pretrained(folder)
    expected = np.zeros((96, 130), bool)
    for point in ([32.5, 24], [97.5, 24], [32.5, 72], [97.5, 72]):  # x, y
        inputs = processor(photo, input_points=[[point]], return_tensors="pt")
        with torch.no_grad():
            outputs = network(**{key: inputs[key] for key in ("pixel_values", "input_points")})
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        (masks,) = processor.image_processor.post_process_masks(outputs.pred_masks, *sizes)
        expected |= masks[0, outputs.iou_scores[0, 0].argmax()].numpy()
    assert 0 < expected.mean() < 1
    drawn = np.asarray(hints.get("objects", model=folder, points=2, sure=-9, same=1.0)(photo))
    np.testing.assert_array_equal(drawn.any(-1), expected)


def test_sam_shows_nothing_where_it_is_unsure(networks, photo):
    assert not np.asarray(hints.get("objects", model=save("sam", networks), points=2, sure=1e9)(photo)).any()


def test_iou_and_covering_by_hand():
    one = np.array([[0, 0, 1, 1]])
    two = np.array([[0, 1, 1, 2]])
    assert metrics.mean_iou(one, one) == 1
    assert metrics.mean_iou(one, two) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert metrics.mean_iou(one, two, ignore=0) == pytest.approx((1 / 3 + 0) / 2)
    assert metrics.mean_iou(one * 0, one * 0, ignore=0) == 1
    # Of one: {0} best 1/2, {1} best 1/2; of two: {0} 1/2, {1} 1/3, {2} 1/2.
    assert metrics.covering(one, two) == pytest.approx((0.5 + (1 * 0.5 + 2 / 3 + 1 * 0.5) / 4) / 2)
    assert metrics.covering(one, 9 - 4 * one) == 1, "names of segments mean nothing"


def test_colour_differences_by_hand():
    black, white = np.zeros((4, 5, 3)), np.ones((4, 5, 3))
    assert metrics.colour_difference(black, white) == pytest.approx(100, abs=1e-3)  # scikit-image's white point has 5 digits
    assert metrics.palette_difference(black, white) == pytest.approx(100, abs=0.02)  # likewise, in a and b
    noise = np.random.default_rng(0).random((4, 5, 3))
    assert metrics.palette_difference(noise, noise[::-1, ::-1]) == 0 < metrics.colour_difference(noise, noise[::-1, ::-1])


def test_edge_f1_by_hand():
    one, two = np.zeros((2, 5, 5), bool)
    one[1, :4], two[1, 2:] = True, True  # 4 and 3 edges, 2 in common
    assert hints.edge_f1(one, two) == pytest.approx(2 * 2 / (4 + 3))
    assert hints.edge_f1(one, two, tolerance=1) == pytest.approx(
        2 * 1 * (3 / 4) / (1 + 3 / 4)
    )  # all of two is near one; (1, 0) is not near two
    assert hints.edge_f1(one, one) == 1 and hints.edge_f1(one, np.roll(one, 2, 0)) == 0
    assert hints.edge_f1(one, np.roll(one, 2, 0), tolerance=2) == 1
    assert hints.edge_f1(one * 0, one * 0) == 1 and hints.edge_f1(one, one * 0) == 0
    assert hints.edge_f1(one, two) == hints.edge_f1(two, one) == hints.edge_f1(one.astype(np.float32), two.astype(np.uint8))
    assert hints.edge_f1(one, one * 0.5) == pytest.approx(2 * 1 * 0.5 / (1 + 0.5)), "gray levels are parts of an edge"


# poses


def drawn_pixel_by_pixel(people, size, thickness):
    """The definition of ``draw_poses``, one pixel after the other: the last that covers it gives its colour."""
    canvas = np.zeros((*size, 3), np.uint8)
    for y in range(size[0]):
        for x in range(size[1]):
            for person in people:
                for number, (a, b) in enumerate(pose.LIMBS):
                    start, end = complex(*person[a]), complex(*person[b])
                    if abs(end - start) > 0:
                        at = (complex(x, y) - (start + end) / 2) * ((end - start) / abs(end - start)).conjugate()
                        if (at.real / (abs(end - start) / 2 + 0.5)) ** 2 + (at.imag / (thickness + 0.5)) ** 2 <= 1:
                            canvas[y, x] = np.array(pose.COLOURS[number]) * 3 // 5
                for number, (px, py) in enumerate(person):
                    if (x - px) ** 2 + (y - py) ** 2 <= thickness**2:
                        canvas[y, x] = pose.COLOURS[number]
    return canvas


def test_poses_are_drawn_as_defined():
    rng = np.random.default_rng(0)
    people = rng.uniform(-3, 31, (2, 18, 2))  # some outside
    people[0, [4, 10]] = np.nan
    people[1, 3] = people[1, 2]  # a limb of no length
    np.testing.assert_array_equal(pose.draw_poses(people, (26, 29), thickness=1.5), drawn_pixel_by_pixel(people, (26, 29), 1.5))


def test_one_limb_by_hand():
    person = np.full((1, 18, 2), np.nan)
    person[0, 1], person[0, 2] = (10, 8), (30, 8)  # neck and right shoulder: the first limb, the first colour
    drawn = pose.draw_poses(person, (17, 40), thickness=2)
    assert (drawn[8, 20] == [153, 0, 0]).all(), "0.6 of red"
    assert np.nonzero(drawn[:, 20].any(-1))[0].tolist() == [6, 7, 8, 9, 10]
    assert (drawn[8, 10] == [255, 85, 0]).all() and (drawn[8, 32] == [255, 170, 0]).all(), "dots on top"
    assert np.nonzero(drawn.any((0, 2)))[0].tolist() == list(range(8, 33))
    assert not pose.draw_poses(np.full((1, 18, 2), np.nan), (17, 40)).any()
    assert not pose.draw_poses(np.empty((0, 18, 2)), (17, 40)).any()


def test_colours_and_names_of_openpose():
    assert len(pose.KEYPOINTS) == len(pose.COLOURS) == 18 and len(pose.LIMBS) == 17
    assert pose.COLOURS[:3] == ((255, 0, 0), (255, 85, 0), (255, 170, 0)) and pose.COLOURS[17] == (255, 0, 85)
    assert {place for limb in pose.LIMBS for place in limb} == set(range(18))


def test_coco_becomes_openpose_by_name():
    coco = [
        "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow", "right elbow",
        "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle", "right ankle",
    ]  # fmt: skip
    places = np.random.default_rng(0).random((2, 17, 2))
    found = pose.openpose_from_coco(places)
    for i, name in enumerate(pose.KEYPOINTS):
        if name != "neck":
            np.testing.assert_array_equal(found[:, i], places[:, coco.index(name)])
    np.testing.assert_allclose(found[:, 1], (places[:, 5] + places[:, 6]) / 2)


def test_keypoints_are_the_networks(networks, photo):
    folder = save("vitpose", networks)
    network = transformers.VitPoseForPoseEstimation.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    boxes = [[[0.0, 0.0, 130.0, 96.0]]]
    with torch.no_grad():
        outputs = network(**processor(photo, boxes=boxes, return_tensors="pt"))
    (found,) = processor.post_process_pose_estimation(outputs, boxes=boxes)
    keypoints, scores = found[0]["keypoints"].numpy(), found[0]["scores"].numpy()
    sure = float(np.median(scores))
    seen = hints.get("openpose", model=folder, sure=max(sure, 0)).keypoints(pixels(photo))
    expected = pose.openpose_from_coco(np.where(scores[:, None] >= max(sure, 0), keypoints, np.nan)[None])
    np.testing.assert_array_equal(seen, expected)


# names, options, bad input


def refused(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_unknown_names_and_options():
    refused(lambda: hints.get("cany"), "'cany'", "'canny'", "softedge")
    refused(lambda: hints.get("openposes"), "'openpose'")
    refused(lambda: hints.get("canny", sigmar=1), "'sigmar'", "'sigma'", "low")
    assert hints.get("canny", sigma=2) == hints.get("canny", sigma=2) != hints.get("canny")
    assert {"canny", "depth", "controlnet-aux:HEDdetector"} <= set(hints.names())


@pytest.mark.parametrize(
    "name, options",
    [
        ("canny", {"sigma": 3}), ("canny", {"low": 0.4}), ("canny", {"high": 3}), ("softedge", {"sigma": 2}), ("scribble", {"sigma": 4}),
        ("scribble", {"low": 0.4}), ("scribble", {"high": 3}), ("scribble", {"width": 5}), ("lineart", {"sigma": 2}),
        ("lineart", {"least": 0.3}), ("regions", {"num_segments": 9}), ("regions", {"compactness": 1}), ("tile", {"factor": 8}),
        ("colour", {"cells": 5}), ("shuffle", {"waves": 4}), ("shuffle", {"seed": 1}),
    ],
)  # fmt: skip
def test_every_option_changes_something(name, options, photo):
    assert hints.get(name, **options)(photo).tobytes() != hints.get(name)(photo).tobytes()


@pytest.mark.parametrize(
    "name, model, options",
    [
        ("depth", "dpt", {"tells": "distance"}), ("normals", "dpt", {"tells": "distance"}), ("normals", "dpt", {"relief": 2.0}),
        ("normals", "zoedepth", {"focal": 0.2}), ("normals", "dpt", {"red": "right"}), ("objects", "sam", {"points": 5, "sure": -9}),
        ("objects", "sam", {"sure": -9}), ("objects", "sam", {"sure": -9, "same": 0}), ("openpose", "vitpose", {"thickness": 1, "sure": 0}),
        ("openpose", "vitpose", {"sure": 0}), ("openpose", "vitpose", {"people": "rt_detr", "sure": 0}),
    ],
)  # fmt: skip
def test_every_option_of_networks_changes_something(name, model, options, networks, photo):
    near = dict(list(options.items())[1:])  # without the first
    drawn = [with_network(name, {"model": model, **some}, networks).draw(pixels(photo)) for some in (options, near)]
    assert (drawn[0] != drawn[1]).any()


def test_tolerance_forgives(photo):
    moved = Image.fromarray(np.roll(np.asarray(photo), 1, 1))
    for name in ("canny", "softedge", "scribble", "lineart"):
        strict, mild = (hints.get(name, tolerance=tolerance) for tolerance in (0, 1))
        assert mild.error(mild(photo), moved) < 0.5 * strict.error(strict(photo), moved)


@pytest.mark.parametrize(
    "name, options",
    [
        ("canny", {"sigma": -1}), ("canny", {"low": 0.5}), ("canny", {"tolerance": -1}), ("softedge", {"sigma": 0}),
        ("scribble", {"width": 2}), ("lineart", {"least": 1}), ("regions", {"num_segments": 0}),
        ("tile", {"factor": 0.5}), ("colour", {"cells": 0}),
        ("shuffle", {"waves": 0}), ("depth", {"model": "a/b", "tells": "metres"}), ("normals", {"model": "a/b", "red": "up"}),
        ("normals", {"model": "a/b", "relief": 0}), ("objects", {"model": "a/b", "points": 0}), ("openpose", {"model": "a/b", "sure": 2}),
    ],
)  # fmt: skip
def test_options_out_of_range(name, options):
    refused(lambda: hints.get(name, **options), *(word for word in options if word != "model"))


@pytest.mark.parametrize("name", ["depth", "normals", "segmentation", "objects", "openpose"])
def test_networks_are_looked_for_before_work(name, tmp_path):
    refused(lambda: hints.get(name), "needs a network", "model=")
    refused(lambda: hints.get(name, model=tmp_path / "missing" / "folder"), "no folder here", "owner/name")
    (tmp_path / "weights.bin").touch()
    refused(lambda: hints.get(name, model=tmp_path), "no config.json", "weights.bin")
    hints.get(name, model="owner/name")  # nothing is loaded yet


def test_networks_that_cannot_draw(networks, photo, tmp_path):
    dpt = save("dpt", networks)
    refused(lambda: hints.get("openpose", model=dpt)(photo), "'dpt'", "VitPoseForPoseEstimation")
    refused(lambda: hints.get("depth", model=save("segformer", networks))(photo), "'segformer'", "AutoModelForDepthEstimation")
    people = save("rt_detr", networks)
    config = json.loads(open(f"{people}/config.json").read())
    config["id2label"] = {"0": "car", "1": "dog"}
    unlabelled = tmp_path / "dogs"
    unlabelled.mkdir()
    for file in ("model.safetensors", "preprocessor_config.json"):
        (unlabelled / file).write_bytes(open(f"{people}/{file}", "rb").read())
    (unlabelled / "config.json").write_text(json.dumps(config))
    refused(lambda: hints.get("openpose", model=save("vitpose", networks), people=unlabelled)(photo), "'person'")


def test_networks_without_all_weights_are_refused(networks, photo, tmp_path):
    from safetensors.torch import load_file, save_file

    source = save("dpt", networks)
    weights = load_file(f"{source}/model.safetensors")
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes(open(f"{source}/{file}", "rb").read())
    unused = {key: value for key, value in weights.items() if "fusion_stage.layers.0.residual_layer1" not in key}
    assert len(unused) < len(weights)
    save_file(unused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    drawn = hints.get("depth", model=tmp_path)(photo)  # as Intel/dpt-large is published
    assert drawn.tobytes() == hints.get("depth", model=source)(photo).tobytes()
    save_file(
        {key: value for key, value in weights.items() if "head" not in key}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    refused(lambda: hints.get("depth", model=str(tmp_path) + "/")(photo), "lacks weights", "head")


def test_pictures_that_are_none(photo):
    canny = hints.get("canny")
    refused(lambda: canny(np.zeros((4, 4, 3))), "ndarray", "Image.fromarray")
    refused(lambda: canny(Image.new("F", (8, 8))), "mode 'F'", "RGB")
    refused(lambda: canny(Image.new("I;16", (8, 8))), "mode 'I;16'")
    for at in ((0, 5), (5,), (5.0, 5.0), (-1, 4)):
        refused(lambda at=at: canny(photo, at=at), "height", "96")
    refused(lambda: canny.error(canny(photo, at=(48, 64)), photo), "64 x 48", "130 x 96", "at=")
    refused(lambda: canny.error(photo, canny(photo)), "no canny hint", "colours")
    refused(lambda: canny.error(Image.new("F", (8, 8)), photo.resize((8, 8))), "mode 'F'")
    assert hints.get("colour").error(photo, photo) > 0, "here colours are what is meant"


def test_metrics_refuse_what_is_no_map():
    one = np.zeros((4, 5))
    refused(lambda: hints.edge_f1(one, one[1:]), "(4, 5)", "(3, 5)")
    refused(lambda: hints.edge_f1(one, one + 255), "255", "[0, 1]")
    refused(lambda: hints.edge_f1(one[None], one[None]), "(H, W)")
    refused(lambda: hints.edge_f1(one, one, tolerance=-1), "tolerance=-1")
    refused(lambda: metrics.depth_error(one, one * np.nan), "NaN", "20 pixels")
    refused(lambda: metrics.normal_error(one, one), "(H, W, 3)")
    refused(lambda: metrics.mean_iou(one, one), "integers")
    refused(lambda: depth.paint_depth(one, tells="distance"), "positive")
    refused(lambda: depth.paint_depth(one * np.nan), "0 known")
    refused(lambda: depth.normals_from_depth(one[:1]), "2 x 2")
    refused(lambda: depth.normals_from_depth(one, focal=10), "positive")
    refused(lambda: regions.paint_labels(one), "integers")
    refused(lambda: pose.draw_poses(np.zeros((1, 17, 2)), (8, 8)), "18", "openpose_from_coco")
    refused(lambda: pose.draw_poses(np.zeros((18, 2)), (8, 8)), "people")
    refused(lambda: pose.draw_poses(np.zeros((1, 18, 2)), (8, 0)), "positive")


@pytest.mark.skipif(bridge.installed(), reason="tests/test_controlnet_aux.py has those of an environment with controlnet-aux")
def test_controlnet_aux_missing_or_misspelled():
    refused(lambda: hints.get("controlnet-aux:CanyDetector"), "'CannyDetector'", "ZoeDetector")
    refused(lambda: hints.get("controlnet-aux:CannyDetector"), "not installed", "README")


# cost and command


def test_importing_hints_is_cheap():
    code = (
        "import sys, time, diffx; before = set(sys.modules); start = time.process_time();"
        "import diffx.conditioning.hints as hints; hints.get('canny');"
        "cost = time.process_time() - start; new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "assert not new & {'skimage', 'scipy', 'transformers', 'torchvision', 'cv2', 'controlnet_aux'}, new; print(cost)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3, "CPU-seconds beyond `import diffx`"


def test_the_command_writes_all_and_a_sheet(tmp_path, networks):
    glyph(4).save(tmp_path / "glyph.png")
    words = ["hints", tmp_path / "glyph.png", "--output", tmp_path / "out", "--depth", save("dpt", networks), "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["hints"][: len(sheet.COMPUTED)] == list(sheet.COMPUTED) and {"depth", "normals"} <= set(found["hints"])
    for name in found["hints"]:
        with Image.open(tmp_path / "out" / f"{name.replace(':', '-')}.png") as drawn:
            assert drawn.size == (32, 32)
    with Image.open(tmp_path / "out" / "canny.png") as drawn:
        assert drawn.tobytes() == hints.get("canny")(glyph(4)).tobytes()
    with Image.open(tmp_path / "out" / "sheet.png") as drawn:
        rows = -(-(len(found["hints"]) + 1) // 4)
        assert drawn.size == (4 * (256 + 4) - 4, rows * (256 + 18) - 4), "in rows of four, the picture first, enlarged, with names"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--only", "cany"], "'canny'"), (["--only", "depth"], "needs a network"), (["--depth", "/no/such/folder"], "no folder here"),
        (["--only", "controlnet-aux:HEDetector"], "'HEDdetector'"), (["--at", "0", "64"], "(height, width)"),
    ],
)  # fmt: skip
def test_the_command_refuses_before_it_writes(words, said, tmp_path):
    glyph().save(tmp_path / "glyph.png")
    result = CliRunner().invoke(app, ["hints", str(tmp_path / "glyph.png"), "--output", str(tmp_path / "out"), *words])
    assert result.exit_code == 2 and result.stderr.startswith("diffx: ") and said in result.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "cannot be read" in CliRunner().invoke(app, ["hints", str(tmp_path / "broken.png")]).stderr
