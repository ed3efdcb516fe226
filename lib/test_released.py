"""What DINO-WM released is read as it lies on the disk, plans and trains, and nothing of it is executed."""

import contextlib
import json
import os
import shutil
import subprocess
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import data
import predictor
from lib import released, worlds
from lib.common import UserError
from lib.problems import random_problems
from lib.test_agreement import write_run
from test_all import find_ball

TINY = ["--epochs", "2", "--sizes", "depth=1,heads=2,mlp_dim=16", "--encoder", "patches"]
BUDGET = ["--n-evals", 3, "--max-iter", 1, "--num-samples", 20, "--topk", 5, "--opt-steps", 2]


@pytest.fixture
def released_run(tmp_path, monkeypatch):
    """A function that writes a released run, and the data set that it was trained on, into an empty folder."""
    monkeypatch.chdir(tmp_path)
    return write_run


def refused(result, message):
    code, _, err = result
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


# -- the world -----------------------------------------------------------------------------------------------


def test_pointmaze_d4rl_follows_the_published_model():
    """D4RL's maze2d-umaze, geom by geom, and 500 steps of it as its environment takes them."""
    import mujoco

    spec, box = mujoco.MjSpec(), mujoco.mjtGeom.mjGEOM_BOX
    spec.option.timestep, spec.option.gravity, spec.option.iterations = 0.01, [0, 0, 0], 20
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
    contact = dict(condim=1, margin=0.002, friction=[0.5, 0.1, 0.1], density=1000)
    ground = dict(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[40, 40, 0.25], pos=[0, 0, -0.1], contype=1, conaffinity=0)
    spec.worldbody.add_geom(**ground, **contact)
    ball = spec.worldbody.add_body(name="ball", pos=[1.2, 1.2, 0])
    ball.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[0.1, 0, 0], contype=1, conaffinity=1, **contact)
    for name, axis in (("ball_x", [1, 0, 0]), ("ball_y", [0, 1, 0])):
        ball.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis, damping=[1, 0, 0])
        motor = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT, gear=[100, 0, 0, 0, 0, 0])
        motor.ctrllimited, motor.ctrlrange = True, [-1, 1]
    for row, col in np.argwhere([[c == "#" for c in cells] for cells in ("#####", "#GOO#", "###O#", "#OOO#", "#####")]):
        place = dict(size=[0.5, 0.5, 0.2], pos=[row + 1, col + 1, 0])
        spec.worldbody.add_geom(type=box, contype=2, conaffinity=1, **place, **contact)
    model = spec.compile()
    simulation = mujoco.MjData(model)

    env, rng, touching = worlds.make_env("pointmaze-d4rl"), np.random.default_rng(0), 0
    state = env.sample_state(rng)
    env.set_state(state)
    simulation.qpos[:], simulation.qvel[:] = state[:2], state[2:]
    for action in rng.uniform(-1.2, 1.2, (50, 2)).repeat(10, axis=0):  # held, so that the walls are reached
        simulation.qvel[:] = simulation.qvel.clip(-5, 5)
        simulation.ctrl[:] = action.clip(-1, 1)
        mujoco.mj_step(model, simulation, 5)
        env.step(action, render=False)
        np.testing.assert_allclose(env.state, np.r_[simulation.qpos, simulation.qvel], atol=1e-6)
        touching += any(box in model.geom_type[contact.geom] for contact in simulation.contact)
    assert touching > 50


