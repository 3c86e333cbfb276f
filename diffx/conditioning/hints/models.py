"""Networks of transformers that hints need: from a folder or Hub id, safetensors only, loaded at the first picture."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...loading import HUB_ID, resolve_device


def check_source(hint: str, model: str | Path | None, examples: str) -> None:
    """Whether ``model`` can be where the network of a hint is, as far as that can be told without reading weights.

    Raises:
        ValueError: it is None, a folder that is not there or has no config.json, or not formed like a Hub id.
    """
    if model is None:
        raise ValueError(f"the hint {hint!r} needs a network: get({hint!r}, model=...) takes a folder or Hub id, for instance {examples}")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"the folder {str(model)!r} of the hint {hint!r} has no config.json (it holds {found}); give that of {examples}"
            )
    elif not HUB_ID.fullmatch(str(model)):
        raise ValueError(f"model {str(model)!r} of the hint {hint!r} is no folder here, and a Hub id has the form owner/name")


# Weights that no output depends on, and that published checkpoints lack: poolers; the residual that DPT's first fusion has not.
UNUSED = re.compile(r"(^|\.)pooler\.|fusion_stage\.layers\.0\.residual_layer1\.")
NOT_FED = ("original_sizes", "reshaped_input_sizes")  # what SAM's processor says to itself


class Network:
    """A network with the processor that feeds it.

    Args:
        classes: of transformers, by name; the first that knows the model's config is taken.

    Raises:
        ValueError: it does not load, lacks weights, or is of another task.
    """

    def __init__(self, model: str | Path, device: str | None, *classes: str) -> None:
        import transformers

        source = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else str(model)
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            fitting = [getattr(transformers, name) for name in classes]
            fitting = [cls for cls in fitting if _knows(cls, config)]
            if not fitting:
                raise ValueError(f"a {config.model_type!r} model is none for {' or '.join(classes)}")
            options: dict[str, Any] = dict(use_safetensors=True, output_loading_info=True)
            network, info = fitting[0].from_pretrained(source, **options)
            self.processor: Any = transformers.AutoProcessor.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, ImportError) as error:  # RuntimeError: weights that do not fit the config
            raise ValueError(f"cannot load a network for a hint from {str(model)!r}: {error}") from error
        missing = sorted(key for key in info["missing_keys"] if not UNUSED.search(key))
        if missing:  # transformers draws these at random, and every run would draw another hint
            raise ValueError(f"{str(model)!r} lacks weights that {type(network).__name__} needs: {', '.join(missing[:3])}")
        self.device = resolve_device(device)
        self.config: Any = network.config
        self.network: Any = network.to(self.device).eval().requires_grad_(False)

    def __call__(self, pixels: np.ndarray, told: dict[str, Any] | None = None, **asked: Any) -> tuple[Any, Any]:
        """The network's outputs for a picture (H, W, 3) in [0, 1], and its inputs.

        Args:
            told: further inputs of the network.
            asked: further arguments of the processor, which makes inputs of them.
        """
        import torch

        levels = np.rint(pixels * 255).astype(np.uint8)
        inputs = self.processor(images=levels, return_tensors="pt", **asked).to(self.device)
        fed = {key: value for key, value in inputs.items() if key not in NOT_FED}
        with torch.no_grad():
            return self.network(**fed, **(told or {})), inputs


def _knows(cls: Any, config: Any) -> bool:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    if not issubclass(cls, _BaseAutoModelClass):
        return isinstance(config, cls.config_class)
    return cls._model_mapping is not None and type(config) in cls._model_mapping


@functools.lru_cache(maxsize=4)
def load(model: str | Path, device: str | None, *classes: str) -> Network:
    """``Network``, the same one for the same arguments."""
    return Network(model, device, *classes)
