"""Data, training and planning, where what is used can be counted or computed by hand."""

import types
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import cem
import data
import encoders
import plan
import predictor
import train
from lib import reports
from lib.problems import get_problems, random_problems
from lib.worlds import make_env
from test_all import TINY, WORLD, close, fake_dataset, refused, some_states, tiny_batch, tiny_model

# -- data ----------------------------------------------------------------------------------------------------


def test_an_encoder_of_other_weights_computes_tokens_of_its_own(tmp_path):
    dataset, encoder = fake_dataset(tmp_path / "d", [4, 5]), nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(2))
    vars(encoder).update(name="conv", img_size=8, num_patches=2, dim=1)
    before = np.array(data.token_cache(encoder, dataset, "cpu"))
    encoder[0].bias.data += 1
    np.testing.assert_allclose(data.token_cache(encoder, dataset, "cpu"), before + 1, atol=1e-2)
    assert len(list(dataset.path.glob("tokens_*"))) == 2


def test_the_frames_of_a_window_are_its_last_ones(tmp_path):
    dataset, rows = fake_dataset(tmp_path / "d", [9]), np.arange(9)
    dataset.frames = rows.reshape(9, 1, 1, 1)  # each shows its row, and so does its token
    windows = data.Windows(dataset, [0], num_frames=3, frameskip=2)
    batch = windows.batch(np.arange(len(windows)), rows.reshape(9, 1, 1), frames=2)
    close(batch["frames"].flatten(1), batch["visual"][:, 1:].flatten(1))


# -- training ------------------------------------------------------------------------------------------------


def test_training_and_validation_imagine_as_many_frames_as_they_are_told(workplace, monkeypatch):
    asked, loss = set(), predictor.WorldModel.loss

    def recorded(model, batch, rollout_steps=1):
        asked.add((model.training, rollout_steps))
        return loss(model, batch, rollout_steps)

    monkeypatch.setattr(predictor.WorldModel, "loss", recorded)
    train.train(train.get_args(f"{TINY} --steps 2 --rollout-steps 3".split()))
    assert asked == {(True, 3), (False, 3)}


def test_a_decoder_learns_to_paint_the_last_frame(monkeypatch):
    model = tiny_model(decoder=dict(img_size=32, channel=8, n_res_block=1, n_res_channel=4))
    batch = tiny_batch(model, 4) | {"frames": torch.randint(256, (5, 1, 32, 32, 3)).float()}
    learnt = mock.Mock(wraps=model.decoder_loss)
    monkeypatch.setattr(model, "decoder_loss", learnt)
    loss, _ = model(batch)
    visual, frames = learnt.call_args.args
    close((visual, frames), (model.encode(batch)["visual"][:, -1:], batch["frames"]))
    close(loss, model.loss(batch)[0] + model.decoder_loss(visual, frames)[0])


def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_cosine():
    rates = [train.learning_rate(step, 1000) for step in (0, 24, 499, 999)]
    assert rates == pytest.approx([0.01, 0.49, 0.5, 0], abs=1e-3)


@pytest.mark.parametrize("size", [4, 9])
def test_validation_counts_each_window_once(dataset, size):
    """There are nine, so that of batches of four the last has one window."""
    model, tokens = tiny_model(encoder=1), np.random.default_rng(0).normal(size=(180, 1, 6)).astype("f")
    windows = data.Windows(dataset, dataset.split()[1], 4, 5)
    batch = windows.batch(np.arange(9), tokens)
    copying = (batch["visual"][:, 1:] - batch["visual"][:, :-1]).square().mean()
    found = train.validate(model, windows, tokens, size, "cpu", 1)
    assert len(windows) == 9 and found["val"] == pytest.approx(model.loss(batch)[0].item(), rel=1e-5)
    assert found["copy"] == pytest.approx(copying.item(), rel=1e-5)


# -- planning ------------------------------------------------------------------------------------------------


