"""What a model is trained on, as users hand it in: ``read_data`` makes numbered pictures, or prompts, of any of it."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..loading import HUB_ID, read_prompts

METADATA = ("metadata.jsonl", "metadata.csv")  # as ``datasets`` reads them: a column file_name, and any others
NUM_SHOWN = 5  # names in an error


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What of the data is used, and how. Every field has a unit or a range, and there is no field that nothing reads."""

    resolution: int | tuple[int, int] | None = None  # pixels, or (height, width); None is the model's own
    aspect_buckets: bool = False  # pictures keep about their shapes, from 1:2 to 2:1, at the resolution's number of pixels
    center_crop: bool = True  # what is cut from a picture that has another shape lies in its middle; else anywhere
    random_flip: bool = False  # half of the cuts are mirrored
    num_crops: int = 1  # cuts of each picture that are kept, each with a place and a side of its own
    split: str = "train"  # of a data set that has several
    image_column: str = "image"
    caption_column: str = "text"
    label_column: str = "label"
    num_generated: int | None = None  # samples that the model makes where the data has no pictures; None is one a prompt, at least 1024
    generation_steps: int = 50  # network calls of each of them, with the model's own scheduler
    generation_guidance_scale: float | None = None  # of each of them; 1 is off, None is 3 where the model can be guided
    num_held_out: int | None = None  # pictures kept from training, to measure adapters on; None is a tenth of the data, at most 32
    seed: int = 0  # of cuts and of generated samples
    cache: str | Path | None = None  # folder; None is $XDG_CACHE_HOME/diffx/data or ~/.cache/diffx/data

    def __post_init__(self) -> None:
        sides = (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution
        if sides is not None and not (len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)):
            raise ValueError(f"resolution={self.resolution!r} must be a positive number of pixels, or (height, width)")
        for name in ("num_crops", "num_generated", "generation_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.num_held_out is not None and self.num_held_out < 2:
            raise ValueError(f"num_held_out={self.num_held_out} must be at least 2: what one was shown is compared with the others")
        if self.generation_guidance_scale is not None and not np.isfinite(self.generation_guidance_scale):
            raise ValueError(f"generation_guidance_scale={self.generation_guidance_scale} is not a finite number; 1 switches guidance off")
        different = 2 if self.random_flip else 1
        if self.center_crop and self.num_crops > different:
            raise ValueError(
                f"num_crops={self.num_crops}, but with center_crop there are {different} different ones; "
                "center_crop=False cuts in different places" + ("" if self.random_flip else ", random_flip=True mirrors")
            )


@dataclass(frozen=True)
class Pictures:
    """Numbered pictures and what is said of each; ``files[i]`` is anything that ``open_picture`` opens, read when it is asked for.

    ``fingerprint`` changes with any picture and is cheap to compute; None where nothing cheap does.
    """

    files: Any  # of a length, and read by number
    name: Callable[[int], str]  # for messages
    texts: Sequence[str] | None
    labels: Sequence[int] | None
    fingerprint: str | None
    others: Any = None  # a second picture of each, such as a control image, as ``files``; where a column of them was asked for

    def __len__(self) -> int:
        return len(self.files)

    def part(self, numbers: Sequence[int]) -> Pictures:
        """The pictures of those numbers, in that order."""
        chosen = list(numbers)
        texts = None if self.texts is None else [self.texts[i] for i in chosen]
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        fingerprint = self.fingerprint and f"{self.fingerprint}/{hashlib.blake2b(repr(chosen).encode(), digest_size=8).hexdigest()}"
        others = None if self.others is None else _Part(self.others, chosen)
        return Pictures(_Part(self.files, chosen), lambda i: self.name(chosen[i]), texts, labels, fingerprint, others)


@dataclass(frozen=True)
class _Part:
    """Some entries of something with a length and numbers."""

    whole: Any
    chosen: list[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Any:
        return self.whole[self.chosen[i]]


@dataclass(frozen=True)
class Prompts:
    """No pictures: samples that the model makes itself are the data; ``texts`` and ``labels`` are what it is told, in turns."""

    texts: Sequence[str] | None = None
    labels: Sequence[int] | None = None


def read_data(data: Any, config: DataConfig, told: str | None, column: str | None = None) -> Pictures | Prompts:
    """The numbered pictures of ``data``, or prompts where it has none.

    Args:
        data: a folder of pictures (with metadata.jsonl or metadata.csv, with a .txt file beside each picture, or with a folder for
            each class); a ``datasets.Dataset``, its Hub id, or the folder it was saved to; a sequence of
            dict(image=..., text=..., label=...); or what the model's own samples are told: a list of prompts, a text file with one
            a line, a list of class numbers, None.
        told: "text" or "label", what the model is told of each picture, or None.
        column: of a second picture of each, the result's ``others``.

    Raises:
        ValueError: it is none of these, it is empty, or it lacks what the model is told or the column.
    """
    match data:
        case Pictures() | Prompts():
            made = data
        case None:
            made = Prompts()
        case str() | Path():
            made = _read_path(data, config, told, column)
        case _ if type(data).__module__.split(".")[0] == "datasets":  # whoever has one has imported it
            made = _read_dataset(data, config, told, column)
        case Sequence() if not len(data):
            raise ValueError("data is empty; None lets a model that is told nothing make samples")
        case Sequence() if all(isinstance(each, str) for each in data):
            made = Prompts(texts=list(data))
        case Sequence() if all(isinstance(each, int) for each in data):
            made = Prompts(labels=list(data))
        case _ if isinstance(data, Sequence) or {"__len__", "__getitem__"} <= set(dir(data)):
            made = _read_rows(data, config, told, column)
        case _:
            raise ValueError(
                f"data is a {type(data).__name__}; a folder, a datasets.Dataset, its Hub id, a sequence of dicts, prompts or None is needed"
            )
    if isinstance(made, Pictures) and not len(made):
        raise ValueError("data holds no picture")
    _check_told(made, told)
    return made


def _check_told(data: Pictures | Prompts, told: str | None) -> None:
    what, kind = {"text": ("caption", str), "label": ("class number", int), None: ("", object)}[told]
    values = {"text": data.texts, "label": data.labels, None: None}[told]
    if isinstance(data, Prompts):
        if told and not values:
            raise ValueError(f"the model is told a {what} of every sample that it is to make; give a list of {what}s as data, or pictures")
        if (given := data.texts or data.labels) and not values:
            raise ValueError(f"the model is told nothing of its samples, so that {given[0]!r} has no use; data=None makes samples")
        return
    values = values or []
    lacking = [i for i, value in enumerate(values) if value is None or value == ""]
    if lacking:
        names = ", ".join(data.name(i) for i in lacking[:NUM_SHOWN]) + (", ..." if len(lacking) > NUM_SHOWN else "")
        raise ValueError(f"{len(lacking)} of {len(data)} pictures have no {what}, and the model is told one of every picture: {names}")
    for i, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{data.name(i)}: {value!r} is no {what}; {kind.__name__} is needed, here is {type(value).__name__}")


def _read_path(path: str | Path, config: DataConfig, told: str | None, column: str | None) -> Pictures | Prompts:
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix != ".txt":
            raise ValueError(f"data={str(path)!r} is a file; a .txt file with one prompt a line, or a folder of pictures, is needed")
        return Prompts(texts=read_prompts(place))
    if not place.exists():
        if not (isinstance(path, str) and HUB_ID.fullmatch(path)):
            raise ValueError(f"data={str(path)!r} is no folder or file here, and a Hub id has the form owner/name; prompts go in a list")
        import datasets

        try:
            loaded: Any = datasets.load_dataset(path, split=config.split)
        except Exception as error:  # of many classes: no network, no such data set, no such split, ...
            raise ValueError(f"data={path!r} is no folder here, and did not load from the Hub ({type(error).__name__}: {error})") from error
        return _read_dataset(loaded, config, told, column)
    if {"state.json", "dataset_dict.json"} & {file.name for file in place.iterdir()}:
        import datasets

        return _read_dataset(datasets.load_from_disk(place), config, told, column)
    return _read_folder(place, config, told, column)


def _read_folder(folder: Path, config: DataConfig, told: str | None, column: str | None) -> Pictures:
    formats = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = [Path(at) / name for at, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if file.suffix.lower() in formats)
    if not files:
        others = ", ".join(sorted({file.suffix or file.name for file in found})[:8]) or "nothing"
        raise ValueError(f"data folder {str(folder)!r} holds no picture (it holds {others}); pictures end in .png, .jpg, .webp and so on")
    texts: list[Any] | None = None
    labels: list[Any] | None = None
    seconds: list[Any] | None = None
    if metadata := next((folder / name for name in METADATA if (folder / name).is_file()), None):
        rows = _read_metadata(metadata)
        files = [folder / row["file_name"] for row in rows]
        if lost := [row["file_name"] for row, file in zip(rows, files) if not file.is_file()]:
            raise ValueError(f"{metadata} lists {len(lost)} files that are not there: {', '.join(lost[:NUM_SHOWN])}")
        columns = sorted({key for row in rows for key in row})
        if told == "text":
            texts = [row.get(_column("caption_column", config, columns)) for row in rows]
        if told == "label":
            labels = [_whole(row.get(_column("label_column", config, columns))) for row in rows]
        if column:
            seconds = [folder / (row.get(_existing(column, columns)) or "") for row in rows]  # without one, what does not open is named
    elif column:
        raise ValueError(
            f"column {column!r} of {str(folder)!r}: a folder has columns where it has {' or '.join(METADATA)}, with paths in it"
        )
    elif told == "text":
        texts = [_text_beside(file) for file in files]
    elif told == "label":
        classes = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
        labels = [classes.index(file.relative_to(folder).parts[0]) if file.parent != folder else None for file in files]
    return Pictures(files, lambda i: os.path.relpath(files[i], folder), texts, labels, _of_files([*files, *(seconds or [])]), seconds)


def _read_metadata(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="") as lines:
        try:
            rows = list(csv.DictReader(lines)) if file.suffix == ".csv" else [json.loads(line) for line in lines if line.strip()]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{file} does not read as {file.suffix[1:]} ({error})") from error
    if not rows or any("file_name" not in row for row in rows):
        raise ValueError(f"{file} needs a column file_name in every row, with paths relative to its folder")
    return rows


def _text_beside(picture: Path) -> str | None:
    file = picture.with_suffix(".txt")
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _whole(value: Any) -> Any:
    """A number that a csv file holds as text."""
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


def _read_dataset(data: Any, config: DataConfig, told: str | None, column: str | None) -> Pictures:
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise ValueError(f"the data set has no split {config.split!r}; it has {', '.join(map(str, data))}")
        data = data[config.split]
    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"data is a {type(data).__name__}, which has no random access; load it without streaming")
    columns, rows = data.column_names, data.with_format(None)
    others = rows[_existing(column, columns)] if column else None
    column = _column("image_column", config, columns)
    texts = list(rows[_column("caption_column", config, columns)]) if told == "text" else None
    labels = list(rows[_column("label_column", config, columns)]) if told == "label" else None
    if isinstance(data.features[column], datasets.Image):  # undecoded: those in files are known by name and time, and not read again
        rows = rows.cast_column(column, datasets.Image(decode=False))
    files: Any = rows[column]
    if len(files) and isinstance(files[0], dict) and files[0]["bytes"] is None:
        paths = [row["path"] for row in files]
        return Pictures(paths, lambda i: paths[i], texts, labels, _of_files(paths) if others is None else None, others)
    return Pictures(files, lambda i: f"row {i}", texts, labels, data._fingerprint, others)


def _read_rows(rows: Any, config: DataConfig, told: str | None, column: str | None) -> Pictures:
    if len(rows) and not isinstance(rows[0], dict):
        raise ValueError(f"data is a sequence of {type(rows[0]).__name__}; dicts(image=..., text=..., label=...) or prompts are needed")
    columns = list(rows[0]) if len(rows) else []
    image = _column("image_column", config, columns) if columns else ""
    texts: Any = list(_entries(rows, _column("caption_column", config, columns))) if told == "text" and columns else None
    labels: Any = list(_entries(rows, _column("label_column", config, columns))) if told == "label" and columns else None
    others = _Column(rows, _existing(column, columns)) if column and columns else None
    return Pictures(_Column(rows, image), lambda i: f"row {i}", texts, labels, None, others)


def _entries(rows: Any, name: str) -> Iterator[Any]:
    for i in range(len(rows)):
        value = rows[i].get(name)
        yield int(value) if isinstance(value, np.integer) else value


class _Column:
    """One entry of every row, taken from the row when it is asked for."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i].get(self.name)


def _column(option: str, config: DataConfig, columns: Sequence[str]) -> str:
    if (name := getattr(config, option)) not in columns:
        raise ValueError(f"{option}={name!r} is not among the data's columns {', '.join(columns)}; give {option}")
    return name


def _existing(column: str, columns: Sequence[str]) -> str:
    if column not in columns:
        raise ValueError(f"column {column!r} is not among the data's columns {', '.join(columns)}")
    return column


def _of_files(files: Sequence[Any]) -> str:
    """A fingerprint of their names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        state = os.stat(file) if os.path.exists(file) else None  # whoever opens it says that it is not there
        digest.update(f"{os.path.abspath(file)}/{state and (state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()
