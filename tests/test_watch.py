import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import ale_py
import gymnasium
import imageio_ffmpeg
import numpy as np
import own_tasks
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence

from potstill import inside, watch
from potstill.commands import looking
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.load import load_all
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy
from potstill.tasks import find_env

PONG = find_env("pong")


@cache  # to begin an emulator takes longer than to film some steps
def untrained(env: EnvConfig, seed: int = 0) -> LoadedPolicy:
    envs = Envs(env, 1)
    policy = Policy(NetworkConfig("1/32"), envs.observation_shape, envs.num_actions)
    envs.close()
    return LoadedPolicy(policy.initialise(torch.Generator().manual_seed(seed)).eval(), env, {}, Path("policy"))


def film(out: Path, *policies: LoadedPolicy, max_steps: int = 20, **options: object) -> None:
    titled = [(f"policy {number}", policy) for number, policy in enumerate(policies)]
    watch.film(titled, out, seed=3, max_steps=max_steps, scale=1, quiet=True, **options)


def test_a_policy_is_called_teacher_beside_its_student_and_else_by_how_it_came_to_be():
    data = Path(__file__).parents[1] / "data"
    expert, other = (data / "experts" / "pong" / f"seed-{seed}" for seed in (0, 1))
    student = data / "results" / "quick" / "width-1_16_student_seed-0"
    loaded = load_all([expert, other])
    assert looking._roles([expert, student], loaded) == ["teacher", "student"]
    assert looking._roles([expert, other], loaded) == ["RL from scratch"] * 2
    assert looking._roles([expert / "policy.safetensors"], loaded[:1]) == ["policy"]


def area_weights(old: int, new: int) -> np.ndarray:
    """(new, old): how much of each old pixel lies in each new one."""
    edges = np.arange(new + 1) * old / new
    overlap = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old))
    return overlap.clip(0) / (old / new)


def test_the_policy_sees_the_film_shrunk_to_84x84_greys_the_brighter_of_its_last_two_pictures_stickiness_included():
    envs, screen = Envs(PONG, 1), watch._screen(PONG, seed=5)
    envs.reset(5)
    screen.first()
    rows, columns = area_weights(210, 84), area_weights(160, 84)
    rng = np.random.default_rng(0)
    for action in rng.integers(0, 3, 150):
        pictures, reward = screen.step(PONG.actions[action])
        step = envs.step(np.array([action]))
        greys = [np.round(picture @ [0.2989, 0.5870, 0.1140]) for picture in pictures[-2:]]
        expected = rows @ np.maximum(*greys) @ columns.T
        assert np.abs(step.observations[0, -1] - expected).max() <= 1.0  # rounding
        assert reward == step.rewards[0]
    envs.close()


def test_without_stickiness_the_film_is_gymnasiums_own_pong_pixel_for_pixel_after_as_many_no_ops():
    screen = watch._screen(replace(PONG, sticky=0.0), seed=5)
    actions = np.random.default_rng(0).integers(0, 3, 20)
    filmed = [screen.first(), *(picture for action in actions for picture in screen.step(PONG.actions[action])[0])]
    gymnasium.register_envs(ale_py)
    options = {"frameskip": 1, "repeat_action_probability": 0.0, "render_mode": "rgb_array"}
    env = gymnasium.make("ALE/Pong-v5", disable_env_checker=True, **options)

    def same_after(no_ops: int) -> bool:
        env.reset()
        played = [0] * no_ops + [PONG.actions[action] for action in actions for _ in range(4)]
        for number, action in enumerate(played, start=1):
            env.step(action)
            if number >= no_ops and not np.array_equal(env.render(), filmed[number - no_ops]):
                return False
        return True

    assert sum(same_after(no_ops) for no_ops in range(1, 31)) == 1
    env.close()


def test_an_mp4_shows_both_games_side_by_side_at_real_speed_and_its_last_frame_a_second_longer(tmp_path):
    film(tmp_path / "game.mp4", untrained(PONG), untrained(PONG, seed=1), max_steps=20)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "game.mp4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True)
    assert re.search(r"Input.*h264.*yuv420p.* 328x240.* 30 fps", decoded.stderr.decode(), re.DOTALL)
    frames = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, 210 + 30, 160 + 8 + 160, 3)
    assert len(frames) == 1 + 20 * 4 // 2 + 1 + 30  # the first, every second of 80 pictures, the end, a second of it
    first = watch._screen(PONG, seed=3).first()
    for left in (0, 168):
        assert np.abs(frames[0][30:, left : left + 160].astype(int) - first).mean() < 4.0  # lossy
    assert (tmp_path / "game.mp4").read_bytes().find(b"moov") < 100  # a browser can begin before it has the whole file
    assert [path.name for path in tmp_path.iterdir()] == ["game.mp4"]


