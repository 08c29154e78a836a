"""C out: compiled as strictly as gcc can, and played."""

import json
import re
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from small_runs import sharpened
from torch import nn

from potstill.cli import main
from potstill.envs import EnvConfig, Envs
from potstill.errors import InputError
from potstill.export import c, export
from potstill.export.actor import Actor, layers, verify
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.quantisation import prune, round_statistics, round_weights

EXPERT = Path(__file__).parents[2] / "data" / "experts" / "pong" / "seed-2"
STRICT = [*c.FLAGS, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
REPLAY = """#include <stdio.h>
#include "policy.h"
int main(void)
{
    static TYPE observation[POLICY_OBSERVATION];
    float output[POLICY_ACTIONS];
    while (fread(observation, sizeof observation, 1, stdin) == 1) {
        policy_outputs(observation, output);
        fwrite(output, sizeof output, 1, stdout);
        (void)policy_act(observation);
    }
    return 0;
}
"""


def network(
    shape, actions, dtype=np.float32, continuous=False, seed=0, layout=None, view=(), sparsity=0.0, rounded=False,
    **config,
):  # fmt: skip
    """A policy of clear opinions that normalises its inputs, and observations of its own."""
    known = {} if layout is None else {"layout": layout, "dtype": np.dtype(dtype).name}
    policy = sharpened(Policy(NetworkConfig(**config), shape, actions, continuous, **known, view=view), seed)
    if sparsity:
        prune(policy, sparsity)
    policy.actor.bias.data = torch.linspace(-1, 1, actions)
    policy.normalise_by(torch.full_like(policy.mean, 0.25), torch.full_like(policy.mean, 2.0))
    if rounded:
        draw = torch.Generator().manual_seed(seed)
        policy.normalise_by(*(200 * torch.rand(2, *policy.mean.shape, generator=draw) + 0.4).clamp(min=1.0))
        policy.hide(17)
        round_statistics(policy)
    shown = np.random.default_rng(seed).normal(0, 2, (64, *shape))
    return policy, ((shown * 60).clip(0, 255) if dtype == np.uint8 else shown).astype(dtype)


def test_actions_of_more_than_32_bits_are_refused():
    with pytest.raises(InputError, match=r"^C tells actions in 32 bits, and these are 1099511627776 and more$"):
        c.build(actor_of(*network((3,), 2), actions=[2**40, 2**40 + 1]), "policy")


def actor_of(policy, observations, actions=None, bounds=None):
    return Actor(policy, layers(policy), observations, actions or list(range(policy.num_actions)), bounds)


def compiled(actor, folder, bits=32):
    source, header, sizes = c.build(actor, "policy", bits)
    return c.Library(source, header, "policy", actor, folder), sizes


def expected(actor):
    with torch.no_grad():
        return actor.policy(torch.from_numpy(actor.observations))[0][:, : actor.policy.num_actions].numpy()


NETWORKS = [
    ((4,), np.float32, {"width": "1/4"}),
    ((3,), np.float64, {"width": "1/8", "options": ("activation=relu",)}),
    ((10, 10, 4), bool, {"width": "1/4", "family": "minatar"}),
    ((10, 10, 4), bool, {"width": "1/8", "family": "mlp"}),
    ((4, 84, 84), np.uint8, {"width": "1/16", "family": "nature"}),
    ((4, 84, 84), np.uint8, {"width": "1/8", "family": "framewise"}),
    ((4, 84, 84), np.uint8, {"width": "1/8", "family": "depthwise"}),
    ((3, 40, 36), np.uint8, {"width": "1/16", "layout": "first"}),
    ((20, 24), np.uint8, {"width": "1/8", "layout": "first"}),
    ((4,), np.float32, {"sparsity": 0.9}),
    ((4, 84, 84), np.uint8, {"width": "1/8", "sparsity": 0.9}),
    ((3000,), np.float32, {"sparsity": 0.97}),
    ((4, 84, 84), np.uint8, {"width": "1/16", "layout": "stack", "rounded": True}),
    ((5,), np.float64, {"width": "1/8", "view": ("mask=1,3",)}),
    ((4,), np.float32, {"width": "1/8", "view": ("delay=2",)}),
    ((10, 10, 4), bool, {"width": "1/8", "view": ("keep=0,3", "crop=1:9,0:10")}),
    ((4, 84, 84), np.uint8, {"width": "1/16", "view": ("crop=10:84", "37x42", "frames=2")}),
    ((40, 36, 3), np.uint8, {"family": "mlp", "layout": "last", "view": ("grey", "10x9"), "sparsity": 0.9}),
]
FOUR = [NETWORKS[k] for k in (0, 1, 4, 5, 6, 9, 10, 11, 12)]
"""Weights of 4 bits are those of 8 but for how each kind of layer reads them, two to a byte; some rows are odd."""
CASES = [(bits, *network) for bits in (32, 8) for network in NETWORKS] + [(4, *network) for network in FOUR]


@pytest.mark.parametrize(("bits", "shape", "dtype", "config"), CASES)
def test_strict_compilers_and_sanitizers_have_nothing_to_say_and_it_computes_what_pytorch_does(
    tmp_path, bits, shape, dtype, config
):
    actor = actor_of(*network(shape, 3, dtype, **config))
    if bits == 4:  # which a policy has to be distilled for
        round_weights(actor.policy, bits)
    source, header, _ = c.build(actor, "policy", bits)
    kind = re.search(r"const (\w+) observation", header).group(1)
    for name, text in (("policy.c", source), ("policy.h", header), ("replay.c", REPLAY.replace("TYPE", kind))):
        (tmp_path / name).write_text(text)
    subprocess.run(["gcc", *STRICT, "policy.c", "replay.c", "-o", "replay", "-lm"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "replay"], input=actor.observations.tobytes(), capture_output=True, check=True)
    assert done.stderr == b""
    outputs, logits = np.frombuffer(done.stdout, np.float32).reshape(-1, 3), expected(actor)
    if bits == 32:
        verify(actor, outputs, outputs.argmax(1), "C")
        return
    gaps = np.sort(logits, 1)
    clear = gaps[:, -1] - gaps[:, -2] > 0.05 * np.ptp(logits)
    assert clear.sum() >= 20
    assert (outputs.argmax(1) == logits.argmax(1))[clear].all()
    centred = logits - logits.mean(1, keepdims=True)
    assert 0 < np.abs(outputs - centred).max() < 0.05 * np.ptp(centred)


@pytest.mark.parametrize(("bits", "each"), [(32, 4 + 1), (8, 1 + 1), (4, 0.5 + 1)])
def test_of_a_pruned_layer_only_the_weights_that_are_left_are_written(bits, each):
    dense, pruned = (actor_of(*network((64,), 3, width="1", sparsity=sparsity)) for sparsity in (0.0, 0.9))
    sizes = [c.build(actor, "policy", bits)[2]["constants"] for actor in (dense, pruned)]
    weights = [layer.weight for layer in pruned.policy.trunk.linears]  # 2 x 64 x 64, a tenth of which is left
    left = sum(int(weight.count_nonzero()) for weight in weights)
    assert left == 820
    saved = 2 * 64 * 64 * bits // 8 - left * each - 2 * 2 * 64  # a count for each output
    assert abs(sizes[0] - sizes[1] - saved) <= 3 * 2  # of integers, a small one may be rounded to zero


@pytest.mark.parametrize("wild", [1e30, -1e30, np.inf, np.nan])
def test_no_observation_makes_integers_overflow(tmp_path, wild):
    actor = actor_of(*network((4,), 3, width="1/4"))
    source, header, _ = c.build(actor, "policy", bits=8)
    for name, text in (("policy.c", source), ("policy.h", header), ("replay.c", REPLAY.replace("TYPE", "float"))):
        (tmp_path / name).write_text(text)
    subprocess.run(["gcc", *STRICT, "policy.c", "replay.c", "-o", "replay"], cwd=tmp_path, check=True)
    observation = np.full(4, wild, np.float32).tobytes()
    assert subprocess.run([tmp_path / "replay"], input=observation, capture_output=True, check=True).stderr == b""


def test_padding_strides_and_oblong_images_are_convolved_as_torch_does(tmp_path):
    policy, observations = network((12, 9, 2), 3, width="1/4", family="minatar")
    convs = [nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=(1, 2)), nn.Conv2d(5, 3, 3, padding=1)]
    head = [nn.Flatten(), nn.Linear(3 * 6 * 12, 3)]
    stack = [convs[0], nn.Tanh(), convs[1], nn.ReLU(), *head]
    with torch.no_grad():
        wanted = nn.Sequential(*stack)(policy.prepare(torch.from_numpy(observations))).numpy()
    library, _ = compiled(actor_of(policy, observations)._replace(layers=stack), tmp_path)
    np.testing.assert_allclose(library.outputs(observations), wanted, atol=1e-5)


