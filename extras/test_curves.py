"""The claims of extras/curves.py and of --log."""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from extras import curves
from test_all import SMALL, assert_refused

TINY = "--sizes", "depth=1,heads=2,mlp_dim=16", "--epochs", "2"


def test_tensorboard_gets_what_stands_in_the_log(workplace, script, one_process):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, _, err = script("train", *TINY, "--name", "tiny", "--log", "tensorboard")
    assert code == 0, err
    log = np.genfromtxt("runs/tiny/log.csv", delimiter=",", names=True)
    events = event_accumulator.EventAccumulator("runs/tiny").Reload()
    assert [event.step for event in events.Scalars("train/val")] == [1, 2]
    assert np.allclose([event.value for event in events.Scalars("train/val")], log["val"])
    for step in ("collect", "train-v", "train-m", "train-c"):
        assert script("vae_mdnrnn", step, *SMALL, "--out", "runs/wm", "--log", "tensorboard")[0] == 0
    events = event_accumulator.EventAccumulator("runs/wm").Reload()
    assert {"train V/recon", "train M/nll", "train c_dream_tau1/best"} <= set(events.Tags()["scalars"])
    best = np.genfromtxt("runs/wm/c_dream_tau1.csv", delimiter=",", names=True)["best"]
    assert np.allclose([event.value for event in events.Scalars("train c_dream_tau1/best")], best)


def test_wandb_gets_the_flags_and_the_numbers(workplace, script, monkeypatch):
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert script("train", *TINY, "--name", "tiny", "--log", "wandb")[0] == 0
    assert wandb.init.call_args.kwargs["config"]["epochs"] == 2
    logged = [call.args[0] for call in wandb.init.return_value.log.call_args_list]
    assert [entry["train/step"] for entry in logged] == [1, 2] and all("train/val" in entry for entry in logged)


@pytest.mark.parametrize("kind, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_log_whose_package_is_missing_is_one_line(kind, module, workplace, script, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    refused = script("train", *TINY, "--name", "tiny", "--log", kind)
    assert_refused(refused, f"--log {kind} needs a package: pip install {kind}")


def test_curves_of_several_runs_stand_in_one_figure(tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = {"a": "epoch,train,val,seconds\n1,2.0,30.0,9\n2,1.0,2.5,9\n", "b": "epoch,train\n1,-1.0\n2,-2.0\n"}
    for run, text in logs.items():
        Path(run).mkdir()
        Path(run, "log.csv").write_text(text)
    Path("a/c_real.csv").write_text("steps,generation,best,score\n50,1,4.0,\n90,2,5.0,3.5\n")
    assert curves.read_logs("a")["c_real", "score"] == ("steps", [90.0], [3.5])
    drawn = []
    monkeypatch.setattr(curves.pictures, "save_figure", lambda path, figure, dpi: drawn.append(figure))
    assert "4 columns of 2 runs" in script("extras.curves", "a", "b")[1]
    name = lambda plot: f"{plot.get_title()} {plot.get_ylabel()}".strip()  # noqa: E731
    plots = {name(plot): plot for plot in drawn[0].axes}
    assert plots.keys() == {"train", "val", "c_real best", "c_real score"}
    assert [list(line.get_ydata()) for line in plots["train"].get_lines()] == [[2, 1], [-1, -2]]
    assert (plots["train"].get_yscale(), plots["val"].get_yscale()) == ("linear", "log")
    script("extras.curves", "a", "b", "--columns", "val")
    assert len(drawn[1].axes) == 1
    Path("b/c_real.csv").write_text("steps,generation,score\n80,1,5.0\n901,2,6.0\n")
    script("extras.curves", "a", "b", "--columns", "score,val")  # one search is ten times as long as the other
    assert {name(plot): plot.get_xscale() for plot in drawn[2].axes} == {"c_real score": "log", "val": "linear"}
    assert_refused(
        script("extras.curves", "a", "--columns", "wall"), "no log has wall; they have best, score, train, val"
    )
    assert_refused(script("extras.curves", "none"), "no log of a training in none")
