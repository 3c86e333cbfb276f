"""Single files of a folder or Hub repository, with errors that say what to do, and names that do not lead out of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..loading import HUB_ID

NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def file_of(source: str | Path, name: str, *, subfolder: str | None = None, **options: Any) -> Path | None:
    """Where a file of a folder or Hub id lies on this machine, downloaded if need be; None where there is no such file.

    Args:
        options: of ``huggingface_hub.hf_hub_download``: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        ValueError: no such folder, repository or revision, one that is not for this token, a Hub out of reach, or a subfolder that
            leads out of it.
    """
    from huggingface_hub import errors, hf_hub_download

    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts or "\\" in subfolder):
        raise ValueError(f"subfolder={subfolder!r} leads out of {str(source)!r}; give one inside it")
    folder = Path(source).expanduser()
    if folder.is_dir():
        file = folder / (subfolder or "") / name
        return file if file.is_file() else None
    if not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"{str(source)!r} is no folder here, and a Hub id has the form owner/name")
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **options))
    except errors.GatedRepoError as error:
        raise ValueError(f"{source} is gated: ask for access on its page, and log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{source} is no folder here and no repository on the Hub that this token can see; log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{source} has no revision {options.get('revision')!r}; give a branch, a tag or a commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"the Hub is out of reach, and {name} of {source} is not in the cache; connect once, or give a folder of this machine"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, OSError) as error:
        raise ValueError(f"{name} of {source} did not download ({type(error).__name__}: {error})") from error


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds a {type(content).__name__}, where an object with options belongs")
    return content


def check_index(index: Mapping[str, Any]) -> None:
    """Refuse a model_index.json whose names lead elsewhere: components are folders, libraries and classes are Python names.

    Raises:
        ValueError: one does, or there is no pipeline class; the message names it.
    """
    told = index.get("_class_name")
    named = told if isinstance(told, list) else [told]
    if not all(isinstance(each, str) and NAME.fullmatch(each) for each in named):
        raise ValueError(f"model_index.json: _class_name is {told!r}; the name of a pipeline class belongs there")
    for name, value in index.items():
        if name.startswith("_") or not (isinstance(value, list) and any(isinstance(each, str) for each in value)):
            continue  # an option of the pipeline
        if not NAME.fullmatch(name):
            raise ValueError(f"model_index.json: the component {name!r} is no name of a folder beside it, and is not read")
        if not all(each is None or (isinstance(each, str) and MODULE.fullmatch(each)) for each in value):
            raise ValueError(f"model_index.json: the component {name!r} has {value!r} where a library and a class belong")


def check_weights(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a folder with a component whose only weights are pickles.

    Raises:
        ValueError: it has one; the message names the file.
    """
    for name, value in index.items():
        files = sorted((folder / name).glob("*")) if isinstance(value, list) and NAME.fullmatch(name) else []
        pickles = [file.name for file in files if file.suffix in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(
                f"{name}/{pickles[0]} is a pickle, which can run any code when it is read; diffx reads safetensors only: "
                "convert it on a machine that may run it, with pipe.save_pretrained(folder)"
            )
