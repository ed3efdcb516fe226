"""Worlds and trajectories: the environments, random-policy collection, the data set on disk, its windows.

PointMaze is Gymnasium-Robotics' maze (its MuJoCo model and physics) seen from straight above. One
environment step is five physics steps of 0.01 s, the speed clipped to +-5 m/s before each, as in D4RL's
maze2d (Fu et al., 2020, arXiv:2004.07219), on which DINO-WM (Zhou et al., 2024, arXiv:2411.04983) plans. Its own
world is `pointmaze-d4rl`.

A data set is a folder of flat arrays, one row per *model step* (`frameskip` environment steps):

    frames   (S, H, W, 3) uint8     what is seen at the row
    states   (S, P) float32         the true state at the row; for PointMaze also its proprioception
    actions  (S, frameskip*DoF)     the environment actions taken from this row on, concatenated
    rewards  (S,), dones (S,)       what these actions earned, and whether they ended the episode
    episode_ends (E,)               row behind the last one of each episode
    meta.json                       environment, seed, policy, image size, frameskip, version

Frames between two rows are never rendered: with `frameskip=5` that makes collection five times as fast.

CarRacing and TakeCover are the two worlds of Ha & Schmidhuber (2018, arXiv:1803.10122); vae_mdnrnn.py collects there.

    python data.py --env pointmaze --episodes 3000        # collect into datasets/pointmaze
    python data.py --inspect datasets/pointmaze           # shapes, statistics, contact_sheet.png
    python data.py --bench                                # frames and physics steps per second
"""

import argparse
import contextlib
import ctypes
import errno
import io
import json
import multiprocessing as mp
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

if sys.platform.startswith("linux"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen; to be set before mujoco is imported
    os.environ.setdefault("LP_NUM_THREADS", "0")  # the software renderer draws without threads: 1.4 times as fast
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        # Keep freed memory (M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD): a plan's imagination on the CPU wants the same
        # large blocks over and over, and new pages for them took a quarter of its time.
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
            ctypes.CDLL("libc.so.6").mallopt(option, value)

import gymnasium as gym
import numpy as np
from PIL import Image
from tqdm import tqdm

VERSION = 1  # of the format on disk
SHIFTS = ("colours", "light", "camera", "noise", "distractor")  # other looks of PointMaze, to plan in
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
               errno.EEXIST, errno.ENAMETOOLONG)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# What every script shares: how an error of the user's ends, and how a file is written whole or not at all


class UserError(Exception):
    """Something that the user can put right. Its text is one line that says what to do."""


