"""What DINO-WM and V-JEPA 2-AC released is read as it lies, computes what the released code computes, and runs nothing.

test_released.json holds numbers that the released code itself gave, once (gaoyuezhou/dino_wm at 0a9492f,
facebookresearch/dinov2 at b8931f7, facebookresearch/vjepa2 at c2963a4). Weights and inputs are not in the file, because
they follow from a formula, `pattern`.
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import data
import encoders
import plan
import predictor
import train
from lib import common, released, worlds
from lib.common import UserError, to_tensor
from test_all import find_ball

REFERENCE = json.loads((Path(__file__).parent / "test_released.json").read_text())


MODULES = {"train": train, "plan": plan, "released": released, "data": data}
TINY = ["--epochs", "2", "--sizes", "depth=1,heads=2,mlp_dim=16", "--encoder", "patches"]
BUDGET = ["--n-evals", 3, "--max-iter", 1, "--num-samples", 20, "--topk", 5, "--opt-steps", 2]


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script's main in this process: script("train", "--epochs", 1) -> (exit code, stdout, stderr)."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            common.run_script((lambda: train.train(train.get_args())) if name == "train" else MODULES[name].main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def refused(result, message):
    code, _, err = result
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


# -- what these tests call of the project --------------------------------------------------------------------


def open_run(run):
    return predictor.load_model(run, weights="random")


read_checkpoint = released.read_pickle


def predict(model, obs, actions):
    """The latents {"visual": (B, T, N, d), "proprio": (B, T, copies, e)} predicted to follow those of `obs`."""
    z, _ = model.predictor(model.pack(model.encode(obs)), model.encode_action(actions))
    N, d, e = model.encoder.num_patches, model.encoder.dim, model.proprio_dim
    visual, proprio = z.split([N * d, z.shape[-1] - N * d], -1)
    return {"visual": visual.unflatten(-1, (N, d)), "proprio": proprio.unflatten(-1, (-1, e))}


def losses(model, obs, actions):
    """The loss, and those of the visual and of the proprio's part by themselves."""
    loss, parts = model.loss(obs | {"action": actions})
    return torch.stack([loss, parts["visual"], parts["proprio"]])


def rollout(model, obs, actions):
    """The latents {"visual": (B, T + 1, N, d), "proprio": (B, T + 1, e)} that T actions lead to."""
    return model.rollout(model.encode(obs), actions)


def costs(model, obs, goal, actions, objective):
    """What actions cost (B,) in planning from one known frame to another."""
    numpy = lambda obs: {name: x.numpy() for name, x in obs.items()}  # noqa: E731
    goal = {name: x[:, 0] for name, x in goal.items()}
    worlds = types.SimpleNamespace(past=numpy(obs), goal_obs=numpy(goal), taken=np.zeros((len(actions), 0, 10), "f4"))
    cost = plan.latent_cost(model, worlds, torch.device("cpu"), objective, alpha=0.5, base=3.0)
    return cost(np.arange(len(actions)))(actions[:, None]).flatten()


def paint(model, tokens, frames):
    """The images (B, T, 3, H, W) that tokens decode to, and the decoder's loss, its reconstruction's and its codes'."""
    return model.decoder(tokens)[0], torch.stack(model.decoder_loss(tokens, frames))


def ac_tokens(path, tokens, actions, states):
    """Three frames of four tokens of six numbers through the V-JEPA 2-AC predictor in the file `path`."""
    ac = predictor.ACPredictor(4, 3, 6, 3, 3, width=32, depth=2, heads=2, mlp_dim=128)
    ac.load_released(path)
    return ac.transformer(tokens, actions, states)[0]


def seen_by_dinov2(frames):
    """What the backbone of the encoder `dinov2` is given for frames (S, 224, 224, 3)."""
    encoder, seen = encoders.build_encoder("dinov2", weights="random"), []
    encoder.vit.forward_features = lambda x: seen.append(x) or torch.zeros(len(x), 197, 384)
    encoder(to_tensor(frames))
    return seen[0]


# -- weights and inputs, as make_released_reference.py has them ----------------------------------------------


def pattern(shape, k, scale=1.0):
    """Numbers from -scale to scale in no apparent order, the same on every machine."""
    n = torch.arange(math.prod(shape))
    return ((n * n * 7919 + n * k * 4729 + k * 389) % 65521 / 32760.5 - 1).mul(scale).reshape(shape)


