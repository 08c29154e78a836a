"""Policies -> a film of the games they play, side by side.

A policy plays in `Envs`, where it was trained and is evaluated, so it sees exactly what it always saw. What the film
shows is the same game a second time: another emulator with the same seed, given the same actions, that draws in colour.
"""

import math
import os
import secrets
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import imageio_ffmpeg  # type: ignore[import-untyped]
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from potstill import telemetry
from potstill.envs import Array, EnvConfig, Envs, make_atari, maker
from potstill.errors import InputError, first_line, reason
from potstill.evaluation import Actions, check_fit
from potstill.inside import BACKGROUND, GAME, Inside, cut
from potstill.networks import Policy, torch_threads
from potstill.policies import LoadedPolicy
from potstill.rollout import Preparer, collect
from potstill.storage.checkpoints import write_atomically
from potstill.tasks import task_of
from potstill.views import sensed

ENCODERS = {
    # yuv420p and the index at the front are what browsers ask for.
    ".mp4": ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart"],
    # A palette of its own for each frame: exact colours, and no frame is kept waiting for the last one.
    ".gif": ["-lavfi", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none"],
}
ENCODERS[".html"] = [*ENCODERS[".mp4"], "-crf", "26"]  # a page that holds an mp4
FPS = {".mp4": 30, ".gif": 20, ".html": 30}  # a GIF counts in hundredths of a second
LEAST = 5  # seconds of play in a film for which time is up
MOST_PAGE = 3_000_000  # bytes
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #ddd; background: #101010; max-width: 1280px; margin: 1rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.2rem; }
div { overflow-x: auto; }
video { max-width: 100%; display: block; }
.inside { width: 100%; min-width: 60rem; }
button { font: inherit; font-size: .9rem; margin: .5rem .3rem .5rem 0; padding: .1rem .6rem; }
input { width: 100%; margin: 0; }
td { padding: .1rem 1rem .1rem 0; font-size: .9rem; color: #bbb; white-space: nowrap; }
</style>
<h1>$title</h1>
<div><video $kind autoplay muted loop playsinline src="data:video/mp4;base64,$film"></video></div>
<input type="range" max="1" step="any" value="0" aria-label="place in the film">
<button>pause</button><button>previous picture</button><button>next picture</button>
$layers
<script>
const film = document.querySelector("video"), place = document.querySelector("input");
const [play, back, on] = document.querySelectorAll("button");
const go = seconds => { film.pause(); film.currentTime = seconds; };
const step = by => go((Math.floor(film.currentTime * $fps) + by + .5) / $fps);  // amid a picture
play.onclick = () => film.paused ? film.play() : film.pause();
film.onplay = film.onpause = () => { play.textContent = film.paused ? "play" : "pause"; };
film.ontimeupdate = () => { place.value = film.currentTime / film.duration; };
place.oninput = () => go(place.value * film.duration);
back.onclick = () => step(-1);
on.onclick = () => step(1);
film.onpause();
</script>
</html>
""")


@torch.no_grad()
def film(
    policies: Sequence[tuple[str, LoadedPolicy]],
    out: Path,
    *,
    seed: int,
    max_steps: int,
    actions: Actions = "greedy",
    scale: int | None = None,
    until: float = math.inf,
    inside: bool = False,
    quiet: bool = False,
) -> None:
    """Films one game of each policy, all from the same seed, side by side and as fast as a person would play it.

    A game that is over stays on its last frame until all are; then the last frame stays for a second.

    Args:
        policies: (title, policy); each plays the task it was trained on.
        out: .mp4, .gif, or .html, a page that holds an .mp4; must not exist. It appears when it is complete.
        max_steps: agent steps after which a game is cut.
        scale: magnification of the game's picture. Default: a game is about 480 pixels wide, 320 in a GIF, and less
            where a grid of them would pass 1920 x 1080; for the height it is not drawn smaller than twice.
        until: when, as `time.monotonic()` counts, games are cut too, but not within their first five seconds.
        inside: draw the network of the one policy beside its game, with all that it computes.

    Raises:
        InputError: `out` exists, is of another kind or cannot be written, or a task or a network cannot be drawn.
    """
    out = Path(out)
    kind = out.suffix.lower()
    if kind not in ENCODERS:
        raise InputError(f"{out}: films are written as .mp4, .gif or .html")
    if out.exists():
        raise InputError(f"{out} exists: choose another --out")
    if actions not in ("greedy", "sampled"):
        raise InputError(f"actions are greedy or sampled, not {actions!r}")
    if not policies or max_steps < 1 or (scale or 1) < 1:
        raise InputError("a film needs a policy, and at least 1 step and scale 1")
    if inside and len(policies) > 1:
        raise InputError(f"--inside draws one policy, not {len(policies)}")
    network = Inside(policies[0][1].policy, policies[0][1].path) if inside else None
    fps = FPS[kind]
    columns = _columns(len(policies))
    room = min(320 if kind == ".gif" else 480, 1920 // columns), 1080 // -(-len(policies) // columns)
    if network is not None:
        room = GAME
    players: list[Policy] = []
    for _, loaded in policies:
        players.append(loaded.policy.player(players))
    games = [
        _play(title, loaded, player, seed, max_steps, fps, actions, scale, room, until, network)
        for (title, loaded), player in zip(policies, players, strict=True)
    ]
    widths = " and ".join(loaded.policy.config.width for _, loaded in policies)
    temporary = out.with_name(f".{out.stem}.{secrets.token_hex(4)}.tmp{'.mp4' if kind == '.html' else kind}")
    try:
        title = f"film {policies[0][1].env.id}, width {widths}"
        with torch_threads(1), telemetry.Progress(title, max_steps, quiet=quiet) as bar:
            most = 3 * MOST_PAGE // 4 if kind == ".html" else math.inf  # of a film, which takes a third more in a page
            pictures = _side_by_side(games, fps, bar, lambda: temporary.exists() and temporary.stat().st_size > most)
            _encode(temporary, kind, fps, pictures)
        if kind == ".html":
            write_atomically(out, _page(policies, temporary.read_bytes(), network))
        else:
            temporary.rename(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
        if network is not None:
            network.close()


def _play(
    title: str, loaded: LoadedPolicy, policy: Policy, seed: int, max_steps: int, fps: int, actions: Actions,
    scale: int | None, room: tuple[int, int], until: float, network: Inside | None = None,
) -> Iterator[tuple[int, Array]]:  # fmt: skip
    """Plays one game. Yields, `fps` times a second of play, the agent steps so far and the captioned picture."""
    config = loaded.env
    details = "" if policy.sees_raw else f"{policy.size().parameters:,} parameters, width {policy.config.width}"
    generator = torch.Generator().manual_seed(seed)

    def act(inputs: Tensor) -> Tensor:
        policy.restart(envs.ages == 0)
        logits = policy.logits(inputs).cpu()
        kind = policy.distribution
        chosen = kind.greedy(logits) if actions == "greedy" else kind.sample(logits, generator)
        if network is not None:
            first = np.cumsum([0, *map(len, envs.choices)])[:-1]  # of the outputs, that of each choice
            network.step(inputs, logits, [] if envs.continuous else (first + chosen[0].numpy()).tolist())
        return chosen

    with closing(Envs(config, 1)) as envs:
        check_fit(policy, envs)
        observations = envs.reset(seed)
        screen = _screen(config, seed)
        first = screen.first()
        rows, width = first.shape[:2]
        fitting = max(2, int(room[1] / (rows + 3 * width / 20)))  # under a strip of three lines of its text
        scale = scale or max(1, min(round(room[0] / width), fitting))
        if network is not None:
            network.names = _names(envs, screen)
        won = lost = due = 0.0
        shown = 0

        def drawn(picture: Array, ended: bool = False) -> Array:
            score = f"won {won:g}, lost {lost:g}" if task_of(config).two_sided else f"score {won - lost:g}"
            picture = _captioned(picture, scale, title, details, f"final: {score}" if ended else score)
            return picture if network is None else network.around(picture)

        for step, transition in enumerate(collect(envs, Preparer(policy), observations, act), start=1):
            if step == 1:
                yield 0, drawn(first)
            pictures, reward = screen.step(envs.own_actions(transition.actions.numpy())[0])
            if reward != transition.step.rewards[0]:
                raise InputError(
                    f"{config.id} is no function of its seed and actions: the film would be of another game"
                )
            won, lost = won + max(reward, 0.0), lost + max(-reward, 0.0)
            ended = bool(transition.step.terminated[0] or transition.step.truncated[0])
            for picture in pictures:
                due += fps / screen.rate
                for _ in range(int(due)):
                    yield step, drawn(picture)
                shown += int(due)
                due %= 1.0
            late = time.monotonic() > until and shown >= LEAST * fps
            if ended or step == max_steps or late:
                yield step, drawn(pictures[-1], ended)
                return


def _screen(config: EnvConfig, seed: int) -> "_Screen":
    """A game drawn in colour, in step with the one that is played."""
    own = int(np.random.SeedSequence(seed).generate_state(1)[0] & 0x7FFFFFFF)  # as Envs seeds its first environment
    if config.atari and not sensed(config.view):
        return _AtariScreen(config, own)
    if config.id.startswith("MinAtar/"):
        return _MinAtarScreen(config, own)
    return _GymnasiumScreen(config, own, render_mode="rgb_array")


class _AtariScreen:
    """The emulator's own 160x210 pictures, each of its 60 a second: the frames a policy's frame skip hides are here."""

    rate = 60.0  # pictures per second of play

    def __init__(self, config: EnvConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        shown = {"frameskip": 1, "stack_num": 1, "img_height": 210, "img_width": 160, "grayscale": False}
        self._venv = make_atari(config, 1, 1, **shown, maxpool=False, autoreset_mode=AutoresetMode.NEXT_STEP)
        ale = self._venv.ale  # type: ignore[attr-defined]  # as an AtariVectorEnv has
        self.names: Sequence[str] = [action.name for action in ale.get_action_set()]  # the environment's own

    def first(self) -> Array:
        """(H, W, 3) uint8."""
        observations, _ = self._venv.reset(seed=np.array([self._seed]))  # type: ignore[arg-type]  # ALE takes arrays
        return np.asarray(observations[0, 0])

    def step(self, action: Any) -> tuple[list[Array], float]:
        """One of the environment's own actions: the pictures of that agent step, and its reward."""
        own = np.array([action])
        pictures, total = [], 0.0
        for _ in range(self._config.frame_skip):
            observations, rewards, terminated, truncated, _ = self._venv.step(own)
            pictures.append(np.array(observations[0, 0]))
            total += float(rewards[0])
            if terminated[0] or truncated[0]:
                break
        return pictures, total


class _GymnasiumScreen:
    """What the task itself draws; its names are empty where nothing tells them."""

    def __init__(self, config: EnvConfig, seed: int, **options: Any) -> None:
        self._config, self._seed = config, seed
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # where there is no screen, pygame complains of it
        try:
            self._env = maker(config)(**options)
        except Exception as error:  # it takes no render_mode, say
            raise InputError(f"{config.id} cannot be drawn: {first_line(error)}") from error
        told = self._env.metadata.get("render_fps", 30)
        self.rate = 60.0 / config.frame_skip if config.atari else float(told)
        self.names: Sequence[str] = getattr(self._env.unwrapped, "get_action_meanings", tuple)()

    def first(self) -> Array:
        self._env.reset(seed=self._seed)
        return self._render()

    def step(self, action: Any) -> tuple[list[Array], float]:
        _, reward, *_ = self._env.step(action)
        return [self._render()], float(np.float32(np.asarray(reward).item()))

    def _render(self) -> Array:
        try:
            picture = self._env.render()
        except NotImplementedError:
            picture = None
        except Exception as error:  # a package is missing, or it is a fault of the task's own code
            raise InputError(f"{self._config.id} cannot be drawn: {first_line(error)}") from error
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
            raise InputError(f"{self._config.id} draws no pictures of bytes (rows, columns, 3): it cannot be filmed")
        return picture


class _MinAtarScreen(_GymnasiumScreen):
    """The grid of a MinAtar game, a colour per channel, ten steps a second."""

    # Black, then Okabe & Ito 2008 and three greys: Seaquest has ten channels.
    palette = bytes.fromhex("000000 56b4e9 e69f00 009e73 d55e00 f0e442 cc79a7 0072b2 ffffff bbbbbb 777777")

    def __init__(self, config: EnvConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.rate = 10.0
        words = {"n": "nothing", "l": "left", "u": "up", "r": "right", "d": "down", "f": "fire"}
        game: Any = self._env.unwrapped
        self.names = [words[game.game.env.action_map[action]] for action in game.action_set]

    def _render(self) -> Array:
        state = self._env.get_wrapper_attr("game").state()
        top = (state * np.arange(1, state.shape[-1] + 1)).max(axis=-1)
        return np.asarray(np.frombuffer(self.palette, np.uint8).reshape(-1, 3)[top])


_Screen = _AtariScreen | _GymnasiumScreen


def _names(envs: Envs, screen: _Screen) -> list[str]:
    """Of a policy's outputs: its actions, or the numbers of continuous ones."""
    if envs.bounds is not None:
        return [f"number {number + 1}" for number in range(envs.bounds.shape[1])]
    known = task_of(envs.config).action_names or screen.names
    least = int(getattr(envs.action_space, "start", 0)) if len(envs.choices) == 1 else 0
    if len(envs.choices) == 1 and max(envs.choices[0]) - least < len(known):
        return [str(known[own - least]) for own in envs.choices[0]]
    return [f"{n + 1}: {own}" if len(envs.choices) > 1 else str(own) for n, c in enumerate(envs.choices) for own in c]


def _page(policies: Sequence[tuple[str, LoadedPolicy]], film: bytes, network: Inside | None) -> bytes:
    """An HTML page that needs nothing beside it: the film, and what is known of each layer.

    Raises:
        InputError: it would be larger than 3 MB.
    """
    rows = ["".join(f"<td>{escape(words)}</td>" for words in row) for row in network.about()] if network else []
    table = "".join(f"<tr>{row}</tr>\n" for row in rows)
    told = "The rows of the picture, from what the policy sees to what it plays."
    layers = f"<p>{told}</p>\n<div><table>{table}</table></div>" if network else ""
    kind = 'class="inside"' if network else ""  # whose words are too small on a narrow screen: it scrolls
    title = escape(f"{policies[0][1].env.id}: {' and '.join(title for title, _ in policies)}")
    page = PAGE.substitute(
        title=title, film=b64encode(film).decode(), fps=FPS[".html"], kind=kind, layers=layers
    ).encode()
    if len(page) > MOST_PAGE:
        raise InputError(
            f"the page would have {len(page) / 1e6:.1f} MB, and may have 3: give fewer --max-steps, or an .mp4"
        )
    return page


def _captioned(picture: Array, scale: int, title: str, details: str, score: str) -> Array:
    """`picture` (H, W, 3) magnified, under a strip with title, details and score."""
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    return np.concatenate([_strip(picture.shape[1], title, details, score), picture])


@lru_cache(maxsize=64)  # a score stands for many frames
def _strip(width: int, title: str, details: str, score: str) -> Array:
    size = max(10, width // 20)
    font = ImageFont.load_default(size)
    strip = Image.new("RGB", (width, 3 * size), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    room = width - draw.textlength(score, font) - 2 * size
    draw.text((size // 2, size // 3), cut(title, draw, font, room), "white", font)
    draw.text((width - size // 2, size // 3), score, "#f0e442", font, anchor="ra")
    small = ImageFont.load_default(0.8 * size)
    draw.text((size // 2, size * 5 // 3), cut(details, draw, small, width - size), "#bbbbbb", small)
    return np.asarray(strip) & 0xF0  # with few shades of grey, a whole frame fits a GIF's 256 colours exactly


def _side_by_side(
    games: Sequence[Iterator[tuple[int, Array]]], fps: int, bar: telemetry.Progress, full: Callable[[], bool] = bool
) -> Iterator[Array]:
    """One picture of all games for each film frame, (H, W, 3) uint8, H and W even, until a page is `full`."""
    latest = [next(game) for game in games]
    while True:
        bar.update(done := max(step for step, _ in latest))
        if full():
            raise InputError(f"after {done:,} steps the page has 3 MB already: give fewer --max-steps, or an .mp4")
        tiled = _tiled([picture for _, picture in latest])
        yield tiled
        news = [next(game, None) for game in games]
        if not any(news):
            break
        latest = [new or old for new, old in zip(news, latest, strict=True)]
    for _ in range(fps):
        yield tiled


def _columns(games: int) -> int:
    """Up to three stand in a row, more in a grid."""
    return games if games <= 3 else int(np.ceil(np.sqrt(games)))


def _tiled(pictures: Sequence[Array], gap: int = 8) -> Array:
    """Pictures in a row of up to three, or in a grid."""
    columns = _columns(len(pictures))
    rows = -(-len(pictures) // columns)
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    whole = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    sheet = np.full((*(n + n % 2 for n in whole), 3), BACKGROUND, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def _encode(path: Path, kind: str, fps: int, frames: Iterator[Array]) -> None:
    """Writes frames (H, W, 3) uint8 of one size as a film.

    Raises:
        InputError: the encoder gave up, a full disk for instance.
    """
    frame = next(frames)
    size = f"{frame.shape[1]}x{frame.shape[0]}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size]
    command += ["-r", str(fps), "-i", "-", *ENCODERS[kind], str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as encoder:
        assert encoder.stdin is not None
        try:
            encoder.stdin.write(frame.tobytes())
            for frame in frames:
                encoder.stdin.write(frame.tobytes())
        except BrokenPipeError:
            pass  # it says below why it left
        errors = encoder.communicate()[1].decode(errors="replace").strip()
    if encoder.returncode:
        raise InputError(f"the film could not be written: {errors.splitlines()[-1] if errors else 'ffmpeg failed'}")
