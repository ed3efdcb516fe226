"""The page of extras/play.py in a real Chromium, and what stands behind it:  python -m pytest -q extras/test_play.py"""

import asyncio
import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import plan
import train
import vae_mdnrnn as wm
from extras import play
from lib import probe, worlds
from predictor import WorldModel
from test_all import OneProcess, assert_refused

TINY = (
    "--env pointmaze --episodes 4 --max-steps 45 --v-steps 4 --sizes z_dim=4,hidden=8 --m-steps 4 --popsize 4".split()
)
TINY += "--trials 2 --c-steps 500 --score-trials 2 --workers 1".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    """A folder with tiny runs: `dream` of World Models, and `plan`, a world model. Nothing may be written there."""
    folder = tmp_path_factory.mktemp("play")
    shutil.copytree(dataset.path, folder / "datasets" / "pointmaze")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(worlds, "Workers", OneProcess)
        for step in ("collect", "train-v", "train-m", "train-c"):
            wm.main([step, *TINY, "--out", "runs/dream"])
        train.train(train.get_args("--sizes depth=1,heads=2,mlp_dim=16 --epochs 2 --name plan".split()))
    return folder / "runs"


@pytest.fixture
def here(workplace, runs):
    """A workplace with a copy of the runs."""
    shutil.copytree(runs, "runs")
    return workplace


