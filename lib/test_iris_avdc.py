"""IRIS and AVDC: agreement with their references, the cache, gradients, and that each trains and plans.

test_iris_avdc.json holds numbers that the reference implementations gave, once (eloialonso/iris at 24326aa,
flow-diffusion/AVDC at 176fbe1). Weights and inputs follow from `pattern`.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import avdc, iris
from lib.common import UserError
from lib.test_agreement import pattern
from lib.test_systems import SMALL, agree, build, some_batch, write_dataset
from predictor import load_model
from test_all import assert_refused

close = torch.testing.assert_close
REFERENCE = json.loads(Path(__file__).with_suffix(".json").read_text())


def with_pattern(module, scale=1.0):
    """The module, its parameters filled in the order in which they are used."""
    for k, (name, parameter) in enumerate(module.named_parameters()):
        shape = parameter.shape
        if len(shape) > 1:
            parameter.data = pattern(shape, k, scale * math.sqrt(3 / min(shape[:2]) / math.prod(shape[2:])))
        else:
            parameter.data = pattern(shape, k, 0.4 * scale) + float(name.endswith("weight"))
    return module


# -- what the references compute -----------------------------------------------------------------------------


def test_the_autoencoder_is_iris():
    model, images = with_pattern(iris.Autoencoder(16, 1, (32, 64, 64), 1, codes=8, dim=6)), pattern((3, 3, 16, 16), 7)
    e, tokens = model.eval().encode(images)  # in training the background would be that of these images
    painted, codes = model(images)
    assert tokens.flatten().tolist() == REFERENCE["tokens"]
    error = F.l1_loss(painted, images)
    agree({"e": e, "painted": painted, "reconstruction": error[None], "codes": codes[None]}, REFERENCE)


def test_the_transformer_is_iris():
    """Its losses, and the tokens that it writes with its cache; a discrete action there is a one-hot vector here."""
    gpt = with_pattern(iris.GPT(15, 8, 3, width=16, depth=2, heads=2), 2)
    tokens = (pattern((2, 3, 4), 5, 4) + 4).long().clamp(max=7)
    actions = F.one_hot((pattern((2, 3), 6, 1.5) + 1.5).long().clamp(max=2), 3).float()
    logits = gpt(gpt.embed(tokens, actions))  # (2, 15, 8)
    of_tokens = logits[:, [i for i in range(15) if i % 5 != 3]]  # an action comes after a frame's last token
    entropy = F.cross_entropy(of_tokens[:, :-1].flatten(0, 1), tokens.flatten(1)[:, 1:].flatten())
    agree({"logits": of_tokens, "entropy": entropy[None]}, REFERENCE)
    model = build("iris")
    model.gpt, model.num_patches, model.encode_action = gpt, 4, lambda actions: actions
    written = model.rollout({"tokens": tokens[:, :1]}, actions[:, :2])["tokens"]
    assert written[:, 1:].flatten().tolist() == REFERENCE["written"]


def test_the_diffusion_is_avdcs():
    diffusion, at = avdc.Diffusion(), [0, 10, 50, 90, 98, 99]
    agree({name: getattr(diffusion, name)[at] for name in ("alpha", "sigma")}, REFERENCE)
    x, noise, condition = pattern((2, 6, 4, 4), 1), pattern((2, 6, 4, 4), 2, 1.7), pattern((2, 6, 4, 4), 3)

    def network(x, t, condition):  # the reference's predicts v, from which x^ follows
        v = 0.6 * x - 0.3 * condition.roll(1, -1) + 0.01 * t.view(-1, 1, 1, 1)
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (diffusion.alpha, diffusion.sigma))
        return alpha * x - sigma * v

    agree({"drawn": diffusion.sample(network, noise, 5, condition)}, REFERENCE)
    seen, t = [], torch.tensor([20, 90])
    with mock.patch("torch.randint", return_value=t), mock.patch("torch.randn_like", return_value=noise):
        close(diffusion.loss(lambda noised, *_: seen.append(noised) or 0 * x, x, condition), x.square().mean())
    agree({"noised": seen[0]}, REFERENCE)


# -- IRIS ----------------------------------------------------------------------------------------------------


def test_the_gradient_passes_the_codes_straight_through():
    model, images = build("iris").autoencoder.double(), torch.rand(2, 3, 64, 64).double()
    e, tokens = (x.detach() for x in model.encode(images))
    e.requires_grad_()
    with mock.patch.object(model, "encode", lambda _: (e, tokens)):
        painted, error = model(images)
    c, weight = model.codes(tokens).detach().requires_grad_(), torch.randn(2, 3, 64, 64).double()
    close(painted, model.decode(c))
    gradients = [torch.autograd.grad((x * weight).sum(), y) for x, y in ((painted, e), (model.decode(c), c))]
    close(*gradients)
    to_e, to_codes = torch.autograd.grad(error, (e, model.codes.weight))
    close(to_e, 2 * (e - c).detach() / e.numel())  # towards the codes
    assert (to_codes.any(1) == torch.bincount(tokens.flatten(), minlength=16).bool()).all()  # the chosen ones alone


def test_the_gpt_sees_the_past_alone():
    gpt = with_pattern(iris.GPT(15, 8, 3, width=16, depth=2, heads=2))
    x = torch.randn(2, 15, 16)
    logits = gpt(x)
    for i in range(15):
        other = x.clone()
        other[:, i] = -other[:, i]
        change = (gpt(other) != logits).any(-1)  # (2, 15)
        assert not change[:, :i].any() and change[:, i:].all()


def test_the_autoencoder_learns_alone_and_then_the_gpt_alone(tmp_path, capsys):
    model, batch, losses = build("iris", first=2).train(), some_batch(4, 7), {}
    for step, learner in enumerate(("autoencoder", "autoencoder", "gpt", "gpt")):
        loss, _ = model.loss(batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert gradient.any() if name.startswith(learner) else gradient is None, (step, name)
        losses[learner] = loss
        model.save_pretrained(tmp_path)
        assert ("has not begun to learn" in capsys.readouterr().out) == (step < 2)
        assert load_model(tmp_path).trained == step + 1  # so that a resumed training goes on where it was
    loss, parts = model.eval().loss(batch)
    close(loss, losses["autoencoder"] + losses["gpt"])
    assert model.trained == 4 and 0 < parts["used"] <= 1


@torch.no_grad()
def test_imagination_with_the_cache_is_the_plain_computation():
    """Also when it has to be begun anew, since ten frames are more than the window."""
    model, batch = build("iris").eval(), some_batch(3, 2)
    with_pattern(model.gpt, 2)
    z, actions = model.encode(batch), torch.randn(3, 9, 10)
    tokens, first = z["tokens"], 0
    for t in range(2, 10):  # t frames are known
        if t - first == model.num_frames:
            first = t - 2
        frame = tokens.new_empty(3, 1, 0)
        for _ in range(16):
            x = model.gpt.embed(tokens[:, first:], model.encode_action(actions)[:, first:t])
            logits = model.gpt(torch.cat([x, model.gpt.token(frame[:, 0])], 1))
            frame = torch.cat([frame, logits[:, None, -1:].argmax(-1)], 2)
        tokens = torch.cat([tokens, frame], 1)
    imagined = model.rollout(z, actions)
    assert (imagined["tokens"] == tokens).all() and len(tokens[:, 2:].unique()) > 4
    close(imagined["visual"], model.autoencoder.codes(tokens))
    assert imagined["visual"].shape == (3, 10, 16, 4) and imagined["proprio"].shape == (3, 10, 0)


def test_a_dead_codebook_is_one_line(tmp_path, capsys):
    model = build("iris", codes=64).eval()
    model.autoencoder.codes.weight.data[:, 0] = torch.arange(64) * 100  # only the first is near
    model.trained += model.first + 1
    _, parts = model.loss(some_batch(2, 7))
    model.save_pretrained(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert parts["used"] == 1 / 64 and "2% of the codes are in use, the codebook has died" in line


# -- AVDC ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_are_spread_as_the_data_are():
    """Of normal data N(2, 0.5^2) the best x^ is known."""
    diffusion = avdc.Diffusion()

    def network(x, t):
        alpha, sigma = (table[t[:1]] for table in (diffusion.alpha, diffusion.sigma))
        return (2 * sigma**2 + 0.25 * alpha * x) / (sigma**2 + 0.25 * alpha**2)

    drawn = diffusion.sample(network, torch.randn(5000, 1), 100)
    assert drawn.mean().item() == pytest.approx(2, abs=0.05) and drawn.std().item() == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
def test_a_film_depends_on_now_and_the_goal_and_the_actions_on_the_film():
    model = build("avdc").eval()
    past, goal = some_batch(2, 2)["visual"], some_batch(2, 1)["visual"][:, 0]
    film = model.generate(past, goal)
    close(model.generate(past, goal), film, atol=0, rtol=0)
    assert film.shape == (2, avdc.FRAMES, 3, avdc.SIDE, avdc.SIDE)
    assert (model.generate(past, goal.flip(0)) != film).flatten(2).any(-1).all()
    assert (model.generate(past.flip(1), goal) != film).flatten(2).any(-1).all()
    shown = torch.cat([model.small(past), film], 1)
    worlds = SimpleNamespace(past={"visual": past.numpy()}, goal_obs={"visual": goal.numpy()})
    planned = model.plan(worlds, np.arange(2), 4)
    close(planned, model.inverse(shown)[:, 1:5])  # from the last frame that is seen on
    assert (model.inverse(shown.roll(1, 1))[:, 1:5] != planned).any(-1).all()
    (alone,) = model.plan(worlds, np.array([1]), 5)
    assert alone.shape == (5, 10)


def test_the_inverse_model_learns_the_actions_between_the_frames_that_it_sees():
    model, batch = build("avdc"), some_batch(2, 7)
    with mock.patch.object(model.inverse, "forward", side_effect=lambda film: film[:, :-1, 0, 0, :10]) as inverse:
        _, parts = model.loss(batch)
    (film,) = inverse.call_args.args
    frames = model.small(batch["visual"])
    close(film, frames)
    close(parts["inverse"], F.mse_loss(frames[:, 1:6, 0, 0, :10], model.encode_action(batch["action"][:, 1:6])))


# -- both ----------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with a data set of eight episodes of sixteen rows."""
    monkeypatch.chdir(tmp_path)
    write_dataset("datasets/pointmaze", rows=16)


