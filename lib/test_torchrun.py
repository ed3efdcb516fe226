"""Several processes do what one does:  python -m pytest -q lib/test_torchrun.py"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from lib import processes
from lib.common import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set of 30 short episodes."""
    folder = tmp_path_factory.mktemp("torchrun")
    data.collect(folder / "datasets" / "pointmaze", "pointmaze", 30, 8, 5, 64, workers=1)
    return folder


def start(folder, script, *flags, processes=1):
    """Runs a script in `folder` and returns its exit code and what it prints."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *several, str(script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stdout + done.stderr


def results(folder, name):
    content = json.loads((folder / "plan_outputs" / name / "results.json").read_text())
    return {key: content[key] for key in ("success_by_iter", "interval", "controls", "n_evals")}


def test_two_processes_train_and_plan_as_one_does(folder):
    flags = ["--steps", 12, "--batch-size", 26, "--sizes", "depth=1"]  # the last batch of an epoch is not even
    for name, several in (("one", 1), ("two", 2)):
        code, printed = start(folder, ROOT / "train.py", *flags, "--name", name, processes=several)
        assert code == 0 and printed.count("plan with it") == 1, printed
        for path in (folder / "datasets" / "pointmaze").glob("tokens_*.npy"):
            path.rename(folder / f"{name}.npy")  # so that the next run encodes the frames, too
    one, two = (np.genfromtxt(folder / "runs" / name / "log.csv", delimiter=",")[1:, :-1] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4)
    np.testing.assert_array_equal(np.load(folder / "one.npy"), np.load(folder / "two.npy"))

    flags = [
        "--ckpt",
        "runs/one",
        "--n-evals",
        12,
        "--max-iter",
        2,
        "--num-samples",
        20,
        "--controls",
        "random,oracle",
    ]
    for name, several in (("one", 1), ("two", 2)):
        code, printed = start(folder, ROOT / "plan.py", *flags, "--name", name, processes=several)
        assert code == 0 and printed.count("| `mpc-icem` |") == 2, printed
    assert results(folder, "one") == results(folder, "two")
    one, two = ((folder / "plan_outputs" / name / "problem_3.gif").read_bytes() for name in ("one", "two"))
    assert one == two


def test_what_processes_cannot_share_is_one_line(folder, monkeypatch):
    code, printed = start(folder, ROOT / "train.py", "--batch-size", 9, "--name", "refused", processes=2)
    assert code != 0 and printed.count("error: ") == 1, printed
    assert "error: 2 processes cannot share a --batch-size of 9 evenly" in printed
    assert not (folder / "runs" / "refused").exists()
    monkeypatch.setattr(processes, "WORLD_SIZE", 3)
    with pytest.raises(UserError, match="there is work for 2 processes, and not for 3"):
        processes.share(abs, [1, 2])


def test_processes_that_see_different_data_are_refused(folder):
    """The second process goes to a folder of its own, as on a machine with another disk."""
    data.collect(folder / "other" / "datasets" / "pointmaze", "pointmaze", 30, 8, 5, 64, seed=1, workers=1)
    program = f"import os, sys; os.environ['RANK'] == '1' and os.chdir('other'); sys.path.insert(0, {str(ROOT)!r}); "
    program += "import train; train.common.run_script(train.main)"
    (folder / "elsewhere.py").write_text(program)
    code, printed = start(folder, "elsewhere.py", "--name", "apart", processes=2)
    assert code != 0 and printed.count("error: ") == 1, printed
    assert "error: the processes of torchrun see different data at datasets/pointmaze" in printed


def test_two_processes_find_the_controller_that_one_finds(folder):
    script, tiny = (
        ROOT / "vae_mdnrnn.py",
        ["--env", "pointmaze", "--episodes", 4, "--max-steps", 15, "--sizes", "hidden=8"],
    )
    tiny += ["--v-steps", 2, "--m-steps", 2, "--workers", 1]
    for step in ("collect", "train-v", "train-m"):
        code, printed = start(folder, script, step, *tiny, "--out", "one")
        assert code == 0, printed
    shutil.copytree(folder / "one", folder / "two")
    search = ["--popsize", 6, "--trials", 2, "--c-steps", 400, "--score-trials", 3]
    for where, name in (("dream", "c_dream_tau1"), ("real", "c_real")):
        for out, several in (("one", 1), ("two", 2)):
            flags = [*tiny, *search, "--in", where, "--out", out]
            code, printed = start(folder, script, "train-c", *flags, processes=several)
            assert code == 0 and printed.count("weights, ") == 1, printed
        one, two = (np.genfromtxt(folder / out / f"{name}.csv", delimiter=",", skip_header=1) for out in ("one", "two"))
        assert len(one) > 1
        np.testing.assert_allclose(one, two, rtol=0 if where == "real" else 1e-4)  # a dream is rounded differently
    code, printed = start(folder, script, "train-v", *tiny, "--out", "one", processes=2)
    assert code != 0 and "error: the step train-v is for one process: torchrun shares train-c alone" in printed