def pattern_frames(shape, k):
    return (pattern(shape, k, 127.5) + 127.5).round().byte()


def pattern_weights(shapes):
    """{name: tensor} of {name: shape}: matrices and kernels of a moderate size, and all else around 0 or 1."""
    state = {}
    for k, (name, shape) in enumerate(sorted(shapes.items())):
        if len(shape) > 1 and name.endswith("weight"):
            state[name] = pattern(shape, k, math.sqrt(3 / min(shape[:2]) / math.prod(shape[2:])))
        else:
            state[name] = pattern(shape, k, 0.4) + float(name.endswith(("weight", "cluster_size")))
    return state


def sample(x, count):
    """`count` of the numbers in x, spread over all of its axes; all of them in order, if there are no more."""
    if x.numel() <= count:
        return x.flatten()
    return x.flatten()[torch.arange(1, count + 1) * 104729 % x.numel()]


def batch(img_size, tokens):
    """Two windows of four frames, their tokens, states and actions in the world's units, and two actions more."""
    return dict(frames=pattern_frames((2, 4, img_size, img_size, 3), 5), tokens=pattern((2, 4, tokens, 384), 6, 1.7),
                states=pattern((2, 4, 4), 3), actions=pattern((2, 6, 10), 4))  # fmt: skip


# -- a run in the release's format ---------------------------------------------------------------------------


def released_weights(described, layers=2, **sizes):
    """{name: tensor} of a part of the release that is described as {"head.*.tail": "weight 3 D, bias 3"}, where * is
    the number of a layer and a letter one of `sizes`."""
    shapes = {}
    for owner, tensors in described.items():
        for i in range(layers if "*" in owner else 1):
            for leaf, *shape in map(str.split, tensors.split(", ")):
                name = ".".join(filter(None, [owner.replace("*", str(i)), leaf]))
                shapes[name] = [sizes.get(n) or int(n) for n in shape]
    return pattern_weights(shapes)


def as_modules(state):
    """Nested modules with these tensors, which behave as nothing."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            module = module._modules.setdefault(parent, nn.Module())
        module.register_parameter(leaf, nn.Parameter(tensor))
    return root


SETTINGS = """
frameskip: 5
num_hist: 3
num_pred: 1
env: {name: point_maze, dataset: {normalize_action: true, data_path: point_maze}}
encoder: {_target_: models.dino.DinoV2Encoder, name: dinov2_vits14, feature_key: x_norm_patchtokens}
predictor: {_target_: models.vit.ViTPredictor, depth: 2, heads: 2, mlp_dim: 16, dropout: 0.1, pool: mean}
"""


@pytest.fixture
def released_run(tmp_path, monkeypatch):
    """A function that writes the run `name` of the reference, and the data set that it was trained on, into an empty
    folder; with its own trained DINOv2, if that is asked for."""
    monkeypatch.chdir(tmp_path)

    def write(name="one copy", own_encoder=False, spoil=lambda content: None):
        made, parts = REFERENCE["runs"][name], REFERENCE["parts"]
        (p, a), (copies_p, copies_a) = made["widths"], made["repeats"]
        write_data_set(tmp_path / "point_maze", made["img_size"])

        if made["concat_dim"] == 1:
            tokens, width = made["tokens"], 384 + copies_p * p + copies_a * a
        else:
            tokens, width = made["tokens"] + 2, 384
        sizes = dict(L=3 * tokens, D=width, P=p, A=a)
        content = {
            part: as_modules(released_weights(parts[part], **sizes))
            for part in ("predictor", "proprio_encoder", "action_encoder")
        }
        for layer in (0, 1):  # the mask is an attribute there, and no buffer
            attention = content["predictor"].get_submodule(f"transformer.layers.{layer}.0")
            attention.bias = torch.ones(1, 1, 3 * tokens, 3 * tokens)
        if own_encoder:
            content["encoder"] = as_modules(released_weights(parts["encoder"], layers=12))
        kind = "transposed_conv" if made["tokens"] == 1 else "vq"
        if "images" in made["numbers"]:
            content["decoder"] = as_modules(released_weights(parts[kind]))
        optimizer = torch.optim.AdamW(content["predictor"].parameters(), lr=0)
        for parameter in content["predictor"].parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # now it has a state, as a trained one
        content |= {"epoch": 3, "predictor_optimizer": optimizer}

        settings = yaml.safe_load(SETTINGS) | {k: made[k] for k in ("img_size", "concat_dim")}
        settings |= dict(proprio_emb_dim=p, action_emb_dim=a, num_proprio_repeat=copies_p, num_action_repeat=copies_a)
        settings["has_decoder"] = "decoder" in content
        settings["decoder"] = dict(channel=4, n_embed=3, n_res_block=1, n_res_channel=2, quantize=name == "copies")
        if kind == "transposed_conv":
            settings["encoder"]["feature_key"] = "x_norm_clstoken"
            settings["decoder"] = dict(observation_shape=[3, 112, 112], depth=4, kernel_size=5, stride=3)
        run = Path("outputs") / "pm"
        (run / "checkpoints").mkdir(parents=True)
        (run / "hydra.yaml").write_text(yaml.safe_dump(settings))
        spoil(content)
        torch.save(content, run / "checkpoints" / "model_latest.pth")
        return run

    return write


def write_data_set(path, img_size):
    """Three short episodes in the release's format; their means and deviations are what a run normalises by."""
    (path / "obses").mkdir(parents=True)
    torch.save(pattern((3, 8, 4), 1), path / "states.pth")
    torch.save(pattern((3, 8, 2), 2), path / "actions.pth")
    torch.save(torch.tensor([8, 6, 7]), path / "seq_lengths.pth")
    for episode in range(3):
        frames = torch.zeros(8, img_size, img_size, 3, dtype=torch.uint8)
        torch.save(frames, path / "obses" / f"episode_{episode:03d}.pth")


