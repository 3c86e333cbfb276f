"""Pipelines and scheduler configs from a folder, a Hub id, or the embedded model, with errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Diffusers takes seconds to import, and only the functions need it
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

EMBEDDED = Path(__file__).parent / "assets" / "emoji"
EMBEDDED_TABLE, EMBEDDED_STUDENT = EMBEDDED.with_name("emoji_calibrated_6"), EMBEDDED.with_name("emoji_progressive_4")
EMBEDDED_SAMPLERS = {folder.name: folder for folder in (EMBEDDED_TABLE, EMBEDDED_STUDENT)}  # whose names do, wherever one is named
CALL_KWARGS = "call_kwargs.json"  # of a trained model: what its pipeline is called with; it also says that a folder holds one
SHOWN = "shown.png"  # in the folder of an adapter's run: what the first of its samples was shown
DTYPES = ("float32", "bfloat16", "float16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_pipeline(model: str | Path | None = None, *, device: str | None = None, torch_dtype: str | None = None) -> DiffusionPipeline:
    """A pipeline on ``device``, its own components untouched.

    Args:
        model: a pipeline folder or Hub id; None or "emoji" is the embedded model.
        device: as torch spells it; None is "cuda" where there is one, else "cpu".
        torch_dtype: "float32", "bfloat16" or "float16", for all components; None leaves Diffusers' default, float32.

    Raises:
        ValueError: there is no such folder, it holds no pipeline, its files do not load, or device or type do not exist.
    """
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if torch_dtype not in (None, *DTYPES):
        raise ValueError(f"torch_dtype={torch_dtype!r} is not one of {', '.join(DTYPES)}")
    device, source = resolve_device(device), resolve(model)
    options = {} if torch_dtype is None else {"torch_dtype": getattr(torch, torch_dtype)}
    try:
        return DiffusionPipeline.from_pretrained(source, **options).to(device)
    except Exception as error:  # each broken file has an exception class of its own; for the user they are one thing
        raise ValueError(f"model {source!r} did not load ({type(error).__name__}: {_first_line(error)})") from error


def load_scheduler_config(model: str | Path | None = None) -> dict[str, Any]:
    """The scheduler config of a pipeline; no weights are read.

    Raises:
        ValueError: as ``load_pipeline``.
    """
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

    class Config(ConfigMixin):  # ConfigMixin reads by this class attribute
        config_name = SCHEDULER_CONFIG_NAME

    source = resolve(model)
    try:
        config = Config.load_config(source, subfolder="scheduler")
    except Exception as error:  # as above
        raise ValueError(f"model {source!r} has no readable scheduler config ({type(error).__name__}: {_first_line(error)})") from error
    assert isinstance(config, dict)
    return config


def resolve_device(device: str | None) -> str:
    """``device`` itself, or where it is None "cuda" if there is one, else "cpu".

    Raises:
        ValueError: it does not work here.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError, depending on the device
        raise ValueError(f"device={device!r} does not work here ({_first_line(error)}); 'cpu' always does") from error
    return device


def resolve(model: str | Path | None) -> str:
    """The folder or Hub id that ``model`` means, checked as far as that is possible without reading weights.

    Raises:
        ValueError: it is neither a pipeline folder nor formed like a Hub id.
    """
    if model is None or model == "emoji":
        model = EMBEDDED
    folder = Path(model).expanduser()
    if folder.is_file():
        raise ValueError(
            f"model {str(model)!r} is a file; a pipeline folder or a Hub id is needed. "
            "Single-file checkpoints: StableDiffusionPipeline.from_single_file(file).save_pretrained(folder), then give the folder"
        )
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise ValueError(f"model folder {str(model)!r} has no model_index.json (it holds {found}); give the folder of a whole pipeline")
        return str(folder)
    if not HUB_ID.fullmatch(str(model)):
        raise ValueError(f"model {str(model)!r} is no folder here, and a Hub id has the form owner/name")
    return str(model)


def read_prompts(file: str | Path) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        ValueError: the file is not there, is not text, or has no such line.
    """
    try:
        prompts = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts file {str(file)!r} cannot be read ({error}); give a text file with one prompt a line") from error
    if not prompts:
        raise ValueError(f"prompts file {str(file)!r} is empty; give one prompt a line")
    return prompts


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
