"""Rows of named tensors on disk: written once, in files of a few rows each, and read anywhere without reading the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..evaluation.report import write_atomically

Rows = dict[str, Tensor]  # each (B, ...)
OPEN_FILES = 8192  # memory-mapped at once; systems allow some 65,000


class Store:
    """``num_rows`` rows in ``folder``, whose name stands for all that they depend on.

    A file is there whole or not at all, and nobody writes it twice: a filling that was interrupted goes on where it stood, and
    processes that fill the same store share the work.

    Args:
        rows_per_file: what an interruption loses at most.
    """

    def __init__(self, folder: Path, num_rows: int, rows_per_file: int = 64) -> None:
        self.folder, self.num_rows, self.rows_per_file = folder, num_rows, rows_per_file
        self._open = functools.lru_cache(OPEN_FILES)(self._map)

    def __len__(self) -> int:
        return self.num_rows

    def missing(self) -> list[int]:
        """Numbers of the files that are not there, or are damaged."""
        return [i for i in range(-(-self.num_rows // self.rows_per_file)) if not self._is_there(i)]

    def fill(self, make: Callable[[range], Rows], advance: Callable[[int], Any] = lambda rows: None) -> None:
        """Write what is missing: ``make`` gives the rows of a range, and ``advance`` is told how many are newly there, by whomever."""
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = self.missing()
        while waiting:
            # What others are writing may be finished when our own files are; when all is theirs, wait for one: its writer may have died.
            theirs = [i for i in waiting if not self._write(i, make, advance, wait=False)]
            if len(theirs) == len(waiting):
                self._write(theirs.pop(0), make, advance, wait=True)
            waiting = theirs
        for lock in self.folder.glob(".*.lock"):
            lock.unlink(missing_ok=True)

    def _write(self, i: int, make: Callable[[range], Rows], advance: Callable[[int], Any], *, wait: bool) -> bool:
        """Whether file ``i`` is there now; not where another process is writing it and we do not ``wait``."""
        try:
            with FileLock(self.folder / f".{i:06d}.lock", timeout=-1 if wait else 0):
                if not self._is_there(i):
                    content = save({name: _narrowed(value) for name, value in make(self.rows_of(i)).items()})
                    write_atomically(self._file(i), lambda file: file.write(content))
        except Timeout:
            return False
        advance(len(self.rows_of(i)))
        return True

    def read(self, rows: Sequence[int]) -> Rows:
        """Those rows, (B, ...) each; floating numbers are float32."""
        places = [divmod(row, self.rows_per_file) for row in rows]
        names = self._open(places[0][0])
        return {name: torch.stack([_widened(self._open(i)[name][j]) for i, j in places]) for name in names}

    def read_all(self) -> Rows:
        """All rows."""
        files = [self._open(i) for i in range(-(-self.num_rows // self.rows_per_file))]
        return {name: torch.cat([_widened(file[name]) for file in files]) for name in files[0]}

    def rows_of(self, i: int) -> range:
        """Numbers of the rows in file ``i``."""
        return range(i * self.rows_per_file, min((i + 1) * self.rows_per_file, self.num_rows))

    def _file(self, i: int) -> Path:
        return self.folder / f"{i:06d}.safetensors"

    def _map(self, i: int) -> Rows:
        with safe_open(self._file(i), framework="pt") as file:  # the tensors are views of the file, read where they are touched
            return {name: file.get_tensor(name) for name in file.keys()}  # no dict

    def _is_there(self, i: int) -> bool:
        try:
            self._map(i)
        except (OSError, SafetensorError):
            return False
        return True


def _narrowed(value: Tensor) -> Tensor:
    """The same numbers in two bytes each where that loses nothing, as for the output of encoders in half precision."""
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(value.to(dtype).float(), value):
                return value.to(dtype)
    return value


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
