"""The environments by name, the random policies, and the one episode loop.

PointMaze has a file of its own. CarRacing and TakeCover, here, are the two worlds of Ha & Schmidhuber (2018,
arXiv:1803.10122). All are Gymnasium environments with the observation {"visual": (H, W, 3) uint8, "proprio": (P,)
float32}; a maze can also be put into a state (`set_state`, `sample_state`, `goal_reached`), so that one can plan in it.
"""

import contextlib
import math
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

from lib.common import UserError, Workers, to_frames
from lib.pointmaze import PointMaze, PointMazeD4RL, observation_space


class Screen(gym.Wrapper):
    """An environment that is known by its frames alone: the upper part `shown` of its screen, scaled down."""

    def __init__(self, env, img_size, shown):
        super().__init__(env)
        self.img_size, self.shown = img_size, shown
        self.observation_space = observation_space(img_size, 0)

    def observe(self):
        return {"visual": self.render(), "proprio": np.zeros(0, np.float32)}

    def render(self):
        """(img_size, img_size, 3) uint8: every pixel is the mean of the area that it covers."""
        image = Image.fromarray(self.screen[: int(self.shown * len(self.screen))])
        return np.asarray(image.resize((self.img_size, self.img_size), Image.Resampling.BOX))


class CarRacing(Screen):
    """Gymnasium's CarRacing-v3, seen as in World Models: without the bar of indicators at the bottom.

    The action is steering in [-1, 1], gas in [0, 1] and brake in [0, 1]. Each of the N tiles of the track is worth
    1000 / N, and a step costs 0.1. An episode lasts 1,000 steps at most.
    """

    def __init__(self, img_size=64):
        import Box2D  # noqa: F401  (without it Gymnasium's own message is a page long)
        from gymnasium.envs.box2d import car_racing

        env = gym.make("CarRacing-v3", max_episode_steps=1000, disable_env_checker=True)  # it would miss the bar
        super().__init__(env, img_size, shown=1)
        self.gymnasium, self.road, self.env.unwrapped._render = car_racing, None, self.draw

    def draw(self, mode):
        """Draws the upper 84 of Gymnasium's 96 rows, which the paper's code keeps. Every pixel is Gymnasium's, in about
        a third of the time: Gymnasium turns some 700 polygons one by one and typesets a score that nobody reads."""
        env, made, pygame = self.env.unwrapped, self.gymnasium, self.gymnasium.pygame
        width, height = made.WINDOW_W, made.WINDOW_H
        env.surf = pygame.Surface((width, height))
        angle = -env.car.hull.angle
        zoom = 0.1 * made.SCALE * max(1 - env.t, 0) + made.ZOOM * made.SCALE * min(env.t, 1)  # closes in for a second
        x, y = env.car.hull.position
        shift = pygame.math.Vector2(-x * zoom, -y * zoom).rotate_rad(angle) + (width / 2, height / 4)
        self.draw_road(env.surf, zoom, shift, angle)
        env.car.draw(env.surf, zoom, shift, angle, False)
        bar = height // 8
        upper = pygame.transform.flip(env.surf.subsurface((0, bar, width, height - bar)), False, True)
        small = pygame.transform.smoothscale(upper, (made.STATE_W, made.STATE_H * 7 // 8))
        return pygame.surfarray.array3d(small).swapaxes(0, 1)

    def draw_road(self, surface, zoom, shift, angle):
        """Draws field, grass and road. It turns the polygons near the car at once, and leaves out those off screen."""
        env, made = self.env.unwrapped, self.gymnasium
        if self.road is not env.road_poly:  # a new track
            self.road = env.road_poly
            square = np.array([[1, 0], [0, 0], [0, 1], [1, 1]])
            field = made.PLAYFIELD * (2 * square - 1)
            grass = made.GRASS_DIM * (np.mgrid[-20:20:2, -20:20:2].reshape(2, -1).T[:, None] + square)  # (400, 4, 2)
            self.corners = np.concatenate([field[None], grass, [polygon for polygon, _ in self.road]])
            self.centres = self.corners.mean(1)
            self.colours = [env.bg_color, *[env.grass_color] * len(grass), *(colour for _, colour in self.road)]
        car, size = np.array(env.car.hull.position), np.array(surface.get_size())
        reach = np.hypot(*size) / zoom  # past the screen's farthest corner by more than half a polygon
        near = (np.abs(self.centres - car) < reach).all(1)
        near[0] = np.abs(car).max() + reach > made.PLAYFIELD  # is the field's edge in sight?
        if not near[0]:
            surface.fill(env.bg_color)
        near = near.nonzero()[0]
        (x, y), cos, sin = np.moveaxis(self.corners[near], -1, 0), np.cos(angle), np.sin(angle)
        pixels = np.stack([x * cos - y * sin, x * sin + y * cos], -1) * zoom + shift  # (N, 4, 2)
        seen = (pixels.max(1) >= -1) & (pixels.min(1) <= size + 1)
        for i in seen.all(1).nonzero()[0]:
            corners, colour = pixels[i].tolist(), [int(c) for c in self.colours[near[i]]]  # tiles change theirs
            made.gfxdraw.aapolygon(surface, corners, colour)
            made.gfxdraw.filled_polygon(surface, corners, colour)

    @property
    def state(self):
        """Position (m), velocity (m/s) and heading (rad) of the car."""
        hull = self.env.unwrapped.car.hull
        return np.array([*hull.position, *hull.linearVelocity, hull.angle])

    def reset(self, *, seed=None, options=None):
        self.screen, info = self.env.reset(seed=seed, options=options)
        return self.observe(), info

    def step(self, action, render=True):
        action = np.clip(action, self.action_space.low, self.action_space.high).astype(np.float32)
        self.screen, reward, terminated, truncated, info = self.env.step(action)
        return (self.observe() if render else None), float(reward), terminated, truncated, info


class TakeCover(Screen):
    """ViZDoom's TakeCover, seen and steered as in World Models: the player has to survive the monsters' fireballs.

    The action is one number in [-1, 1]: below -1/3 the player moves left, above 1/3 right, and between them it stays.
    A step, one tic of the game (1/35 s), is worth 1. An episode ends with death, or after 2,100 steps. The state is
    the player's health, 0 to 100.
    """

    def __init__(self, img_size=64):
        import vizdoom.gymnasium_wrapper  # noqa: F401  (registers the environments)

        super().__init__(gym.make("VizdoomTakeCover-v1", max_episode_steps=2100), img_size, 400 / 480)  # as in its code
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        self.screen, self.state = observation["screen"], observation["gamevariables"]
        return self.observe(), info

    def step(self, action, render=True):
        button = 2 if action[0] < -1 / 3 else 1 if action[0] > 1 / 3 else 0  # MOVE_LEFT, MOVE_RIGHT, none
        observation, reward, terminated, truncated, info = self.env.step(button)
        if not terminated:  # a dead player sees nothing: the last frame stays
            self.screen, self.state = observation["screen"], observation["gamevariables"]
        return (self.observe() if render else None), float(reward), terminated, truncated, info


class DreamEnv(gym.Env):
    """One dream of vae_mdnrnn.py: `proprio` is what C sees, [z h], and `render()` is what V imagines."""

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, dream, vae):
        self.dream, self.vae, self.state = dream, vae, dream.reset(1)[0].cpu().numpy()
        self.observation_space = observation_space(64, len(self.state))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (dream.rnn.action_dim,), np.float32)

    def observe(self):
        return {"visual": self.render(), "proprio": self.state}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.dream.generator.manual_seed(seed)
        self.state = self.dream.reset(1)[0].cpu().numpy()
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


