"""Whose run it is: what keeps two runs on one scheduler from mixing.

``set_timesteps`` makes a Turn, which names the calling thread and holds the run. ``in_turn`` lets a method begin in the calling
thread's turn only, and looks at the end whether that turn is still in force. So no step waits for a lock, and one that another
thread's ``set_timesteps`` cut through raises instead of returning a mixture.

On one thread the elements of ``timesteps`` say whose they are. What cannot be seen: two loops that take turns on one thread,
step with numbers or copied times, and together keep to the order of one run. ``fork()`` is for them, too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import RLock, get_ident
from typing import Any, Self
from weakref import ReferenceType

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .error import Tracker
from .table import State, Table

SETTING = RLock()  # held while a scheduler's grid is replaced or copied; a step never waits for it
ONE_RUN = "two runs are using one scheduler: {}; give each run a scheduler of its own, scheduler.fork()"
ANYBODY = 0  # no thread has this number


@dataclass
class Run:
    """One pass through (a tail of) the grid: the table made for the calls from ``begin`` on, and what it remembers."""

    begin: int
    table: Table
    state: State
    options: dict[str, Any] = field(default_factory=dict)  # arguments of step that the table was made with
    seeds: tuple[int, ...] | None = None  # of the samples, once a row asked for noise that nobody else seeds
    tracker: Tracker | None = None  # where errors are tracked

    @property
    def index(self) -> int:
        return self.begin + self.state.call

    @property
    def under_way(self) -> bool:
        return 0 < self.state.call < len(self.table.rows)


@dataclass(eq=False)
class Turn:
    """The right of one thread to run, and its run; void from the next ``set_timesteps`` on."""

    thread: int | None = ANYBODY  # before the first set_timesteps; None is a copy's, which the first thread that uses it claims
    begin_index: int | None = None
    run: Run | None = None  # from the first step on
    scaled: ReferenceType[Tensor] | None = None  # what scale_model_input returned last

    def claim(self) -> Self:
        """This turn, if it is the calling thread's.

        Raises:
            ValueError: it is another thread's.
        """
        here = get_ident()
        if self.thread != here and self.thread != ANYBODY:
            with SETTING:
                if self.thread is not None:
                    raise ValueError(ONE_RUN.format("set_timesteps() was last called in another thread"))
                self.thread = here
        return self

    def copy(self) -> "Turn":
        """The same place in a run of its own, which nobody has claimed."""
        return Turn(None if self.thread else self.thread, self.begin_index, self.run and replace(self.run))


def in_turn(method: Callable) -> Callable:
    """A method of a scheduler that is done in the turn of the calling thread, from beginning to end, or refused."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        turn = self._turn.claim()
        try:
            result = method(self, *args, **kwargs)
        except Exception as error:  # it may have read half of another thread's grid, and tripped over anything
            if self._turn is turn:
                raise
            raise ValueError(ONE_RUN.format("another thread called set_timesteps() meanwhile")) from error
        if self._turn is not turn:
            raise ValueError(ONE_RUN.format("another thread called set_timesteps() meanwhile"))
        return result

    return guarded


class HandedOut:
    """The lists of times that a scheduler handed out before the present one, for as long as anybody holds one of their elements."""

    def __init__(self) -> None:
        self._lists: list[StorageWeakRef] = []

    def add(self, times: Tensor) -> None:
        self._lists = [one for one in self._lists if not one.expired()]
        self._lists.append(StorageWeakRef(times.untyped_storage()))

    def __contains__(self, time: Tensor) -> bool:
        storage = time.untyped_storage()._cdata  # not used again before the weak reference goes
        return any(one.cdata == storage and not one.expired() for one in self._lists)
