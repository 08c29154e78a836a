"""The notebook of the README's example, with fewer steps: it runs, and shows a table and a figure."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
# A kernel's sockets and loops close when they are collected, and older libraries' files are read in their own way.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.mark.timeout(600)  # a kernel imports torch once more
def test_the_notebook_runs_and_shows_a_table_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs")  # stored without outputs, which would grow stale
        small = "total_timesteps=2_048, threads=1, episodes=4"
        cell.source = cell.source.replace("total_timesteps=60_000", small).replace('"1/8")', f'"1/8", {small})')
        cell.source = cell.source.replace("episodes=100", "episodes=4, threads=1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("<td>distinct games</td><td>4</td>" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown)
