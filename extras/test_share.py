"""The claims of extras/share.py and of models in the hub's form."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import pytest
import torch

import plan
import train
from extras import share
from lib import common, weights
from lib.systems import system_class
from predictor import WorldModel
from test_all import SMALL, assert_refused, run_all

TINY = "--sizes depth=1,heads=2,mlp_dim=16 --epochs 1"


@pytest.fixture
def run_folder(workplace):
    """A folder with a run that is trained and planned with."""
    train.train(train.get_args([*TINY.split(), "--name", "tiny"]))
    return workplace


def imagined(folder):
    """What the model in a folder imagines for the same latents and actions."""
    torch.manual_seed(0)
    model = WorldModel.from_pretrained(folder)
    z = model.encode({"visual": torch.rand(2, 1, 1, model.encoder.dim), "proprio": torch.rand(2, 1, 4)})
    return model.rollout(z, torch.rand(2, 5, model.action_dim))


class Hub:
    """Takes the place of the hub: it keeps what is committed in a folder, and gives it back."""

    def __init__(self, folder, patch):
        self.folder = folder
        patch.setattr(hub, "create_repo", lambda repository, **_: None)
        patch.setattr(hub, "create_commit", self.commit)
        patch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
        patch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: None)
        patch.setattr(hub, "hf_hub_download", lambda repository, name: str(folder / repository / name))

    def commit(self, repository, parts, commit_message):
        (self.folder / repository).mkdir(parents=True)
        for part in parts:
            content = part.path_or_fileobj
            content = content if isinstance(content, bytes) else Path(content).read_bytes()
            (self.folder / repository / part.path_in_repo).write_bytes(content)


def test_a_model_that_is_shared_plans_as_before_bit_for_bit(run_folder, script, monkeypatch):
    search = "--n-evals 3 --num-samples 10 --topk 4 --opt-steps 2 --max-iter 2".split()
    assert script("plan", *search)[0] == 0
    Hub(run_folder / "hub", monkeypatch)
    code, out, err = script("extras.share", "runs/tiny", "someone/tiny")
    assert code == 0 and "someone/tiny has 5 files" in out, err
    shared = run_folder / "hub" / "someone" / "tiny"
    card = (shared / "README.md").read_text()
    assert "python train.py --sizes depth=1,heads=2,mlp_dim=16 --epochs 1 --name tiny" in card
    assert "python plan.py --ckpt someone/tiny" in card and "| `mpc-icem` | 2 × 10 candidates" in card
    assert card.startswith("---\nlicense: mit\n")
    assert script("plan", "--ckpt", "someone/tiny", "--name", "again", *search)[0] == 0
    before, after = (json.loads((Path("plan_outputs") / n / "results.json").read_text()) for n in ("tiny", "again"))
    assert before["success_by_iter"] == after["success_by_iter"]
    program = "import torch; from extras.test_share import imagined; torch.set_num_threads(1); "
    program += f"torch.save(imagined({str(shared)!r}), 'imagined.pt')"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(Path(plan.__file__).parent)})
    here, elsewhere = imagined("runs/tiny"), torch.load("imagined.pt")
    assert all(torch.equal(here[name], elsewhere[name]) for name in here)


def test_v_m_and_c_are_shared(tmp_path, script, monkeypatch):
    run_all(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Hub(tmp_path / "hub", monkeypatch)
    code, _, err = script("extras.share", "run", "someone/dreams")
    assert code == 0, err
    shared = tmp_path / "hub" / "someone" / "dreams"
    assert {path.name for path in shared.iterdir()} > {
        "README.md",
        "starts.npy",
        "vae.safetensors",
        "c_dream_tau1.safetensors",
    }
    card = (shared / "README.md").read_text()
    assert "vae_mdnrnn.py all --env pointmaze --max-steps 8 --episodes 6" in card
    assert (
        "pipeline_tag: reinforcement-learning" in card
        and "| dream_tau1 | real | " in card
        and "--sizes " + SMALL[SMALL.index("--sizes") + 1] in card
    )
    shutil.copytree("run", "rounds/iteration2")  # a run of iterate, of which two iterations are there
    flags = json.loads(Path("run/args.json").read_text()) | {"episodes": [6, 2], "v_steps": [4], "m_steps": [6, 3]}
    Path("rounds/args.json").write_text(json.dumps(flags))
    card = script("extras.share", "rounds", "someone/rounds", "--dry-run")[1]
    assert "vae_mdnrnn.py iterate --env pointmaze --max-steps 8 --episodes 6 2" in card
    assert "--m-steps 6 3 --iterations 2\n" in card


def test_what_wrong_input_gets(run_folder, script, monkeypatch):
    shown = script("extras.share", "runs/tiny", "a/b", "--dry-run")[1]
    assert "a/b would get README.md, config.json, args.json, model.safetensors" in shown
    assert_refused(script("extras.share", "runs/none", "a/b"), "no model at runs/none")
    assert_refused(script("extras.share", "runs/tiny"), "give a repository USER/NAME, --folder or --dry-run")

    def refuse(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(hub, "create_repo", refuse)
    assert_refused(script("extras.share", "runs/tiny", "a/b"), "a/b has not taken the files (no route to host)")
    monkeypatch.setattr(weights.hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(weights.hub, "get_hf_file_metadata", refuse)
    assert_refused(script("plan", "--ckpt", "a/b"), "a/b is not here, and the hub cannot be reached: download")
    (run_folder / "plan_outputs/tiny").mkdir(parents=True)
    (run_folder / "plan_outputs/tiny/table.md").write_text("| |\n")
    (run_folder / "plan_outputs/tiny/results.json").write_text(json.dumps({"args": {"ckpt": "runs/other"}}))
    assert_refused(script("extras.share", "runs/tiny", "a/b"), "has the results of another model: give --plans")
    results = {"args": {"ckpt": "runs/tiny"}}
    (run_folder / "plan_outputs/tiny/results.json").write_text(json.dumps(results))
    (run_folder / "runs/tiny/model.safetensors").touch()  # trained again since
    os.utime("plan_outputs/tiny/table.md", (0, 0))
    assert_refused(script("extras.share", "runs/tiny", "a/b"), "has the results of another model: give --plans")


def test_a_system_and_a_converted_run_say_how_they_were_made(workplace, script):
    assert_refused(script("plan", "--ckpt", "runs/own"), "no model at runs/own: train one with python train.py")
    world = dict(env="pointmaze", img_size=64, data="datasets/pointmaze")
    stats = (np.zeros(2), np.ones(2)), (np.zeros(4), np.ones(4))
    system_class("lewm")(*stats, world=world, channels=2, mlp_dim=4, dim=4).save_pretrained("runs/own")
    flags = vars(train.get_args(["--system", "lewm", "--seed", "3", "--sizes", "channels=2,mlp_dim=4,dim=4"]))
    for written, made in (
        (flags, "python train.py --system lewm --sizes channels=2,mlp_dim=4,dim=4 --seed 3\npython plan.py --ckpt"),
        ({"released": "outputs/x"}, "python -m lib.released outputs/x --convert runs/own\npython plan.py --ckpt"),
    ):
        common.write_json("runs/own/args.json", written)
        text, *_ = share.share_model(Path("runs/own"), Path("none"))
        assert f"```bash\n{made}" in text and "A world model of `pointmaze`, with lewm." in text


def test_the_model_that_is_shipped_reaches_its_goals(workplace, script):
    shipped = Path(plan.__file__).parent / "assets" / "models" / "pointmaze"
    code, _, err = script("plan", "--ckpt", shipped, "--n-evals", 6, "--max-iter", 4)
    assert code == 0, err
    assert json.loads(Path("plan_outputs/pointmaze/results.json").read_text())["success_by_iter"][-1] > 0.6