# -- the tests -----------------------------------------------------------------------------------------------


def part(obs, first, last):
    return {name: x[:, first:last] for name, x in obs.items()}


def check(results, numbers):
    """Every result, a tensor, has the numbers that the release gives, and none is left out."""
    assert results.keys() == numbers.keys()
    for name, tensor in results.items():
        expected = torch.tensor(numbers[name])
        torch.testing.assert_close(
            sample(tensor, len(expected)), expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", REFERENCE["runs"])
@torch.no_grad()
def test_a_released_run_computes_what_the_released_code_does(name, released_run):
    model, made = open_run(released_run(name)), REFERENCE["runs"][name]
    assert (model.encoder.img_size, model.encoder.num_patches) == (made["encoder_img_size"], made["tokens"])
    given = batch(made["img_size"], made["tokens"])
    obs, actions = {"visual": given["tokens"], "proprio": given["states"]}, given["actions"]
    predicted = predict(model, part(obs, 0, 3), actions[:, :3])
    imagined = rollout(model, part(obs, 0, 1), actions[:, :5])
    later = rollout(model, part(obs, 0, 2), actions)
    results = {"losses": losses(model, obs, actions[:, :4])}
    for kind in ("visual", "proprio"):
        results[f"predicted {kind}"] = predicted[kind]
        results[f"rollout {kind}"], results[f"rollout from two, {kind}"] = imagined[kind], later[kind]
    for objective in ("last", "all"):
        results[objective] = costs(model, part(obs, 0, 1), part(obs, 3, 4), actions[:, :5], objective)
    if name != "two tokens more":  # which has no decoder
        results["images"], results["decoder losses"] = paint(model, given["tokens"], given["frames"])
    check(results, made["numbers"])


@torch.no_grad()
def test_frames_go_through_a_released_run_with_a_trained_encoder(released_run):
    """From pixels to the cost of a plan: resizing, DINOv2 with resampled positions, rollout, objectives."""
    model, given = open_run(released_run("one copy", own_encoder=True)), batch(32, 4)
    obs, actions = {"visual": given["frames"], "proprio": given["states"]}, given["actions"][:, :5]
    results = {f"encoded {kind}": latent for kind, latent in model.encode(obs).items()}
    results["rollout visual"] = rollout(model, part(obs, 0, 1), actions)["visual"]
    for objective in ("last", "all"):
        results[objective] = costs(model, part(obs, 0, 1), part(obs, 3, 4), actions, objective)
    check(results, REFERENCE["from frames"])


def test_dinov2_sees_what_it_sees_in_the_release():
    made, seen = REFERENCE["observation"], seen_by_dinov2(pattern_frames((2, 224, 224, 3), 7))
    assert list(seen.shape) == made["shape"]
    check({"numbers": seen}, {"numbers": made["numbers"]})


@torch.no_grad()
def test_a_released_ac_predictor_computes_what_the_released_code_does(tmp_path):
    state = released_weights(REFERENCE["ac"]["shapes"])
    torch.save({"predictor": {f"module.{name}": x for name, x in state.items()}, "epoch": 3}, tmp_path / "ac.pt")
    inputs = pattern((2, 12, 6), 1, 1.7), pattern((2, 3, 3), 2), pattern((2, 3, 3), 3)
    check({"numbers": ac_tokens(tmp_path / "ac.pt", *inputs)}, {"numbers": REFERENCE["ac"]["numbers"]})


def test_every_class_in_a_released_checkpoint_is_known(tmp_path):
    """All that a checkpoint of the released code names, with AdamW's states and a DINOv2 of its own, can be read."""
    names = [(module, name) for module, classes in REFERENCE["classes"].items() for name in classes.split()]
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        asked = b"".join(f"c{module}\n{name}\n0".encode() for module, name in names)  # each is looked up and dropped
        file.writestr("x/data.pkl", b"\x80\x02" + asked + b"}.")
    assert read_checkpoint(tmp_path / "x.pth") == {}


# -- the world ----------------------------------------------------------------------------------------------


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
    starts, goals = plan.random_problems(env, types.SimpleNamespace(seed=[99, 7], n_evals=4))
    np.testing.assert_array_equal([starts[3], goals[3]], expected)
    np.testing.assert_array_equal(starts[5], env.sample_problem(7, 1)[0])
    with pytest.raises(UserError, match="seed 0 is not a seed of the release"):
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


def test_the_released_data_set(archive, monkeypatch):
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
    code, out, _ = script("released", archive)
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
    (change(EPISODE, lambda f: f[:11]), f"{EPISODE}: 11 frames, where seq_lengths.pth says 30"),
    (change(EPISODE, lambda f: f.float()), "of torch.float32 are not (32, 32, 3) of uint8 each"),
    (change(EPISODE, lambda f: f[:, :16, :16]), f"{EPISODE}: frames (30, 16, 16, 3)"),
    (change("obses/episode_000.pth", lambda f: f[:, :16]), "frames (30, 16, 32, 3) of torch.uint8"),
    (change("obses/episode_000.pth", lambda f: f[0, 0, 0, 0]), "episode_000.pth: frames () of torch.uint8"),
])  # fmt: skip
def test_a_released_data_set_that_is_not_whole(archive, script, damage, message):
    damage(archive)
    for command in (["train", "--data", archive], ["released", archive], ["data", "--inspect", archive]):
        refused(script(*command), message)
    assert not Path("runs").exists()


