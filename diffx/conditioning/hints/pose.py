"""People as OpenPose draws them: the drawing from keypoints, and keypoints by a network."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from .hint import Hint, Values
from .metrics import codes, mean_iou
from .models import check_source, load

KEYPOINTS = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip
# Pairs of those, in the order in which they are drawn; limb i and keypoint i have colour i.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS = tuple(tuple(int(255 * part + 1e-9) for part in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18))  # the wheel of hues
LIMB_LIGHT = 0.6
# COCO's 17 keypoints: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, left before right. None is the neck.
FROM_COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


@dataclass(frozen=True)
class OpenPose(Hint):
    """The people in a picture as sticks and dots on black.

    Args:
        model: folder or Hub id of a ViTPose network of transformers, for COCO's 17 keypoints.
        people: folder or Hub id of an object detector of transformers that knows "person" (RT-DETR, ...); None takes the whole picture
            as one person.
        sure: least score of a person or a keypoint, in [0, 1].
        thickness: half the width of a stick and the radius of a dot, in pixels; published ControlNets know 4 at 512 pixels.
        device: as torch spells it; None is "cuda" where there is one, else "cpu".
    """

    name: ClassVar[str] = "openpose"
    values: ClassVar[Values] = "colour"
    model: str | Path | None = None
    people: str | Path | None = None
    sure: float = 0.3
    thickness: float = 4.0
    device: str | None = None

    def __post_init__(self) -> None:
        check_source(self.name, self.model, "usyd-community/vitpose-base-simple")
        if self.people is not None:
            check_source(self.name, self.people, "PekingU/rtdetr_r50vd_coco_o365")
        if not 0 <= self.sure <= 1 or not self.thickness > 0:
            raise ValueError(f"{self}: sure must be in [0, 1], and thickness positive")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        size = pixels.shape[0], pixels.shape[1]
        return draw_poses(self.keypoints(pixels), size, thickness=self.thickness) / 255

    def keypoints(self, pixels: np.ndarray) -> np.ndarray:
        """(P, 18, 2) as ``draw_poses`` takes them, of a picture (H, W, 3) in [0, 1]."""
        import torch

        assert self.model is not None  # __post_init__
        boxes = self._boxes(pixels)
        if not len(boxes):
            return np.empty((0, len(KEYPOINTS), 2))
        network = load(self.model, self.device, "VitPoseForPoseEstimation")
        experts = network.config.backbone_config.num_experts > 1  # ViTPose+: one for each data set it learned; the first is COCO's
        told = {"dataset_index": torch.zeros(len(boxes), dtype=torch.long, device=network.device)} if experts else {}
        outputs, _ = network(pixels, told, boxes=[boxes])
        (found,) = network.processor.post_process_pose_estimation(outputs, boxes=[boxes])
        people = [np.where(person["scores"][:, None] >= self.sure, person["keypoints"], np.nan) for person in found]
        return openpose_from_coco(np.stack(people))

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """1 - ``mean_iou`` of sticks and dots, each colour for itself; the background does not count."""
        return 1 - mean_iou(codes(one), codes(two), ignore=0)

    def _boxes(self, pixels: np.ndarray) -> np.ndarray:
        """(P, 4): left, top, width, height of each person."""
        height, width = pixels.shape[:2]
        if self.people is None:
            return np.array([[0.0, 0.0, width, height]])
        network = load(self.people, self.device, "AutoModelForObjectDetection")
        persons = [label for label, name in network.config.id2label.items() if name == "person"]
        if not persons:
            raise ValueError(f"the detector {str(self.people)!r} knows no label 'person'; give one that was trained on COCO")
        outputs, _ = network(pixels)
        (found,) = network.processor.post_process_object_detection(outputs, target_sizes=[(height, width)], threshold=self.sure)
        corners = found["boxes"][found["labels"] == persons[0]].double().cpu().numpy()
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)


def draw_poses(keypoints: np.ndarray, size: tuple[int, int], *, thickness: float = 4.0) -> np.ndarray:
    """(H, W, 3) uint8: people as OpenPose's 18 keypoints and 17 limbs on black, later people on top.

    A limb is the ellipse between its keypoints, ``thickness`` wide on either side, at 0.6 of its colour; a keypoint is a disk of that
    radius. A pixel is painted where its centre, which has whole coordinates, lies in the disk, or in the ellipse with semi-axes half a
    pixel longer: the rim is painted, too, as by ControlNet's preprocessor (OpenCV's polygons, whose corners are rounded to pixels).

    Source: Cao et al. 2018 (arXiv:1812.08008); colours and widths are ControlNet's.

    Args:
        keypoints: (P, 18, 2), x and y in pixels in the order of ``KEYPOINTS``; NaN where one is not seen. It may lie outside.
        size: (height, width).

    Raises:
        ValueError: another shape, a size that is none, or a thickness that is not positive.
    """
    keypoints = np.asarray(keypoints, np.float64)
    if keypoints.ndim != 3 or keypoints.shape[1:] != (len(KEYPOINTS), 2):
        raise ValueError(
            f"keypoints have shape {keypoints.shape}; give (people, 18, 2), x and y in pixels; COCO's 17 become them by openpose_from_coco"
        )
    if min(size) < 1 or not thickness > 0:
        raise ValueError(f"size={size}, thickness={thickness}: height, width and thickness must be positive")
    canvas = np.zeros((*size, 3), np.uint8)
    y, x = np.indices(size, dtype=np.float64)
    for person in keypoints:
        for (start, end), colour in zip(LIMBS, COLOURS):
            (x0, y0), (x1, y1) = person[start], person[end]
            length = np.hypot(x1 - x0, y1 - y0)
            if length > 0:  # neither NaN nor one point
                dx, dy, cos, sin = x - (x0 + x1) / 2, y - (y0 + y1) / 2, (x1 - x0) / length, (y1 - y0) / length
                along, across = (cos * dx + sin * dy) / (length / 2 + 0.5), (cos * dy - sin * dx) / (thickness + 0.5)
                canvas[along**2 + across**2 <= 1] = [int(level * LIMB_LIGHT) for level in colour]
        for (px, py), colour in zip(person, COLOURS):
            canvas[(x - px) ** 2 + (y - py) ** 2 <= thickness**2] = colour  # nowhere where it is NaN
    return canvas


def openpose_from_coco(keypoints: np.ndarray) -> np.ndarray:
    """(P, 18, 2) in OpenPose's order of (P, 17, 2) in COCO's; the neck is in the middle between the shoulders."""
    if keypoints.ndim != 3 or keypoints.shape[1:] != (17, 2):
        raise ValueError(f"COCO's keypoints have shape {keypoints.shape}; give (people, 17, 2)")
    neck = keypoints[:, [5, 6]].mean(1)
    return np.stack([neck if place is None else keypoints[:, place] for place in FROM_COCO], 1)
