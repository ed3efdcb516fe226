"""A page in the browser for playing in M's dream, and for setting goals for the planner.

*Dream* (World Models, Ha & Schmidhuber, 2018, arXiv:1803.10122, section 4): the arrow keys act in a dream of M, which V
decodes, and in the real game beside it. You can change the temperature while playing, and C can play, too.

*Plan* (DINO-WM, Zhou et al., 2024, arXiv:2411.04983, section 3.3): a click says where the ball should go. The page
shows where the planner's candidates end in the model's imagination, from iteration to iteration, and then the plan that
is executed, and the next plan. A linear probe (lib/probe.py) decodes the ball's position from imagined latents.

    python -m extras.play                                                 # the models in assets/models
    python -m extras.play --run runs/worldmodels_carracing                # in the dream of another run
    python -m extras.play --ckpt runs/pointmaze_pca runs/pointmaze_vae    # with other models to plan with
"""

import asyncio
import contextlib
import copy
import socket
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import plan
import vae_mdnrnn as wm
from lib import common, processes
from lib.common import UserError
from lib.pictures import data_uri, svg_lines, svg_plan
from lib.pointmaze import PointMaze
from lib.probe import Probe
from lib.recipes import open_run
from lib.worlds import DreamEnv, make_env
from predictor import WorldModel, load_model

try:
    from nicegui import app, binding, ui
except ModuleNotFoundError:  # main says what to do
    ui = None

FPS = 15
SHIPPED = Path(__file__).parents[1] / "assets" / "models"
PLANNERS = {"icem": "iCEM", "cem": "CEM", "mppi": "MPPI", "gd": "gradient descent"}
# What the arrow keys do in each world: of x and y, right and up are 1, left and down are -1.
KEYS = {
    "takecover": (lambda x, y: [x], "← → dodge the fireballs"),
    "carracing": (lambda x, y: [x, max(y, 0), max(-y, 0)], "← → steer, ↑ is the gas, ↓ the brake"),
    "pointmaze": (lambda x, y: [x, y], "← → ↑ ↓ push the ball"),
}


# ---- Dream ---------------------------------------------------------------------------------------


class Side:
    """One of the two games: an environment, in which act(obs) acts, and what the page shows of it."""

    def __init__(self, env, act):
        self.env, self.act = env, act

    def begin(self, seed, *lines):
        self.obs, _ = self.env.reset(seed=seed)
        self.score, self.steps, self.over = 0.0, 0, False
        self.show(*lines)

    def step(self, max_steps):
        self.obs, reward, done, truncated, _ = self.env.step(self.act(self.obs))
        self.score, self.steps = self.score + reward, self.steps + 1
        self.over = done or truncated or self.steps >= max_steps
        self.show(*[f"over after {self.steps} steps", "space begins again"] * self.over)

    def show(self, *lines):
        self.picture, self.overlay = data_uri(self.obs["visual"]), svg_lines(lines, 64)
        self.count = f"score {self.score:.0f}   step {self.steps}"


