"""controlnet-aux behind our call, and its drawings and OpenCV's beside ours; ``make test-hints`` runs this in an environment of its own."""

import subprocess
import sys

import numpy as np
import pytest
import skimage.data
from PIL import Image

from diffx.conditioning import hints
from diffx.conditioning.hints import bridge, pose, sheet

if not bridge.installed():
    pytest.skip("controlnet-aux is not installed; make test-hints installs it", allow_module_level=True)


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(skimage.data.astronaut()[:192, 128:448])  # 320 x 192, multiples of 64: nothing is padded


def pixels(image):
    return np.asarray(image, np.float32) / 255


@pytest.mark.parametrize("detector", bridge.WITHOUT_WEIGHTS)
def test_detectors_keep_our_promises(detector, photo):
    hint = hints.get(f"controlnet-aux:{detector}")
    for image in (photo, photo.crop((0, 0, 130, 97)), photo.resize((32, 32)).convert("L")):
        state = np.random.get_state()[1].copy()
        drawn = hint(image)
        assert drawn.size == image.size and drawn.mode == "RGB"
        assert hint(image).tobytes() == drawn.tobytes(), "noise included"
        assert (np.random.get_state()[1] == state).all(), "NumPy's generator is where it was"
        assert hint.error(drawn, image) == 0
    assert hint(photo, at=(100, 50)).size == (50, 100)


def test_a_detector_is_called_as_it_is(photo):
    import controlnet_aux

    theirs = controlnet_aux.CannyDetector()(photo, 50, 120, detect_resolution=192, image_resolution=192)
    assert hints.get("controlnet-aux:CannyDetector", low_threshold=50, high_threshold=120)(photo).tobytes() == theirs.tobytes()


def test_one_detector_is_imported_at_a_time():
    code = (
        "import sys; from diffx.conditioning import hints; hints.get('controlnet-aux:CannyDetector');"
        "parts = sorted(name for name in sys.modules if name.startswith('controlnet_aux.'));"
        "assert parts == ['controlnet_aux.canny', 'controlnet_aux.util'], parts;"
        "assert not {'torchvision', 'timm', 'controlnet_aux'} & set(sys.modules);"
        "import controlnet_aux; assert controlnet_aux.ZoeDetector and controlnet_aux.CannyDetector is sys.modules[parts[0]].CannyDetector"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("detector", bridge.DETECTORS)
def test_every_detector_can_be_imported(detector):
    module, _ = bridge.DETECTORS[detector]
    assert bridge._import(module, detector).__name__ == detector


def test_refusals(tmp_path):
    for detector, options, said in [
        ("HEDdetector", {}, "needs weights="),
        ("CannyDetector", {"weights": "lllyasviel/Annotators"}, "has no weights"),
        ("CannyDetector", {"low_treshold": 1}, "'low_threshold'"),
        ("HEDdetector", {"weights": tmp_path}, "cannot make its HEDdetector"),  # an empty folder
        ("DWposeDetector", {}, "cannot make its DWposeDetector"),  # it needs mmpose, which no longer installs
    ]:
        with pytest.raises(ValueError, match=said):
            hints.get(f"controlnet-aux:{detector}", **options)


# ours beside theirs


def test_line_art_is_theirs(photo):
    ours, theirs = (np.asarray(hints.get(name)(photo), int) for name in ("lineart", "controlnet-aux:LineartStandardDetector"))
    assert np.abs(ours - theirs).max() <= 1, "they cut where we round"


def test_canny_agrees_with_opencvs():
    import cv2

    # OpenCV rounds gradient directions to 45 degrees and scikit-image interpolates between: thin lines, here and there a pixel apart.
    gray = np.rint(skimage.data.astronaut()[:256, :320] @ [0.2125, 0.7154, 0.0721]).astype(np.uint8)
    theirs = cv2.Canny(gray, 100, 200, L2gradient=True) > 0
    ours = hints.get("canny", sigma=0, low=100 / 255, high=200 / 255).draw(np.repeat(gray[..., None] / np.float32(255), 3, -1))
    assert hints.edge_f1(ours, theirs) > 0.9 and hints.edge_f1(ours, theirs, tolerance=1) > 0.97


def test_colour_is_opencvs_area_resampling(photo):
    import cv2

    small = cv2.resize(pixels(photo), (10, 6), interpolation=cv2.INTER_AREA)
    theirs = cv2.resize(small, photo.size, interpolation=cv2.INTER_NEAREST)
    np.testing.assert_allclose(hints.get("colour", cells=6).draw(pixels(photo)), theirs, atol=1e-5)  # float32 sums of 1024 pixels


@pytest.mark.parametrize("seed", range(4))
def test_poses_look_like_theirs(seed):
    bridge._import("open_pose", "OpenposeDetector")
    draw, keypoint = (sys.modules[f"controlnet_aux.open_pose.{name}"] for name in ("util", "body"))
    places = np.random.default_rng(seed).integers(20, 236, (18, 2))
    told = [keypoint.Keypoint(x=(x + 0.5) / 256, y=(y + 0.5) / 256) for x, y in places]  # they cut to whole pixels
    theirs = draw.draw_bodypose(np.zeros((256, 256, 3), np.uint8), told)
    ours = pose.draw_poses(places[None], (256, 256))
    assert {tuple(colour) for colour in ours.reshape(-1, 3)} == {tuple(colour) for colour in theirs.reshape(-1, 3)}
    ink = ours.any(-1) | theirs.any(-1)
    # They cut middles, lengths and angles to whole pixels and degrees, which turns long limbs by a pixel at their ends.
    assert (ours == theirs).all(-1)[ink].mean() > 0.85
    assert ours.any(-1).sum() == pytest.approx(theirs.any(-1).sum(), rel=0.05), "as thick"


def test_their_detectors_are_on_the_sheet(photo, tmp_path):
    found = sheet.available()
    assert list(found) == [*sheet.COMPUTED, *(f"controlnet-aux:{name}" for name in bridge.WITHOUT_WEIGHTS)]
    files = sheet.write(photo, found, tmp_path)
    assert all(file.is_file() for file in files) and len(files) == len(found) + 1