# ---- The page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(runs):
    """The page with both modes in a process of its own, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "extras.play", f"--port={port}", f"--run={runs}/dream", f"--ckpt={runs}/plan"]
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}  # NiceGUI would ask for more
    with open(runs.parent / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, env=env, start_new_session=True)
        process.address, process.log = f"http://127.0.0.1:{port}", runs.parent / "log"
        end = time.monotonic() + 180
        while process.poll() is None and "Ctrl-C" not in process.log.read_text() and time.monotonic() < end:
            time.sleep(0.1)
        assert process.poll() is None, process.log.read_text()
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested with selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("the page is tested in Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1366,768"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def opened(server, browser):
    """The page, just opened. At the end there has been no error in the browser or in the server."""
    browser.get(server.address)
    until(lambda: browser.find_elements("css selector", ".picture img"))
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert "Traceback" not in server.log.read_text()


def until(condition):
    """Waits until it is true, and returns it."""
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)
    return value


def text(page):
    return page.execute_script("return document.getElementById('app').textContent")


def pictures(page):
    """The frames that are shown, as the browser has them."""
    sources = [image.get_attribute("src") for image in page.find_elements("css selector", ".picture img")]
    return [imageio.imread(base64.b64decode(source.partition(",")[2])) for source in sources if "," in source]


def ball(frame):
    """How far to the right the green ball is, in pixels."""
    green = (frame[..., 1].astype(int) - frame[..., [0, 2]].max(-1)).clip(20) - 20
    return (green.sum(0) * np.arange(frame.shape[1])).sum() / green.sum()


def steps(page):
    return [int(label.text.split()[-1]) for label in page.find_elements("css selector", ".count")]


def press(page, down=(), up=()):
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(page)
    for key in down:
        chain.key_down(key)
    for key in up:
        chain.key_up(key)
    chain.perform()


LEFT, RIGHT, SPACE = "\ue012", "\ue014", " "


def test_held_keys_move_the_dream_and_the_real_game(opened):
    assert steps(opened) == [0, 0] and text(opened).count("press an arrow key") == 2
    before, places = pictures(opened), []
    for key in (RIGHT, LEFT):
        press(opened, down=[key])
        first = steps(opened)
        until(lambda: min(steps(opened)) >= first[0] + 12)  # noqa: B023
        places.append(ball(pictures(opened)[1]))
        press(opened, up=[key])
    dream, _ = pictures(opened)
    assert (dream != before[0]).any() and places[0] > places[1] + 1
    until(lambda: text(opened).count("over after 45 steps") == 2)
    assert steps(opened) == [45, 45]
    press(opened, down=[SPACE], up=[SPACE])
    until(lambda: steps(opened) == [0, 0])


def test_a_key_that_is_held_is_released_when_the_window_loses_the_focus(opened):
    press(opened, down=[RIGHT])
    until(lambda: min(steps(opened)) >= 12)
    place = ball(pictures(opened)[1])
    opened.execute_script("dispatchEvent(new Event('blur'))")
    press(opened, down=[LEFT])  # with both keys held the ball would not turn back
    until(lambda: min(steps(opened)) == 45)
    assert ball(pictures(opened)[1]) < place - 1
    press(opened, up=[LEFT, RIGHT])


def test_c_plays_once_it_is_switched_on(opened):
    switch = opened.find_element("css selector", ".q-toggle")
    switch.click()
    until(lambda: min(steps(opened)) > 0)
    switch.click()
    until(lambda: text(opened).count("over after 45 steps") == 2)
    opened.find_element("xpath", "//button[contains(., 'Begin again')]").click()
    until(lambda: steps(opened) == [0, 0])


def test_a_click_is_planned_to_and_another_click_is_the_next_goal(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    opened.find_element("xpath", "//*[contains(@class, 'q-tab')][.='Plan']").click()
    until(lambda: "Click where the ball should go." in text(opened) and len(pictures(opened)) == 1)
    image = opened.find_element("css selector", ".picture img")
    (before,), size, goals = pictures(opened), image.size["width"], []
    for y in (0.28, 0.72):  # the two ends of the U
        where = int(0.3 * size - size / 2), int(y * size - size / 2)
        ActionChains(opened).move_to_element_with_offset(image, *where).click().perform()
        until(lambda: "Plan 1: iteration" in text(opened))
        assert len(opened.find_elements("css selector", ".picture circle")) > 50
        until(lambda: "Plan 1 is executed" in text(opened))
        goals.append(pictures(opened)[1])
        assert ball(goals[-1]) == pytest.approx(0.3 * 64, abs=2)
    assert (goals[0] != goals[1]).any() and (pictures(opened)[0] != before).any()


def test_ctrl_c_ends_the_page_and_leaves_no_process(server):
    urllib.request.urlopen(server.address, timeout=60).close()
    os.killpg(server.pid, signal.SIGINT)  # as a terminal does
    assert server.wait(60) == 130
    assert re.fullmatch(r"http://127.0.0.1:\d+ \(Ctrl-C ends it\)\n", server.log.read_text())
    with pytest.raises(ProcessLookupError):
        os.killpg(server.pid, 0)


# ---- What stands behind it -----------------------------------------------------------------------


def test_in_a_dream_the_keys_act_or_c_does(runs):
    game, dreamt = play.DreamGame(runs / "dream"), {}
    assert game.notes == ["← → ↑ ↓ push the ball"]
    for held in ("ArrowRight", "ArrowLeft", "ArrowRight", "C"):
        game.seed, game.c_plays, game.held = 0, held == "C", {held}
        game.thread.submit(game.begin).result()
        game.thread.submit(game.step).result()
        z = game.dream.z.clone()
        assert held != "ArrowRight" or torch.equal(dreamt.setdefault(held, z), z)  # one seed, one dream
        dreamt[held] = z
    assert len({tuple(z.flatten().tolist()) for z in dreamt.values()}) == 3
    hidden = game.agents.state[0].clone()
    game.c_plays, game.seed = False, 0
    game.thread.submit(game.begin).result()
    game.thread.submit(game.step).result()
    assert not torch.equal(game.agents.state[0], hidden)  # M is told what was done in the real game, whoever did it
    game.close()


@pytest.fixture(scope="module")
def game(runs):
    """A ball to plan with, in this process, and a probe of fewer states."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "COUNT", 200)
        game = play.PlanGame([str(runs / "plan")])
    yield game
    game.close()


def test_a_probe_finds_the_ball_in_latents_and_pictures(game):
    model, env, probe = game.maze
    places = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert probe.to_pixels(places) == pytest.approx(np.array([[32, 32], [44.8, 32], [32, 19.2]]), abs=0.2)  # 5 m wide
    assert probe.to_xy(probe.to_pixels(places)) == pytest.approx(places, abs=0.02)
    states = probe.states[-100:]  # it is not fitted to these
    obs = game.thread.submit(lambda: plan.Worlds(env, states, states).past).result()
    z = model.encode({name: torch.from_numpy(o) for name, o in obs.items()})["visual"]
    assert np.linalg.norm(probe.read(z)[:, 0] - states[:, :2], axis=1).mean() < 0.1  # metres
    x, y, *speed = probe.rest_at((25, 32))  # in the wall between the two arms
    assert abs(y) > 0.5 and abs(x - probe.to_xy(np.array([25, 32]))[0]) < 0.4 and speed == [0, 0]


