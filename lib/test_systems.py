"""The systems that bring their own encoder: agreement with their references, and that each trains and plans.

test_systems.json holds numbers that the reference implementations gave, once (NM512/dreamerv3-torch at 6ef8646,
nicklashansen/tdmpc2 at e9f5932, galilai-group/stable-worldmodel at addbab4). Weights and inputs follow from `pattern`.
"""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import data
import plan
import train
from lib import common, dreamer, pictures, systems, tdmpc2
from lib.common import UserError
from lib.test_agreement import pattern, pattern_weights, sample
from test_all import assert_refused, write_short_gif

close = torch.testing.assert_close
REFERENCE = json.loads(Path(__file__).with_suffix(".json").read_text())
SMALL = {  # sizes for the tests
    "dreamer": dict(channels=4, deter=12, mlp_dim=10, groups=3, classes=4),
    "tdmpc2": dict(channels=4, mlp_dim=12),
    "lewm": dict(channels=4, mlp_dim=12, dim=6),
    "iris": dict(codes=16, dim=4, channels=2, width=8, depth=2, heads=2, first=4),
    "avdc": dict(width=8),
}
HERE = "dreamer", "tdmpc2", "lewm"  # the others are in lib/test_iris_avdc.py


def agree(results, reference=REFERENCE):
    """Every result has the numbers that the reference gave."""
    for name, tensor in results.items():
        expected = torch.tensor(reference[name])
        close(sample(tensor.detach(), len(expected)), expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def with_pattern(module):
    module.load_state_dict(pattern_weights({name: list(x.shape) for name, x in module.state_dict().items()}))
    return module


# -- what the references compute -----------------------------------------------------------------------------


def test_dreamers_steps_are_the_references():
    rssm = with_pattern(dreamer.RSSM(8, 3, 6, 7, 4, 5))
    h, a, e = pattern((2, 6), 1), pattern((2, 3), 3), pattern((2, 8), 4)
    z = pattern((2, 4, 5), 2).softmax(-1).flatten(1)
    after, prior = rssm.imagine(h, z, a)
    first, start = rssm.initial(2)
    seen, _ = rssm.imagine(first, start, torch.zeros(2, 3))
    agree({"initial deter": first, "initial stoch": start, "deter": after, "prior": prior})
    agree({"posterior": rssm.observe(after, e), "first deter": seen, "first posterior": rssm.observe(seen, e)})
    encoder, E = dreamer.conv_encoder(16, 4)
    embedding = with_pattern(encoder)(pattern((2, 1, 16, 16, 3), 7, 0.5)[:, 0].movedim(-1, 1))
    assert embedding.shape == (2, E)
    agree({"embedding": embedding})


def test_dreamers_kl_loss_and_its_gradients_are_the_references():
    rssm = dreamer.RSSM(8, 3, 6, 7, 4, 5)
    logits = [pattern((6, 4, 5), k, 1.2).requires_grad_() for k in (5, 6)]
    loss, _ = dreamer.kl_loss(*(rssm.distribution(x.flatten(1)) for x in logits))
    assert (loss == 0.6).sum() == 3  # below the free nat
    gradients = torch.autograd.grad(loss.sum(), logits)
    agree({"kl loss": loss, "its gradients": torch.stack(gradients)})


def test_simnorm_the_dynamics_and_sigreg_are_the_references():
    norm = tdmpc2.SimNorm()
    layers = [tdmpc2.dense(6, 5, torch.nn.Mish()), tdmpc2.dense(5, 5, torch.nn.Mish()), tdmpc2.dense(5, 16, norm)]
    dynamics = with_pattern(torch.nn.Sequential(*layers))
    agree({"simnorm": norm(pattern((2, 3, 16), 8, 4.0)), "dynamics": dynamics(pattern((4, 6), 8))})
    z = pattern((3, 8, 6), 9, 2.0).requires_grad_()
    torch.manual_seed(0)  # the directions are drawn alike
    term = tdmpc2.sigreg(z, num_proj=64)
    agree({"sigreg": term[None], "its gradient": torch.autograd.grad(term, z)[0]})


def test_sigreg_is_least_for_an_isotropic_gaussian():
    z = torch.randn(512, 4)
    values = [tdmpc2.sigreg(x) for x in (z, 0.2 * z, 3 * z, z + 1, z[:, :1].expand(-1, 4), torch.zeros(512, 4))]
    assert min(values[1:]) > 10 * values[0]


# -- each system -----------------------------------------------------------------------------------------------


@pytest.fixture(params=HERE)
def model(request):
    return build(request.param).eval()


def build(name, img_size=64, **sizes):
    stats, world = ((0.1, 0.2), (0.5, 0.6)), dict(env="pointmaze", img_size=img_size, data="datasets/pointmaze")
    return systems.system_class(name)(stats, ((0.0,) * 4, (1.0,) * 4), world=world, **SMALL[name] | sizes)


def some_batch(B, T):
    frames = torch.randint(0, 256, (B, T, 64, 64, 3), dtype=torch.uint8)
    return {"visual": frames, "proprio": torch.randn(B, T, 4), "action": torch.rand(B, T, 10) * 2 - 1}


@torch.no_grad()
def test_latents_depend_on_the_past_alone(model):
    batch = some_batch(2, 6)
    z = model.encode(batch)
    changed = model.encode(batch | {"visual": torch.cat([batch["visual"][:, :3], some_batch(2, 3)["visual"]], 1)})
    assert z["visual"].shape[:3] == (2, 6, 1) and z["proprio"].shape == (2, 6, 0)
    close(changed["visual"][:, :3], z["visual"][:, :3])
    assert (changed["visual"][:, 3:] != z["visual"][:, 3:]).any(-1).all()
    known, actions = {name: latent[:, :2] for name, latent in z.items()}, batch["action"]
    imagined = model.rollout(known, actions)["visual"]
    assert imagined.shape == (2, 7, *z["visual"].shape[2:])
    for t in range(1, 6):
        other = actions.clone()
        other[:, t] *= -1
        change = (model.rollout(known, other)["visual"] != imagined).flatten(2).any(-1)  # (2, 7)
        assert not change[:, : t + 1].any() and change[:, t + 1].all()


@torch.no_grad()
def test_what_is_known_is_not_forgotten(model):
    """Imagination depends on every known frame and on the actions between them, not on the newest frame alone."""
    batch = some_batch(2, 3)
    z, actions = model.encode(batch), torch.cat([batch["action"], batch["action"]], 1)
    imagined = model.rollout(z, actions)["visual"]
    for change in ({"frame": 0}, {"frame": 1}, {"action": 0}, {"action": 1}):
        known, taken = {name: latent.clone() for name, latent in z.items()}, actions.clone()
        if "frame" in change:
            known["visual"][:, change["frame"]] = model.encode(some_batch(2, 1))["visual"][:, 0]
        else:
            taken[:, change["action"]] *= -1
        assert (model.rollout(known, taken)["visual"][:, 3:] != imagined[:, 3:]).flatten(2).any(-1).all()


@torch.no_grad()
def test_a_plan_costs_dreamer_how_the_decoded_state_differs_to_the_encoder():
    model, batch = build("dreamer").eval(), some_batch(2, 3)
    torch.nn.init.normal_(model.decoder[-1].weight)  # it begins at zero
    goal, z = model.encode({"visual": batch["visual"][:, :1]})["visual"], model.encode(batch)
    imagined = model.rollout(z, some_batch(2, 5)["action"])["visual"][:, -1:]
    frames = torch.stack([model.decoder(imagined[:, 0, 0, : model.state_dim]), model.images(batch["visual"])[:, 0]])
    error = (model.encoder(frames[0]) - model.encoder(frames[1])).square()
    close(model.criterion(imagined, goal, reduction="none")[:, 0], error)
    close(model.criterion(imagined, goal), error.mean())


def test_a_draw_has_the_gradient_of_its_probabilities():
    rssm = dreamer.RSSM(8, 3, 6, 7, 4, 5)
    logits, weights = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20)
    log_p = rssm.distribution(logits)
    close(log_p.exp().min(), 0.99 * logits.unflatten(-1, (4, 5)).softmax(-1).min() + 0.002)
    gradients = []
    for sample_ in (True, False):
        z = rssm.draw(log_p, sample_)
        close(z.unflatten(-1, (4, 5)).sum(-1), torch.ones(3, 4))
        assert ((z - z.round()).abs() < 1e-6).all()
        for x in (z, log_p.exp().flatten(-2)):
            gradients.append(torch.autograd.grad((x * weights).sum(), logits, retain_graph=True))
    close(gradients[0], gradients[1])
    close(gradients[2], gradients[3])
    many = torch.stack([rssm.draw(log_p, True) for _ in range(3000)]).mean(0)
    close(many, log_p.exp().flatten(-2), atol=0.05, rtol=0)