def test_actions_are_the_environments_own(tmp_path):
    actor = actor_of(*network((4,), 3, width="1/4"), actions=[5, 6, 7])
    library, _ = compiled(actor, tmp_path)
    own = [library.act(observation) for observation in actor.observations]
    assert own == [5 + index for index in expected(actor).argmax(1)]
    assert set(own) == {5, 6, 7}


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuous_actions_stay_within_their_bounds(tmp_path, dtype, bits):
    random = np.random.default_rng(0)
    bounds = np.sort(random.normal(size=(2, 20)), axis=0).astype(dtype)
    actor = actor_of(*network((4,), 20, continuous=True, width="1/4"), bounds=bounds)
    library, _ = compiled(actor, tmp_path, bits)
    actions = library.actions(actor.observations)
    assert actions.dtype == dtype
    assert ((bounds[0] <= actions) & (actions <= bounds[1])).all()
    assert (actions == bounds[1]).mean() > 0.1
    if bits == 32:
        verify(actor, library.outputs(actor.observations), actions, "C")


@pytest.mark.parametrize(("bits", "bound"), [(8, 1.0), (4, 1.0), (32, 0.75), (8, 0.75), (4, 0.75)])
def test_a_squashed_policy_computes_its_means_and_none_beyond_its_bound(tmp_path, bits, bound):
    actor = actor_of(*network((4,), 3, continuous=True, width="1/4"), bounds=np.float32([[-1] * 3, [1] * 3]))
    with torch.no_grad():
        actor.policy.actor.weight /= 100
    actor.policy.squash = torch.tensor(bound)
    actor = actor._replace(layers=layers(actor.policy))
    if bits < 32:
        round_weights(actor.policy, bits)
    library, _ = compiled(actor, tmp_path, bits)
    means, computed = expected(actor), library.outputs(actor.observations)
    assert np.ptp(means) > 1
    assert (np.abs(means) == bound).any() == (bound < 1)
    assert np.abs(computed).max() <= bound
    np.testing.assert_allclose(computed, means, atol=0.02 if bits < 32 else 1e-6)