def test_pointmaze_d4rl_is_seen_through_mujoco_pys_free_camera():
    env = worlds.make_env("pointmaze-d4rl", 224)
    side = 2 * (5.5 + 0.235 + 4) * np.tan(np.pi / 8)  # metres in view: its distance is the model's extent
    for x, y in [(0.8, 0.8), (0.8, 2.8), (2.8, 2.8), (2.8, 1.0)]:
        env.set_state(np.array([x, y, 0, 0]))
        frame = env.observe()["visual"]
        np.testing.assert_allclose(find_ball(frame, 30), 112 + 224 / side * (np.array([x, y]) + 1.2 - 3), atol=1)
    wall, floor = frame[112 - 224 // 4, 112], frame[5, 5:60].astype(float)  # rows grow with y, columns with x
    assert wall[0] > wall[1] > wall[2] and (floor[:, 2] > floor[:, 0]).all()  # sand; a blue checker
    assert len({tuple(pixel) for pixel in floor.round(-1)}) >= 2


def test_pointmaze_d4rl_poses_the_releases_problems():
    env, rng, expected = worlds.make_env("pointmaze-d4rl"), np.random.RandomState(99 * 3 + 1), []
    while len(expected) < 2:
        x, y = rng.uniform(0.5, 3.1), rng.uniform(0.5, 3.1)
        if not 1.1 < x < 2.5 or y >= 2.5:  # in a leg of the U, or in its bend
            expected.append([x, y, rng.uniform(-5.2262554, 5.2262554), rng.uniform(-5.2262554, 5.2262554)])
    starts, goals = random_problems(env, types.SimpleNamespace(seed=[99, 7], n_evals=4))
    np.testing.assert_array_equal([starts[3], goals[3]], expected)
    np.testing.assert_array_equal(starts[5], env.sample_problem(7, 1)[0])
    with pytest.raises(UserError, match="no problem 0 of --seed 0"):
        env.sample_problem(0, 0)
    here, away, behind = np.array([[1, 1, 0, 0], [1.4, 1, 3, 3], [1.6, 1, 0, 0]], float)
    assert env.goal_reached(here, away) and not env.goal_reached(here, behind)  # less than 0.5 m, whatever the speed
    assert env.free[tuple(np.round(starts[:, :2] + 0.2).astype(int).T)].all()


# -- the data set --------------------------------------------------------------------------------------------

LENGTHS = [30, 26, 30, 28, 30, 30, 27, 30, 30, 30]


@pytest.fixture(scope="module")
def archive_content(tmp_path_factory):
    """Ten episodes, padded with NaN; frame t of episode e begins with (e, t)."""
    path = tmp_path_factory.mktemp("released") / "point_maze"
    (path / "obses").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(10, 30, 4, generator=generator, dtype=torch.float64)
    states[..., :2] = states[..., :2].clamp(-0.1, 0.1) + 0.8
    actions = torch.rand(10, 30, 2, generator=generator) * 2 - 1
    for e, length in enumerate(LENGTHS):
        states[e, length:], actions[e, length:] = torch.nan, torch.nan
        frames = torch.randint(256, (length, 32, 32, 3), generator=generator, dtype=torch.uint8)
        frames[:, 0, 0, 0], frames[:, 0, 0, 1] = e, torch.arange(length)
        torch.save(frames, path / "obses" / f"episode_{e:03d}.pth")
    for name, tensor in (("states", states), ("actions", actions), ("seq_lengths", torch.tensor(LENGTHS))):
        torch.save(tensor, path / f"{name}.pth")
    return path


@pytest.fixture
def archive(archive_content, tmp_path, monkeypatch):
    """A copy of it, in an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(archive_content, tmp_path / "point_maze")).relative_to(tmp_path)


def test_the_released_data_set_is_read_as_the_release_reads_it(archive, monkeypatch):
    dataset = data.open_dataset(archive)
    actions, states = (torch.load(archive / f"{name}.pth") for name in ("actions", "states"))
    rows = torch.cat([states[e, :length] for e, length in enumerate(LENGTHS)]).float()
    statistics = dataset.statistics()
    np.testing.assert_array_equal(statistics["proprio"][0], rows.mean(0))
    np.testing.assert_array_equal(statistics["proprio"][1], rows.std(0))  # n - 1, and all episodes
    np.testing.assert_array_equal(dataset.actions[30:56], actions[1, :26])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    assert [part.tolist() for part in dataset.split()] == [sorted(order[:9]), order[9:]]
    assert (dataset.meta["env"], dataset.meta["img_size"], dataset.frames.shape) == (
        "pointmaze-d4rl",
        32,
        (291, 32, 32, 3),
    )

    opened, read = [], released.read_tensor
    monkeypatch.setattr(released, "read_tensor", lambda path: opened.append(path.name) or read(path))
    frames = dataset.frames[np.array([29, 30, 57])]
    assert frames[:, 0, 0, :2].tolist() == [[0, 29], [1, 0], [2, 1]]
    assert dataset.frames[54:58][:, 0, 0, :2].tolist() == [[1, 24], [1, 25], [2, 0], [2, 1]]
    assert opened == ["episode_000.pth", "episode_001.pth", "episode_002.pth"] + ["episode_001.pth", "episode_002.pth"]
    assert dataset.frames[30].shape == (32, 32, 3) and dataset.frames[::100].shape == (3, 32, 32, 3)

    windows = data.Windows(dataset, np.arange(10), num_frames=4, frameskip=5)
    assert len(windows) == sum(length - 20 + 1 for length in LENGTHS)
    batch = windows.batch(np.array([12]), np.arange(291)[:, None, None])  # the second of episode 1, which begins at 30
    assert batch["visual"].ravel().tolist() == [31, 36, 41, 46]
    np.testing.assert_array_equal(batch["action"][0, 1], actions[1, 6:11].ravel())


def test_the_released_data_set_trains_plans_and_is_described(archive, script):
    code, _, err = script("train", "--data", archive, *TINY, "--name", "tiny")
    assert code == 0, err
    for extra in ([], ["--goal-source", "dset"]):
        code, _, err = script("plan", "--ckpt", "runs/tiny", *BUDGET, *extra)
        assert code == 0, err
    results = json.loads(Path("plan_outputs/tiny/results.json").read_text())
    assert results["n_evals"] == 3 and len(results["success_by_iter"]) == 1
    code, out, _ = script("lib.released", archive)
    assert code == 0 and "10 episodes of 26 to 30 rows" in out and "(291, 32, 32, 3)" in out
    refused(script("train", "--data", archive, "--env", "pointmaze"), "has --env pointmaze-d4rl, and not pointmaze")


def change(name, new):
    def damage(path):
        torch.save(new(torch.load(path / name)), path / name)

    return damage


EPISODE = "obses/episode_002.pth"


@pytest.mark.parametrize("damage, message", [
    (lambda p: (p / "actions.pth").unlink(), "no file at point_maze/actions.pth"),
    (lambda p: (p / EPISODE).unlink(), f"no file at point_maze/{EPISODE}"),
    (lambda p: shutil.rmtree(p / "obses"), "no file at point_maze/obses/episode_000.pth"),
    (lambda p: (p / "states.pth").write_bytes(b"half"), "point_maze/states.pth is damaged"),
    (lambda p: torch.save({"states": 1}, p / "states.pth"), "states.pth is damaged, or does not hold a tensor"),
    (change("actions.pth", lambda a: a.index_fill(1, torch.tensor([7]), torch.nan)), "actions of episode 0 are"),
    (change("states.pth", lambda s: s.index_fill(1, torch.tensor([3]), torch.inf)), "states of episode 0 are"),
    (change("states.pth", lambda s: s[:, :20]), "point_maze/states.pth: (10, 20, 4) has no room"),
    (change("states.pth", lambda s: s[0]), "has no room for the 10 episodes"),
    (change("seq_lengths.pth", lambda n: n[:8]), "has no room for the 8 episodes"),
    (change("seq_lengths.pth", lambda n: n * 0), "seq_lengths.pth is not one whole number of steps"),
    (change("seq_lengths.pth", lambda n: n.float()), "is not one whole number of steps"),
    (change("seq_lengths.pth", lambda n: n[0]), "is not one whole number of steps"),
    (change(EPISODE, lambda f: f[:11]), f"{EPISODE}: (11, 32, 32, 3) of torch.uint8, not 30"),
    (change(EPISODE, lambda f: f.float()), "of torch.float32, not 30 uint8 frames (32, 32, 3)"),
    (change(EPISODE, lambda f: f[:, :16, :16]), f"{EPISODE}: (30, 16, 16, 3)"),
    (change("obses/episode_000.pth", lambda f: f[:, :16]), "(30, 16, 32, 3) of torch.uint8, not 30 uint8 frames"),
    (change("obses/episode_000.pth", lambda f: f[0, 0, 0, 0]), "episode_000.pth: () of torch.uint8"),
])  # fmt: skip
def test_a_released_data_set_that_is_not_whole_is_refused(archive, script, damage, message):
    damage(archive)
    for command in (["train", "--data", archive], ["lib.released", archive], ["data", "--inspect", archive]):
        refused(script(*command), message)
    assert not Path("runs").exists()


# -- the run -------------------------------------------------------------------------------------------------


def test_a_released_run_plans_at_once_or_converted(released_run, script):
    run = released_run()
    code, _, err = script("plan", "--ckpt", run, "--weights", "random", *BUDGET)
    assert code == 0, err
    assert json.loads(Path("plan_outputs/pm/results.json").read_text())["n_evals"] == 3
    code, out, err = script("lib.released", run, "--weights", "random", "--convert", "runs/pm")
    assert code == 0 and "python plan.py --ckpt runs/pm" in out, err
    code, out, err = script("plan", "--ckpt", "runs/pm", *BUDGET)
    assert code == 0 and "PSNR" in out, err
    code, out, _ = script("lib.released", run)
    assert code == 0 and "predictor.blocks.1.0.to_qkv.weight" in out and "depth: 2" in out
    refused(script("lib.released", run, "--weights", "random", "--convert", "runs/pm"), "runs/pm is there: remove it")
    refused(script("lib.released", "runs/pm", "--convert", "runs/again"), "runs/pm/hydra.yaml is missing")
    assert sorted(path.name for path in Path("runs").rglob("*")) == [
        "args.json",
        "config.json",
        "model.safetensors",
        "pm",
    ]


def test_a_run_that_does_not_normalise_has_no_statistics(released_run):
    run = released_run()
    put("env.dataset", {"normalize_action": False, "data_path": "/far"})(run)
    model = predictor.load_model(run, data="point_maze", weights="random")
    assert (model.proprio_std == 1).all() and (model.action_mean == 0).all()


def put(name, value=None):
    """Changes or removes a setting of hydra.yaml."""

    def damage(run):
        settings = yaml.safe_load((run / "hydra.yaml").read_text())
        *parents, last = name.split(".")
        inner = settings
        for parent in parents:
            inner = inner[parent]
        inner.pop(last) if value is None else inner.update({last: value})
        (run / "hydra.yaml").write_text(yaml.safe_dump(settings))

    return damage


def write(name, content):
    return lambda run: (run / name).write_bytes(content)


LATEST = "checkpoints/model_latest.pth"


@pytest.mark.parametrize("damage, message", [
    (lambda run: (run / "hydra.yaml").unlink(), "outputs/pm/hydra.yaml is missing, damaged or not YAML"),
    (write("hydra.yaml", b"a: [b"), "outputs/pm/hydra.yaml is missing, damaged or not YAML"),
    (write("hydra.yaml", b"[" * 100_000), "outputs/pm/hydra.yaml"),
    (write("hydra.yaml", b""), "hydra.yaml"),
    (put("num_hist"), "outputs/pm/hydra.yaml has no num_hist"),
    (put("predictor.depth"), "outputs/pm/hydra.yaml has no predictor.depth"),
    (put("env", "point_maze"), "hydra.yaml has no env.name"),
    (put("env.name", "pusht"), "env.name is pusht, not point_maze"),
    (put("num_pred", 2), "num_pred is 2, not 1"),
    (put("encoder._target_", "models.encoder.r3m.load_r3m"), "encoder._target_ is models.encoder.r3m"),
    (put("env.dataset.data_path", "/far"), "are not at /far: give --data"),
    (put("predictor.depth", 3), "model_latest.pth does not fit the model that is asked for"),
    (lambda run: (run / LATEST).unlink(), "no checkpoint at outputs/pm/checkpoints"),
    (write(LATEST, b"PK"), "model_latest.pth is damaged"),
    (lambda run: torch.save({"epoch": 1}, run / LATEST), "hold a module 'predictor'"),
])  # fmt: skip
def test_a_released_run_that_is_not_whole_is_refused(released_run, script, damage, message):
    run = released_run()
    damage(run)
    refused(script("plan", "--ckpt", run, "--weights", "random"), message)
    assert not Path("plan_outputs").exists()


def test_a_released_run_with_numbers_that_are_not_finite_is_refused(released_run, script):
    run = released_run(spoil=lambda content: content["predictor"].pos_embedding.data.fill_(torch.nan))
    refused(script("lib.released", run, "--weights", "random", "--convert", "runs/pm"), "pos_embedding holds numbers")
    assert not Path("runs/pm").exists()


# -- nothing of it is executed -------------------------------------------------------------------------------


class Malicious:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("function, args, name", [
    (os.system, ("touch owned",), f"{os.system.__module__}.system"),
    (eval, ("open('owned', 'w')",), "builtins.eval"),
    (getattr, (complex, "real"), "builtins.getattr"),
    (torch.load, ("owned",), "torch.serialization.load"),
    (Path, ("owned",), "pathlib"),
    (subprocess.Popen, (["touch", "owned"],), "Popen"),
])  # fmt: skip
def test_a_malicious_checkpoint_is_refused_and_has_no_effect(released_run, script, function, args, name, deep):
    bomb = Malicious(function, *args)

    def spoil(content):
        if deep:  # in the attributes of a module inside a module, behind tensors
            inner = content["predictor"].get_submodule("transformer.layers.1.0")
            inner.note = {"a": [torch.zeros(3), (1, bomb)]}
        else:
            content["epoch"] = bomb

    result = script("plan", "--ckpt", released_run(spoil=spoil), "--weights", "random")
    refused(result, "which no checkpoint of DINO-WM needs: refused")
    assert name in result[2] and not Path("owned").exists() and not Path("plan_outputs").exists()


def test_a_shell_has_no_behaviour_and_what_it_is_given_stays_in_it(tmp_path):
    """State for a known name or a module's class, in place of an instance: nothing outlives the reading."""

    def archive(*body):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
            file.writestr("x/data.pkl", b"\x80\x02" + b"".join(body) + b".")
        return tmp_path / "x.pth"

    state = b"N}U\x01aK\x01s\x86b"  # BUILD with (None, {"a": 1}): sets attributes
    for name in (b"torch._utils\n_rebuild_tensor_v2\n", b"models.vit\nAttention\n", b"collections\nOrderedDict\n"):
        with contextlib.suppress(UserError):
            released.read_pickle(archive(b"c" + name, state))
    assert not hasattr(released.Shell, "a") and not hasattr(released.Shell, "state")
    shell = released.read_pickle(archive(b"cmodels.vit\nAttention\nK\x05\x85R}U\x01aK\x01sb"))
    assert type(shell) is released.Shell and vars(shell) == {"state": {"a": 1}}