def test_a_gif_keeps_the_games_own_colours(tmp_path):
    film(tmp_path / "game.gif", untrained(PONG), max_steps=12)
    with Image.open(tmp_path / "game.gif") as gif:
        assert gif.size == (160, 240)
        assert gif.info["duration"] == 50
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 1 + 12 * 4 // 3 + 1 + 20
    assert np.array_equal(frames[0][30:], watch._screen(PONG, seed=3).first())


def test_a_game_that_ends_is_filmed_to_its_end_with_the_final_score(tmp_path, monkeypatch):
    scores = []
    captioned = watch._captioned
    monkeypatch.setattr(watch, "_captioned", lambda *a: scores.append(a[-1]) or captioned(*a))
    film(tmp_path / "game.gif", untrained(replace(PONG, max_frames=300)), max_steps=1000)
    assert scores[0] == "won 0, lost 0"
    assert scores[-1] == "final: won 0, lost 1"
    assert scores[-2] == "won 0, lost 1"


def test_a_finished_game_stays_on_its_last_picture_until_the_others_are_done():
    def game(*levels: int) -> list[tuple[int, np.ndarray]]:
        return [(step, np.full((2, 2, 3), level, np.uint8)) for step, level in enumerate(levels)]

    with watch.telemetry.Progress("film", 3, quiet=True) as bar:
        frames = list(watch._side_by_side([iter(game(1, 2)), iter(game(3, 4, 5, 6))], 2, bar))
    assert [int(frame[0, 0, 0]) for frame in frames] == [1, 2, 2, 2, 2, 2]
    assert [int(frame[0, -1, 0]) for frame in frames] == [3, 4, 5, 6, 6, 6]


def test_no_more_is_filmed_than_a_page_has_room_for(tmp_path):
    game = [(step, np.zeros((2, 2, 3), np.uint8)) for step in range(9)]
    (written := tmp_path / "film").touch()
    with watch.telemetry.Progress("film", 9, quiet=True) as bar:
        frames = watch._side_by_side([iter(game)], 2, bar, lambda: written.stat().st_size > 0)
        with pytest.raises(InputError, match="after 1 steps the page has 3 MB already: give fewer --max-steps"):
            [written.write_bytes(frame.tobytes()) for frame in frames]


def test_more_than_three_games_form_a_grid_with_even_sides():
    assert watch._tiled([np.zeros((11, 5, 3), np.uint8)] * 5).shape == (2 * 11 + 8, 3 * 5 + 2 * 8 + 1, 3)


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_grid_of_sizes_shows_the_size_and_the_score_of_each(tmp_path, monkeypatch, kind):
    captions = []
    captioned = watch._captioned
    monkeypatch.setattr(watch, "_captioned", lambda *a: captions.append(a[2:]) or captioned(*a))
    film(tmp_path / f"game.{kind}", *[untrained(PONG, seed) for seed in range(5)], max_steps=2)
    assert set(captions) == {
        (f"policy {number}", "1,964 parameters, width 1/32", "won 0, lost 0") for number in range(5)
    }
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / f"game.{kind}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert f" {3 * 160 + 2 * 8}x{2 * 240 + 8}" in found  # three in the first row, two in the second


