"""What was measured of a checkpoint, from the report itself: entries of a model index, and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.quality import Evaluation
from ..evaluation.samplers import split_count
from ..training.curve import GAIN
from .artifact import Artifact
from .snippet import task


def read_evaluation(evaluation: Any) -> dict[str, Any]:
    """The content of a report.json of ``diffx evaluate``, of the folder that holds it, or of the ``Evaluation`` itself.

    Raises:
        ValueError: there is none, or it is of something else.
    """
    if isinstance(evaluation, Evaluation):
        return json.loads(evaluation.to_json())
    file = Path(evaluation).expanduser()
    file = file / "report.json" if file.is_dir() else file
    try:
        report = json.loads(file.read_text())
        _ = report["settings"]["features"], [row["measures"] for row in report["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is no report of `diffx evaluate --output FOLDER` ({type(error).__name__}: {error})") from error
    return report


def results(made: Artifact, report: Mapping[str, Any] | None) -> list[EvalResult]:
    """Entries of the card's model index: each measure of each row of this folder, and what its run measured.

    Raises:
        ValueError: the report has no row of this folder.
    """
    common: dict[str, Any] = dict(task_type=task(made) or "text-to-image", dataset_type="pictures")
    found = []
    if report:
        mine = [row for row in report["rows"] if _is(row["sampler"], made)]
        if not mine:
            measured = ", ".join(dict.fromkeys(row["sampler"] for row in report["rows"]))
            raise ValueError(
                f"the evaluation is of {measured}, and not of {str(made.folder)!r}; diffx evaluate --samplers {made.folder} measures it"
            )
        for row in mine:
            for measure in row["measures"]:
                how = f"{report['settings']['features']}, {row['nfe']} calls, {measure['count']} pictures"
                found.append(
                    EvalResult(
                        **common, dataset_name=Path(report["settings"]["real"]).name, metric_type=measure["name"].lower(),
                        metric_name=f"{measure['name']} ({how})", metric_value=measure["value"],
                    )
                )  # fmt: skip
    if figures := _figures(made):
        what = "likeness to what is shown, less likeness to what others are shown"
        found.append(
            EvalResult(
                **common, dataset_name="held-out pictures", metric_type="adherence", metric_name=what, metric_value=figures[GAIN]
            )
        )  # fmt: skip
    return found


def measured(made: Artifact, report: Mapping[str, Any] | None) -> str:
    """The same in words and a table."""
    parts = [_table(made, report)] if report else []
    if figures := _figures(made):
        parts.append(
            "On pictures that were kept from training: "
            + ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            + " (*true* is the likeness of samples to what they were shown, *shuffled* to what others were shown, *gain* the difference)."
        )
    if told := _calibration(made):
        errors = ", ".join(f"{stage} {error:.4g}" for stage, error in told["errors"].items())
        parts.append(
            f"A table of {len(told['timesteps'])} network calls at guidance {told['guidance_scale']:g}. Distance to many-step runs of the "
            f"model, on prompts and noises that it was not learned from, by stage of the calibration: {errors}. *search* is the best "
            "solver that needs no learning."
        )
    return "\n\n".join(parts) or "Nothing was measured when this was published."


def _table(made: Artifact, report: Mapping[str, Any]) -> str:
    settings, names = report["settings"], list(dict.fromkeys(m["name"] for row in report["rows"] for m in row["measures"]))
    lines = [
        f"{settings['count']} pictures in every row against as many real ones, seed {settings['seed']}; features: {settings['features']}. "
        "*Real* is the floor: as many other real pictures, measured the same way.",
        "",
        f"| | calls | guidance | {' | '.join(names)} |",
        "|:---|---:|---:|" + "---:|" * len(names),
    ]
    for row in report["rows"]:
        values = {measure["name"]: f"{measure['value']:.4g}" for measure in row["measures"]}
        mine = _is(row["sampler"], made)
        row = {**row, **made.call_kwargs} if mine else row  # whose guidance is its own
        name = "*real*" if row["role"] == "reference" else "**this**" if mine else Path(row["sampler"]).name
        cells = ["" if row[key] is None else f"{row[key]:g}" for key in ("nfe", "guidance_scale")]
        lines.append(f"| {' | '.join([name, *cells, *(values.get(key, '') for key in names)])} |")
    return "\n".join(lines)


def _is(sampler: str, made: Artifact) -> bool:
    """Whether a row of an evaluation is of this very folder."""
    return Path(split_count(sampler)[0]).expanduser().resolve() == made.folder.resolve()


def _calibration(made: Artifact) -> Mapping[str, Any]:
    """What a calibrated scheduler says of itself."""
    return made.read("scheduler_config.json").get("calibration") or {} if made.kind == "scheduler" else {}


def _figures(made: Artifact) -> Mapping[str, float]:
    """What the run measured with the weights that it kept."""
    figures = made.report.get("figures", {}).get(str(made.report.get("kept_step")), {})
    return figures if GAIN in figures else {}