@pytest.mark.parametrize("planner", play.PLANNERS)
def test_each_planner_is_watched_until_it_is_there_or_another_turn_begins(planner, game, monkeypatch):
    monkeypatch.setitem(plan.BUDGETS["gd"], "opt_steps", 12)
    asyncio.run(game.begin(game.enter))
    game.planner, game.candidates, shown, start = planner, 30, [], game.state

    def sleep(seconds):
        shown.append((game.status, game.overlay.count("<circle")))
        if game.status == "Plan 2 is executed.":
            game.turn += 1  # another goal

    monkeypatch.setattr(play.time, "sleep", sleep)
    asyncio.run(game.begin(game.solve, (20, 20)))
    counts = [count for status, count in shown if status.startswith("Plan 1: iteration")]
    each = 1 if planner == "gd" else 30
    assert counts[:10] == [1 + each * (i + 1) for i in range(len(counts[:10]))] and counts[10:] == counts[9:-1]
    assert shown[-1][0] == "Plan 2 is executed." or "there after 1 plan." in game.status
    assert np.linalg.norm(game.state - start) > 0.01


def test_a_run_that_is_shared_in_a_folder_is_small_and_dreams_and_plans(here, script):
    for run in ("dream", "plan"):
        assert script("extras.share", f"runs/{run}", "--folder", f"shared/{run}", "--half")[0] == 0
    assert_refused(script("extras.share", "runs/plan", "--folder", "shared/plan"), "shared/plan is there: remove it")
    models = {"vae.safetensors", "rnn.safetensors", "c_dream_tau1.safetensors"}
    assert {path.name for path in Path("shared/dream").iterdir()} == {"args.json", "starts.npy", *models}
    kept = [load_file(f"shared/{name}.safetensors") for name in ("dream/vae", "dream/rnn", "plan/model")]
    assert {t.dtype for state in kept for t in state.values() if t.is_floating_point()} == {torch.float16}
    (old, new), features = ([play.DreamGame(f"{folder}/dream") for folder in ("runs", "shared")], [])
    for game in (old, new):
        game.c_plays = True
        game.thread.submit(game.step).result()
        features.append(game.dream.z)
        game.close()
    torch.testing.assert_close(*features, atol=0.05, rtol=0)
    torch.testing.assert_close(new.params, old.params, atol=1e-3, rtol=0)
    assert WorldModel.from_pretrained("shared/plan").config == WorldModel.from_pretrained("runs/plan").config


# ---- What wrong input gets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, message",
    [
        ("--port 0", "0 is not a whole number of at least 1"),
        ("--run nowhere", "no run of World Models at nowhere: make one with python vae_mdnrnn.py all --env takecover"),
        ("--run runs/plan", "no run of World Models at runs/plan"),
        (
            "--run runs/dream --without rnn.safetensors",
            "no runs/dream/rnn.safetensors: first run python vae_mdnrnn.py train-m --env",
        ),
        ("--run runs/dream --without data", "no runs/dream/data: first run python vae_mdnrnn.py collect --env"),
        ("--ckpt runs/dream", "no model at runs/dream: train one with python train.py"),
        ("--ckpt runs/typo", "no model at runs/typo: train one with python train.py"),
    ],
)
def test_what_wrong_input_gets(command, message, here, script):
    command, _, name = command.partition(" --without ")
    if name:
        Path("runs/dream", name).rename("away")
    assert_refused(script("extras.play", *command.split()), message)


def test_a_taken_port_and_a_missing_library_are_one_line(script, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(script("extras.play", "--port", port), f"port {port} is not free: choose another --port")
    monkeypatch.setattr(play, "ui", None)
    assert_refused(script("extras.play"), "the page needs NiceGUI: pip install -r extras/requirements.txt")


def test_without_c_or_the_real_game_the_dream_goes_on(here, monkeypatch):
    Path("runs/dream/c_dream_tau1.safetensors").unlink()
    monkeypatch.setitem(worlds.ENVIRONMENTS, "pointmaze", lambda img_size: __import__("no_such_package"))
    game = play.DreamGame("runs/dream")
    assert list(game.sides) == ["The dream"] and not game.has_c
    assert "first run python vae_mdnrnn.py train-c --env pointmaze" in game.notes[1]
    assert game.notes[2].startswith("The real game cannot run here: pointmaze needs no_such_package")
    game.thread.submit(game.step).result()
    assert game.sides["The dream"].steps == 1
