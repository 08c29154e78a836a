import re
import subprocess
from contextlib import closing
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import own_tasks
import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from potstill import inside, watch
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.imports import allow
from potstill.inside import Inside, Watched
from potstill.load import load
from potstill.networks import NetworkConfig, Policy
from potstill.policies import LoadedPolicy
from potstill.quantisation import prune
from potstill.tasks import find_env


def untrained(task: str, width: str = "1", family: str = "auto", *options: str) -> LoadedPolicy:
    env = find_env(task)
    with closing(Envs(env, 1)) as envs:
        policy = Policy(NetworkConfig(width, family, options=options), **envs.spaces)
    return LoadedPolicy(policy.initialise(torch.Generator().manual_seed(0)).eval(), env, {}, Path("policy"))


class Branched(nn.Module):
    """Two layers read the same numbers; the second has an activation that is a module."""

    def __init__(self, shape, width):
        super().__init__()
        self.left, self.right = nn.Linear(shape[0], shape[0]), nn.Linear(shape[0], shape[0])
        self.activation = nn.Sequential(nn.Tanh())

    def forward(self, x):
        return relu(self.left(x)) + self.activation(self.right(input=x))


@torch.no_grad()
def test_what_each_layer_passes_on_is_what_pytorch_computes():
    policy = untrained("pong", "1/16").policy
    inputs = policy.prepare(torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8))
    with closing(Watched(policy)) as watched:
        for scale in (1.0, 0.5):  # the last pass counts
            logits = policy.logits(scale * inputs)
    one, two, three = policy.trunk.convs
    x, expected = 0.5 * inputs, []
    expected.extend(x := relu(conv(x)) for conv in (one, two, three))
    expected.append(relu(policy.trunk.linears[0](x.flatten(1))))
    expected.append(logits)
    layers = watched.layers
    assert [layer.module for layer in layers] == [one, two, three, policy.trunk.linears[0], policy.actor]
    for layer, value in zip(layers, expected, strict=True):
        assert np.array_equal(layer.passes, value[0].numpy())
    assert (layers[3].passes >= 0).all()
    assert np.array_equal(layers[0].reads, 0.5 * inputs[0].numpy())


@torch.no_grad()
def test_a_network_of_ones_own_tells_what_its_modules_gave_in_the_order_in_which_they_were_called():
    policy = untrained("cartpole", "1", allow(Branched)).policy
    x = torch.randn(1, 4)
    with closing(Watched(policy)) as watched:
        policy.logits(x)
    left, right, actor = watched.layers
    assert np.array_equal(left.passes, policy.trunk.left(x)[0].numpy())
    assert np.array_equal(right.passes, torch.tanh(policy.trunk.right(x))[0].numpy())
    assert np.array_equal(right.reads, x[0].numpy())
    assert actor.module is policy.actor
    policy.logits(2 * x)
    assert np.array_equal(watched.layers[0].reads, x[0].numpy())  # the hooks are gone


@torch.no_grad()
def test_gated_units_pass_on_what_they_remember():
    policy = untrained("cartpole", "1/8", "gru").policy
    policy.restart(np.array([True]))
    with closing(Watched(policy)) as watched:
        for _ in range(2):
            before = policy.memory
            policy.logits(torch.randn(1, 4))
    *_, read, recall, _ = watched.layers
    assert (read.module, recall.module) == (policy.trunk.gru.read, policy.trunk.gru.recall)
    assert np.array_equal(recall.reads, before[0].numpy())
    assert np.array_equal(recall.passes, policy.memory[0].numpy())


POLICIES = [
    ("pong", "1/32", "nature", 3), ("pong", "1/16", "nature", 3), ("pong", "1/16", "framewise", 3),
    ("breakout", "1/32", "nature", 4), ("ale/seaquest", "1/32", "nature", 18), ("minatar-breakout", "1/4", "auto", 3),
    ("minatar-asterix", "1/4", "mlp", 5), ("minatar-breakout", "1", "linear", 3), ("cartpole", "1", "mlp", 2),
    ("cartpole", "1/8", "mlp", 2), ("cartpole", "1/8", "gru", 2), ("pong", "1/32", "gru", 3),
    ("cartpole", "1", "linear", 2), ("pendulum", "1/4", "mlp", 1),
]  # fmt: skip


