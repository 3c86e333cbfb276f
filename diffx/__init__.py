"""diffx: sample better, distil and condition with Diffusers; ``import diffx`` makes its classes known to Diffusers."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import diffusers.pipelines

if TYPE_CHECKING:  # what __getattr__ serves, for editors and type checkers
    from . import guidance, objectives
    from .acceleration import set_attention
    from .calibration import calibrate
    from .conditioning.attach import Control, attach
    from .conditioning.controlnets import ControlNet
    from .conditioning.inpaint import SoftInpaint, outpaint
    from .conditioning.ip_adapter import IPAdapter
    from .guidance import guide
    from .hub import AutoScheduler, from_pretrained, push_to_hub, save_pretrained, upgrade
    from .schedulers import (
        DDIM,
        DDPM,
        DEIS,
        LCM,
        LMS,
        Calibrated,
        DPMSolver,
        DPMSolverSinglestep,
        Euler,
        EulerAncestral,
        Heun,
        Row,
        Table,
        TableScheduler,
        UniPC,
    )  # fmt: skip
    from .training.api import Trained, distill, train

__version__ = "0.1.0"

# Public name -> the module that defines it. Imported on first use, so that ``import diffx`` stays cheap.
_PUBLIC = {
    "AutoScheduler": "diffx.hub",
    "Calibrated": "diffx.schedulers",
    "Control": "diffx.conditioning.attach",
    "ControlNet": "diffx.conditioning.controlnets",
    "IPAdapter": "diffx.conditioning.ip_adapter",
    "DDIM": "diffx.schedulers",
    "DDPM": "diffx.schedulers",
    "DEIS": "diffx.schedulers",
    "DPMSolver": "diffx.schedulers",
    "DPMSolverSinglestep": "diffx.schedulers",
    "LCM": "diffx.schedulers",
    "LMS": "diffx.schedulers",
    "Euler": "diffx.schedulers",
    "EulerAncestral": "diffx.schedulers",
    "Heun": "diffx.schedulers",
    "Row": "diffx.schedulers",
    "Table": "diffx.schedulers",
    "TableScheduler": "diffx.schedulers",
    "UniPC": "diffx.schedulers",
    "Trained": "diffx.training.api",
    "SoftInpaint": "diffx.conditioning.inpaint",
    "attach": "diffx.conditioning.attach",
    "calibrate": "diffx.calibration",
    "distill": "diffx.training.api",
    "from_pretrained": "diffx.hub",
    "guide": "diffx.guidance",
    "outpaint": "diffx.conditioning.inpaint",
    "push_to_hub": "diffx.hub",
    "set_attention": "diffx.acceleration",
    "save_pretrained": "diffx.hub",
    "train": "diffx.training.api",
    "upgrade": "diffx.hub",
}
__all__ = [
    "DDIM", "DDPM", "DEIS", "LCM", "LMS", "AutoScheduler", "Calibrated", "Control", "ControlNet", "DPMSolver", "DPMSolverSinglestep",
    "Euler", "EulerAncestral", "Heun", "IPAdapter", "Row", "SoftInpaint", "Table", "TableScheduler", "Trained", "UniPC", "attach",
    "calibrate", "distill", "from_pretrained", "guidance", "guide", "objectives", "outpaint", "push_to_hub", "save_pretrained",
    "set_attention", "train", "upgrade",
]  # fmt: skip

# Diffusers resolves ["diffx", "UniPC"] of a model_index.json as an attribute of diffusers.pipelines.diffx.
setattr(diffusers.pipelines, "diffx", sys.modules[__name__])  # noqa: B010  # the module declares no such attribute


def __getattr__(name: str) -> Any:
    if name in ("guidance", "objectives"):
        return importlib.import_module(f"diffx.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "SchedulerMixin":  # Diffusers asks the library of a component for its base classes
        return importlib.import_module("diffusers").SchedulerMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
