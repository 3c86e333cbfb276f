"""Data as training reads it: clean samples and conditions, encoded once and kept on disk, named by all that they depend on."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..calibration.problem import key_of
from ..conditioning.adapter import AdaptedFamily
from ..families import Condition, Family
from .data import DataConfig, Pictures, Prompts, read_data
from .draws import hashed
from .encoders import FORMAT, TEXT_ENCODERS, VAE, finite, hash_of, made_by
from .generated import Generated
from .pictures import Cut, Size, buckets, channels_of, cut_of, cuts_of, open_picture, picture_size, pixels_of, side_multiple
from .store import Rows, Store

PIXELS_AT_ONCE = 2**21  # encoded in one call: two pictures of 1024 x 1024
TEXTS_AT_ONCE = 8
DIGESTS_PER_FILE = 1024
NUM_SHOWN = 5  # unreadable pictures in one message


@dataclass(frozen=True)
class Group:
    """The examples of one picture size: clean samples, different conditions, which of these each sample has, and what else it is told.

    ``shown`` is what an adapter is shown of each; None where none is trained.
    """

    size: Size
    samples: Store
    conditions: Store
    told: np.ndarray
    extra: Condition
    shown: Store | None = None


class Cache:
    """Examples with random access, numbered group after group: ``read(numbers)`` gives what the network denoises and is told."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self._starts = np.cumsum([0, *self.group_sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many examples of each picture size there are; a batch is of one size, as ``draws.batch_order`` draws it."""
        return tuple(len(group.samples) for group in self.groups)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Condition]:
        """(B, ...) float32 samples and their conditions, all of one picture size.

        Raises:
            ValueError: they have several sizes.
        """
        owners = set(np.searchsorted(self._starts, indices, side="right") - 1)
        if len(owners) != 1:
            raise ValueError(f"examples {list(indices)[:16]} have {len(owners)} picture sizes; draws.batch_order draws batches of one")
        owner = owners.pop()
        group, rows = self.groups[owner], [int(i - self._starts[owner]) for i in indices]
        condition = group.conditions.read([int(group.told[row]) for row in rows])
        condition |= {name: value[rows] for name, value in group.extra.items()} | (group.shown.read(rows) if group.shown else {})
        return group.samples.read(rows)["x0"], condition


def make_cache(data: Any, family: Family, config: DataConfig | None = None, *, progress: bool = True) -> Cache:
    """All of ``data``, encoded as ``family`` trains on it; what was encoded before is read, and an interrupted call goes on.

    Several processes may call it at once: they share the work.

    Args:
        data: as ``read_data`` takes it. Where it holds no pictures the model's own pipeline makes the samples.

    Raises:
        ValueError: the data cannot serve this model, or a picture does not open; nothing was encoded then.
        FloatingPointError: an encoded or generated sample holds NaN or infinity.
    """
    config = config or DataConfig()
    size = picture_size(family, config.resolution)
    source = read_for(family, data, config)
    _check_labels(source, family)
    folder = (Path(config.cache) if config.cache else default_cache()).expanduser()
    with torch.no_grad():
        if isinstance(source, Prompts):
            if isinstance(family, AdaptedFamily):
                raise ValueError(f"{type(family.adapter).__name__} learns from pictures, and the data has none; pass a folder of pictures")
            return Cache([_generated(Generated(source, family, config, size), folder, progress)])
        return Cache(_encoded(source, family, config, size, folder, progress))


def read_for(family: Family, data: Any, config: DataConfig) -> Pictures | Prompts:
    """``data`` as ``make_cache`` takes it, numbered; nothing is encoded.

    Raises:
        ValueError: it lacks what the model is told, or its adapter shown.
    """
    column = family.column if isinstance(family, AdaptedFamily) else None
    return read_data(data, config, _told(family, picture_size(family, config.resolution)), column)


