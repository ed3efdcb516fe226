"""PointMaze: a ball that a force pushes through a maze, as DINO-WM plans it.

The maze is Gymnasium-Robotics', with its MuJoCo model and physics, seen from straight above. One environment step is
five physics steps of 0.01 s, before which both components of the velocity are clipped to +-5 m/s, as in D4RL's maze2d
(Fu et al., 2020, arXiv:2004.07219), on which DINO-WM (Zhou et al., 2024, arXiv:2411.04983) plans. DINO-WM's own world,
as its data were rendered, is PointMazeD4RL.
"""

import contextlib
import functools
import io
import math
import os
import sys
from pathlib import Path

if sys.platform.startswith("linux"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen; it has to be set before mujoco is imported
    os.environ.setdefault("LP_NUM_THREADS", "0")  # the software renderer is 1.4 times as fast without threads

import gymnasium as gym
import numpy as np

from lib.common import UserError

SHIFTS = ("colours", "light", "camera", "noise", "distractor")  # other appearances of the maze, to plan in


def observation_space(img_size, proprio_dim):
    return gym.spaces.Dict(
        visual=gym.spaces.Box(0, 255, (img_size, img_size, 3), np.uint8),
        proprio=gym.spaces.Box(-np.inf, np.inf, (proprio_dim,), np.float32),
    )


class PointMaze(gym.Env):
    """A ball in a maze, pushed by a force and seen from straight above.

    The state and the proprioception are (x, y, vx, vy) in metres and m/s. The action in [-1, 1]^2 is the force on the
    ball. The reward is exp(-distance to `goal`), D4RL's dense one; `goal` is the middle of the first free cell. It
    never terminates: the caller sets the length. `maze` is one of the package's maps, UMaze, Medium or Large. Frames
    are square, with `img_size` pixels a side; `shift`, one of SHIFTS, is another appearance of the same world.
    """

    DT, PHYSICS_STEPS, MAX_SPEED, BALL_RADIUS, REACHED = 0.01, 5, 5.0, 0.1, 0.5
    ORIGIN = 0.0  # where the ball is drawn, x and y in metres, when its state says (0, 0)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(self, maze="UMaze", img_size=64, shift=None):
        import mujoco

        self.mujoco = mujoco
        self.model, self.free = self.build(maze)
        self.data = mujoco.MjData(self.model)
        self.img_size, self.shift, self._renderer = img_size, shift, None
        self.shift_rng = np.random.default_rng(0)  # draws the shifts that differ from frame to frame
        self.goal = self.cell_center(*np.argwhere(self.free)[0])
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = observation_space(img_size, 4)

    def build(self, maze):
        """The MuJoCo model, and which cells (rows, cols), 1 m x 1 m each, are free. The maze is centred on (0, 0)."""
        with contextlib.redirect_stderr(io.StringIO()):  # it prints notices about environments that are not used here
            import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        env = gym.make(f"PointMaze_{maze}-v3").unwrapped
        Path(env.tmp_xml_file_path).unlink(missing_ok=True)
        model = env.point_env.model
        model.opt.timestep = self.DT
        model.site("target").rgba[:] = 0  # the goal marker is never seen
        free = np.array(env.maze.maze_map) != 1
        # Drawing what the camera cannot see takes time, so the floor of 80 m ends just behind the maze, after whole
        # periods of its pattern, and each side of a wall is one piece. It looks the same in a third of the time.
        reach = 4 * math.ceil((max(free.shape) / 2 + 1) / 4)  # m
        model.mat_texrepeat[model.geom_matid[0]] *= reach / model.geom_size[0, 0]
        model.geom_size[0, :2], model.vis.quality.numquads = reach, 1
        return model, free

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
        """Puts the ball at `state` (4,) and forgets everything that was before."""
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = state[:2], state[2:]

    def goal_reached(self, state, goal):
        """Whether states (..., 4) lie within 0.5 m of goals (..., 4). As in DINO-WM their velocities do not matter."""
        return np.linalg.norm(np.asarray(state)[..., :2] - np.asarray(goal)[..., :2], axis=-1) < self.REACHED

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.set_state(self.sample_state(self.np_random))
        return self.observe(), {}

    def step(self, action, render=True):
        """One environment step of 0.05 s. With `render=False` the observation is None and the step is cheap."""
        self.data.qvel[:] = np.clip(self.data.qvel, -self.MAX_SPEED, self.MAX_SPEED)
        self.data.ctrl[:] = np.clip(action, -1, 1)  # here an action becomes a force
        self.mujoco.mj_step(self.model, self.data, self.PHYSICS_STEPS)
        reward = float(np.exp(-np.linalg.norm(self.data.qpos - self.goal)))
        return (self.observe() if render else None), reward, False, False, {}

    @functools.cached_property
    def thread_data(self):
        """MuJoCo's working memory for each thread of `simulate`."""
        return [self.mujoco.MjData(self.model) for _ in range(os.cpu_count())]

    def simulate(self, states, actions):
        """Physics alone, for B balls at once in threads: states (B, 4), actions (B, T, 2) -> final states (B, 4)."""
        from mujoco import rollout

        full = np.zeros((len(states), 1 + states.shape[1]))  # MuJoCo's full state: time, qpos, qvel
        full[:, 1:] = states
        for t in range(actions.shape[1]):
            full[:, 3:] = full[:, 3:].clip(-self.MAX_SPEED, self.MAX_SPEED)
            control = np.broadcast_to(actions[:, t, None].clip(-1, 1), (len(states), self.PHYSICS_STEPS, 2))
            full = rollout.rollout(self.model, self.thread_data, full, control, persistent_pool=True)[0][:, -1]
        return full[:, 1:]

    def observe(self):
        return {"visual": self.render(), "proprio": self.state.astype(np.float32)}

    def render(self):
        """The frame (H, W, 3) uint8."""
        if self._renderer is None:
            self.open_renderer()
        self.mujoco.mj_kinematics(self.model, self.data)  # not mj_forward: rendering must not change what happens next
        self.mujoco.mj_camlight(self.model, self.data)
        self._renderer.update_scene(self.data, self._camera)
        if self.shift == "distractor":  # a second, red ball at a random place
            scene, position = self._renderer.scene, [*self.sample_state(self.shift_rng)[:2] + self.ORIGIN, 0.2]
            sphere, red = self.mujoco.mjtGeom.mjGEOM_SPHERE, np.array([1, 0, 0, 1], np.float32)
            size, upright = np.full(3, self.BALL_RADIUS), np.eye(3).ravel()
            self.mujoco.mjv_initGeom(scene.geoms[scene.ngeom], sphere, size, position, upright, red)
            scene.ngeom += 1
        frame = self._renderer.render()
        if self.shift == "noise":  # with a standard deviation of 15 grey levels
            frame = (frame + self.shift_rng.normal(0, 15, frame.shape)).clip(0, 255).astype(np.uint8)
        return frame

    def open_renderer(self):
        """Opens the renderer, sets up the camera, and changes the appearance. The physics stays the same."""
        model, mujoco = self.model, self.mujoco
        model.vis.global_.offwidth = model.vis.global_.offheight = self.img_size
        try:
            self._renderer = mujoco.Renderer(model, self.img_size, self.img_size)
        except Exception as error:  # a missing library shows itself differently on every system
            raise UserError(
                f"MuJoCo cannot render ({type(error).__name__}, MUJOCO_GL={os.environ.get('MUJOCO_GL')}): install a GL "
                "library (apt-get install libegl1 libgl1-mesa-dri), or try MUJOCO_GL=osmesa with libosmesa6"
            ) from error
        self._camera = camera = mujoco.MjvCamera()
        camera.azimuth, camera.elevation = 90, -90  # from straight above
        self.aim(camera, self._renderer.scene)
        if self.shift == "colours":
            model.geom_rgba[model.geom_type == mujoco.mjtGeom.mjGEOM_BOX, :3] = 0.35, 0.6, 0.45  # walls
            model.mat_rgba[model.geom_matid[0], :3] = 1.0, 0.75, 0.5  # floor
        elif self.shift == "light":
            model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.25, (0.7, 0.6, 0.4)  # dim and warm
        elif self.shift == "camera":
            camera.azimuth = 93  # turned by 3 degrees, moved by 0.1 m each way
            camera.lookat[:2] += 0.1

    def aim(self, camera, scene):
        """Looks orthographically at the whole maze. Without shadows and haze a frame takes a third less time."""
        camera.orthographic, camera.distance = 1, 10
        self.model.vis.global_.fovy = max(self.free.shape)  # an orthographic camera's field of view is in metres
        self.model.vis.global_.ipd = 0  # one viewpoint, in the middle
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE"):
            scene.flags[getattr(self.mujoco.mjtRndFlag, flag)] = False

    def close(self):
        if self._renderer:
            self._renderer.close()


class PointMazeD4RL(PointMaze):
    """The same ball in D4RL's maze2d-umaze, rendered as DINO-WM's data were (its env/pointmaze/).

    Here x grows with the row and y with the column of the map; the middle of cell (row, col) is (row, col) - 0.2.
    Deviation: MuJoCo now adds the margins of two geoms where the release's version took the larger one, so contacts
    begin 2 mm earlier.
    """

    MAP = "#####", "#   #", "### #", "#   #", "#####"
    MAX_START_SPEED, ORIGIN = 5.2262554, 1.2  # the speed is the range of D4RL's data
    MJCF = """<mujoco>
      <compiler angle="radian" inertiafromgeom="true"/>
      <option timestep="{timestep}" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <default>
        <joint type="slide" damping="1" limited="false"/> <motor ctrlrange="-1 1" ctrllimited="true" gear="100"/>
        <geom density="1000" margin="0.002" condim="1" friction="0.5 0.1 0.1" contype="2" conaffinity="1"/>
      </default>
      <visual>
        <headlight ambient="0.4 0.4 0.4" diffuse="0.8 0.8 0.8" specular="0.1 0.1 0.1"/>
        <map znear="0.01"/> <quality shadowsize="2048"/>
      </visual>
      <asset>
        <texture name="floor" type="2d" width="100" height="100" builtin="checker" rgb1=".2 .3 .4" rgb2=".1 .2 .3"/>
        <material name="floor" texture="floor" texrepeat="20 20"/> <material name="wall" rgba="0.7 0.5 0.3 1"/>
      </asset>
      <worldbody>
        <geom type="plane" size="40 40 0.25" pos="0 0 -0.1" contype="1" conaffinity="0" material="floor"/>
        <body pos="1.2 1.2 0">
          <geom type="sphere" size="{radius}" rgba="0 0 1 0" contype="1"/> <site size="0.2" rgba="0.3 0.6 0.3 1"/>
          <joint name="x" axis="1 0 0"/> <joint name="y" axis="0 1 0"/>
        </body>
        {walls}
      </worldbody>
      <actuator> <motor joint="x"/> <motor joint="y"/> </actuator>
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
        """Start and goal states of the n-th problem of a seed, as the release draws them."""
        if seed == 0 or seed * n + 1 >= 2**32:
            raise UserError(f"the release has no problem {n} of --seed {seed}: take a small seed, and not 0")
        rng = np.random.RandomState(seed * n + 1)
        return self.sample_state(rng), self.sample_state(rng)

    def aim(self, camera, scene):
        """Looks as mujoco-py's free camera does: at the geoms' median, from as far away as the model extends."""
        camera.lookat[:], camera.distance = (3, 3, 0), self.model.stat.extent

    def render(self):
        return super().render()[::-1].copy()  # mujoco-py's rows come from the bottom up
