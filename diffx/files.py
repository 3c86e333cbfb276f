"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(folder: Path, *, keep: bool = False) -> Iterator[Path]:
    """A scratch folder beside ``folder`` that takes its place in the end; where that fails, nothing has changed.

    Args:
        keep: what else lies in ``folder`` stays there: files and folders at its top whose names are not written anew.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    made, old = scratch / "new", scratch / "old"
    try:
        made.mkdir()
        yield made
        for file in made.rglob("*.safetensors"):
            file.chmod(0o644)  # which safetensors writes for the user's eyes alone
        if keep and folder.exists():
            for other in folder.iterdir():
                if not (made / other.name).exists():
                    _take_along(other, made / other.name)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(made, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_along(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)  # no second copy of large files: the first goes away
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)
