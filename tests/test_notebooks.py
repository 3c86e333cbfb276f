"""The notebooks run from top to bottom, and what their text says comes out."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAYS = {"write_a_solver": ["ddim: order", "adams: order", "row 1 lands on alpha=", "Adams: 4 network calls"]}


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
    """A notebook's name and its outputs, made in a folder of its own by this interpreter."""
    notebook = nbformat.read(request.param, as_version=4)
    folder = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    # The kernel is a process of its own: it finds this tree also where diffx is not installed, and draws into the notebook.
    env = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | {"PYTHONPATH": str(ROOT)}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute(env=env)
    return request.param.stem, outputs(notebook)


def test_a_notebook_says_what_it_promises_and_shows_pictures(executed):
    name, made = executed
    printed = "".join(output.text for output in made if output.output_type == "stream" and output.name == "stdout")
    assert all(sentence in printed for sentence in SAYS[name])
    pictures = [output for output in made if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    # 0.2 around theory, as in test_orders.
    orders = {solver: float(order) for solver, order in re.findall(r"(\w+): order (\S+)", printed)}
    assert orders == {"ddim": pytest.approx(1, abs=0.2), "adams": pytest.approx(2, abs=0.2)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not outputs(notebook) and all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
