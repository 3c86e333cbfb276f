"""Checkpoints that are whole or not there: tensors and JSON only, a manifest written last, the newest valid one found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..evaluation.report import write_atomically

FORMAT = 1  # of a checkpoint; a folder of a newer one is refused
MANIFEST, WEIGHTS, STATE = "manifest.json", "weights.safetensors", "state.json"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write ``folder/step-00000500`` and make it the latest; a crash at any moment leaves what was there before.

    Args:
        tensors: by name; what does not lie on the host is copied there.
        state: anything JSON can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    goal = folder / name_of(step)
    if is_valid(goal):
        point(folder, "latest", goal)  # which a crash may have prevented
        return goal  # a step has one state, and this one is on disk
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, scratch / WEIGHTS)
        (scratch / STATE).write_text(json.dumps(state))
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(scratch.iterdir())}
        (scratch / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        for file in scratch.iterdir():
            _to_disk(file)
        if goal.exists():  # a damaged one of the same step
            shutil.rmtree(goal)
        os.replace(scratch, goal)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint of step {step} cannot be written to {folder} ({error}); the ones before it are still there"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    point(folder, "latest", goal)
    return goal


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint that ``is_valid``."""
    return load_file(path / WEIGHTS), json.loads((path / STATE).read_text())


def newest(folder: Path) -> Path | None:
    """The valid checkpoint of the highest step; None where there is none.

    Raises:
        ValueError: the newest was written by a later version of this package.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if is_valid(path):
            return path
    return None


def is_valid(path: Path) -> bool:
    """Whether a checkpoint is complete: every file of its manifest is there with its size and hash.

    Raises:
        ValueError: it was written by a later version of this package.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = int(manifest["format"]), dict(manifest["files"])
        whole = {WEIGHTS, STATE} <= files.keys() and all(
            (path / name).stat().st_size == file["bytes"] and _sha256(path / name) == file["sha256"] for name, file in files.items()
        )
    except (OSError, KeyError, TypeError, ValueError):  # the last is that of text and JSON
        return False
    if version > FORMAT:
        raise ValueError(f"{path} has checkpoint format {version}, and this diffx knows {FORMAT}; update diffx to go on with it")
    return whole


def point(folder: Path, name: str, goal: Path) -> None:
    """Let the one-line file ``folder/name`` name a checkpoint."""
    write_atomically(folder / name, lambda file: file.write((goal.name + "\n").encode()))


def pointed(folder: Path, name: str) -> Path | None:
    """The valid checkpoint that ``folder/name`` names; None where it names none."""
    goal = _named(folder, name)
    return goal if goal and is_valid(goal) else None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints and those that "latest" and "best" name, and what crashed writes left."""
    named = {_named(folder, "latest"), _named(folder, "best")}
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path not in named:
            shutil.rmtree(path)
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def name_of(step: int) -> str:
    """Of a checkpoint's folder; names sort like steps."""
    return f"step-{step:08d}"


def _named(folder: Path, name: str) -> Path | None:
    """What ``folder/name`` names, be it there or not."""
    try:
        goal = folder / (folder / name).read_text().strip()
    except (OSError, ValueError):
        return None
    return goal if goal.name.startswith("step-") else None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
