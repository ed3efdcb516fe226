"""The environments by name, the random policies, and the one episode loop, which plays many episodes at once.

PointMaze has a file of its own. CarRacing and TakeCover, here, are the two worlds of Ha & Schmidhuber (2018,
arXiv:1803.10122). All are Gymnasium environments with the observation {"visual": (H, W, 3) uint8, "proprio": (P,)
float32}; a maze can also be put into a state (`set_state`, `sample_state`, `goal_reached`), so that one can plan in it.
"""

import contextlib
import math
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

from lib.common import UserError, to_frames
from lib.pointmaze import PointMaze, PointMazeD4RL, observation_space
from lib.processes import Workers


class Screen(gym.Env):
    """A world that is known by its frames: the upper `ROWS` rows of its `screen`, scaled down. `begin` says how an
    episode begins, and `act` what an action does. An agent also sees the first `proprio_dim` numbers of its `state`,
    and a world model learns from all of them."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    render_mode = "rgb_array"

    def __init__(self, img_size, low, high, proprio_dim=0):
        self.img_size, self.observation_space = img_size, observation_space(img_size, proprio_dim)
        self.proprio_dim = proprio_dim
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))

    def begin(self, seed):
        """Begins an episode: in a random state, if the world can be put into one."""
        self.set_state(self.sample_state(self.np_random))

    def observe(self):
        return {"visual": self.render(), "proprio": np.float32(self.state[: self.proprio_dim])}

    def render(self):
        """(img_size, img_size, 3) uint8: every pixel is the mean of the area that it covers."""
        image = Image.fromarray(self.screen[: self.ROWS])
        return np.asarray(image.resize((self.img_size, self.img_size), Image.Resampling.BOX))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.begin(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self.observe(), {}

    def step(self, action, render=True):
        reward, terminated, truncated = self.act(np.clip(action, self.action_space.low, self.action_space.high))
        return (self.observe() if render else None), float(reward), bool(terminated), bool(truncated), {}


class CarRacing(Screen):
    """Gymnasium's CarRacing-v3 as EnvPool wrote it in C++, seen as in World Models: without the bar of indicators.

    The action is steering in [-1, 1], gas in [0, 1] and brake in [0, 1]. Each of the N tiles of the track is worth
    1000 / N, and a step costs 0.1. An episode lasts 1,000 steps at most. The state is the return so far.
    On the same track the same actions earn the same rewards as in Gymnasium, in less than half of the time. But the
    frames are not smoothed and show skid marks, and a seed stands for another track.
    """

    ROWS = 84  # of 96, as in the paper's code

    def __init__(self, img_size=64):
        super().__init__(img_size, [-1, 0, 0], [1, 1, 1])
        self.open()

    def open(self):
        try:
            from envpool import make_gymnasium
        except ImportError:
            wheels = "it has wheels for Python 3.11 and newer on Linux, Windows and Macs that are not Intel's"
            raise UserError(f"carracing needs envpool: pip install envpool ({wheels})") from None
        self.make = partial(make_gymnasium, "CarRacing-v3", num_envs=1, num_threads=1)

    def begin(self, seed):
        self.pool, self.state = self.make(env_seed=[seed]), np.zeros(1)
        self.screen = self.pool.reset()[0][0]

    def act(self, action):
        (self.screen,), (reward,), (terminated,), (truncated,), _ = self.pool.step(np.float32(action)[None])
        self.state = self.state + reward
        return reward, terminated, truncated


class GymnasiumCarRacing(CarRacing):
    """The original, for which figures are published."""

    def open(self):
        import Box2D  # noqa: F401  (without it Gymnasium's own message is a page long)

        self.env = gym.make("CarRacing-v3", max_episode_steps=1000)

    def begin(self, seed):
        self.screen, self.state = self.env.reset(seed=seed)[0], np.zeros(1)

    def act(self, action):
        self.screen, reward, *ended, _ = self.env.step(np.float32(action))
        self.state = self.state + reward
        return reward, *ended


class TakeCover(Screen):
    """ViZDoom's TakeCover, seen and steered as in World Models: the player has to survive the monsters' fireballs.

    The action is one number in [-1, 1]: below -1/3 the player moves left, above 1/3 right, and between them it stays.
    A step, one tic of the game (1/35 s), is worth 1. An episode ends with death, or after 2,100 steps. The state is
    the player's health, 0 to 100.
    """

    ROWS = 200  # of 240, as in the paper's code
    metadata = Screen.metadata | {"render_fps": 35}

    def __init__(self, img_size=64):
        import vizdoom.gymnasium_wrapper  # noqa: F401  (registers the environments)

        super().__init__(img_size, [-1], [1])
        Path("_vizdoom").mkdir(exist_ok=True)  # games that begin at once would all try to make it, and fail
        self.env = gym.make("VizdoomTakeCover-v1", max_episode_steps=2100)
        self.broken = vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException

    def begin(self, seed):
        observation, _ = self.env.reset(seed=seed)
        self.screen, self.state = observation["screen"], observation["gamevariables"]

    def act(self, action):
        button = 2 if action[0] < -1 / 3 else 1 if action[0] > 1 / 3 else 0  # MOVE_LEFT, MOVE_RIGHT, none
        try:
            observation, *outcome, _ = self.env.step(button)
        except self.broken as error:
            raise UserError(f"a game of takecover broke off ({error}): give the same command again") from None
        if not outcome[1]:  # a dead player sees nothing: the last frame stays
            self.screen, self.state = observation["screen"], observation["gamevariables"]
        return outcome

    def close(self):
        self.env.close()


class DreamEnv(gym.Env):
    """One dream of vae_mdnrnn.py: `proprio` is what C sees, [z h] or [z h c], and `render()` is what V imagines.
    An agent's smallest action is `low`, [-1, 0, 0] in a dream of CarRacing, and its largest is 1."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    render_mode = "rgb_array"

    def __init__(self, dream, vae, low=-1):
        self.dream, self.vae, self.state = dream, vae, dream.reset(torch.arange(1))[0].cpu().numpy()
        self.observation_space = observation_space(64, len(self.state))
        low = np.full(dream.rnn.action_dim, low, np.float32)
        self.action_space = gym.spaces.Box(low, np.ones_like(low))

    def observe(self):
        return {"visual": self.render(), "proprio": self.state}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.dream.generator.manual_seed(seed)
        self.state = self.dream.reset(torch.arange(1))[0].cpu().numpy()
        return self.observe(), {}

    def step(self, action, render=True):
        a = torch.as_tensor(np.asarray(action, np.float32), device=self.dream.device)[None]
        features, reward, done = self.dream.step(a)
        self.state, timeout = features[0].cpu().numpy(), self.dream.t >= self.dream.max_steps
        return (self.observe() if render else None), float(reward[0]), bool(done[0]) and not timeout, timeout, {}

    @torch.inference_mode()
    def render(self):
        """The frame (64, 64, 3) uint8 that V decodes from z."""
        return to_frames(self.vae.decode(self.dream.z[:1]))[0]


