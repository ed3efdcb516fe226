"""Waypoints (lib/waypoints.py): the graph, the way through it, and planning along it."""

import json
import shutil
import types
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import data
import plan
from lib.waypoints import Graph, Route, farthest_points
from lib.worlds import make_env, play
from test_all import SEARCH, assert_refused, tiny_model

U = np.array([(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (2, 2), (2, 1), (2, 0)], np.float32)


class Eye:
    """The latent of a point is the point."""

    action_mean, encode = torch.zeros(1), dict


def pairs_of(path, *episodes, stride=1):
    """A data set of episodes of points (T, 2), as pairs of rows that are a model step apart, and its tokens."""

    def episode(points):
        n = len(points)
        actions, states = np.zeros((n, 2), np.float32), np.pad(points, ((0, 0), (0, 2)))
        frames, zeros = np.zeros((n, 8, 8, 3), np.uint8), np.zeros(n, np.float32)
        return dict(frames=frames, states=states, actions=actions, rewards=zeros, dones=zeros > 0)

    meta = dict(env="pointmaze", seed=0, policy="none", img_size=8, frameskip=1)
    dataset = data.write_dataset(path, map(episode, episodes), len(episodes), meta)
    return data.Windows(dataset, np.arange(len(episodes)), 2, stride), dataset.states[:, None, :2]


def worlds_at(points, goals):
    """What a route sees of worlds in which a ball is at `points` (B, 2), and is to come to `goals` (B, 2)."""
    points, goals = np.float32(points)[:, None], np.float32(goals)[:, None]  # one token each
    past, goal_obs = {"visual": points[:, None], "proprio": points}, {"visual": goals, "proprio": goals[:, 0]}
    return types.SimpleNamespace(past=past, goal_obs=goal_obs, goals=np.pad(goals[:, 0], ((0, 0), (0, 2))))


def test_points_are_chosen_far_apart():
    chosen, nearest, distance = farthest_points(torch.tensor([[0.0], [1], [5], [10], [11]]), 3)
    assert chosen.tolist() == [0, 4, 2] and nearest.tolist() == [0, 0, 2, 1, 1]
    torch.testing.assert_close(distance, torch.tensor([0.0, 1, 0, 1, 0]))


def test_the_way_leads_around_a_wall(tmp_path):
    """The ends of a U are two apart and eight steps. Two episodes know its halves, and two pass by a little beside."""
    halves = U[:6], U[4:]
    graph = Graph(Eye, *pairs_of(tmp_path / "u", *halves, *(points + 0.1 for points in halves)), horizon=4, nodes=9)
    now = np.array([U[0], U[3], U[6], U[8], U[0], U[0]]) + 0.05
    goals = np.array([U[8], U[8], U[8], U[0], (9, 9), U[8]])
    route = Route(graph, worlds_at(now, goals))
    around, near = graph.find({"visual": U[:, None]})  # the nodes in the order of the U
    assert near.all() and route.steps[0, around].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert route.ahead(np.arange(3)).tolist() == [around[3], around[6], -1]  # the last is within reach
    assert route.ahead(np.array([3, 4])).tolist() == [-1, -1]  # there is no way back, and no frame like that goal
    assert [known.tolist() for *_, known in route.log] == [[True] * 3, [False] * 2]
    assert np.array_equal(route.states(np.arange(3))[:, :2].round(), [U[3], U[6], U[8]])
    targets = {"visual": torch.full((2, 1, 1, 2), 7.0), "proprio": torch.full((2, 1, 4), 7.0)}
    route.replace(np.array([5, 2]), targets)  # the waypoint's recorded proprio goes with its latent
    assert targets["visual"][:, 0, 0].round().tolist() == [U[3].tolist(), [7, 7]]
    assert targets["proprio"][:, 0].round().tolist() == [[*U[3], 0, 0], [7] * 4]


@pytest.mark.parametrize("stride", [1, 2])
def test_edges_join_what_an_episode_joins_and_nothing_else(tmp_path, stride):
    rng = np.random.default_rng(0)
    episodes = [rng.normal(0, 1, 2) + rng.normal(0, 0.3, (12, 2)).cumsum(0) for _ in range(20)]
    episodes = [np.float32(points) for points in episodes]
    graphs = [Graph(Eye, *pairs_of(tmp_path / name, *episodes, stride=stride), horizon=5, nodes=50) for name in "ab"]
    graph, again = graphs
    assert torch.equal(graph.x, again.x) and (graph.edges != again.edges).nnz == 0
    assert len(graph.x.unique(dim=0)) == 50
    joined = np.zeros((50, 50), bool)
    for points in episodes:
        near = np.linalg.norm(points[:, None] - graph.x.numpy(), axis=-1).argmin(1)
        starts = np.arange(len(points) - 2 * stride + 1)  # as data.Windows counts them
        joined[near[starts], near[starts + stride]] = True
    assert np.array_equal(graph.edges.toarray() > 0, joined)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a short data set of PointMaze, and a model that has hardly learned from it."""
    monkeypatch.chdir(tmp_path)
    jobs = [dict(who="uniform", seed=seed, steps=6, frameskip=5) for seed in range(20)]
    meta = dict(env="pointmaze", seed=0, policy="uniform", img_size=64, frameskip=5)
    dataset = data.write_dataset("datasets/pointmaze", play([make_env("pointmaze")], None, jobs), 20, meta)
    model = tiny_model(encoder="pca", world=dict(env="pointmaze", img_size=64, data="datasets/pointmaze"))
    model.encoder.fit(dataset.frames[:])
    model.save_pretrained("runs/tiny")
    return model


PLAN = f"--ckpt runs/tiny --n-evals 4 --max-iter 2 {SEARCH} --waypoints graph".split()


def test_a_plan_along_waypoints_repeats_itself_and_draws_what_it_did(run, script, monkeypatch):
    monkeypatch.setattr(plan, "Graph", partial(Graph, nodes=40))
    for name in ("one", "two"):
        code, out, err = script("plan", *PLAN, "--name", name, "--controls", "oracle")
        assert code == 0, err
    one, two = (json.loads(Path(f"plan_outputs/{name}/results.json").read_text()) for name in ("one", "two"))
    assert all(one[name] == two[name] for name in ("success_by_iter", "controls", "waypoints"))
    plans, lost = one["waypoints"]["plans"], one["waypoints"]["without"]
    assert 4 <= plans <= 8 and f"{lost} of {plans} plans went without waypoints" in out
    assert imageio.imread("plan_outputs/one/waypoints.png").std() > 10


@pytest.mark.parametrize(
    "what, message",
    [
        ("few", "has 108 training frames, and a graph of waypoints has 5000 nodes"),
        ("other", "has env other, the checkpoint has pointmaze"),
    ],
)
def test_a_graph_that_cannot_be_made_is_one_line(run, script, what, message):
    shutil.copytree("datasets/pointmaze", "datasets/other")
    meta = json.loads(Path("datasets/other/meta.json").read_text())
    Path("datasets/other/meta.json").write_text(json.dumps(meta | {"env": "other"}))
    flags = ["--data", "datasets/other"] if what == "other" else []
    assert_refused(script("plan", *PLAN, *flags), message)
    assert not Path("plan_outputs").exists()
