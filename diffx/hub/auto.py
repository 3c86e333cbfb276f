"""Schedulers from folders and repositories of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin

from .degrade import CLASSES, KEY, restore
from .repository import NAME, file_of, read_object

CODE = "scheduler.py"


class AutoScheduler:
    """Loads whatever scheduler a folder or Hub id holds; never made itself."""

    def __init__(self) -> None:
        raise TypeError("AutoScheduler is not made itself; call AutoScheduler.from_pretrained(folder_or_hub_id)")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """The scheduler of a folder or Hub id that holds a scheduler_config.json.

        It is of the class that the config names: one of Diffusers or diffx, one of ours that ``diffx.save_pretrained`` wrote behind
        a stock one, or one that a scheduler.py beside the config defines.

        Args:
            subfolder: where in it, such as "scheduler" of a pipeline.
            trust_remote_code: run the scheduler.py; without it no code from the folder or repository ever runs.
            revision: a branch, a tag or a commit.
            options: of ``huggingface_hub.hf_hub_download``: token, cache_dir, local_files_only, force_download.

        Raises:
            ValueError: there is no scheduler, its config or class cannot be used, its code is not trusted, or the Hub is out of reach.
        """
        options |= {"subfolder": subfolder, "revision": revision}
        file = file_of(source, SCHEDULER_CONFIG_NAME, **options)
        if file is None:
            raise ValueError(cls._absent(source, options))
        config = read_object(file)
        name = config.get("_class_name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{SCHEDULER_CONFIG_NAME} of {str(source)!r}: _class_name is {name!r}; the name of a class belongs there")
        kind = CLASSES.get(name) or getattr(diffusers, name, None) or cls._from_code(source, name, file, trust_remote_code, options)
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise ValueError(
                f"{SCHEDULER_CONFIG_NAME} of {str(source)!r}: {name} is not a scheduler, or one whose packages are not installed"
            )
        scheduler = _made(kind, config)
        return restore(scheduler) if KEY in config and name not in CLASSES else scheduler

    @staticmethod
    def _absent(source: str | Path, options: Mapping[str, Any]) -> str:
        text = f"{str(source)!r} holds no {SCHEDULER_CONFIG_NAME}"
        if options["subfolder"] is not None:
            return f"{text} in {options['subfolder']!r}"
        elsewhere = file_of(source, SCHEDULER_CONFIG_NAME, **{**options, "subfolder": "scheduler"})
        return f'{text}; that of its pipeline is loaded with subfolder="scheduler"' if elsewhere else f"{text}: there is no scheduler"

    @staticmethod
    def _from_code(source: str | Path, name: str, config: Path, trusted: bool, options: dict[str, Any]) -> Any:
        from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module, resolve_trust_remote_code
        from diffusers.utils.hub_utils import extract_commit_hash

        if not Path(source).expanduser().is_dir():
            # Code and config of one commit, whatever happens to the branch in between.
            options = options | {"revision": extract_commit_hash(str(config)) or options["revision"]}
        code = file_of(source, CODE, **options)
        if code is None:
            raise ValueError(
                f"{str(source)!r} names the class {name}, which neither Diffusers nor diffx has, and holds no {CODE} that defines it"
            )
        if not trusted:
            raise ValueError(
                f"{str(source)!r} defines its class {name} in {CODE}, which would have to run here. Read it ({code}), "
                "and pass trust_remote_code=True if you trust it"
            )
        resolve_trust_remote_code(True, str(source), True)  # which an environment variable of Diffusers forbids
        found = str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else str(source)
        return get_class_from_dynamic_module(found, CODE, class_name=name, trust_remote_code=True, **options)


def _made(kind: Any, config: dict[str, Any]) -> Any:
    try:
        return kind.from_config(config)
    except (TypeError, NotImplementedError) as error:  # Diffusers' classes raise these for values they do not know
        raise ValueError(f"{kind.__name__} refuses its config: {error}") from error