ENVIRONMENTS = {
    "pointmaze": partial(PointMaze, "UMaze"),
    "pointmaze-medium": partial(PointMaze, "Medium"),
    "pointmaze-large": partial(PointMaze, "Large"),
    "pointmaze-d4rl": PointMazeD4RL,
    "carracing": CarRacing,
    "carracing-gymnasium": GymnasiumCarRacing,
    "takecover": TakeCover,
}


def make_env(name, img_size=64, shift=None):
    """The environment called `name`, with frames of `img_size` pixels a side. `shift`, one of SHIFTS, is for mazes."""
    if name not in ENVIRONMENTS:
        raise UserError(f"unknown environment '{name}'; known: {', '.join(ENVIRONMENTS)}")
    if shift and not name.startswith("pointmaze"):
        raise UserError(f"{name} has no other appearance: --shift is for the mazes")
    try:
        return ENVIRONMENTS[name](img_size=img_size, **{"shift": shift} if shift else {})
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name}: pip install -r requirements.txt") from None


def can_be_set(name):
    """Whether the environment called `name` is one of ours that can be put into a state, so that one can plan in it."""
    world = ENVIRONMENTS.get(name)
    return hasattr(getattr(world, "func", world), "set_state")


# ---- Episodes ------------------------------------------------------------------------------------


BATCH = 32  # episodes that V, M and C see at once in each process


def random_actions(kind, space, rng):
    """Yields actions at random, in one of three ways.

    "uniform": every action is drawn anew. "hold": a uniform action is kept for 1 to 99 steps, log-uniformly (TakeCover;
    the paper keeps it for 1 to 10, but has more episodes in which to reach the walls). "brownian":
    a_{t+1} = a_t + sqrt(dt) N(0, 1), dt = 1/50, kept within bounds (CarRacing, after github.com/ctallec/world-models;
    the paper's code draws a random C for each episode).
    """
    low, high = space.low, space.high
    action = rng.uniform(low, high)
    while True:
        for _ in range(int(10 ** rng.uniform(0, 2)) if kind == "hold" else 1):
            yield action
        if kind == "brownian":
            action = np.clip(action + math.sqrt(1 / 50) * rng.standard_normal(space.shape), low, high)
        else:
            action = rng.uniform(low, high)


