"""The claims of extras/, checked on a CPU in a minute:  python -m pytest -q extras/test_extras.py"""

import contextlib
import json
import shutil
from unittest import mock

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from encoders import build_encoder
from extras import budget, calibration, horizon, representation, tokens
from lib import pictures, processes
from lib.common import UserError
from lib.systems import system_class
from lib.worlds import make_env, play_alone
from predictor import WorldModel
from test_all import assert_refused, run_all

# ---------------------------------------------------------------------------------------------------------
# horizon.py

TRANSITIONS = {
    "vit": ["--sizes=depth=1,heads=2,mlp_dim=16"],
    "rwm": ["--sizes=width=16", "--encoder=state"],
    "vjepa2_ac": ["--sizes=width=24,depth=1,heads=2,mlp_dim=16"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    """The folder in which a run of each transition stands, trained on two imagined frames."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(dataset.path, folder / "datasets" / "pointmaze")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in TRANSITIONS.items():
            own = [f"--predictor={name}", f"--name={name}", "--rollout-steps=2", "--epochs=2"]
            train.train(train.get_args(own + flags))
    return folder / "runs"


def test_each_transition_shows_its_horizon_error(workplace, script, runs):
    (workplace / "runs").symlink_to(runs)
    compared = [f"runs/{name}" for name in TRANSITIONS]
    code, out, err = script("extras.horizon", "--steps", 4, "--n-evals", 6, "--name", "error", "--ckpt", *compared)
    assert code == 0, err
    assert out.count("  copy") == out.count("  simulator") == 3
    assert (workplace / "plan_outputs" / "error" / "horizon_error.png").exists()
    curves = json.loads((workplace / "plan_outputs" / "error" / "horizon_error.json").read_text())["curves"]
    assert list(curves) == compared
    for by_name in curves.values():
        assert all(len(curve) == 4 and min(curve) > 0 for curve in by_name.values())
        assert by_name["simulator"][0] < 0.5 * by_name["copy"][0]
    flags = ["--steps", 4, "--n-evals", 6, "--name", "again", "--ckpt", "runs/rwm", "runs/vit"]
    assert script("extras.horizon", *flags)[0] == 0
    again = json.loads((workplace / "plan_outputs" / "again" / "horizon_error.json").read_text())["curves"]
    assert again == {run: curves[run] for run in again}  # the trajectories are the same, whoever is compared


def state_model(frameskip=5):
    stats = (torch.zeros(2), torch.ones(2)), (torch.zeros(4), torch.ones(4))
    world, sizes = dict(env="pointmaze", img_size=64, data="d"), dict(width=8, depth=1, mlp_dim=8)
    return WorldModel(build_encoder("state"), *stats, frameskip=frameskip, world=world, predictor="rwm", **sizes).eval()


def test_horizon_error_of_the_truth_is_zero(monkeypatch):
    """A model that imagines with MuJoCo has an error of rounding alone, and copying's is the distance travelled."""
    model, env = state_model(), make_env("pointmaze")

    def simulate(z0, actions):
        states = list(z0["visual"][:, :, 0].double().numpy().swapaxes(0, 1))
        for t in range(len(states) - 1, actions.shape[1]):
            states.append(env.simulate(states[-1], actions[:, t].double().numpy().reshape(len(actions), 5, 2)))
        return {"visual": torch.from_numpy(np.stack(states, 1)).float()[:, :, None]}

    monkeypatch.setattr(model, "rollout", simulate)
    curves = horizon.horizon_error(env, {"truth": model}, 3, 4, [99], torch.device("cpu"))["truth"]
    assert max(curves["model"]) < 1e-4 < min(curves["simulator"][0], 0.01) < curves["copy"][0]


def test_runs_of_different_worlds_have_no_common_horizon(workplace, script):
    for name, frameskip in (("a", 5), ("b", 1)):
        state_model(frameskip).save_pretrained(f"runs/{name}")
    message = "only runs of one environment, --img-size and --frameskip can be compared"
    assert_refused(script("extras.horizon", "--ckpt", "runs/a", "runs/b", "--steps", 3), message)
    stats = (np.zeros(2), np.ones(2)), (np.zeros(4), np.ones(4))
    sizes = dict(channels=2, deter=4, mlp_dim=4, groups=1, classes=2)
    dreamer = system_class("dreamer")(*stats, world=dict(env="pointmaze", img_size=16, data="d"), **sizes)
    dreamer.save_pretrained("runs/c")
    message = "a latent of runs/c depends on earlier frames"
    assert_refused(script("extras.horizon", "--ckpt", "runs/c", "--steps", 3), message)
    assert not (workplace / "plan_outputs").exists()


# ---------------------------------------------------------------------------------------------------------
# budget.py


def test_every_planner_gets_every_budget_once(workplace, script, runs, monkeypatch):
    (workplace / "runs").symlink_to(runs)
    monkeypatch.setattr(budget, "BUDGETS", ((4, 1), (6, 2)))
    command = "extras.budget", "--ckpt", "runs/vit", "--max-iter", 2, "--n-evals"
    code, out, err = script(*command, 3)
    assert code == 0, err
    planned = [json.loads(path.read_text())["args"] for path in (workplace / "plan_outputs").rglob("results.json")]
    chosen = {(args["planner"], args["num_samples"], args["opt_steps"], args["ckpt"]) for args in planned}
    assert chosen == {(planner, *size, "runs/vit") for planner in budget.COLOURS for size in budget.BUDGETS}
    assert (workplace / "plan_outputs" / "budget" / "budget.png").exists()
    monkeypatch.setattr(budget.plan, "run", None)  # nothing is planned again
    assert script(*command, 3)[1].splitlines()[-8:] == out.splitlines()[-8:]
    assert_refused(script(*command, 4), "was begun with other flags (--n-evals 3)")


# ---------------------------------------------------------------------------------------------------------
# representation.py

STUDY = "--env pointmaze --encoder pca --seeds 0,1 --shift colours --workers 2 --steps 4 --depth 1 --drift 2".split()
STUDY += "--n-evals 3 --max-iter 2 --num-samples 20 --topk 5 --opt-steps 2".split()


@pytest.fixture
def here(monkeypatch):
    """The study's jobs are done in this process, which does not have to import everything again, as a worker does."""
    pool, threads = mock.Mock(map=lambda function, jobs: map(function, jobs)), torch.get_num_threads()
    monkeypatch.setattr(processes, "Workers", lambda workers: contextlib.nullcontext(pool))
    yield
    torch.set_num_threads(threads)


def test_the_study_measures_every_run_once(workplace, script, here):
    code, out, err = script("extras.representation", *STUDY)
    assert code == 0, err
    root = workplace / "runs" / "study"
    rows = [line.split(" | ") for line in (root / "table.md").read_text().splitlines() if line.startswith("| pca |")]
    success, shifted, measured = rows
    assert success[1] == "1 × 32" and [len(rows) for rows in (success, shifted, measured)] == [4, 3, 7]
    assert success[2] == shifted[1] and float(measured[3]) > 0.7  # within one plan; the ball's place
    assert (root / "study.png").exists() and "| true simulator |" in out
    result = json.loads((root / "pointmaze_pca_1" / "study.json").read_text())
    assert np.isin(result["success"], (0, 1)).all() and np.shape(result["success"]) == (2, 3)  # iterations, problems
    assert list(result["shift"]) == ["colours"] and len(result["shift"]["colours"]) == 3 and result["probe"][0] > 0.7
    assert len(result["drift"]["model"]) == len(result["drift"]["copy"]) == 2
    for seed in (0, 1):  # the controls are measured once, not once for each encoder
        controls = json.loads((root / f"pointmaze_controls_{seed}" / "study.json").read_text())
        assert list(controls) == ["random", "oracle"] and all(len(rates) == 2 for rates in controls.values())

    stamps = {path: path.stat().st_mtime_ns for path in [*root.glob("*/study.json"), *root.glob("*/model.safetensors")]}
    lost = root / "pointmaze_pca_1" / "study.json"
    lost.unlink()
    more = "--encoder", "pca,patches", "--curve", "pca"  # goes on, with one encoder more, and with a curve
    assert script("extras.representation", *STUDY, *more)[0] == 0
    assert json.loads(lost.read_text())["success"] == result["success"]
    assert {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp} == {lost}
    table = (root / "table.md").read_text()
    assert "| patches | 16 × 64 |" in table and "| against the first | patches − pca | " in table
    assert [line.split(" | ")[0] for line in table.splitlines()[-4:]] == ["| 1", "| 2", "| 4", "| 8"]  # gradient steps
    assert_refused(script("extras.representation", *STUDY, "--steps", 13), "was begun with other flags (--steps 4)")


def test_a_run_that_fails_does_not_end_the_study(workplace, script, here, monkeypatch):
    measure = representation.measure

    def unlucky(args, env, encoder, seed, steps):
        if (encoder, seed) == ("pca", 0):
            raise UserError("pca has collapsed: try another --seed")
        return measure(args, env, encoder, seed, steps)

    flags = [*STUDY, "--name", "unlucky"]
    with monkeypatch.context() as patch:
        patch.setattr(representation, "measure", unlucky)
        said = "1 of 4 runs failed, and the others are done: pointmaze_pca_0: pca has collapsed: try another --seed"
        assert_refused(script("extras.representation", *flags), said)
    done = {path.parent.name for path in (workplace / "runs" / "unlucky").glob("*/study.json")}
    assert done == {"pointmaze_pca_1", "pointmaze_controls_0", "pointmaze_controls_1"}
    assert script("extras.representation", *flags)[0] == 0  # the same command does what is left


def test_the_study_runs_in_worker_processes(workplace, script):
    code, _, err = script("extras.representation", *STUDY, "--seeds", 0, "--max-iter", 1, "--name", "deep/own")
    assert code == 0, err
    assert "3 goals in each maze for each of 1 seeds" in (workplace / "runs" / "deep" / "own" / "table.md").read_text()


def test_encoders_are_compared_on_the_same_problems():
    """Binomial(9, 1/2) gives P(8 or 9 of 9) = 10 / 512 on either side. What both or neither solve tells nothing."""
    one, other = np.array([1] * 8 + [0] + [1] * 5), np.array([0] * 8 + [1] + [1] * 5)
    assert representation.mcnemar(one, other) == representation.mcnemar(other, one) == pytest.approx(20 / 512)
    assert representation.mcnemar(one, one) == 1

    def run(*success):  # of two seeds, with two iterations, in (seeds, iterations, problems)
        return {"success": np.array(success), "shift": {"light": np.array(success)[:, 0]}}

    results = {("pointmaze", "vae"): run([[1, 1, 0], [1, 1, 0]], [[0, 1, 0], [1, 1, 1]])}
    results |= {("pointmaze", "pca"): run([[0, 0, 0], [1, 1, 0]], [[0, 1, 0], [0, 0, 0]])}
    args = mock.Mock(encoder=["pca", "vae"], env=["pointmaze"], max_iter=2)
    header, *rows = representation.comparison_rows(args, results)
    assert header[2:] == ["pointmaze, within 1", "all, within 1", "all, within 2", "with another look", "runs ahead"]
    once, in_the_end = "+0.33 (p 0.5)", "+0.50 (p 0.25)"
    assert rows == [["a reconstructive latent", "vae − pca", once, once, in_the_end, once, "1 of 2"]]


def test_the_probe_reads_what_is_linear():
    seen, readout = np.random.default_rng(0).normal(size=(400, 2, 3)).astype(np.float32), np.arange(12).reshape(6, 2)
    states = np.column_stack([seen.reshape(400, 6) @ readout + 5, np.random.default_rng(1).normal(size=400)])
    read = representation.linear_probe(seen, states, (np.arange(300), np.arange(300, 400)))
    assert min(read[:2]) > 0.999 and abs(read[2]) < 0.1
    places = np.random.default_rng(2).uniform(0, 3, (60, 2))
    straight = np.pad(places, ((0, 0), (0, 2)))[:, None].astype(np.float32)
    assert representation.distance_correlation(straight, places) == pytest.approx(1)
    assert representation.distance_correlation(-seen[:60], places) < 0.3


# ---------------------------------------------------------------------------------------------------------
# calibration.py


def test_dreams_stand_beside_games(tmp_path, script, one_process):
    run_all(tmp_path)
    rnn = load_file(tmp_path / "rnn.safetensors")
    rnn["heads.reward.weight"] *= 0
    rnn["heads.reward.bias"][:] = 0.5
    save_file(rnn, tmp_path / "rnn.safetensors")  # now each of the 8 steps of a dream is worth 0.5
    code, out, err = script("extras.calibration", "--run", tmp_path, "--tau", 2, "0.5", "--episodes", 3)
    assert code == 0, err
    players = json.loads((tmp_path / "calibration.json").read_text())
    assert list(players) == ["zero", "random", "dream_tau1"]
    assert all(list(returns) == ["game", "0.5", "2"] for returns in players.values())
    assert all(returns[tau] == [4, 4, 4] for returns in players.values() for tau in ("0.5", "2"))
    still = lambda obs: np.zeros(2, np.float32)  # noqa: E731
    games = [play_alone(make_env("pointmaze"), still, calibration.SEED + i, 8) for i in range(3)]
    assert np.allclose(players["zero"]["game"], [game["rewards"].sum() for game in games], atol=1e-6)
    assert players["random"]["game"] != players["zero"]["game"]
    assert "| zero |" in out and out.count("4 ± 0 (± 0)") == 6
    assert (tmp_path / "calibration.png").exists()


def test_who_moves_at_random_does_so_in_a_dream():
    space, seen = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 3])), []
    dream = mock.Mock(device=torch.device("cpu"), generator=torch.Generator(), keep=lambda rows: None)
    dream.reset = lambda trial, trials: torch.zeros(len(trial), 3)
    dream.step = lambda a: (seen.append(a), torch.zeros(len(a), 3), torch.ones(len(a)), torch.ones(len(a)) > 0)[1:]
    assert calibration.returns_in_dreams(dream, None, space, None, 50) == [1] * 50
    actions = torch.cat(seen)
    assert (actions.amin(0) - torch.tensor([-1, 0])).abs().max() < 0.1
    assert (actions.amax(0) - torch.tensor([1, 3])).abs().max() < 0.1


