"""How to sample: every solver is a table of coefficients, stepped by one function, in Diffusers' scheduler contract."""

from .calibrated import Calibrated, Calibration
from .derivative import LMS, gradient_estimation
from .few_step import LCM
from .multistep import DEIS, DPMSolver
from .one_step import DDIM, Euler
from .plan import Call, Plan
from .scheduler import StepOutput, TableScheduler
from .singlestep import DPMSolverSinglestep
from .stochastic import DDPM, EulerAncestral
from .table import Row, State, Table, advance
from .two_stage import Heun
from .unipc import UniPC

SAMPLERS = (DDIM, DDPM, Euler, EulerAncestral, Heun, DPMSolver, DPMSolverSinglestep, UniPC, DEIS, LMS, LCM)
for _sampler in (*SAMPLERS, Calibrated):
    _sampler.__module__ = "diffx"  # the name Diffusers writes into model_index.json, whatever file the class lives in

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "LCM",
    "LMS",
    "SAMPLERS",
    "Calibrated",
    "Calibration",
    "Call",
    "DPMSolver",
    "DPMSolverSinglestep",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Plan",
    "Row",
    "State",
    "StepOutput",
    "Table",
    "TableScheduler",
    "UniPC",
    "advance",
    "gradient_estimation",
]