def drawn(loaded: LoadedPolicy, steps: int = 3) -> Inside:
    policy = loaded.policy
    network = Inside(policy, loaded.path)
    with closing(Envs(loaded.env, 1)) as envs, torch.no_grad(), closing(network):
        network.names = watch._names(envs, watch._screen(loaded.env, 0))
        observations, rng = envs.reset(0), np.random.default_rng(0)
        for _ in range(steps):
            inputs = policy.prepare(torch.from_numpy(observations))
            policy.restart(envs.ages == 0)
            network.step(inputs, policy.logits(inputs), [0])
            observations = envs.step(envs.random_actions(rng)).observations
    return network


def test_the_rows_of_a_pruned_network_add_up_to_its_parameters():
    loaded = untrained("minatar-breakout", "1/4")
    prune(loaded.policy, 0.8)
    with closing(Watched(loaded.policy)) as watched, torch.no_grad():
        loaded.policy.logits(torch.zeros((1, *loaded.policy.input_shape)))
        sizes = [layer.about[2].split() for layer in watched.layers]
    assert all(told[1:2] == ["of"] for told in sizes[:-1])
    assert sum(int(told[0].replace(",", "")) for told in sizes) == loaded.policy.size().parameters


@pytest.mark.parametrize(("task", "width", "family", "actions"), POLICIES)
def test_every_weight_is_in_the_picture_and_nothing_lies_over_anything_else(task, width, family, actions):
    loaded = untrained(task, width, family)
    network = drawn(loaded)
    rows = network._rows
    assert len(network.names) == actions
    shown = sum(int((~np.isnan(inside._wrapped(block, row.cell, 344))).sum()) for row in rows for block in row.blocks)
    assert shown == loaded.policy.size().parameters
    tops = [row.top for row in rows]
    bottoms = [row.top + row.height for row in rows]
    assert tops == [inside.TOP, *bottoms[:-1]]
    assert bottoms[-1] <= inside.HEIGHT
    for row in rows:
        sheets = [inside._mosaic(block, row.cell, inside.WEIGHTS[1]) for block in row.blocks]
        assert all(sheet.width <= inside.WEIGHTS[1] for sheet in sheets)
        assert sum(sheet.height + 2 for sheet in sheets) <= row.height
        if not row.dots:
            passed = inside._mosaic(inside._tiles(row.first), row.passed_cell, inside.PASSED[1])
            assert passed.width <= inside.PASSED[1]
            assert passed.height <= row.height
        top = row.top  # the weights are where they should be, in their colours
        for sheet in sheets:
            box = (inside.WEIGHTS[0], top, inside.WEIGHTS[0] + sheet.width, top + sheet.height)
            assert network._panel.crop(box).tobytes() == sheet.tobytes()
            top += sheet.height + 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["nature", "mlp"])
def test_a_linear_layer_over_maps_has_a_tile_per_map_and_unit(family):
    task = "pong" if family == "nature" else "minatar-breakout"
    policy = untrained(task, "1/16" if family == "nature" else "1/8", family).policy
    shown = torch.rand(1, *policy.observation_shape) > 0.5
    inputs = policy.prepare(shown.float())
    with closing(Watched(policy)) as watched:
        policy.logits(inputs)
    layer = next(layer for layer in watched.layers if isinstance(layer.module, nn.Linear))
    maps = [inside._array(inputs), *(layer.passes for layer in watched.layers if layer.passes.ndim == 3)]
    tiles = inside._blocks(layer, maps)[0] * layer.scale
    read = maps[-1]
    assert tiles.shape == (len(read), len(layer.module.weight), *read.shape[1:])
    units = np.einsum("cohw,chw->o", tiles, read) + layer.module.bias.numpy()
    expected = layer.module(torch.from_numpy(layer.reads)).numpy()
    assert np.allclose(units, expected, atol=1e-4)


def test_colours_go_from_blue_over_grey_to_orange():
    colours = inside._colours(np.array([-2.0, -1.0, -0.5, 0.0, 1.0, np.nan]))
    assert colours.tolist() == [
        [86, 180, 233], [86, 180, 233], [65, 112, 138], [44, 44, 44], [255, 160, 30], [16, 16, 16],
    ]  # fmt: skip