# ---------------------------------------------------------------------------------------------------------
# tokens.py


def test_tokens_are_drawn_as_colours(workplace, script, monkeypatch):
    monkeypatch.setattr(tokens, "LENGTH", 4)
    code, out, err = script(
        "extras.tokens", "--encoders", "pca,patches,r3m", "--data", "datasets/pointmaze", "--out", "out"
    )
    assert code == 0, err
    assert "left out: " in out  # r3m without weights: it is never random by itself
    assert imageio.imread("out/tokens.png").shape[0] == 450  # three rows
    colours = pictures.principal_colours(torch.rand(3, 4, 5))
    assert colours.shape == (3, 2, 2, 3) and colours.min() == 0 and colours.max() == 1


def test_frames_of_pointmaze_come_in_clips(monkeypatch):
    monkeypatch.setattr(tokens, "CLIPS", 2)
    clips = tokens.sample_frames(None).reshape(2, 8, 224, 224, 3)
    assert (clips[:, 1:] != clips[:, :-1]).any((2, 3, 4)).all()  # the ball moves


# ---------------------------------------------------------------------------------------------------------
# What wrong input gets


@pytest.mark.parametrize(
    "command, message",
    [
        ("representation --encoder pca,nowhere", "unknown encoder 'nowhere'; known: pca"),
        ("representation --encoder r3m@missing.pth", "no weights at missing.pth"),
        ("representation --encoder state", "--encoder state sees none"),
        ("representation --encoder ,", "each have to name at least one"),
        ("representation --seeds 0,x", "x is not a whole number of at least 0"),
        ("representation --shift dark", "unknown dark; known: colours"),
        ("representation --env carracing", "unknown carracing; known: pointmaze"),
        ("representation --topk 100", "--topk 100 must lie between 2 and --num-samples 64"),
        ("representation --name ..", "is not a folder below runs/"),
        ("horizon", "no trained model under runs/"),
        ("horizon --ckpt a b", "no model at a: train one"),
        ("horizon --ckpt a --steps 0", "0 is not a whole number of at least 1"),
        ("calibration", "no run of World Models at runs/worldmodels_takecover"),
        ("calibration --tau 0", "0 is not a number above 0"),
        ("tokens --encoders patches,x", "unknown x; known: pca"),
        ("tokens --encoders state", "unknown state; known: pca"),
        ("tokens --encoders patches --data datasets/pointmaze", "as long as a window of 8 model steps"),
    ],
)
def test_what_wrong_input_gets(command, message, script, workplace):
    before = sorted(workplace.rglob("*"))
    assert_refused(script(*f"extras.{command}".split()), message)
    assert sorted(workplace.rglob("*")) == before  # nothing half-written