class DreamGame:
    """A dream and the real game, with the same keys, in one thread, because a renderer belongs to a thread."""

    def __init__(self, run):
        self.args = args = open_run(run)
        self.vae, rnn, self.controller = wm.load_models(args)
        there = sorted(args.run.glob("c_*.safetensors"), key=lambda path: path.stat().st_mtime)  # the newest is last
        params = wm.load_c(args, there[-1].stem.removeprefix("c_")) if there else np.zeros(self.controller.num_params)
        self.params, self.has_c = torch.from_numpy(np.float32(params))[None], bool(there)
        none = f"C cannot play: first run python vae_mdnrnn.py train-c --env {args.env} --out {args.run}"
        self.notes = [KEYS[args.env][1]] + [none] * (not there)
        self.dream = wm.make_dream(args, rnn)
        self.agents = wm.Agents(self.vae, rnn, self.controller, args.cell, size=1)
        self.agents.controller = self.act
        self.seed, self.held, self.c_plays, self.begun, self.tab = 0, set(), False, False, "Dream"
        processes.use_threads(torch.device("cpu"), 1)
        self.thread = ThreadPoolExecutor(1)
        self.thread.submit(self.open).result()

    def open(self):
        dreamer = lambda obs: self.act(self.params, torch.from_numpy(obs["proprio"])[None])[0].numpy()  # noqa: E731
        self.sides = {"The dream": Side(DreamEnv(self.dream, self.vae), dreamer)}
        try:
            real = Side(make_env(self.args.env), lambda obs: self.agents(obs["visual"][None])[0])
            real.begin(0)
            self.sides["The real game"] = real
        except UserError as error:  # it is not installed, or cannot render here
            self.notes.append(f"The real game cannot run here: {error}")
        self.begin()

    def begin(self):
        """Begins both games. They wait for a key unless C plays."""
        self.seed, self.begun = self.seed + 1, self.c_plays
        self.agents.begin(0, self.params[0], self.seed)
        for side in self.sides.values():
            side.begin(self.seed, *["press an arrow key"] * (not self.begun))

    def act(self, params, features):
        """The action (1, A): C's, or that of the keys that are held."""
        if self.c_plays:
            return self.controller(params, features)
        left, right, up, down = (float(f"Arrow{key}" in self.held) for key in ("Left", "Right", "Up", "Down"))
        return torch.tensor([KEYS[self.args.env][0](right - left, up - down)])

    def step(self):
        for side in self.sides.values():
            with contextlib.suppress(UserError):  # a real game that broke off stands still
                if not side.over:
                    side.step(self.args.max_steps)

    async def tick(self):
        """The page's clock calls it FPS times a second. Nothing moves until someone plays with this tab open."""
        self.begun = self.begun or self.c_plays
        if self.begun and self.tab == "Dream":
            await asyncio.wrap_future(self.thread.submit(self.step))

    async def again(self):
        await asyncio.wrap_future(self.thread.submit(self.begin))

    async def on_key(self, event):
        if event.key.is_cursorkey:
            (self.held.add if event.action.keydown else self.held.discard)(event.key.name)
            self.begun = self.begun or self.tab == "Dream"
        elif event.key.space and event.action.keydown and self.tab == "Dream":
            await self.again()

    def close(self):
        for side in self.sides.values():
            self.thread.submit(side.env.close).result()


# ---- Plan ----------------------------------------------------------------------------------------