@torch.no_grad()
def test_a_film_shows_the_network_of_each_frame_beside_the_game(tmp_path, monkeypatch):
    steps, step = [], Inside.step
    monkeypatch.setattr(Inside, "step", lambda self, *a: (step(self, *a), steps.append((self._panel, a)))[0])
    loaded = untrained("pong", "1/32")
    out = tmp_path / "game.mp4"
    watch.film([("student", loaded)], out, seed=3, max_steps=6, inside=True, quiet=True)
    assert not loaded.policy.trunk.convs[0]._forward_hooks
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", out, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True)
    assert re.search(r"Input.*h264.*yuv420p.* 1280x720.* 30 fps", decoded.stderr.decode(), re.DOTALL)
    frames = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, 720, 1280, 3)
    assert len(frames) == 1 + 6 * 4 // 2 + 1 + 30
    assert len(steps) == 6
    for frame, (panel, _) in ((frames[0], steps[0]), (frames[-1], steps[-1])):
        assert np.abs(frame[:, 400:].astype(int) - np.asarray(panel)[:, 400:]).mean() < 3.0  # lossy
    game = watch._screen(loaded.env, seed=3).first().repeat(2, 0).repeat(2, 1)
    assert np.abs(frames[0][8 + 48 : 8 + 48 + 420, 8:328].astype(int) - game).mean() < 4.0
    for _, (inputs, logits, chosen) in steps:
        assert torch.equal(loaded.policy.logits(inputs), logits)
        assert chosen == [int(logits.argmax())]


def test_a_page_holds_the_film_and_tells_of_each_layer_and_needs_nothing_else(tmp_path):
    out = tmp_path / "game.html"
    watch.film([("a <b>", untrained("cartpole", "1/8"))], out, seed=3, max_steps=4, inside=True, quiet=True)
    page = out.read_text()
    assert "<title>CartPole-v1: a &lt;b&gt;</title>" in page
    assert 'src="data:video/mp4;base64,AAAA' in page
    assert "<td>linear</td><td>8 to 2 numbers</td><td>18 parameters</td>" in page
    assert "http" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["game.html"]


def test_a_page_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "MOST_PAGE", 4_000)
    with pytest.raises(InputError, match=r"the page would have .* MB, and may have 3: give fewer --max-steps"):
        watch.film([("a", untrained("cartpole", "1/8"))], tmp_path / "a.html", seed=3, max_steps=4, quiet=True)
    assert not list(tmp_path.iterdir())


def test_actions_have_the_names_that_their_task_gives_them():
    def names(task: object) -> list[str]:
        env = find_env(task)
        with closing(Envs(env, 1)) as envs:
            return watch._names(envs, watch._screen(env, 0))

    assert names("pong") == ["NOOP", "RIGHT", "LEFT"]
    assert names("minatar-breakout") == ["nothing", "left", "right"]
    assert names("cartpole") == ["left", "right"]
    assert names("acrobot") == ["0", "1", "2"]
    assert names("pendulum") == ["number 1"]


def test_what_cannot_be_seen_is_refused_in_one_line(tmp_path):
    def film(*policies: LoadedPolicy) -> None:
        watch.film([("a", each) for each in policies], tmp_path / "a.mp4", seed=0, max_steps=2, inside=True, quiet=True)

    with pytest.raises(InputError, match="policy has 27,479 parameters, and --inside draws 20,000 at most: leave it"):
        film(untrained("pong", "1/8"))
    small = untrained("cartpole")
    with pytest.raises(InputError, match="--inside draws one policy, not 2"):
        film(small, small)
    with pytest.raises(InputError, match=r"policy has 31 layers with weights, more than a picture of 1280 x 720 has"):
        film(untrained("cartpole", "1", "mlp", f"layers={','.join(['4'] * 30)}"))
    with pytest.raises(InputError, match="is code, an ONNX file or a network with a memory: --inside draws none"):
        film(load(own_tasks.sees, env=own_tasks.Photo))
    assert not list(tmp_path.iterdir())
