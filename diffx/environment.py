"""What is installed here, and what that means for diffx."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

DISTRIBUTION = "diffx-diffusers"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "scipy", "pillow", "matplotlib")
EXTRAS = {
    "train": ("peft", "datasets", "tensorboard"),
    "hints": ("controlnet-aux", "opencv-python-headless"),
    "xformers": ("xformers",),
}


def report() -> dict[str, Any]:
    """Versions, devices, extras and warnings of this machine, ready for JSON."""
    import torch

    from .loading import EMBEDDED

    devices = {"cpu": f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"}
    for i in range(torch.cuda.device_count()):
        devices[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    if torch.backends.mps.is_available():
        devices["mps"] = platform.processor()
    return {
        "diffx": installed(DISTRIBUTION),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "devices": devices,
        "extras": {extra: {name: installed(name) for name in names} for extra, names in EXTRAS.items()},
        "embedded_model": (EMBEDDED / "model_index.json").is_file(),
        "warnings": warnings(),
    }


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def warnings() -> list[str]:
    """What is wrong with this environment, each with the way out."""
    if (foreign := installed("diffx")) is None:
        return []
    return [
        f"the distribution 'diffx' {foreign} is installed: it is another project (it compares JSON and XML) whose package and command "
        f"have the names of ours. Uninstall both 'diffx' and '{DISTRIBUTION}', then install this project again from its folder"
    ]