def test_a_constant_latent_costs_tdmpc2_nothing_and_lewm_much():
    losses = {}
    for name in ("tdmpc2", "lewm"):
        model = build(name)
        for part in (model.encoder, model.dynamics):
            for parameter in part.parameters():
                parameter.data.zero_()
        loss, parts = model.loss(some_batch(32, 6))
        assert parts["variance"] == 0 and parts["visual"] == 0
        losses[name] = (loss - parts["recon"]).item()
    assert abs(losses["tdmpc2"]) < 1e-6 and losses["lewm"] > 1


def test_a_new_lewm_tells_frames_apart_that_are_almost_alike():
    frames = torch.full((8, 6, 64, 64, 3), 100.0)
    for i, (x, y) in enumerate(np.random.default_rng(0).integers(0, 60, (48, 2))):
        frames.flatten(0, 1)[i, x : x + 3, y : y + 3] = 130.0  # a pale ball
    batch = {"visual": frames, "action": torch.zeros(8, 6, 10)}
    variance = {name: build(name).train().loss(batch)[1]["variance"] for name in ("tdmpc2", "lewm")}
    assert variance["lewm"] > 1e-4 and variance["tdmpc2"] < 1e-5


@pytest.mark.parametrize(("name", "learns"), [("tdmpc2", False), ("lewm", True)])
def test_targets_teach_the_eyes_in_lewm_alone_and_the_decoder_never(name, learns):
    model, batch = build(name), some_batch(4, 6)
    z = model.encode(batch)["visual"].detach().requires_grad_()
    with mock.patch.object(model, "encode", lambda _: {"visual": z}), mock.patch.object(tdmpc2, "sigreg", torch.sum):
        loss, _ = model.loss(batch)
    gradient = torch.autograd.grad(loss, z)[0] - (0.09 if learns else 0)
    assert (gradient[:, :3] != 0).any()
    assert (gradient[:, 3:].abs() > 1e-6).any() == learns  # the last three frames are targets alone