def default_cache() -> Path:
    """Where encoded data is kept for all projects."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffx" / "data"


def _told(family: Family, size: Size) -> str | None:
    """What a family is told of every picture, "text", "label" or None, by what it refuses to do without."""
    for told, labels in ((None, None), ("label", torch.zeros(1, dtype=torch.long))):
        try:
            family.encode_condition(None, labels, size=size)
            return told
        except ValueError:
            continue
    return "text"


def _check_labels(source: Pictures | Prompts, family: Family) -> None:
    num_classes = getattr(family, "num_classes", None)  # of the families that are told a class
    for i, label in enumerate(source.labels or []):
        if num_classes is not None and not 0 <= label < num_classes:
            name = source.name(i) if isinstance(source, Pictures) else f"entry {i}"
            raise ValueError(f"{name} has the label {label}, and the model's classes are 0 to {num_classes - 1}")


def _encoded(source: Pictures, family: Family, config: DataConfig, size: Size, folder: Path, progress: bool) -> list[Group]:
    digests, originals = _identified(source, folder, progress)
    sizes = buckets(size, side_multiple(family)) if config.aspect_buckets else [size]
    for each in sizes:
        family.sample_shape(each)  # which refuses sizes that the model cannot have
    cuts: dict[Size, list[tuple[int, Cut]]] = {}
    for i, (digest, original) in enumerate(zip(digests, originals)):
        # Drawn by what the picture shows: when other pictures come or go, its cuts stay.
        rng = np.random.Generator(np.random.Philox(key=hashed(config.seed, digest)))
        for cut in cuts_of(original, sizes, config.num_crops, center=config.center_crop, flip=config.random_flip, rng=rng):
            cuts.setdefault(cut.size, []).append((i, cut))
    small = {i for rows in cuts.values() for i, cut in rows if cut.resized[0] > originals[i][0]}
    if small:
        warnings.warn(f"{len(small)} of {len(source)} pictures are smaller than the resolution and are enlarged", stacklevel=3)
    groups = []
    for size, rows in sorted(cuts.items()):
        samples = _samples(source, rows, digests, family, size, folder, progress)
        texts = [source.texts[i] for i, _ in rows] if source.texts else None
        labels = [source.labels[i] for i, _ in rows] if source.labels else None
        conditions, told = _conditions(texts, labels, len(rows), family, size, folder, progress)
        extra = _sizes(family, size, [(originals[i], cut.corner) for i, cut in rows])
        shown = _shown(source, rows, digests, family, size, folder, progress) if isinstance(family, AdaptedFamily) else None
        groups.append(Group(size, samples, conditions, told, extra, shown))
    return groups


def _shown(
    source: Pictures, rows: list[tuple[int, Cut]], digests: list[str], family: AdaptedFamily, size: Size, folder: Path, progress: bool
) -> Store:
    """A store of what an adapter is shown of each cut."""
    others = None
    if source.others is not None:
        fingerprint = source.fingerprint and f"{source.fingerprint}/{family.column}"
        others = _identified(replace(source, files=source.others, fingerprint=fingerprint), folder, progress)[0]

    def encode(some: range) -> Rows:
        shown = [shown_of(source, rows[j][0], rows[j][1], family) for j in some]
        return {name: value.cpu() for name, value in family.encode_shown(shown).items()}

    of = [(digests[i], others and others[i], *cut) for i, cut in rows]
    key = {"format": FORMAT, "shown": hash_of(of), "by": family.describe_shown()}
    store = Store(folder / f"shown-{key_of(key)}", len(rows))
    _fill(store, encode, "drawing what is shown", progress)
    return store


def shown_of(source: Pictures, i: int, cut: Cut, family: AdaptedFamily) -> Image.Image:
    """What an adapter is shown of a cut of picture ``i``.

    Raises:
        ValueError: the picture in the column does not fit; the message names it.
    """
    picture = cut_of(open_picture(source.files[i]), cut, "RGB")
    try:
        other = None if source.others is None else open_picture(source.others[i])
        if other is not None and family.column_is_cut:
            other = cut_of(other, cut, "RGB", of=open_picture(source.files[i]).size, resample=family.column_resampling)
        return family.shown(picture, other)
    except ValueError as error:
        raise ValueError(f"{source.name(i)}, column {family.column!r}: {error}") from error


def _samples(
    source: Pictures, rows: list[tuple[int, Cut]], digests: list[str], family: Family, size: Size, folder: Path, progress: bool
) -> Store:
    """A store of ``x0``, the encoded cuts of one size."""
    channels, at_once = channels_of(family), max(1, PIXELS_AT_ONCE // (size[0] * size[1]))

    def encode(some: range) -> Rows:
        found = []
        with ThreadPoolExecutor() as pool:  # Pillow decodes beside the interpreter
            for part in (some[k : k + at_once] for k in range(0, len(some), at_once)):
                files = [(source.files[rows[j][0]], rows[j][1]) for j in part]
                pixels = torch.stack(list(pool.map(lambda each: pixels_of(open_picture(each[0]), each[1], channels), files)))
                found.append(family.encode_images(pixels).float().cpu())
        return {"x0": finite(torch.cat(found), lambda j: source.name(rows[some[j]][0]))}

    key = {"channels": channels, "cuts": hash_of((digests[i], *cut) for i, cut in rows), **made_by(family, VAE)}
    samples = Store(folder / f"samples-{key_of(key)}", len(rows))
    _fill(samples, encode, f"encoding {size[0]} x {size[1]}", progress)
    return samples


def _generated(made: Generated, folder: Path, progress: bool) -> Group:
    size, rows, family = made.size, made.rows, made.family
    samples = Store(folder / f"generated-{key_of(made.describe())}", len(rows))
    _fill(samples, made.samples, "generating", progress)
    words: list[Any] = [row.word for row in rows]
    texts, labels = words if made.prompts.texts else None, words if made.prompts.labels else None
    conditions, told = _conditions(texts, labels, len(rows), family, size, folder, progress)
    return Group(size, samples, conditions, told, {})


def _conditions(
    texts: list[str] | None, labels: list[int] | None, num: int, family: Family, size: Size, folder: Path, progress: bool
) -> tuple[Store, np.ndarray]:
    """A store of what the network is told, every different caption or class once; and (num,) which of them each example has."""
    words: Sequence[Any] = texts or labels or [None] * num
    different: list[Any] = list(dict.fromkeys(words))
    places = {word: i for i, word in enumerate(different)}

    def encode(some: range) -> Rows:
        parts = [different[k : min(k + TEXTS_AT_ONCE, some.stop)] for k in range(some.start, some.stop, TEXTS_AT_ONCE)]
        told = [family.encode_condition(part if texts else None, torch.tensor(part) if labels else None, size=size) for part in parts]
        return {name: torch.cat([part[name].cpu() for part in told]) for name in told[0]}

    key = {"size": size, "told": hash_of(different), **made_by(family, TEXT_ENCODERS)}
    conditions = Store(folder / f"conditions-{key_of(key)}", len(different))
    _fill(conditions, encode, "encoding captions", progress)
    return conditions, np.array([places[word] for word in words])


def _sizes(family: Family, size: Size, cuts: Sequence[tuple[Size, Size]]) -> Condition:
    """(B, ...) what the network is told of pictures' original sizes and the corners of their cuts."""
    told = [family.size_condition(size, original, corner) for original, corner in cuts]
    return {name: torch.cat([each[name].cpu() for each in told]) for name in told[0]}