def run_script(main):
    """Runs a script's `main`: an error that a user can cause is one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"cannot write {error.filename or 'the output'}: {error.strerror}"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """What every script parses its flags with: --help says the defaults that there are, an error is one line."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            unsaid = action.default is None or action.default is False
            return action.help if unsaid else super()._get_help_string(action)

    def __init__(self, **options):
        super().__init__(formatter_class=self.Formatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(message)


def natural(text):
    """An `argparse` type: 0, 1, 2, ..."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def positive(text):
    """An `argparse` type: 1, 2, 3, ..."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def per_second(call, seconds=1):
    """How often a second `call()` is done."""
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        call()
        n += 1
    return n / (time.perf_counter() - start)


def read_json(path):
    """The dictionary in a .json file of ours; UserError if it is damaged."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove it, and give the command again, with all its flags") from None


def write_csv(path, rows):
    """A table of the dictionaries `rows`, atomically; what a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [[str(row.get(name, "")) for name in names] for row in rows]
    write_atomic(path, lambda temporary: temporary.write_text("".join(",".join(line) + "\n" for line in lines)))


def write_atomic(path, write):
    """Calls `write(temporary_path)`, then renames: `path` is either whole or as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")  # each process its own
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------
# The environments


class PointMaze(gym.Env):
    """A force-actuated ball in a maze, seen from straight above.

    State and proprioception (x, y, vx, vy) in metres and m/s; action in [-1, 1]^2, the force on the ball.
    Reward exp(-distance to the goal), as D4RL's dense one. Never terminates; the caller sets the length.

    Args:
        maze: `UMaze`, `Medium` or `Large`, the package's maps.
        img_size: side of the square frames in pixels.
    """

    DT, PHYSICS_STEPS, MAX_SPEED, BALL_RADIUS, REACHED = 0.01, 5, 5.0, 0.1, 0.5
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(self, maze="UMaze", img_size=64):
        import mujoco

        self.mujoco = mujoco
        self.model, self.free = self.build(maze)
        self.data = mujoco.MjData(self.model)
        self.img_size, self._renderer, self._rollout = img_size, None, None
        self.shift, self.chance = None, np.random.default_rng(0)
        self.goal = self.cell_center(*np.argwhere(self.free)[0])
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gym.spaces.Dict(
            visual=gym.spaces.Box(0, 255, (img_size, img_size, 3), np.uint8),
            proprio=gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
        )

    def build(self, maze):
        """The MuJoCo model, and which cells (rows, cols) are free, each 1 m x 1 m, centred on the origin."""
        with contextlib.redirect_stderr(io.StringIO()):  # it prints news of environments that are not used here
            import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        env = gym.make(f"PointMaze_{maze}-v3").unwrapped
        Path(env.tmp_xml_file_path).unlink(missing_ok=True)
        model = env.point_env.model
        model.opt.timestep = self.DT
        model.site("target").rgba[:] = 0  # the goal marker is never seen
        return model, np.array(env.maze.maze_map) != 1

    def cell_center(self, row, col):
        """(x, y) of the middle of a cell: x grows with the column, y falls with the row."""
        rows, cols = self.free.shape
        return np.array([col + 0.5 - cols / 2, rows / 2 - row - 0.5])

    def sample_state(self, rng):
        """A state (4,) with the ball anywhere it fits, uniformly, and a uniform velocity in [-5, 5]^2."""
        half = np.array(self.free.shape[::-1]) / 2  # (x, y)
        touch = self.BALL_RADIUS + 0.02
        while True:
            xy = rng.uniform(touch - half, half - touch)
            cols, rows = (xy[0] + half[0] + [-touch, touch]), (half[1] - xy[1] + [-touch, touch])
            if self.free[np.ix_(np.floor(rows).astype(int), np.floor(cols).astype(int))].all():
                return np.concatenate([xy, rng.uniform(-self.MAX_SPEED, self.MAX_SPEED, 2)])

    @property
    def state(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def set_state(self, state):
        """Puts the ball at `state` (4,), with nothing left of what was before."""
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = state[:2], state[2:]

    def goal_reached(self, state, goal):
        """Whether states (..., 4) lie within 0.5 m of goals (..., 4); their speeds do not matter (DINO-WM)."""
        return np.linalg.norm(np.asarray(state)[..., :2] - np.asarray(goal)[..., :2], axis=-1) < self.REACHED

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.set_state(self.sample_state(self.np_random))
        return self.observe(), {}

    def step(self, action, render=True):
        """One environment step, 0.05 s. With `render=False` the observation is None, and the step cheap."""
        self.data.qvel[:] = np.clip(self.data.qvel, -self.MAX_SPEED, self.MAX_SPEED)
        self.data.ctrl[:] = np.clip(action, -1, 1)
        self.mujoco.mj_step(self.model, self.data, self.PHYSICS_STEPS)
        reward = float(np.exp(-np.linalg.norm(self.data.qpos - self.goal)))
        return (self.observe() if render else None), reward, False, False, {"state": self.state}

    def simulate(self, states, actions):
        """Physics alone, for B balls at once in threads: states (B, 4), actions (B, T, 2) -> final states (B, 4)."""
        from mujoco import rollout

        if self._rollout is None:
            threads = os.cpu_count()
            self._rollout = rollout.Rollout(nthread=threads), [self.mujoco.MjData(self.model) for _ in range(threads)]
        pool, datas = self._rollout
        full = np.zeros((len(states), 1 + states.shape[1]))  # MuJoCo's full state: time, qpos, qvel
        full[:, 1:] = states
        for t in range(actions.shape[1]):
            full[:, 3:] = full[:, 3:].clip(-self.MAX_SPEED, self.MAX_SPEED)
            control = np.broadcast_to(actions[:, t, None].clip(-1, 1), (len(states), self.PHYSICS_STEPS, 2))
            full = pool.rollout(self.model, datas, full, control)[0][:, -1]
        return full[:, 1:]

    def observe(self):
        return {"visual": self.render(), "proprio": self.state.astype(np.float32)}

    def render(self):
        """The frame (H, W, 3) uint8, as `look` sees it."""
        mujoco = self.mujoco
        if self._renderer is None:
            visual = self.model.vis
            visual.global_.offwidth = visual.global_.offheight = self.img_size
            try:
                self._renderer = mujoco.Renderer(self.model, self.img_size, self.img_size)
            except Exception as error:  # a missing library shows itself differently on every system
                raise UserError(
                    f"MuJoCo cannot render ({type(error).__name__}, MUJOCO_GL={os.environ.get('MUJOCO_GL')}): "
                    "install a GL library (Debian, Ubuntu: apt-get install libegl1 libgl1-mesa-dri), "
                    "or try MUJOCO_GL=osmesa with libosmesa6"
                ) from error
            self._camera = mujoco.MjvCamera()
            self._camera.azimuth, self._camera.elevation = 90, -90  # from straight above
            self.look(self._camera, self._renderer.scene)
            self.dress()
        mujoco.mj_kinematics(self.model, self.data)  # and not mj_forward: looking must not change what happens next
        mujoco.mj_camlight(self.model, self.data)
        self._renderer.update_scene(self.data, self._camera)
        if self.shift == "distractor":
            self._add_ball([1, 0, 0, 1])
        frame = self._renderer.render()
        if self.shift == "noise":
            frame = (frame + self.chance.normal(0, 15, frame.shape)).clip(0, 255).astype(np.uint8)
        return frame

    def dress(self):
        """Another look of the same world, by `shift`: physics does not notice. In every frame anew: "noise", of 15 grey
        levels, and "distractor", a second, red ball at a random place."""
        model, camera = self.model, self._camera
        if self.shift == "colours":
            model.geom_rgba[model.geom_type == self.mujoco.mjtGeom.mjGEOM_BOX, :3] = 0.35, 0.6, 0.45  # walls
            model.mat_rgba[model.geom_matid[0], :3] = 1.0, 0.75, 0.5  # floor
        elif self.shift == "light":
            model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.25, (0.7, 0.6, 0.4)  # dim and warm
        elif self.shift == "camera":
            camera.azimuth, camera.lookat[:2] = 93, (0.1, 0.1)  # turned by 3 degrees, moved by 0.1 m each way

    def _add_ball(self, rgba):
        scene, position = self._renderer.scene, np.array([*self.sample_state(self.chance)[:2], 0.2])
        size = np.full(3, self.BALL_RADIUS)
        sphere, ball = self.mujoco.mjtGeom.mjGEOM_SPHERE, scene.geoms[scene.ngeom]
        self.mujoco.mjv_initGeom(ball, sphere, size, position, np.eye(3).ravel(), np.array(rgba, np.float32))
        scene.ngeom += 1

    def look(self, camera, scene):
        """Orthographic, the whole maze, and nothing that costs time: a third less of it."""
        camera.orthographic, camera.distance = 1, 10
        self.model.vis.global_.fovy = max(self.free.shape)  # an orthographic camera's field of view is in metres
        self.model.vis.global_.ipd = 0  # one eye, in the middle
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE"):
            scene.flags[getattr(self.mujoco.mjtRndFlag, flag)] = False

    def close(self):
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class PointMazeD4RL(PointMaze):
    """The same ball in D4RL's maze2d-umaze, dressed as DINO-WM's data were rendered (its env/pointmaze/).

    Here x grows with the row and y with the column of the map; the middle of cell (row, col) is (row, col) - 0.2.
    MuJoCo now adds the margins of two geoms where the release's took the larger: contacts begin 2 mm earlier.
    """

    MAP = "#####", "#   #", "### #", "#   #", "#####"
    MAX_START_SPEED = 5.2262554  # the range of D4RL's data
    MJCF = """
    <mujoco>
      <compiler angle="radian" inertiafromgeom="true"/>
      <option timestep="{timestep}" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <default>
        <joint type="slide" damping="1" limited="false"/>
        <geom density="1000" margin="0.002" condim="1" friction="0.5 0.1 0.1" contype="2" conaffinity="1"/>
      </default>
      <visual>
        <headlight ambient="0.4 0.4 0.4" diffuse="0.8 0.8 0.8" specular="0.1 0.1 0.1"/>
        <map znear="0.01"/>
        <quality shadowsize="2048"/>
      </visual>
      <asset>
        <texture name="floor" type="2d" width="100" height="100" builtin="checker" rgb1=".2 .3 .4" rgb2=".1 .2 .3"/>
        <material name="floor" texture="floor" texrepeat="20 20"/>
        <material name="wall" rgba="0.7 0.5 0.3 1"/>
      </asset>
      <worldbody>
        <geom type="plane" size="40 40 0.25" pos="0 0 -0.1" contype="1" conaffinity="0" material="floor"/>
        <body pos="1.2 1.2 0">
          <geom type="sphere" size="{radius}" rgba="0 0 1 0" contype="1"/>
          <site size="0.2" rgba="0.3 0.6 0.3 1"/>
          <joint name="x" axis="1 0 0"/>
          <joint name="y" axis="0 1 0"/>
        </body>
        {walls}
      </worldbody>
      <actuator>
        <motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
        <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
      </actuator>
    </mujoco>"""

    def build(self, maze):
        free = np.array([[cell != "#" for cell in row] for row in self.MAP])
        wall = '<geom type="box" size="0.5 0.5 0.2" pos="{} {} 0" material="wall"/>'
        walls = "".join(wall.format(row + 1, col + 1) for row, col in np.argwhere(~free))
        xml = self.MJCF.format(timestep=self.DT, radius=self.BALL_RADIUS, walls=walls)
        return self.mujoco.MjModel.from_xml_string(xml), free

    def cell_center(self, row, col):
        return np.array([row, col]) - 0.2

    def sample_state(self, rng):
        """A state (4,) as the release samples starts and goals: anywhere in the U, with a uniform velocity."""
        while True:
            x, y = rng.uniform(0.5, 3.1), rng.uniform(0.5, 3.1)
            if not 1.1 < x < 2.5 or y >= 2.5:
                return np.array([x, y, *rng.uniform(-self.MAX_START_SPEED, self.MAX_START_SPEED, 2)])

    def sample_problem(self, seed, n):
        """Start and goal states of the n-th problem of a seed, those of the release."""
        if not 0 < seed * n + 1 < 2**32 or seed == 0:
            raise UserError(f"seed {seed} is none of the release's: with 0 its problems are all the same (--seed)")
        rng = np.random.RandomState(seed * n + 1)
        return self.sample_state(rng), self.sample_state(rng)

    def look(self, camera, scene):
        """mujoco-py's free camera: at the geoms' median, as far from it as the model extends."""
        camera.lookat[:], camera.distance = (3, 3, 0), self.model.stat.extent

    def render(self):
        return super().render()[::-1].copy()  # mujoco-py's rows come from the bottom up


class Screen(gym.Wrapper):
    """An environment that is known by its frames alone: the upper `shown` of what it draws, averaged down."""

    def __init__(self, env, img_size, shown):
        super().__init__(env)
        self.img_size, self.shown = img_size, shown
        self.observation_space = gym.spaces.Dict(
            visual=gym.spaces.Box(0, 255, (img_size, img_size, 3), np.uint8),
            proprio=gym.spaces.Box(-np.inf, np.inf, (0,), np.float32),
        )

    def observe(self):
        return {"visual": self.render(), "proprio": np.zeros(0, np.float32)}

    def render(self):
        """(img_size, img_size, 3) uint8: every pixel the mean of the area that it covers."""
        image = Image.fromarray(self.screen[: int(self.shown * len(self.screen))])
        return np.asarray(image.resize((self.img_size, self.img_size), Image.Resampling.BOX))


class CarRacing(Screen):
    """Gymnasium's CarRacing-v3, seen as in World Models: without the bar of indicators at the bottom.

    Action: steering in [-1, 1], gas in [0, 1], brake in [0, 1]. Reward 1000 / N for each of the N tiles of the track,
    -0.1 a step. An episode lasts 1,000 steps at most.
    """

    def __init__(self, img_size=64):
        try:
            import Box2D  # noqa: F401  (without it Gymnasium's own message is a page long)
            from gymnasium.envs.box2d import car_racing
        except ImportError:
            raise UserError("carracing needs Box2D: pip install 'gymnasium[box2d]'") from None
        env = gym.make("CarRacing-v3", max_episode_steps=1000, disable_env_checker=True)  # it would miss the bar
        super().__init__(env, img_size, shown=1)
        self.gymnasium, self.road, self.env.unwrapped._render = car_racing, None, self.draw

    def draw(self, mode):
        """The upper 84 of Gymnasium's 96 rows, as the paper's code crops them: the same to the pixel, and a step takes
        a third of its time: Gymnasium turns some 700 polygons one by one, and typesets a score that nobody reads."""
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
        """Field, grass and road; those near the car turned all at once, those off the screen left out."""
        env, made = self.env.unwrapped, self.gymnasium
        if self.road is not env.road_poly:  # a new track
            self.road = env.road_poly
            square = np.array([[1, 0], [0, 0], [0, 1], [1, 1]])
            field = made.PLAYFIELD * (2 * square - 1)
            grass = made.GRASS_DIM * (np.mgrid[-20:20:2, -20:20:2].reshape(2, -1).T[:, None] + square)  # (400, 4, 2)
            self.corners = np.concatenate([field[None], grass, [polygon for polygon, _ in self.road]])
            self.centres = self.corners.mean(1)
            self.colours = [env.bg_color, *[env.grass_color] * len(grass), *(colour for _, colour in self.road)]
        car, size = np.array(env.car.hull.position), np.array([made.WINDOW_W, made.WINDOW_H])
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

    def reset(self, **options):
        self.screen, info = self.env.reset(**options)
        return self.observe(), info

    def step(self, action, render=True):
        action = np.clip(action, self.action_space.low, self.action_space.high).astype(np.float32)
        self.screen, reward, terminated, truncated, info = self.env.step(action)
        return (self.observe() if render else None), float(reward), terminated, truncated, info


class TakeCover(Screen):
    """ViZDoom's TakeCover, seen and steered as in World Models: survive the monsters' fireballs.

    Action: one number in [-1, 1]; below -1/3 the player moves left, above 1/3 right, between them it stays.
    Reward 1 a step (one tic of the game, 1/35 s). An episode ends with death, or after 2,100 steps.
    """

    def __init__(self, img_size=64):
        try:
            import vizdoom.gymnasium_wrapper  # noqa: F401  (registers the environments)
        except ImportError:
            raise UserError("takecover needs ViZDoom: pip install vizdoom") from None
        super().__init__(gym.make("VizdoomTakeCover-v1", max_episode_steps=2100), img_size, 400 / 480)  # as in its code
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    @property
    def state(self):
        """The player's health, 0 to 100."""
        return self.health

    def reset(self, **options):
        observation, info = self.env.reset(**options)
        self.screen, self.health = observation["screen"], observation["gamevariables"]
        return self.observe(), info

    def step(self, action, render=True):
        button = 2 if action[0] < -1 / 3 else 1 if action[0] > 1 / 3 else 0  # MOVE_LEFT, MOVE_RIGHT, none
        observation, reward, terminated, truncated, info = self.env.step(button)
        if not terminated:  # a dead player sees nothing: the last frame stays
            self.screen, self.health = observation["screen"], observation["gamevariables"]
        return (self.observe() if render else None), float(reward), terminated, truncated, info


ENVIRONMENTS = {
    "pointmaze": lambda img_size: PointMaze("UMaze", img_size),
    "pointmaze-medium": lambda img_size: PointMaze("Medium", img_size),
    "pointmaze-large": lambda img_size: PointMaze("Large", img_size),
    "pointmaze-d4rl": lambda img_size: PointMazeD4RL(img_size=img_size),
    "carracing": CarRacing,
    "takecover": TakeCover,
}


def make_env(name, img_size=64, shift=None):
    """The environment called `name`, its observation {"visual": (H, W, 3) uint8, "proprio": (P,) float32}; with a
    `shift`, one of SHIFTS, in another look."""
    if name not in ENVIRONMENTS:
        raise UserError(f"unknown environment '{name}'; known: {', '.join(ENVIRONMENTS)}")
    env = ENVIRONMENTS[name](img_size)
    if shift and not hasattr(env, "shift"):
        raise UserError(f"{name} has no other looks (--shift)")
    env.shift = shift
    return env


# ---------------------------------------------------------------------------------------------------------
# Collection


class NpyWriter:
    """A .npy file that grows row by row: its header leaves room for any number of rows and is set last."""

    def __init__(self, path, like):
        self.file, self.dtype, self.shape, self.rows = open(path, "wb"), like.dtype, like.shape[1:], 0
        self._header()

    def _header(self):
        descr = np.lib.format.dtype_to_descr(self.dtype)
        shape = (self.rows, *self.shape)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, rows):
        self.file.write(np.ascontiguousarray(rows, self.dtype))
        self.rows += len(rows)

    def close(self):
        self.file.seek(0)
        self._header()
        self.file.close()