# -- the scripts -----------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with a data set of eight episodes of ten rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "write_gif", write_short_gif)
    write_dataset("datasets/pointmaze", rows=10)


def write_dataset(path, rows, img_size=64):
    rng = np.random.default_rng(0)

    def episode():
        frames = rng.integers(0, 256, (rows, img_size, img_size, 3), np.uint8)
        states, actions = rng.normal(size=(rows, 4)), rng.uniform(-1, 1, (rows, 10))
        ends = dict(rewards=np.zeros(rows, np.float32), dones=np.zeros(rows, bool))
        return dict(frames=frames, states=np.float32(states), actions=np.float32(actions)) | ends

    meta = dict(env="pointmaze", seed=0, policy="none", img_size=img_size, frameskip=5)
    return data.write_dataset(path, (episode() for _ in range(8)), 8, meta)


def command(name, more=""):
    sizes = ",".join(f"{size}={value}" for size, value in SMALL[name].items())
    return f"--system {name} --sizes {sizes} --epochs 2 --batch-size 8 {more}".split()


@pytest.mark.parametrize("name", HERE)
def test_each_system_trains_and_plans(workplace, script, name):
    assert script("train", *command(name))[0] == 0
    run = Path(f"runs/pointmaze_{name}")
    written = {"args.json", "config.json", "model.safetensors", "log.csv", "curves.png", "imagined.png", "imagined.gif"}
    assert {path.name for path in run.iterdir()} == written
    log = np.genfromtxt(run / "log.csv", delimiter=",", names=True)
    assert {"train", "val", "val_visual", "copy", "psnr"} < {*log.dtype.names} and np.isfinite(log.tolist()).all()
    assert ("val_variance" in log.dtype.names) == (name != "dreamer")

    search = "--num-samples 4 --topk 2 --opt-steps 1 --planner-args keep=1 --planner mpc-icem"
    code, out, err = script("plan", *f"--ckpt {run} --n-evals 2 --max-iter 2 {search}".split())
    assert code == 0 and "imagined against real frames: PSNR" in out, err
    results = json.loads(Path(f"plan_outputs/{run.name}/results.json").read_text())
    assert len(results["success_by_iter"]) == 2 and results["args"]["history"] == 3


