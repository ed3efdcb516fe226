"""The notebook runs from top to bottom, here with less of everything."""

from pathlib import Path

import pytest

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
LESS = {"400, 20, frameskip": "40, 20, frameskip", "--steps 600": "--steps 20", "--n-evals 20": "--n-evals 4"}
LESS |= {"steps=500": "steps=10", "steps=200_000": "steps=12_000", "frames[:2000]": "frames[:500]", ":2000,": ":500,"}


def test_the_tour_runs_from_top_to_bottom(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    (tmp_path / "extras").mkdir()
    notebook = nbformat.read(root / "extras" / "tour.ipynb", 4)
    for old, new in LESS.items():
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "extras")}}).execute()
    shown = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert (
        any("return in the dream" in text for text in shown) and (tmp_path / "plan_outputs/tour/success.png").exists()
    )
