"""Calibration: a grid and a table of weights learned for one model, so that it needs fewer network calls."""

from .api import calibrate, calibrate_problems, cost
from .problem import NetworkProblem, PipelineProblem, Problem
from .stages import Cost, Settings, Stage

__all__ = ["Cost", "NetworkProblem", "PipelineProblem", "Problem", "Settings", "Stage", "calibrate", "calibrate_problems", "cost"]