def _die_with_parent():
    """Ends a worker whose parent was killed: it would wait for work for ever."""
    parent = mp.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


def process_runs(pid):
    """Whether there is a process of this number; on Windows, where asking would end it, always true."""
    try:
        return os.name == "nt" or os.kill(pid, 0) is None
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True


class Workers:
    """`workers` processes, each begun with `initializer(*initargs)`: `with Workers(...) as pool: pool.map(...)`."""

    def __init__(self, workers, initializer=None, initargs=()):
        spawn = mp.get_context("spawn")  # a forked copy of threads or of a renderer hangs
        self.start = lambda: ProcessPoolExecutor(workers, spawn, _start_worker, (initializer, initargs))
        self.pool = self.start()

    def map(self, function, items, chunksize=4):
        """Yields `function(item)` in order. If a worker dies (a renderer that crashes, a lack of memory) new ones do
        what is left; if one dies again before anything more is done, a UserError."""
        items, done, died_at = list(items), 0, None
        while done < len(items):
            try:
                for result in self.pool.map(function, items[done:], chunksize=chunksize):
                    yield result
                    done += 1
            except BrokenProcessPool:
                if done == died_at:
                    raise UserError("a worker process died (out of memory?): try fewer --workers") from None
                died_at, self.pool = done, self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(cancel_futures=True)