# ---- Episodes ------------------------------------------------------------------------------------


class RandomPolicy:
    """Acts at random, in one of three ways.

    "uniform": every action is drawn anew. "hold": a uniform action is kept for 1 to 99 steps, log-uniformly (TakeCover;
    the paper keeps it for 1 to 10, but has more episodes in which to reach the walls). "brownian":
    a_{t+1} = a_t + sqrt(dt) N(0, 1), dt = 1/50, kept within bounds (CarRacing, after github.com/ctallec/world-models;
    the paper's code draws a random C for each episode).
    """

    def __init__(self, kind, space, rng):
        self.kind, self.space, self.rng, self.action, self.left = kind, space, rng, None, 0

    def __call__(self, obs):
        low, high = self.space.low, self.space.high
        if self.kind == "brownian" and self.action is not None:
            step = math.sqrt(1 / 50) * self.rng.standard_normal(self.space.shape)
            self.action = np.clip(self.action + step, low, high)
        elif self.left == 0:
            self.action = self.rng.uniform(low, high)
            self.left = int(10 ** self.rng.uniform(0, 2)) if self.kind == "hold" else 1
        self.left -= 1
        return self.action


def rollout(env, obs, policy, steps, frameskip=1, patience=math.inf):
    """Plays one episode, in which `policy(obs)` acts from the first observation `obs` on.

    Returns {"frames", "states", "actions", "rewards", "dones"}: arrays with a row per model step, which is `frameskip`
    environment steps. Frames between two rows are never rendered. The episode is cut short after `patience` rows
    without a reward above 0.
    """
    rows, in_vain = [], 0
    for t in range(steps):
        seen, state, actions, earned = obs, np.float32(env.state), [], 0.0
        for i in range(frameskip):
            actions.append(np.float32(policy(seen)))
            obs, reward, done, truncated, _ = env.step(actions[-1], render=i == frameskip - 1 and t < steps - 1)
            earned += reward
            if done or truncated:
                actions += actions[-1:] * (frameskip - len(actions))  # fills the row; nothing happens any more
                break
        rows.append((seen["visual"], state, np.concatenate(actions), np.float32(earned), done))
        in_vain = 0 if earned > 0 else in_vain + 1
        if done or truncated or in_vain >= patience:
            break
    names = "frames", "states", "actions", "rewards", "dones"
    return {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


class EpisodePool(contextlib.ExitStack):
    """A pool of processes, each with an environment of its own, that play episodes.

    A job is {"who", "seed", "steps"} and, if wanted, {"frameskip", "patience"} for `rollout`. `who` is the kind of a
    random policy. Anything else is for `make_policy(who, seed)`, which each process gets from `make_policies(*args)`.
    """

    def __init__(self, workers, env, img_size, make_policies=None, *args):
        make_env(env, img_size).close()  # an unknown name or a missing package fails here, in one line
        super().__init__()
        self.workers = self.enter_context(Workers(workers, _begin_worker, (env, img_size, make_policies, *args)))

    def map(self, jobs):
        """Yields the episodes in order."""
        return self.workers.map(_play, jobs)

    def returns(self, jobs):
        """Yields the cumulative rewards of the episodes, in order."""
        return self.workers.map(_return_of, jobs, chunksize=1)


def _begin_worker(env, img_size, make_policies, *args):
    global _env, _make_policy
    _env, _make_policy = make_env(env, img_size), make_policies and make_policies(*args)


def _play(job):
    """One episode from a random state, where the world can be put into one. It depends on its job alone."""
    who, seed, rng = job["who"], job["seed"], np.random.default_rng(job["seed"])
    if hasattr(_env, "set_state"):
        _env.set_state(_env.sample_state(rng))
        obs = _env.observe()
    else:
        obs, _ = _env.reset(seed=seed % 2**31 if isinstance(seed, int) else int(rng.integers(2**31)))
    policy = RandomPolicy(who, _env.action_space, rng) if isinstance(who, str) else _make_policy(who, seed)
    return rollout(_env, obs, policy, **{k: v for k, v in job.items() if k not in ("who", "seed")})


def _return_of(job):
    return float(_play(job)["rewards"].sum(dtype=np.float64))