def test_a_wide_grid_is_drawn_smaller(tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(
        watch, "_encode", lambda path, kind, fps, frames: scales.append(next(frames).shape) or path.touch()
    )
    policies = [(str(number), untrained(PONG)) for number in range(17)]
    watch.film(policies, tmp_path / "game.mp4", seed=3, max_steps=1, quiet=True)
    assert scales == [(4 * (2 * 210 + 48) + 3 * 8, 5 * 2 * 160 + 4 * 8, 3)]


def test_two_rows_of_games_fit_a_screen_of_1080_lines(tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        watch, "_encode", lambda path, kind, fps, frames: shapes.append(next(frames).shape) or path.touch()
    )
    for number in (3, 6):
        policies = [(str(place), untrained(PONG)) for place in range(number)]
        watch.film(policies, tmp_path / f"{number}.mp4", seed=3, max_steps=1, quiet=True)
    assert shapes == [(3 * 210 + 72, 3 * 3 * 160 + 2 * 8, 3), (2 * (2 * 210 + 48) + 8, 3 * 2 * 160 + 2 * 8, 3)]


def test_time_that_is_up_ends_the_games_after_five_seconds_of_play(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(watch.telemetry.Progress, "update", lambda self, step, **_: steps.append(step))
    film(tmp_path / "game.gif", untrained(PONG), untrained(PONG, seed=1), max_steps=1_000, until=time.monotonic() - 1)
    assert max(steps) == 75  # of four frames of the emulator's sixty a second


def test_a_name_too_long_keeps_both_its_ends():
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(10)
    names = [inside.cut(f"width-1_16_student_seed-{seed}", draw, font, 80) for seed in range(2)]
    assert [name[:5] + name[-2:] for name in names] == ["width-0", "width-1"]
    assert all(draw.textlength(name, font) <= 80 for name in names)
    assert inside.cut("short", draw, font, 80) == "short"
    assert inside.cut("short", draw, font, 0) == ""


def test_a_size_too_long_for_its_game_is_cut():
    picture = np.zeros((4, 160, 3), np.uint8)
    cut = watch._captioned(picture, 1, "", "123,456,789,012 parameters, width 0.123456789012", "")
    blank = watch._captioned(picture, 1, "", "", "")
    assert np.array_equal(cut[:, -5:], blank[:, -5:])
    assert not np.array_equal(cut, blank)


def test_a_title_too_long_for_its_game_is_cut_not_written_over_the_score():
    picture = np.zeros((4, 160, 3), np.uint8)
    cut = watch._captioned(picture, 1, "a run with a very long name", "", "won 21, lost 20")
    score = watch._captioned(picture, 1, "", "", "won 21, lost 20")
    assert np.array_equal(cut[:, 80:], score[:, 80:])
    assert not np.array_equal(cut, score)


def test_minatar_is_drawn_from_its_channels(tmp_path):
    env = find_env("minatar-breakout")
    film(tmp_path / "game.gif", untrained(env), max_steps=5)
    envs, screen = Envs(env, 1), watch._screen(env, seed=3)
    pairs = [(envs.reset(3), screen.first())]
    pairs += [(envs.step(np.array([0])).observations, screen.step(0)[0][0]) for _ in range(4)]
    colours = [set() for _ in range(5)]
    for (state,), picture in pairs:
        highest = (state * np.arange(1, 5)).max(axis=-1)
        for channel, colour in zip(highest.flat, picture.reshape(-1, 3), strict=True):
            colours[channel].add(tuple(colour))
    assert all(len(same) <= 1 for same in colours)
    assert colours[0] == {(0, 0, 0)}
    assert len(set.union(*colours)) == sum(map(len, colours)) >= 4


def test_a_task_whose_picture_needs_pygame_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(InputError, match="CartPole-v1 cannot be drawn: DependencyNotInstalled: pygame is not"):
        film(tmp_path / "game.mp4", untrained(find_env("cartpole")))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a screen")
def test_a_machine_without_a_screen_is_filmed_on_without_a_complaint(tmp_path):
    code = "import sys; from potstill.watch import _screen; from potstill.tasks import find_env;"
    code += "screen = _screen(find_env('cartpole'), 1); screen.first(); import os; print(os.environ['SDL_VIDEODRIVER'])"
    bare = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH") if key in os.environ}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert (done.stdout.split()[-1], done.stderr) == ("dummy", "")


def test_an_unknown_kind_of_film_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"game.avi: films are written as .mp4, .gif or .html"):
        film(tmp_path / "game.avi", untrained(PONG))


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "game.mp4").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists: choose another --out"):
        film(tmp_path / "game.mp4", untrained(PONG))
    assert (tmp_path / "game.mp4").read_bytes() == b"mine"


def test_words_that_are_no_way_to_act_are_refused(tmp_path):
    with pytest.raises(InputError, match="greedy or sampled, not 'best'"):
        film(tmp_path / "game.mp4", untrained(PONG), actions="best")


def test_an_encoder_that_cannot_write_leaves_one_clear_line_and_nothing_else(tmp_path):
    with pytest.raises(InputError, match=r"film could not be written: .*No such file or directory"):
        film(tmp_path / "missing" / "game.mp4", untrained(PONG), max_steps=2)
    assert not list(tmp_path.iterdir())


def test_a_task_of_ones_own_is_filmed_where_it_draws_itself_and_refused_in_one_line_elsewhere(tmp_path):
    film(tmp_path / "game.gif", untrained(find_env(own_tasks.Photo)), max_steps=3)
    with Image.open(tmp_path / "game.gif") as gif:
        assert gif.size[0] == 6
    with pytest.raises(InputError, match="own_tasks:Copy cannot be drawn: TypeError"):
        film(tmp_path / "other.gif", untrained(find_env(own_tasks.Copy)), max_steps=3)
    assert [path.name for path in tmp_path.iterdir()] == ["game.gif"]


class Moody(own_tasks.Photo):
    """Counts on whoever plays it."""

    count = 0

    def observe(self):
        Moody.count += 1
        self.right = Moody.count % 3
        return np.full((6, 6, 3), 80 * self.right, np.uint8)


class Pale(own_tasks.Photo):
    def render(self):
        return np.zeros((6, 6))


class Headless(own_tasks.Photo):
    def render(self):
        raise RuntimeError("no display\nlong advice")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Moody, "is no function of its seed and actions"),
        (Pale, r"draws no pictures of bytes \(rows, columns, 3\)"),
        (Headless, "test_watch:Headless cannot be drawn: RuntimeError: no display$"),
    ],
)
def test_what_cannot_be_filmed_is_told_in_a_line(task, words, tmp_path):
    with pytest.raises(InputError, match=words):
        film(tmp_path / "game.gif", untrained(find_env(task)))
    assert not list(tmp_path.iterdir())
