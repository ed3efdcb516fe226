"""A tiny comparison of systems, from training to its table:  python -m pytest -q extras/test_systems.py"""

import json

import numpy as np
import pytest

import data
from extras import representation, systems
from extras.test_extras import here  # noqa: F401  (jobs are done in this process)
from lib import pictures
from lib.systems import system_class
from test_all import assert_refused, write_short_gif

FLAGS = "--system avdc,pca --env pointmaze --seeds 1 --steps 2 --n-evals 2 --max-iter 2 --num-samples 5 --topk 2"
FLAGS = f"{FLAGS} --opt-steps 1 --name tiny".split()


def test_a_tiny_comparison_goes_on_and_reports(tmp_path, script, here, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    data.collect("datasets/pointmaze", "pointmaze", 12, 9, 5, 64, workers=1)
    monkeypatch.setattr(pictures, "write_gif", write_short_gif)
    monkeypatch.setattr(system_class("avdc"), "sizes", dict(width=8))
    monkeypatch.setattr(systems, "AHEAD", 6)
    root = tmp_path / "runs" / "tiny"
    first = root / "pointmaze_pca_0"
    code, _, err = script("extras.systems", *FLAGS, "--system", "pca")
    assert code == 0, err
    measured = (first / "study.json").stat().st_mtime_ns
    code, out, err = script("extras.systems", *FLAGS)
    assert code == 0, err
    assert (first / "study.json").stat().st_mtime_ns == measured  # it went on, and did not begin anew
    assert (root / "systems.png").exists() and (root / "imagined.png").exists()
    lines = (root / "table.md").read_text().splitlines()
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines) if cells}
    assert list(rows)[-5:] == ["random policy", "true simulator", "copy", "avdc", "pca"]
    assert {len(cells) for cells in rows.values()} == {9} and rows["pca"][-1] == "(DINOv2: .98)"
    result = json.loads((first / "study.json").read_text())
    assert len(result["success"]) == 2 and len(result["psnr"]) == 6 and result["variance"] == []
    assert rows["avdc"][3] and not rows["avdc"][4]  # it draws five frames
    assert rows["pca"][3] == f"{result['psnr'][0]:.1f}" and rows["pca"][5] == f"{result['parameters']:,}"


def test_seeds_are_taken_together():
    rates, intervals = representation.pooled([[0.1, 0.5], [0.3, 0.5]], 50)
    np.testing.assert_allclose(rates, [0.2, 0.5])
    np.testing.assert_allclose(intervals[1], (0.4038, 0.5962), atol=1e-4)  # Wilson's, of 50 in 100


def test_psnr_is_that_of_each_step():
    real = np.zeros((2, 3, 16, 16, 3), np.uint8)
    frames = real.copy()
    frames[:, 1], frames[:, 2] = 51, 255  # a fifth of the range, and all of it
    assert systems.psnr_by_step(frames[:, 1:], real[:, 1:]) == pytest.approx([-20 * np.log10(0.2), 0], abs=1e-4)


def test_an_impossible_budget_is_reported_before_anything_is_trained(tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(script("extras.systems", "--num-samples", 5), "--topk 10 must lie between 2 and --num-samples 5")
    assert not list(tmp_path.iterdir())