def test_coloured_noise_has_the_spectrum_of_its_exponent():
    noise = cem.coloured_noise(1.0, dof=2)(1, 4000, 5, 10).view(4000, 25, 2)  # 25 environment steps
    power = torch.fft.rfft(noise, dim=1).abs().square().mean((0, 2))
    close(power[1:] / power[1], 1 / torch.arange(1.0, 13), atol=0, rtol=0.1)  # 1 / f


def test_candidates_cost_the_same_in_one_piece_and_in_several():
    model, env, costs = tiny_model(encoder="pca"), make_env("pointmaze"), []
    states, actions = some_states(env, 4), torch.rand(2, 3, 4, 10)
    worlds = plan.Worlds(env, states[:2], states[2:])
    for patches in (1, 1000):  # all six candidates at once, or two at a time
        model.num_patches = patches
        costs.append(plan.latent_cost(model, worlds, torch.device("cpu"), alpha=0.5)(np.arange(2))(actions))
    close(*costs)


def test_a_search_is_as_wide_as_it_is_told_and_proposes_what_the_world_can_do(monkeypatch):
    model, env, proposed = tiny_model(encoder="pca"), make_env("pointmaze"), []
    asked = mock.Mock(wraps=plan.cem)
    monkeypatch.setattr(plan, "cem", asked)

    def cost(actions):
        proposed.append(actions.abs().flatten())
        return actions.square().sum((2, 3))

    for planner in ("icem", "cem", "mppi"):
        flags = f"--n-evals 2 --planner {planner} --opt-steps 1 --planner-args var_scale=9,keep=2"
        args = plan.settle(plan.get_args(flags.split()), planner, model)
        plan.solve(plan.Worlds(env, *random_problems(env, args)), lambda problems: cost, model, args, "cpu")
    proposed = torch.cat(proposed)
    assert proposed.max() == 1 and (proposed == 1).float().mean() > 0.5  # most are beyond the world's bounds
    icem, plain = (call.kwargs for call in asked.call_args_list)
    assert icem["keep"] == 2 and not plain


def test_problems_of_a_data_set_are_goal_h_steps_apart_in_one_validation_episode(dataset):
    model = types.SimpleNamespace(world=WORLD | {"data": str(dataset.path)}, frameskip=5)
    args = plan.get_args("--goal-source dset --goal-H 2 --n-evals 40".split())
    row = {tuple(state): i for i, state in enumerate(dataset.states[:].astype(float).tolist())}
    for start, goal in zip(*get_problems(None, args, model), strict=True):
        first, last = row[tuple(start)], row[tuple(goal)]
        (episode,) = set(np.searchsorted(dataset.episode_ends, [first, last], side="right"))
        assert last == first + 2 and episode in dataset.split()[1]


def test_a_v_that_has_collapsed_is_refused(frames, monkeypatch):
    monkeypatch.setattr(encoders, "train_vae", lambda vae, *_, **__: vae.mu.weight.data.zero_())
    with refused("vae has collapsed: all frames have the same latent"):
        encoders.build_encoder("vae").fit(frames)


def test_what_is_imagined_stands_beside_what_happened():
    model, env = tiny_model(encoder="pca", decoder=dict(img_size=64, depth=2)), make_env("pointmaze")
    worlds = plan.Worlds(env, some_states(env, 2), some_states(env, 2), films=1)
    actions, frames = torch.rand(2, 2, 10) * 2 - 1, []
    for taken in (actions, actions[:1, :1]):
        z = model.encode({name: torch.from_numpy(o[:1, -1:].copy()) for name, o in worlds.past.items()})
        worlds.act(np.arange(len(taken)), taken.numpy())
        frames.append(model.decode(model.rollout(z, taken[:1])["visual"])[0])
    expected = np.concatenate([frames[0], frames[1][1:]])
    assert (reports.decode_plans(model, worlds.plans[0], "cpu") == expected).all() and len(worlds.films[0]) == 3 * 5 + 1
