"""The notebook in examples/ matches its script, contains its pictures, and runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import fastnn
from repository import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
sys.path.insert(0, str(EXAMPLES))  # the examples import each other as scripts do

import make_notebook  # noqa: E402

pytestmark = pytest.mark.cpu_only("the example, which trains in processes of its own")

SCRIPT = EXAMPLES / "quadratic.py"
COMMITTED = EXAMPLES / "quadratic.ipynb"
REMAKE = "python examples/make_notebook.py examples/quadratic.py makes it anew"
FITS = 3


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """For the started processes: this fastnn, and a matplotlib backend without a display."""
    paths = [str(Path(fastnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel then uses the notebook's own


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def losses(text: str) -> list[tuple[float, float]]:
    """The first and the last loss of each fit."""
    found = re.findall(r": loss (\S+) -> (\S+)$", text, re.MULTILINE)
    return [(float(first), float(last)) for first, last in found]


def test_the_script_fits():
    process = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    (_, quadratic), (_, two), (_, many) = losses(process.stdout)
    # The mean of 100 squared errors of variance 1 has a standard deviation of sqrt(2 / 100) = 0.14.
    assert abs(quadratic - 1) < 3 * 0.14
    # Two lines can't follow the bend; many follow it, and some of the noise.
    assert many < quadratic < two < 2
    assert "the same numbers: True" in process.stdout
    assert "the loop's losses: True" in process.stdout


def test_the_committed_notebook_is_the_script_s():
    committed = nbformat.read(COMMITTED, as_version=4)
    made = make_notebook.notebook_of(SCRIPT)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ], REMAKE


def test_the_committed_notebook_holds_its_pictures():
    assert len(pictures(nbformat.read(COMMITTED, as_version=4))) == FITS, REMAKE
    assert COMMITTED.stat().st_size < 200_000


def test_the_notebook_runs_to_the_committed_results():
    notebook = make_notebook.notebook_of(SCRIPT)
    make_notebook.run(notebook)
    assert len(pictures(notebook)) == FITS
    committed = losses(printed(nbformat.read(COMMITTED, as_version=4)))
    assert len(committed) == FITS
    # Printed with two decimals; the last one may differ on another machine.
    for ours, theirs in zip(losses(printed(notebook)), committed, strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)


def test_an_error_in_a_cell_is_raised(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text("# %%\nraise ValueError('as it should')\n")
    with pytest.raises(Exception, match="as it should"):
        make_notebook.run(make_notebook.notebook_of(script))


@pytest.mark.parametrize("text", ["", "import torch\n", "import torch\n# %%\nx = 1\n"])
def test_a_script_without_cells_is_refused(tmp_path, text):
    script = tmp_path / "plain.py"
    script.write_text(text)
    with pytest.raises(ValueError, match="expected a line '# %%' at the top"):
        make_notebook.notebook_of(script)