def rollout(env, who, seed, steps, frameskip=1, patience=math.inf, film=True):
    """One episode, as a generator: it yields what is seen, and is sent the action. If `who` names a random policy, no
    action has to be sent. Where the world can be put into a state, the episode begins in a random one.

    Returns {"frames", "states", "actions", "rewards", "dones"}: arrays with a row per model step, which is `frameskip`
    environment steps; no frames without `film`. Frames between two rows are never rendered. The episode is cut short
    after `patience` rows without a reward above 0.
    """
    rng = np.random.default_rng(seed)
    if hasattr(env, "set_state"):
        env.set_state(env.sample_state(rng))
        obs = env.observe()
    else:
        obs, _ = env.reset(seed=seed % 2**31 if isinstance(seed, int) else int(rng.integers(2**31)))
    random = random_actions(who, env.action_space, rng) if isinstance(who, str) else None
    rows, in_vain = [], 0
    for t in range(steps):
        seen, state, actions, earned = obs, np.float32(env.state), [], 0.0
        for i in range(frameskip):
            actions.append(np.float32(next(random) if random else (yield seen)))
            obs, reward, done, truncated, _ = env.step(actions[-1], render=i == frameskip - 1 and t < steps - 1)
            earned += reward
            if done or truncated:
                actions += actions[-1:] * (frameskip - len(actions))  # fills the row; nothing happens any more
                break
        frame = [seen["visual"]] if film else []
        rows.append((state, np.concatenate(actions), np.float32(earned), done, *frame))
        in_vain = 0 if earned > 0 else in_vain + 1
        if done or truncated or in_vain >= patience:
            break
    names = "states", "actions", "rewards", "dones", "frames"
    return {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=False)}


def play(envs, agents, jobs):
    """Plays `jobs`, the arguments of `rollout`, in len(envs) environments at once, and returns the episodes in order.

    agents(frames (B, H, W, 3)) gives the actions (B, A) of all; agents.begin(i, who, seed) tells it that an episode
    begins in environment i. It always computes all B rows, needed or not, because then an episode is the same to
    the last bit whichever others are played beside it.
    """
    episodes, waiting = [None] * len(jobs), enumerate(jobs)

    def seat(i, env):
        for number, job in waiting:  # all seats share it: where an episode ends, the next one begins
            if not isinstance(job["who"], str):
                agents.begin(i, job["who"], job["seed"])
            episodes[number] = yield from rollout(env, **job)

    seats, actions = {i: seat(i, env) for i, env in enumerate(envs)}, [None] * BATCH  # with None a generator begins
    frames = np.zeros((BATCH, *envs[0].observation_space["visual"].shape), np.uint8)
    while True:
        for i in list(seats):
            try:
                frames[i] = seats[i].send(actions[i])["visual"]
            except StopIteration:
                del seats[i]
        if not seats:
            return episodes
        actions = agents(frames)
        if not np.isfinite(actions).all():
            raise UserError("an action is not a number, so V, M or C is broken: remove them, and train them again")


def play_alone(env, policy, seed, steps):
    """One episode in which policy(obs) acts, as `rollout` returns it."""
    episode = rollout(env, None, seed, steps)
    obs = next(episode)
    while True:
        try:
            obs = episode.send(policy(obs))
        except StopIteration as end:
            return end.value


class EpisodePool(contextlib.ExitStack):
    """A pool of processes, each with environments of its own, that play episodes.

    A job is a dictionary of what `rollout` takes after `env`. A `who` that is not the kind of a random policy is for
    the agents of `play`, which each process gets from `make_agents(*args)`.
    """

    def __init__(self, workers, env, img_size, make_agents=None, *args):
        make_env(env, img_size).close()  # an unknown name or a missing package fails here, in one line
        super().__init__()
        self.size = workers
        self.workers = self.enter_context(Workers(workers, _open_worlds, (env, img_size, make_agents, *args)))

    def map(self, jobs):
        """Yields the episodes in order."""
        return self._map(_play, jobs, 4 if isinstance(jobs[0]["who"], str) else BATCH)

    def returns(self, jobs):
        """Yields each episode's return and its length, in order."""
        return self._map(_returns, [job | {"film": False} for job in jobs], -(-len(jobs) // self.size))

    def _map(self, function, jobs, size):
        chunks = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        for results in self.workers.map(function, chunks):
            yield from results


def _open_worlds(env, img_size, make_agents, *args):
    global _make_env, _envs, _agents
    _make_env, _envs, _agents = partial(make_env, env, img_size), [], make_agents and make_agents(*args)


def _play(jobs):
    """The episodes of some jobs. Each depends on its own job alone."""
    size = 1 if isinstance(jobs[0]["who"], str) else min(BATCH, len(jobs))  # a random policy gains nothing from a batch
    _envs.extend(_make_env() for _ in range(size - len(_envs)))
    return play(_envs[:size], _agents, jobs)


def _returns(jobs):
    return [(float(e["rewards"].sum(dtype=np.float64)), len(e["rewards"])) for e in _play(jobs)]
