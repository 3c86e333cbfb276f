"""Control images: beside scikit-image, on surfaces and poses that are known, and bad input."""

import numpy as np
import pytest
import skimage.data
import skimage.feature
from PIL import Image

from diffx import glyphs
from diffx.conditioning import hints


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(skimage.data.astronaut()[:128, 160:320])  # 160 x 128: height and width differ


def glyph(index=0, **how):
    return Image.fromarray(glyphs.Rendering(sorted(glyphs.held_out())[index], **how).image())


def test_canny_is_scikit_images(photo):
    for image in (photo, glyph()):
        gray = skimage.color.rgb2gray(np.asarray(image, np.float32) / 255)
        expected = skimage.feature.canny(gray, sigma=0.7, low_threshold=0.2, high_threshold=0.4)
        np.testing.assert_array_equal(np.asarray(hints.get("canny")(image)), expected[..., None].repeat(3, -1) * 255)


def test_canny_of_glyphs_is_lines():
    shares = [np.asarray(hints.get("canny")(glyph(i)), float).mean() / 255 for i in range(40)]
    assert 0.01 < min(shares) and max(shares) < 0.35, "neither empty nor a filled picture"


def test_edge_f1_by_hand():
    one, two = np.zeros((2, 5, 5), bool)
    one[1, :4], two[1, 2:] = True, True  # 4 and 3 edges, 2 in common
    assert hints.edge_f1(one, two) == pytest.approx(2 * 2 / (4 + 3))
    assert hints.edge_f1(one, two, tolerance=1) == pytest.approx(2 * (3 / 4) * 1 / (3 / 4 + 1))  # (1, 4) touches (1, 3); (1, 0) nothing
    assert hints.edge_f1(one, one) == 1 and hints.edge_f1(one, np.roll(one, 2, 0)) == 0
    assert hints.edge_f1(one, np.roll(one, 2, 0), tolerance=2) == 1
    assert hints.edge_f1(one * 0, one * 0) == 1 and hints.edge_f1(one, one * 0) == 0
    assert hints.edge_f1(one, two) == hints.edge_f1(two, one) == hints.edge_f1(one.astype(np.float32), two.astype(np.uint8))