# -- the run -------------------------------------------------------------------------------------------------


def test_a_released_run_plans_at_once_or_converted(released_run, script):
    run = released_run()
    code, _, err = script("plan", "--ckpt", run, "--weights", "random", *BUDGET)
    assert code == 0, err
    assert json.loads(Path("plan_outputs/pm/results.json").read_text())["n_evals"] == 3
    code, out, err = script("released", run, "--weights", "random", "--convert", "runs/pm")
    assert code == 0 and "python plan.py --ckpt runs/pm" in out, err
    code, out, err = script("plan", "--ckpt", "runs/pm", *BUDGET)
    assert code == 0 and "PSNR" in out, err
    code, out, _ = script("released", run)
    assert code == 0 and "predictor.blocks.1.0.to_qkv.weight" in out and "depth: 2" in out
    refused(script("released", run, "--weights", "random", "--convert", "runs/pm"), "runs/pm is there: remove it")
    refused(script("released", "runs/pm", "--convert", "runs/again"), "no hydra.yaml in runs/pm")
    assert sorted(path.name for path in Path("runs").rglob("*")) == ["args.json", "model.pt", "pm"]


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
    (lambda run: (run / "hydra.yaml").unlink(), "no hydra.yaml in outputs/pm"),
    (write("hydra.yaml", b"a: [b"), "outputs/pm/hydra.yaml is damaged, or not YAML"),
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
def test_a_released_run_that_is_not_whole(released_run, script, damage, message):
    run = released_run()
    damage(run)
    refused(script("plan", "--ckpt", run, "--weights", "random"), message)
    assert not Path("plan_outputs").exists()


def test_a_released_run_with_numbers_that_are_not_finite_is_refused(released_run, script):
    run = released_run(spoil=lambda content: content["predictor"].pos_embedding.data.fill_(torch.nan))
    refused(script("released", run, "--weights", "random", "--convert", "runs/pm"), "pos_embedding holds numbers")
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