@pytest.mark.parametrize("bits", [32, 4])
def test_rounded_means_and_deviations_of_pixels_take_a_byte_each(bits):
    policy, shown = network((4, 84, 84), 3, np.uint8, width="1/16", layout="stack", rounded=True)
    size = c.build(actor_of(policy, shown), "policy", bits)[2]["constants"]
    deviations = (1 / policy.scale)[17:].unique()
    assert policy.scale[:17].count_nonzero() == 0
    assert 1 <= deviations.min() < deviations.max() < 205
    assert (deviations[1:] / deviations[:-1]).min() > 1.0199
    policy.mean += 0.1
    policy.scale *= torch.linspace(0.99, 1.01, 84)
    exact = c.build(actor_of(policy, shown), "policy", bits)[2]["constants"]
    assert exact - size == 84 * 84 * (4 - 1) * 2 - 4 * (1 + len(deviations))  # of the deviations, a table


@pytest.mark.parametrize(("bits", "shape", "dtype", "config"), CASES[::2])
def test_the_header_tells_flash_and_stack(tmp_path, bits, shape, dtype, config):
    actor = actor_of(*network(shape, 3, dtype, **config))
    source, header, sizes = c.build(actor, "policy", bits)
    told = [int(number) for number in re.search(r"Flash: (\d+) .* Stack: (\d+) bytes", header).groups()]
    assert told == [sizes["constants"], sizes["activations"]]
    (tmp_path / "policy.c").write_text(source)
    (tmp_path / "policy.h").write_text(header)
    compiler = shutil.which("arm-none-eabi-gcc")  # where it is there
    # What unwinds the stack of an exception is no code, and stands in no microcontroller's flash.
    words = [compiler, "-mcpu=cortex-m4", "-mthumb"] if compiler else ["gcc", "-fno-asynchronous-unwind-tables"]
    words += ["-std=c99", "-O2", "-fno-inline", "-fstack-usage", "-c", "policy.c", "-o", "policy.o"]
    subprocess.run(words, cwd=tmp_path, check=True)
    size = subprocess.run(["size", "policy.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    text, data, bss = (int(number) for number in size.splitlines()[1].split()[:3])
    assert (data, bss) == (0, 0)
    assert 0 < text - told[0] < 3_000
    frames = [line.split("\t")[:2] for line in next(tmp_path.glob("*.su")).read_text().splitlines()]
    layers = [int(size) for name, size in frames if ":layer" in name]  # one after another, never one in another
    others = [int(size) for name, size in frames if ":layer" not in name]
    assert told[1] <= max(layers) + sum(others) < told[1] + 700


def test_it_plays_a_whole_game_as_pytorch_does(tmp_path):
    actor = actor_of(*network((4,), 2, width="1/4", seed=3))
    library, _ = compiled(actor, tmp_path)
    steps = 0
    with closing(gymnasium.make("CartPole-v1")) as game:
        for seed in range(5):
            (observation, _), over = game.reset(seed=seed), False
            while not over:
                logits = actor.policy(torch.from_numpy(observation)[None])[0]
                action = library.act(observation)
                assert action == logits.argmax().item()
                observation, _, terminated, truncated, _ = game.step(action)
                over, steps = terminated or truncated, steps + 1
    assert steps > 30


def test_a_pong_expert_plays_on_as_pytorch_does(tmp_path):
    """Both versions: the integers' actions may differ where two are nearly as good."""
    loaded = load_policy(EXPERT)
    policy, steps = loaded.policy, 60
    with closing(Envs(loaded.env, 1)) as envs:
        observations, seen = envs.reset(0), []
        for _ in range(steps):
            seen.append(observations[0].copy())
            with torch.no_grad():
                index = policy(torch.from_numpy(observations))[0].argmax(1).numpy()
            observations = envs.step(index).observations
    actor = Actor(policy, layers(policy), np.stack(seen), [0, 2, 3], None)
    library, _ = compiled(actor, tmp_path)
    assert verify(actor, library.outputs(actor.observations), library.actions(actor.observations), "C")[1] <= 1
    (tmp_path / "small").mkdir()
    integers, sizes = compiled(actor, tmp_path / "small", bits=8)
    agreed = (integers.actions(actor.observations) == library.actions(actor.observations)).mean()
    assert agreed > 0.95
    assert sizes["constants"] < 0.3 * library.flash


# The command


@pytest.fixture
def pot(tmp_path, monkeypatch):
    """A saved CartPole policy, in the working directory; whatever is measured, files take the same time."""
    monkeypatch.chdir(tmp_path)
    clock = {"latency_ms": 0.0, "latency_p95_ms": 0.0}
    monkeypatch.setattr("potstill.export.latencies", lambda players: dict.fromkeys(players, clock))
    policy, observations = network((4,), 2, width="1")
    Path("pot").mkdir()
    save_policy(Path("pot", "policy.safetensors"), policy, EnvConfig("CartPole-v1"), observations, {})
    return tmp_path


def test_the_command_writes_both_versions_and_scores_the_compiled_code(pot, capsys):
    main(["export", "pot", "--out", "small.c", "--int8", "--episodes", "4", "--threads", "1", "--json"])
    models = json.loads(capsys.readouterr().out)["models"]
    assert {path.name for path in pot.iterdir()} == {"pot", "small.c", "small.h", "small_int8.c", "small_int8.h"} | {
        "small.c.json"
    }
    assert models["int8"]["flash"] < 0.5 * models["float32"]["flash"]
    assert all(model["score"]["episodes"] == 4 for model in models.values())
    assert models["int8"]["delay"]["mean"] > 0


def test_weights_of_4_bits_take_half_the_flash_of_8(pot, capsys):
    main(["export", "pot", "--out", "small.c", "--int8", "--int4", "--episodes", "0", "--json"])
    models = json.loads(capsys.readouterr().out)["models"]
    assert models["int4"]["constants"] < 0.7 * models["int8"]["constants"]
    assert "4-bit weights" in (pot / "small_int4.h").read_text()
    assert models["int4"]["stack"] >= models["int4"]["activations"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5,), (2, 36, 37)])