def _identified(source: Pictures, folder: Path, progress: bool) -> tuple[list[str], list[Size]]:
    """A digest of what each picture shows, and its size; every picture is opened, and those that do not open are named."""

    def identify(some: Iterable[int]) -> Rows:
        digests, sizes, broken = [], [], []
        for i in some:
            try:
                picture = open_picture(source.files[i])
            except ValueError as error:
                broken.append(f"{source.name(i)} {error}")
                continue
            shown = picture.convert("RGBA") if picture.has_transparency_data else picture.convert("L" if picture.mode == "L" else "RGB")
            digests.append(list(hashlib.blake2b(f"{shown.mode} {shown.size}".encode() + shown.tobytes(), digest_size=16).digest()))
            sizes.append((picture.height, picture.width))
        if broken:
            more = f"; and {len(broken) - NUM_SHOWN} more" if len(broken) > NUM_SHOWN else ""
            raise ValueError("; ".join(broken[:NUM_SHOWN]) + more)
        return {"digest": torch.tensor(digests, dtype=torch.uint8), "size": torch.tensor(sizes)}

    if source.fingerprint:
        known = Store(folder / f"pictures-{key_of({'format': FORMAT, 'files': source.fingerprint})}", len(source), DIGESTS_PER_FILE)
        _fill(known, identify, "reading pictures", progress)
        found = known.read_all()
    else:
        found = identify(tqdm(range(len(source)), desc="reading pictures", unit="example", disable=not progress))
    return [bytes(row).hex() for row in found["digest"].tolist()], [(row[0], row[1]) for row in found["size"].tolist()]


def _fill(store: Store, make: Callable[[range], Rows], title: str, progress: bool) -> None:
    """Write what is missing of a store, under a progress bar where anything is."""
    left = sum(len(store.rows_of(i)) for i in store.missing())
    if left:
        with tqdm(total=len(store), initial=len(store) - left, desc=title, unit="example", disable=not progress) as bar:
            store.fill(make, bar.update)