@pytest.mark.parametrize("name", ["iris", "avdc"])
def test_each_trains_and_plans(workplace, script, name):
    sizes = ",".join(f"{size}={value}" for size, value in SMALL[name].items())
    code, _, err = script("train", *f"--system {name} --sizes {sizes} --epochs 2 --batch-size 8".split())
    assert code == 0, err
    log = np.genfromtxt(f"runs/pointmaze_{name}/log.csv", delimiter=",", names=True)
    assert {"iris": {"val_used", "psnr"}, "avdc": {"val_inverse"}}[name] < {*log.dtype.names}
    assert np.isfinite(log.tolist()).all() and log["val"][1] < log["val"][0]
    search = "--num-samples 4 --topk 2 --opt-steps 1 --planner-args keep=1 --planner mpc-icem"
    code, _, err = script("plan", *f"--n-evals 1 --max-iter 2 {search}".split())
    assert code == 0, err
    results = json.loads(Path(f"plan_outputs/pointmaze_{name}/results.json").read_text())
    assert len(results["success_by_iter"]) == 2 and results["args"]["history"] == 2
    if name == "iris":
        result, message = script("plan", *"--n-evals 1 --planner gd --opt-steps 1".split()), "gd needs a gradient"
    else:
        assert "| `mpc-icem` | none |" in Path(f"plan_outputs/pointmaze_{name}/table.md").read_text()
        assert_refused(script("extras.horizon"), "runs/pointmaze_avdc generates a video to the goal")
        result, message = script("plan", *"--n-evals 1 --goal-H 6".split()), "more than the 5 frames that avdc"
    assert_refused(result, message)


@pytest.mark.parametrize("name, sizes, message", [
    ("iris", dict(img_size=40), "40 is not a multiple of 16"),
    ("iris", dict(width=9), "width=9 is not a multiple of heads=2"),
    ("avdc", dict(width=9), "width=9 is not a multiple of the 8 groups"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(name, sizes, message):
    with pytest.raises(UserError, match=message):
        build(name, **sizes)