def test_the_integers_of_a_rounded_policy_lose_nothing(tmp_path, bits, shape):
    """Its weights are what the file holds; activations of 16 bits are left to differ."""
    policy, observations = network(shape, 3, np.float32 if len(shape) == 1 else np.uint8, width="1/16")
    round_weights(policy, bits)
    actor = actor_of(policy, observations)
    library, _ = compiled(actor, tmp_path, bits=bits)
    with torch.no_grad():
        exact = policy(torch.from_numpy(observations))[0].numpy()
    assert np.abs(library.outputs(observations) - exact).max() < 2e-3 * np.abs(exact).max()


def test_a_version_that_takes_more_flash_is_not_written(pot, capsys):
    policy, observations = network((4,), 2, width="1/64")
    save_policy(Path("pot", "policy.safetensors"), policy, EnvConfig("CartPole-v1"), observations, {})
    main(["export", "pot", "--format", "c", "--int8", "--episodes", "0"])
    assert "no int8 file: it would take" in capsys.readouterr().out
    assert {path.name for path in pot.iterdir()} == {"pot", "policy.c", "policy.h", "policy.c.json"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "there.c"], "there.h exists: choose another --out"),
        (["--out", "a b.c"], "the name of a C file is letters"),
        (["--format", "c", "--out", "policy.onnx"], "policy.onnx: C files are written as .c"),
        (["--out", "policy.c", "--opset", "13"], "--opset and --raw are ONNX's"),
        (["--out", "nowhere/policy.c"], "cannot write nowhere/policy.c"),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_nothing(pot, capsys, options, words):
    Path("there.h").touch()
    with pytest.raises(SystemExit) as stop:
        main(["export", "pot", "--episodes", "0", *options])
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert words in err
    assert {path.name for path in pot.iterdir()} == {"pot", "there.h"}


def test_a_missing_compiler_is_named(pot, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(InputError, match="install gcc or clang, or set CC"):
        export(load_policy(Path("pot")), Path("policy.c"))
    assert not Path("policy.c").exists()


def test_other_layers_are_refused_by_name():
    actor = actor_of(*network((4,), 3, width="1/4"))
    for stack in ([nn.Linear(4, 3), nn.GELU()], [nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)]):
        with pytest.raises(InputError, match=r"C is written for plain stacks .* not for (GELU|LayerNorm)"):
            c.build(actor._replace(layers=stack), "policy")


def test_a_single_number_is_an_observation(tmp_path):
    actor = actor_of(*network((), 3))
    library, _ = compiled(actor, tmp_path)
    np.testing.assert_allclose(library.outputs(actor.observations), expected(actor), rtol=1e-5, atol=1e-4)
    assert library.act(actor.observations[0]) == expected(actor)[0].argmax()