def _start_worker(initializer, initargs):
    _die_with_parent()
    if initializer is not None:
        initializer(*initargs)


def _make_worker_env(name, img_size):
    global _env
    _env = make_env(name, img_size)


def _random_episode(job):
    """One episode of uniformly random actions from a random state; seeded by (seed, episode) alone."""
    seed, episode, steps, frameskip = job
    rng = np.random.default_rng([seed, episode])
    _env.set_state(_env.sample_state(rng))
    obs = _env.observe()
    rows = {"frames": [], "states": [], "actions": [], "rewards": [], "dones": []}
    for step in range(steps):
        rows["frames"].append(obs["visual"])
        rows["states"].append(_env.state.astype(np.float32))
        actions = rng.uniform(-1, 1, (frameskip, *_env.action_space.shape)).astype(np.float32)
        reward = 0.0
        for i, action in enumerate(actions):
            obs, r, *_ = _env.step(action, render=i == frameskip - 1 and step < steps - 1)
            reward += r
        rows["actions"].append(actions.ravel())
        rows["rewards"].append(np.float32(reward))
        rows["dones"].append(False)
    return {name: np.stack(values) for name, values in rows.items()}


def write_dataset(out, episodes, total, meta, overwrite=False):
    """Writes episodes (dicts of arrays, one row per model step) as they come into the folder `out`.

    The folder gets its name when it is whole: a run that is killed, or a full disk, leaves no half data set.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} is already there: give another --out, or --overwrite")
    if out.exists() and not (out / "meta.json").is_file():
        raise UserError(f"{out} holds no data set that could be overwritten: give another --out")
    for left in out.parent.glob(f".{out.name}.*.partial"):  # by a run that was killed
        if not process_runs(int(left.suffixes[-2][1:])):
            shutil.rmtree(left, ignore_errors=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        writers, ends = None, []
        for episode in tqdm(episodes, total=total, desc=f"collect {meta['env']}", unit="episode"):
            writers = writers or {name: NpyWriter(partial / f"{name}.npy", a) for name, a in episode.items()}
            for name, rows in episode.items():
                writers[name].append(rows)
            ends.append(writers["frames"].rows)
        for writer in writers.values():
            writer.close()
        np.save(partial / "episode_ends.npy", np.array(ends))
        (partial / "meta.json").write_text(json.dumps({**meta, "version": VERSION, "rows": ends[-1]}, indent=1))
        if overwrite:
            shutil.rmtree(out, ignore_errors=True)
        if not out.exists():  # or another process has collected the same meanwhile
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Dataset(out)


def collect(out, env, episodes, steps, frameskip, img_size, seed=0, workers=None, overwrite=False):
    """Collects `episodes` random-policy episodes of `steps` rows into the folder `out`, in `workers` processes.

    Episode i depends on (seed, i) only, not on the number of workers.
    """
    world = make_env(env, img_size)  # an unknown name fails here, in one line, and not in a worker
    world.close()
    if not hasattr(world, "set_state"):
        raise UserError(f"{env} cannot be put into a random state: python vae_mdnrnn.py collect --env {env}")
    jobs = [(seed, episode, steps, frameskip) for episode in range(episodes)]
    meta = dict(env=env, seed=seed, policy="uniform", img_size=img_size, frameskip=frameskip)
    with Workers(workers or os.cpu_count(), _make_worker_env, (env, img_size)) as pool:
        return write_dataset(out, pool.map(_random_episode, jobs), episodes, meta, overwrite)


# ---------------------------------------------------------------------------------------------------------
# The data set, read


class Dataset:
    """A folder written by `collect`, memory-mapped: `.frames`, `.states`, `.actions`, `.rewards`, `.dones`,
    `.episode_ends`, and `.meta`. A folder that is missing, foreign or truncated raises a UserError."""

    ARRAYS = ("frames", "states", "actions", "rewards", "dones")

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "meta.json").is_file():
            raise UserError(f"no data set at {path} (no meta.json there): python data.py --out {path}")
        file = "meta.json"
        try:
            self.meta = json.loads((self.path / file).read_text())
            if self.meta["version"] != VERSION:
                raise ValueError(f"version {self.meta['version']}, not {VERSION}")
            if lacks := {"env", "img_size", "frameskip"} - self.meta.keys():
                raise ValueError(f"it lacks {', '.join(lacks)}")
            for name in (*self.ARRAYS, "episode_ends"):
                file = f"{name}.npy"
                setattr(self, name, np.load(self.path / file, mmap_mode="r"))
                if name in self.ARRAYS and len(getattr(self, name)) != self.meta["rows"]:
                    raise ValueError(f"{len(getattr(self, name))} rows, not {self.meta['rows']}")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = f"{file}: {str(error).splitlines()[0]}"
            raise UserError(f"{path} is not a whole data set ({reason}): collect it again with data.py") from None
        self.episode_starts = np.concatenate([[0], self.episode_ends[:-1]])

    def __len__(self):
        return len(self.episode_ends)

    def split(self, val_fraction=0.1, seed=42):
        """Episode numbers (train, validation); the same whatever the seed of the run, as in DINO-WM."""
        order = np.random.default_rng(seed).permutation(len(self))
        cut = max(1, round(val_fraction * len(self)))
        return np.sort(order[cut:]), np.sort(order[:cut])

    def rows(self, episodes):
        """All rows of these episodes."""
        return np.concatenate([np.arange(self.episode_starts[e], self.episode_ends[e]) for e in episodes])

    def statistics(self, episodes):
        """Per-dimension (mean, std) of one environment action and of the state, over these episodes."""
        rows = self.rows(episodes)
        actions = self.actions[rows].reshape(-1, self.actions.shape[1] // self.meta["frameskip"])
        values = {"action": actions, "proprio": self.states[rows]}
        return {name: (v.mean(0), v.std(0) + 1e-6) for name, v in values.items()}


class Windows:
    """Windows of `num_frames` model steps, `frameskip` environment steps apart, within single episodes.

    If the data set was recorded with a finer frameskip, every row starts a window and the actions of the
    rows between two model steps are concatenated, as in DINO-WM's TrajSlicerDataset.
    """

    def __init__(self, dataset, episodes, num_frames, frameskip):
        recorded = dataset.meta["frameskip"]
        if frameskip % recorded:
            raise UserError(f"--frameskip {frameskip} is not a multiple of the data set's own {recorded}")
        self.dataset, self.stride, self.num_frames = dataset, frameskip // recorded, num_frames
        span = self.stride * num_frames
        if not len(episodes):
            raise UserError(f"{dataset.path} has {len(dataset)} episode: two are needed, one of them for validation")
        starts, ends = dataset.episode_starts[episodes], dataset.episode_ends[episodes] - span + 1
        if not (starts < ends).any():
            raise UserError(
                f"no episode of {dataset.path} is as long as a window of {num_frames} model steps, {span} rows; the "
                f"longest has {(ends - starts).max() + span - 1}: collect longer ones (python data.py --steps), or "
                "lower --num-hist or --rollout-steps"
            )
        self.starts = np.concatenate([np.arange(s, e) for s, e in zip(starts, ends, strict=True)])

    def __len__(self):
        return len(self.starts)

    def batch(self, indices, tokens, frames=0):
        """Windows `indices` as arrays: visual (B, T, N, d) out of `tokens` (S, N, d), proprio (B, T, P), and
        action (B, T, frameskip*DoF); if asked for, the last `frames` frames (B, frames, H, W, 3)."""
        first = self.starts[indices]
        rows = first[:, None] + self.stride * np.arange(self.num_frames)  # (B, T)
        every = first[:, None] + np.arange(self.stride * self.num_frames)
        action = self.dataset.actions[every].reshape(*rows.shape, -1)
        batch = {"visual": tokens[rows], "proprio": self.dataset.states[rows], "action": action}
        return batch | ({"frames": self.dataset.frames[rows[:, -frames:]]} if frames else {})


# ---------------------------------------------------------------------------------------------------------
# Looking at it


def inspect(dataset):
    """Prints shapes and statistics, and draws eight episodes into `contact_sheet.png`."""
    import imageio.v3 as imageio

    print("  ".join(f"{key} {value}" for key, value in dataset.meta.items()))
    lengths = dataset.episode_ends - dataset.episode_starts
    print(f"{len(dataset)} episodes of {lengths.min()} to {lengths.max()} rows (mean {lengths.mean():.1f})\n")
    print(f"{'array':8} {'shape':22} {'dtype':8} {'min':>8} {'mean':>8} {'std':>8} {'max':>8}")
    for name in dataset.ARRAYS:
        array = getattr(dataset, name)
        sample = array[:: max(1, len(array) // (500 if name == "frames" else 5000))].astype(np.float32)
        stats = " ".join(f"{f(sample):8.3f}" for f in (np.min, np.mean, np.std, np.max))
        print(f"{name:8} {str(array.shape):22} {str(array.dtype):8} {stats}")
    strips = []
    for start, end in list(zip(dataset.episode_starts, dataset.episode_ends, strict=True))[:8]:
        rows = np.linspace(start, end - 1, 10).round().astype(int)
        frames = np.pad(dataset.frames[rows], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        strips.append(np.concatenate(frames, axis=1))
    sheet = np.concatenate(strips)
    write_atomic(dataset.path / "contact_sheet.png", lambda p: imageio.imwrite(p, sheet))
    print(f"\ncontact sheet (an episode a row, time to the right): {dataset.path / 'contact_sheet.png'}")


def bench(env_name, img_size):
    env = make_env(env_name, img_size)
    env.reset(seed=0)

    def step(render):
        _, _, done, truncated, _ = env.step(env.action_space.sample(), render)
        if done or truncated:
            env.reset()

    for what, render in (("rendered", True), ("not looked at", False)):
        rate = per_second(lambda: step(render), 2)  # noqa: B023
        print(f"{env_name} {img_size}x{img_size}, {what}: {rate:.0f} environment steps/s per process")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", default="pointmaze", help=f"one of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--episodes", type=positive, default=3000, help="episodes to collect")
    parser.add_argument("--steps", type=positive, default=20, help="model steps (rows) per episode")
    parser.add_argument("--frameskip", type=positive, default=5, help="environment steps per model step")
    parser.add_argument("--img-size", type=positive, default=64, help="side of the frames in pixels")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", help="folder to write (default: datasets/ENV)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    parser.add_argument("--inspect", metavar="DIR", help="describe a data set instead of collecting one")
    parser.add_argument("--bench", action="store_true", help="measure instead of collecting")
    args = parser.parse_args()
    if args.inspect:
        return inspect(Dataset(args.inspect))
    if args.bench:
        return bench(args.env, args.img_size)
    out = Path(args.out or f"datasets/{args.env}")
    what = args.env, args.episodes, args.steps, args.frameskip, args.img_size
    dataset = collect(out, *what, args.seed, args.workers, args.overwrite)
    print(f"{len(dataset)} episodes, {len(dataset.frames)} frames in {out}")


if __name__ == "__main__":
    run_script(main)