class Attempt(plan.Worlds):
    """One attempt at a goal, shown while it is planned and executed, until another turn of the game begins."""

    def __init__(self, game, turn, goal, args):
        self.game, self.turn, self.args, (self.model, env, self.probe) = game, turn, args, game.maze
        super().__init__(env, game.state[None], goal[None], 1, args.history, self.model.frameskip)
        self.imagined, self.clouds, self.way = [], [], np.empty((0, 2))
        watched = copy.copy(self.model)
        watched.rollout = self.rollout
        self.costs = plan.latent_cost(watched, self, game.device)
        self.show(0, goal=data_uri(self.goal_obs["visual"][0]))

    def rollout(self, z0, actions):
        z = self.model.rollout(z0, actions)
        self.imagined.append(self.probe.read(z["visual"]))  # (M, frames, 2), or a piece of them
        return z

    def cost_for(self, problems):
        """`latent_cost`, which draws the candidates whenever it is asked about them."""
        cost, self.clouds, steps = self.costs(problems), [], self.args.opt_steps

        def watched(actions):
            self.imagined = []
            J = cost(actions)  # (1, M)
            tracks = np.concatenate(self.imagined)
            self.way = tracks[J[0].argmin().item()]
            self.clouds.append(tracks[:: -(-len(tracks) // 100), -1])  # a hundred ends are enough
            status = f"Plan {len(self.plans[0]) + 1}: iteration {len(self.clouds)} of {steps}, least cost {J.min():.3f}"
            self.show(min(0.4, 2 / steps), status=status)
            return J

        return watched

    def film(self):
        frame, self.game.state = super().film(), self.env.state
        self.show(0.05, picture=data_uri(frame), status=f"Plan {len(self.plans[0])} is executed.")
        return frame

    def show(self, seconds, **shown):
        if self.turn != self.game.turn:
            raise CancelledError
        pixels, goal = self.probe.to_pixels, self.goals[0, :2] + np.array([[0, 0], [self.env.REACHED, 0]])
        clouds, way = [pixels(cloud) for cloud in self.clouds[-10:]], pixels(self.way)
        vars(self.game).update(shown, overlay=svg_plan(pixels(goal), clouds, way, self.env.img_size))
        time.sleep(seconds)


class PlanGame:
    """Moves the ball to wherever one clicks, in one thread, because a renderer belongs to a thread."""

    def __init__(self, ckpts):
        self.run, self.planner, self.candidates, self.turn = ckpts[0], "icem", 100, 0
        self.device, self.thread = torch.device(common.default_device()), ThreadPoolExecutor(1)
        self.mazes = self.thread.submit(lambda: {ckpt: self.open(ckpt) for ckpt in ckpts}).result()
        self.thread.submit(self.enter, 0).result()

    def open(self, ckpt):
        model = load_model(ckpt, self.device)
        env = plan.open_world(model)
        if not isinstance(model, WorldModel) or not isinstance(env, PointMaze):
            raise UserError(f"the page plans in mazes, by a model with a frozen encoder, which {ckpt} is not")
        processes.use_threads(self.device, model.num_patches)
        return model, env, Probe(model, env)

    async def begin(self, what, *args):
        """Begins another turn, in which the thread does what(turn, *args). What it has been doing stops."""
        self.turn += 1
        await asyncio.wrap_future(self.thread.submit(what, self.turn, *args))

    def enter(self, turn):
        """The ball rests somewhere in the maze of the chosen run."""
        self.maze = _, env, probe = self.mazes[self.run]
        self.state = probe.states[turn % len(probe.states)] * [1, 1, 0, 0]
        env.set_state(self.state)
        self.picture, self.goal, self.overlay = data_uri(env.render()), "", ""
        self.status = "Click where the ball should go."

    def solve(self, turn, pixel):
        """Plans and acts until the ball is where one has clicked."""
        (model, _, probe), planner, n = self.maze, f"mpc-{self.planner}", self.candidates
        flags = [f"--planner={planner}", f"--num-samples={n}", f"--topk={max(2, n // 10)}", f"--seed={turn}"]
        args = plan.settle(plan.get_args(flags), planner, model)
        with contextlib.suppress(CancelledError), common.bfloat16(self.device, args.dtype == "bfloat16"):
            attempt = Attempt(self, turn, probe.rest_at(pixel), args)
            there = plan.solve(attempt, attempt.cost_for, model, args, self.device).any()
            attempt.clouds, attempt.way, count = [], attempt.way[:0], len(attempt.plans[0])
            end = f"The ball is{'' if there else ' not'} there after {count} plan{'s' * (count > 1)}. Click again."
            attempt.show(0, status=end)

    def close(self):
        self.turn += 1
        for _, env, _ in self.mazes.values():
            self.thread.submit(env.close).result()


# ---- The page ------------------------------------------------------------------------------------

CSS = """
body { background: #0d1420; color: #dbe4f0 }
.picture { width: min(44vw, 52vh); aspect-ratio: 1; border-radius: 6px; overflow: hidden; background: #18222f }
.picture img { image-rendering: pixelated }
.count { white-space: pre }
"""
UNFOCUS = "() => document.activeElement.blur()"  # the keys are the player's, and not a slider's
RELEASE = "<script>addEventListener('blur', () => emitEvent('release'))</script>"  # another window gets the keys


def page(games):
    """`games` are {"Dream": a DreamGame, "Plan": a PlanGame}, or one of them."""
    ui.add_css(CSS)
    ui.colors(primary="#e0a060")
    with ui.column(align_items="center").classes("w-full gap-2"):
        with ui.tabs().props("no-caps") as tabs:
            for name in games:
                ui.tab(name)
        with ui.tab_panels(tabs, value=next(iter(games)), animated=False).classes("bg-transparent"):
            for name, game in games.items():
                with ui.tab_panel(name).classes("p-0"), ui.column(align_items="center").classes("gap-5"):
                    (dream_panel if name == "Dream" else plan_panel)(game)
    if "Dream" in games:
        tabs.bind_value_to(games["Dream"], "tab")
        ui.keyboard(games["Dream"].on_key, repeating=False, ignore=[])
        ui.add_body_html(RELEASE)
        ui.on("release", lambda: games["Dream"].held.clear())


def dream_panel(game):
    with ui.row().classes("gap-8"):
        for title, side in game.sides.items():
            with ui.column().classes("gap-2"):
                ui.label(title).classes("text-lg")
                image = ui.interactive_image(sanitize=False).classes("picture")
                image.bind_source_from(side, "picture").bind_content_from(side, "overlay")
                ui.label().classes("count font-mono").bind_text_from(side, "count")
    with ui.row(align_items="center").classes("gap-6"):
        ui.label("Temperature")
        slider = ui.slider(min=0.05, max=3, step=0.05).classes("w-48").bind_value(game.dream, "tau")
        slider.on("change", js_handler=UNFOCUS)
        ui.label().classes("font-mono").bind_text_from(slider, "value", "{:.2f}".format)
        switch = ui.switch("C plays").bind_value(game, "c_plays").on("click", js_handler=UNFOCUS)
        switch.set_enabled(game.has_c)
        ui.button("Begin again", on_click=game.again).props("outline no-caps").on("click", js_handler=UNFOCUS)
    for note in game.notes:
        ui.label(note).classes("opacity-60")


def plan_panel(game):
    with ui.row().classes("gap-8"):
        with ui.column().classes("gap-2"):
            ui.label("The maze").classes("text-lg")
            click = lambda event: game.begin(game.solve, (event.image_x, event.image_y))  # noqa: E731
            image = ui.interactive_image(on_mouse=click, sanitize=False).classes("picture cursor-crosshair")
            image.bind_source_from(game, "picture").bind_content_from(game, "overlay")
            ends = 'Where the candidates end, <span style="color: #ff4f9a">in this iteration</span> and before'
            ui.html(ends, sanitize=False).classes("opacity-70")
        with ui.column().classes("gap-2"):
            ui.label("The goal, as the model sees it").classes("text-lg")
            ui.interactive_image().classes("picture").bind_source_from(game, "goal")
    ui.label().classes("font-mono").bind_text_from(game, "status")
    with ui.row(align_items="center").classes("gap-6"):
        names, enter = {ckpt: Path(ckpt).name for ckpt in game.mazes}, lambda: game.begin(game.enter)
        runs = ui.select(names, value=game.run, label="run", on_change=enter).classes("w-64")
        runs.bind_value(game, "run")
        ui.select(PLANNERS, label="planner").classes("w-40").bind_value(game, "planner")
        ui.select([30, 100, 300, 1000], label="candidates").classes("w-32").bind_value(game, "candidates")


def main():
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", help="a run of vae_mdnrnn.py, in whose dream one plays")
    add("--ckpt", nargs="+", help="runs of train.py to plan with")
    add("--port", type=common.number(int, 1, 65535), default=8080, help="the page is http://127.0.0.1:PORT")
    args = parser.parse_args()
    if ui is None:
        raise UserError("the page needs NiceGUI: pip install -r extras/requirements.txt")
    try:
        socket.create_server(("127.0.0.1", args.port)).close()
    except OSError:
        raise UserError(f"port {args.port} is not free: choose another --port") from None
    if not args.run and not args.ckpt:
        dreams, models = (sorted(SHIPPED.glob(f"*/{name}.safetensors")) for name in ("rnn", "model"))
        args.run, args.ckpt = dreams[0].parent, [str(path.parent) for path in models]
    games = {"Dream": DreamGame(args.run)} if args.run else {}
    games |= {"Plan": PlanGame(args.ckpt)} if args.ckpt else {}
    if args.run:
        app.timer(1 / FPS, games["Dream"].tick)
    app.on_startup(lambda: print(f"http://127.0.0.1:{args.port} (Ctrl-C ends it)", flush=True))
    binding.MAX_PROPAGATION_TIME = 1  # seconds after which it warns
    where, quiet = dict(host="127.0.0.1", port=args.port), dict(reload=False, show=False, show_welcome_message=False)
    try:
        ui.run(lambda: page(games), title="World models", dark=True, binding_refresh_interval=1 / 30, **where, **quiet)
    finally:
        for game in games.values():
            game.close()
    raise KeyboardInterrupt  # nothing else ends the page, and its server does not always pass it on


if __name__ == "__main__":
    common.run_script(main)
