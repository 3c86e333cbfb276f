"""Hints that divide a picture: superpixels without a network, classes and objects with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from .hint import Hint, Values
from .metrics import codes, colour_difference, covering, mean_iou
from .models import check_source, load

SEGMENTERS = "nvidia/segformer-b0-finetuned-ade-512-512 or facebook/mask2former-swin-small-ade-semantic"
# The colours of ADE20K's 150 classes, in which ControlNets for segmentation were trained, as MMSegmentation (Apache-2.0) lists them.
# Road and skyscraper share a gray, there too.
ADE20K = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04ff3307cc4603"
    "0066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207"
    "ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff"
    "0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff"
    "ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff7000"
    "8fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3"
    "ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff"
    "4700ff7a00ff00ffb8005cffb8ff000085ffffd60019c2c266ff005c00ff"
)  # fmt: skip


@dataclass(frozen=True)
class Regions(Hint):
    """Superpixels, each in its mean colour.

    Source: SLIC, Achanta et al. 2012, "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods"; computed by
    ``skimage.segmentation.slic``.

    Args:
        num_segments: about so many; small pictures have room for fewer.
        compactness: large values make squares, small ones follow the colours.
    """

    name: ClassVar[str] = "regions"
    values: ClassVar[Values] = "colour"
    num_segments: int = 60
    compactness: float = 10.0

    def __post_init__(self) -> None:
        if self.num_segments < 1 or not self.compactness > 0:
            raise ValueError(f"{self}: num_segments must be at least 1, and compactness positive")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        from skimage.segmentation import slic

        labels = slic(pixels.astype(np.float64), self.num_segments, self.compactness, start_label=0)
        count = np.bincount(labels.ravel())
        means = [np.bincount(labels.ravel(), pixels[..., c].ravel()) / count for c in range(3)]
        return np.stack(means, -1)[labels]

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """``colour_difference``."""
        return colour_difference(one, two)


@dataclass(frozen=True)
class Segmentation(Hint):
    """Every pixel in the colour of its class, ADE20K's colours, as ControlNets for segmentation know them.

    Args:
        model: folder or Hub id of a semantic or universal segmentation network of transformers (SegFormer, UperNet, Mask2Former, ...).
        device: as torch spells it; None is "cuda" where there is one, else "cpu".
    """

    name: ClassVar[str] = "segmentation"
    values: ClassVar[Values] = "labels"
    model: str | Path | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_source(self.name, self.model, SEGMENTERS)

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        assert self.model is not None  # __post_init__
        network = load(self.model, self.device, "AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation")
        outputs, _ = network(pixels)
        (labels,) = network.processor.post_process_semantic_segmentation(outputs, target_sizes=[pixels.shape[:2]])
        return paint_labels(labels.cpu().numpy())

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """1 - ``mean_iou`` of the classes."""
        return 1 - mean_iou(codes(one), codes(two))


@dataclass(frozen=True)
class Objects(Hint):
    """Every object in a colour of its own, the small ones on top of the large; what belongs to none is black.

    A grid of points is asked "what is here?"; answers of which the network is sure are kept, one of those that nearly coincide.

    Args:
        model: folder or Hub id of a SAM network of transformers.
        points: along each side of the grid.
        sure: least quality that the network itself gives an answer, usually in [0, 1].
        same: two answers whose intersection over union is larger are one object.
        device: as torch spells it; None is "cuda" where there is one, else "cpu".
    """

    name: ClassVar[str] = "objects"
    values: ClassVar[Values] = "labels"
    model: str | Path | None = None
    points: int = 16
    sure: float = 0.88
    same: float = 0.7
    device: str | None = None

    def __post_init__(self) -> None:
        check_source(self.name, self.model, "facebook/sam-vit-base")
        if self.points < 1 or not 0 <= self.same <= 1:
            raise ValueError(f"{self}: points must be at least 1, and same in [0, 1]")

    def draw(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) in [0, 1]."""
        assert self.model is not None  # __post_init__
        network = load(self.model, self.device, "AutoModelForMaskGeneration")
        height, width = pixels.shape[:2]
        at = (np.arange(self.points) + 0.5) / self.points
        grid = [[[float(x * width), float(y * height)]] for y in at for x in at]
        outputs, fed = network(pixels, input_points=[grid])
        sizes = fed["original_sizes"].cpu(), fed["reshaped_input_sizes"].cpu()
        quality, best = (found.double().cpu().numpy() for found in outputs.iou_scores[0].max(-1))  # of each point's answers
        masks = []
        for point in np.nonzero(quality >= self.sure)[0]:  # one by one: a mask becomes 1024 x 1024 on its way to the picture's size
            answer = outputs.pred_masks[0, point, int(best[point])].cpu()
            masks.append(network.processor.image_processor.post_process_masks(answer[None, None, None], *sizes)[0][0, 0].numpy())
        if not masks:
            return np.zeros(pixels.shape)
        return paint_labels(stacked(np.stack(masks), quality[quality >= self.sure], same=self.same), background=0)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        """1 - ``covering``: which colour an object has means nothing."""
        return 1 - covering(codes(one), codes(two))


def stacked(masks: np.ndarray, quality: np.ndarray, *, same: float) -> np.ndarray:
    """(H, W) labels of masks (N, H, W) that overlap: 0 where there is none, else 1, 2, ... from the largest to the smallest on top.

    Masks whose intersection over union with one of better ``quality`` (N,) exceeds ``same`` are left out.
    """
    kept: list[np.ndarray] = []
    for i in np.argsort(-quality, kind="stable"):
        mask = masks[i]
        if mask.any() and all((mask & other).sum() <= same * (mask | other).sum() for other in kept):
            kept.append(mask)
    labels = np.zeros(masks.shape[1:], int)
    for label, mask in enumerate(sorted(kept, key=lambda mask: -mask.sum()), 1):
        labels[mask] = label
    return labels


def paint_labels(labels: np.ndarray, *, background: int | None = None) -> np.ndarray:
    """(H, W, 3) in [0, 1] of labels (H, W): ADE20K's colour of each number, from the start again after 150; ``background`` black.

    Raises:
        ValueError: other numbers than 0, 1, ..., or -1 and 255, which stand for no class and are black.
    """
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < -1:
        raise ValueError(f"labels of {labels.dtype} from {labels.min()}; they must be integers from 0 on, -1 or 255 for none")
    none = (labels < 0) | (labels == 255) | (labels == (-1 if background is None else background))
    return np.where(none[..., None], 0, palette()[labels % len(palette())]) / 255


def palette() -> np.ndarray:
    """(150, 3) integers in [0, 255]."""
    text = "".join(ADE20K)
    return np.array([int(text[i : i + 2], 16) for i in range(0, len(text), 2)]).reshape(-1, 3)