def test_an_interrupted_training_ends_where_it_would_have(workplace, script, monkeypatch):
    """dreamer draws at random as it learns, and remembers the background of its first batch."""
    monkeypatch.setattr(pictures, "write_log_plot", mock.Mock())
    monkeypatch.setattr(train, "show_imagination", lambda *_: {})
    whole, again = Path("runs/whole"), Path("runs/again")
    assert script("train", *command("dreamer", "--name whole"))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(common, "write_csv", mock.Mock(side_effect=(None, KeyboardInterrupt)))
        assert script("train", *command("dreamer", "--name again"))[0] == 130
    code, out, _ = script("train", *command("dreamer", "--name again"))
    assert code == 0 and "going on after epoch 1 of 2" in out
    whole, again = (common.load_safetensors(run / "model.safetensors") for run in (whole, again))
    assert whole["background.image"].any() and all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_system_that_plans_without_a_cost_is_asked_for_actions(workplace, script, monkeypatch):
    build("lewm").save_pretrained("runs/own")
    asked = []

    def actions(model, worlds, problems, steps):
        asked.append([obs["visual"][problems].shape for obs in (worlds.past, worlds.goal_obs)])
        return torch.full((len(problems), steps, 10), 0.25)

    monkeypatch.setattr(tdmpc2.LeWM, "plan", actions, raising=False)
    taken, act = [], plan.Worlds.act
    monkeypatch.setattr(plan.Worlds, "act", lambda self, *args: taken.append(args[1]) or act(self, *args))
    code, out, err = script("plan", *"--ckpt runs/own --n-evals 2 --max-iter 1 --controls oracle".split())
    assert code == 0 and "| `mpc-icem` | none |" in out, err
    assert asked == [[(2, 3, 64, 64, 3), (2, 64, 64, 3)]]
    close(torch.as_tensor(taken[0]), torch.tensor([0.225, 0.35]).repeat(2, 5, 5))  # 0.25 deviations above the mean


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--system dino", "unknown system 'dino'; known: dreamer, iris, tdmpc2, lewm, avdc"),
        ("--system lewm --encoder vae --num-hist=2", "--system lewm has no --encoder, --num-hist"),
        ("--system dreamer --sizes dim=3", "--system dreamer has no size dim; it has channels, deter"),
        ("--system dreamer --data short", "episodes of short is as long as a window of 8 model steps"),
        ("--system dreamer --data small", "wants frames of 8, 16, 32, 64, ... pixels a side, not 24"),
        ("--system tdmpc2 --data small", "--system tdmpc2 wants frames of 64, 128, ... pixels a side, not 24"),
        ("--system dreamer --img-size 32 --data datasets/pointmaze", "has --img-size 64, and not 32"),
        ("--system lewm --name other", "runs/other was begun with other flags (--seed 1)"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(workplace, script, flags, message):
    write_dataset("short", rows=5)
    write_dataset("small", rows=10, img_size=24)
    build("lewm").save_pretrained("runs/other")
    begun = vars(train.get_args("--system lewm --name other --seed 1".split()))
    common.write_json("runs/other/args.json", {k: v for k, v in begun.items() if k not in ("device", "bench")})
    before = sorted(Path().rglob("*"))
    assert_refused(script("train", *flags.split()), message)
    assert sorted(Path().rglob("*")) == before


def test_a_system_trains_in_one_process(monkeypatch):
    monkeypatch.setattr(systems, "WORLD_SIZE", 2)
    with pytest.raises(UserError, match="--system lewm trains in one process"):
        train.get_args(["--system", "lewm"])


def test_a_damaged_checkpoint_and_waypoints_are_refused(workplace, script):
    build("dreamer").save_pretrained("runs/own")
    assert_refused(script("plan", *"--ckpt runs/own --waypoints graph".split()), "wants a model with a frozen encoder")
    config = common.read_json("runs/own/config.json")
    for change, message in (
        ({"system": "dino"}, "unknown system 'dino'"),
        ({"world": config["world"] | {"img_size": 32}}, "does not fit the model that is asked for"),
        ({"sizes": {"depth": 2}}, "is not a model of this version"),
    ):
        common.write_json("runs/own/config.json", config | change)
        assert_refused(script("plan", "--ckpt", "runs/own"), message)
