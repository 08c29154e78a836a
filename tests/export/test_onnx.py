import json
import re
import runpy
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ale_py
import gymnasium
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from onnx import TensorProto, numpy_helper
from small_runs import sharpened

from potstill import __version__, evaluation
from potstill.cli import main
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.export import card, export
from potstill.export import onnx as exporter
from potstill.export.actor import Actor, layers, verify
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.tasks import TASKS

ROOT = Path(__file__).parents[2]
EXPERT = ROOT / "data" / "experts" / "pong" / "seed-0"
KEYS = {"actions", "observation", "env", "potstill"}


def saved(folder, task, **network):
    """A policy of clear opinions whose inputs, some of them clipped, are normalised; its directory."""
    env = TASKS[task].env
    with closing(Envs(env, 2)) as envs:
        probe = envs.reset(3)
        policy = sharpened(Policy(NetworkConfig(**network), envs.observation_shape, envs.num_actions), seed=1)
    policy.actor.bias.data = torch.linspace(-1, 1, policy.num_actions)
    policy.normalise_by(torch.full_like(policy.mean, 0.25), torch.full_like(policy.mean, 2.0))
    save_policy(folder / "policy.safetensors", policy, env, probe, {})
    return folder


def run(path, observations):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits", "action"], {"observation": observations})


def metadata(path):
    texts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return {key: text if key == "potstill" else json.loads(text) for key, text in texts.items()}


def deployed(policy, observations, bounds=None):
    return Actor(policy, layers(policy), observations, list(range(policy.num_actions)), bounds)


def as_fast(monkeypatch, **latency_ms):
    """Whatever is measured, the files take these times."""
    clock = {name: {"latency_ms": ms, "latency_p95_ms": ms} for name, ms in latency_ms.items()}
    monkeypatch.setattr("potstill.export.latencies", lambda players: {name: clock[name] for name in players})


def one_line(error):
    return "\n" not in str(error.value)


def tampered(change):
    """`exporter.build`, but for a change of the graph it made."""
    build = exporter.build

    def spoil(*arguments):
        model = build(*arguments)
        change(model.graph)
        return model

    return spoil


def shift(graph):
    weight = [weight for weight in graph.initializer if weight.name.endswith(".weight")][-1]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(0.01), weight.name))


def worst_action(graph):
    graph.node[-1].op_type = "ArgMin"


@pytest.mark.parametrize(
    ("task", "network"),
    [
        ("pong", {"width": "1/32"}),
        ("pong", {"width": "1/8", "family": "framewise"}),
        ("pong", {"width": "1/8", "family": "depthwise"}),
        ("minatar-breakout", {"width": "1/8"}),
        ("cartpole", {"width": "1/8"}),
        ("cartpole", {"width": "1/8", "critic": "split"}),
        ("cartpole", {"width": "1/8", "options": ("activation=relu",)}),
    ],
)
def test_the_file_computes_the_policys_logits_and_greedy_action_for_any_batch(tmp_path, task, network):
    loaded = load_policy(saved(tmp_path, task, **network))
    record = export(loaded, tmp_path / "policy.onnx")
    assert record["max_difference"] <= 1e-4
    assert record["observations"] == 16 * 8 + 2
    with closing(Envs(loaded.env, 2)) as envs:
        observations = envs.reset(9)
        random = np.random.default_rng(0)
        for _ in range(20):
            observations = envs.step(random.integers(0, envs.num_actions, 2)).observations
    expected = loaded.policy(torch.from_numpy(observations))[0].detach().numpy()
    assert np.ptp(expected) > 0.1  # else any policy would do
    for batch in (1, 2):
        logits, action = run(tmp_path / "policy.onnx", observations[:batch])
        assert (logits.dtype, action.dtype, action.shape) == (np.float32, np.int64, (batch,))
        np.testing.assert_allclose(logits, expected[:batch], atol=1e-4)
        assert action.tolist() == expected[:batch].argmax(1).tolist()


def test_the_file_holds_the_deployed_actor_and_nothing_of_the_critic(tmp_path):
    loaded = load_policy(saved(tmp_path, "cartpole", width="1/8", critic="split", critic_width="4"))
    record = export(loaded, tmp_path / "policy.onnx")
    model = onnx.load(tmp_path / "policy.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", exporter.OPSET)]
    assert 4 * sum(numpy_helper.to_array(w).size for w in model.graph.initializer) == loaded.policy.size().bytes
    assert record["models"]["float32"]["bytes"] == (tmp_path / "policy.onnx").stat().st_size
    assert record["models"]["float32"]["latency_ms"] <= record["models"]["float32"]["latency_p95_ms"]
    assert list(record["models"]) == ["float32"]


def test_pixels_come_in_raw_and_are_clipped_inside():
    policy = Policy(NetworkConfig("1/32"), (4, 84, 84), 3).initialise(torch.Generator().manual_seed(0))
    policy.normalise_by(torch.zeros(84, 84), torch.ones(84, 84))
    built = exporter.build(deployed(policy, np.zeros((1, 4, 84, 84), np.uint8)))
    assert built.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    model = built.SerializeToString()
    five, white = (np.full((1, 4, 84, 84), value, np.uint8) for value in (5, 255))
    assert np.array_equal(run(model, five)[0], run(model, white)[0])
    assert not np.array_equal(run(model, five)[0], run(model, five - 1)[0])


def test_the_metadata_say_how_to_play(tmp_path):
    folder = saved(tmp_path, "pong", width="1/32")
    (folder / "result.json").write_text('{"score": 18.5, "ci95": [18.0, 19.0], "episodes": 100, "seed": 0}')
    export(load_policy(folder), tmp_path / "policy.onnx")
    assert metadata(tmp_path / "policy.onnx") == {
        "actions": [0, 2, 3],
        "observation": {
            "shape": [4, 84, 84],
            "dtype": "uint8",
            "frame_skip": 4,
            "frame_stack": 4,
            "resize": "INTER_AREA",
        },
        "env": {"id": "ALE/Pong-v5", "sticky": 0.25, "noop_max": 30, "fire_on_reset": False, "max_frames": 108_000},
        "potstill": __version__,
        "score": {"mean": 18.5, "ci95": [18.0, 19.0], "episodes": 100},
    }


@pytest.mark.parametrize("result", [None, "{", '{"status": "done"}'])
def test_a_score_that_is_not_known_is_left_out(tmp_path, result):
    folder = saved(tmp_path, "cartpole", width="1/8")
    if result:
        (folder / "result.json").write_text(result)
    export(load_policy(folder), tmp_path / "policy.onnx")
    found = metadata(tmp_path / "policy.onnx")
    assert set(found) == KEYS
    assert found["actions"] == [0, 1]
    assert found["observation"] | {"dtype": "float32", "shape": [4], "resize": None} == found["observation"]
    assert found["env"]["id"] == "CartPole-v1"


@pytest.mark.parametrize(
    ("change", "words"),
    [(shift, r"other logits than PyTorch \(largest difference 0\.\d+"), (worst_action, "not PyTorch's greedy one")],
)
def test_a_file_that_computes_something_else_is_refused_and_does_not_stay(tmp_path, monkeypatch, change, words):
    loaded = load_policy(saved(tmp_path, "cartpole", width="1/8"))
    monkeypatch.setattr(exporter, "build", tampered(change))
    with pytest.raises(InputError, match=words) as error:
        export(loaded, tmp_path / "out.onnx", int8=True)
    assert one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.safetensors"]


def test_logits_that_are_no_numbers_are_refused():
    policy = Policy(NetworkConfig("1/8"), (4,), 2).initialise(torch.Generator().manual_seed(0))
    torch.nn.init.constant_(policy.actor.bias, float("nan"))
    actor = deployed(policy, np.zeros((3, 4), np.float32))
    with pytest.raises(InputError, match="largest difference nan"):
        exporter.check(exporter.build(actor).SerializeToString(), actor)


def test_either_of_two_tied_actions_is_the_greedy_one():
    policy = Policy(NetworkConfig("1/8"), (4,), 2).initialise(torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(policy.actor.weight)
    observations = np.ones((3, 4), np.float32)
    actor = deployed(policy, observations)
    model = exporter.build(actor, 12)  # the first whose ArgMax can be told which of equal ones to take
    assert run(model.SerializeToString(), observations)[1].tolist() == [0, 0, 0]
    worst_action(model.graph)  # of equal logits
    model.graph.node[-1].attribute.append(onnx.helper.make_attribute("select_last_index", 1))
    assert run(model.SerializeToString(), observations)[1].tolist() == [1, 1, 1]
    assert exporter.check(model.SerializeToString(), actor) == (0.0, 3)


def test_int8_writes_a_smaller_model_beside_it_and_plays_with_both(tmp_path, monkeypatch):
    as_fast(monkeypatch, float32=0.02, int8=0.02)
    loaded = load_policy(saved(tmp_path, "cartpole", width="4"))
    record = export(loaded, tmp_path / "policy.onnx", int8=True, episodes=3, seed=5, quiet=True)
    large, small = record["models"]["float32"], record["models"]["int8"]
    assert small["path"] == str(tmp_path / "policy.int8.onnx")
    assert small["bytes"] == (tmp_path / "policy.int8.onnx").stat().st_size < 0.4 * large["bytes"]
    *_, played = evaluation.play(loaded.policy, loaded.env, episodes=3, seed=5)
    assert large["score"]["mean"] == played.summary()["mean"]
    assert metadata(tmp_path / "policy.int8.onnx")["score"] == small["score"]
    assert small["score"]["episodes"] == 3
    assert set(metadata(tmp_path / "policy.int8.onnx")) == KEYS | {"score"}

    observations = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    (exact, _), (near, action) = (run(Path(model["path"]), observations) for model in (large, small))
    assert 0 < np.abs(near - exact).max() < 0.1 * np.ptp(exact)
    assert action.tolist() == near.argmax(1).tolist()


@pytest.mark.parametrize(("width", "words"), [("1/8", "it would take [0-9,]+ bytes"), ("4", "would take 0.0200 ms")])
def test_int8_writes_no_file_that_is_larger_or_slower_but_says_so(tmp_path, monkeypatch, capsys, width, words):
    as_fast(monkeypatch, float32=0.01, int8=0.02)
    folder = saved(tmp_path, "cartpole", width=width)
    main(["export", str(folder), "--out", str(tmp_path / "policy.onnx"), "--int8", "--episodes", "0"])
    assert re.search(words, capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"policy.safetensors", "policy.onnx", "policy.onnx.json"}


def test_of_several_measurements_the_fastest_counts(monkeypatch):
    times = iter([3.0, 5.0, 2.0, 9.0, 4.0, 1.0])
    monkeypatch.setattr(evaluation, "latency", lambda player: {"latency_ms": next(times)})
    assert card.latencies({"a": None, "b": None}) == {"a": {"latency_ms": 2.0}, "b": {"latency_ms": 1.0}}


def test_inputs_may_be_clipped_where_actions_are_bounded():
    """As VecNormalize's are, of a policy of continuous actions."""
    policy = Policy(NetworkConfig(family="linear"), (4,), 2, True).initialise(torch.Generator().manual_seed(0))
    policy.input_clip = torch.tensor(1.5)
    observations = np.random.default_rng(0).normal(0, 3, (64, 4)).astype(np.float32)
    actor = deployed(policy, observations, np.array([[-1.0, -2.0], [1.0, 3.0]], np.float32))
    assert exporter.check(exporter.build(actor).SerializeToString(), actor)[0] < 1e-5


@pytest.mark.parametrize("opset", [11, 13, 17, 23])
def test_a_chosen_opset_is_written_with_the_first_ir_version_that_knows_it(tmp_path, opset):
    loaded = load_policy(saved(tmp_path, "pong", width="1/32"))
    export(loaded, tmp_path / "policy.onnx", opset=opset)
    model = onnx.load(tmp_path / "policy.onnx")
    assert [each.version for each in model.opset_import] == [opset]
    assert model.ir_version == {11: 6, 13: 7, 17: 8, 23: 11}[opset]


def test_large_logits_may_differ_by_their_rounding_and_no_more(tmp_path):
    """Those of a DQN are its Q-values by the hundred: thousands."""
    policy = load_policy(saved(tmp_path, "cartpole", width="1/8")).policy
    with torch.no_grad():
        policy.actor.bias += 20_000
    actor = deployed(policy, np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32))
    assert 1e-4 < exporter.check(exporter.build(actor).SerializeToString(), actor)[0] + 1e-3 < 0.2
    logits = policy(torch.from_numpy(actor.observations))[0].detach().numpy()
    verify(actor, logits + 0.15, logits.argmax(1), "it")
    with pytest.raises(InputError, match="it computes other logits than PyTorch"):
        verify(actor, logits + 0.25, logits.argmax(1), "it")


def test_the_card_plays_undisturbed_and_disturbed_games(tmp_path):
    loaded = load_policy(saved(tmp_path, "cartpole", width="1/8"))
    actor = deployed(loaded.policy, np.random.default_rng(0).normal(0, 0.2, (64, 4)).astype(np.float32))
    player = exporter.player(exporter.build(actor).SerializeToString(), actor)
    found = card.scores(player, actor, loaded, 6, 1, 1, "it", True)
    *_, games = evaluation.play(loaded.policy, loaded.env, episodes=6, seed=1)
    plain = games.summary()
    expected = {key: plain[key] for key in ("mean", "ci95", "episodes")} | {"worst": min(plain["returns"])}
    assert found["score"] == expected
    assert set(found) == {"score", "action_noise", "observation_noise", "delay"}
    assert all(games["episodes"] == 6 for games in found.values())


def test_a_late_action_is_the_one_before_it_and_noise_is_of_its_size(monkeypatch, tmp_path):
    policy = load_policy(saved(tmp_path, "cartpole", width="1/8")).policy
    actor, given = deployed(policy, np.arange(8, dtype=np.float32).reshape(2, 4)), {}

    def play(who, env, *, alter, **_):
        given[len(given)] = who, alter
        yield SimpleNamespace(episodes=[], summary=lambda: {"mean": 0, "ci95": None, "episodes": 0, "returns": [0]})

    monkeypatch.setattr(evaluation, "play", play)
    player = exporter.player(exporter.build(actor).SerializeToString(), actor)
    card.scores(player, actor, SimpleNamespace(env=None, alone=False), 1, 1, 1, "it", True)
    noisy, late = given[1][1], given[3][1]
    steps = [([1, 5], [0, 3]), ([2, 6], [1, 4]), ([3, 7], [2, 0]), ([4, 8], [3, 1])]  # actions, ages of two games
    assert [late(torch.tensor(a), np.array(g)).tolist() for a, g in steps] == [[1, 5], [1, 5], [2, 7], [3, 7]]
    others = (noisy(torch.zeros(100_000, dtype=torch.int64), None) != 0).float().mean().item()
    assert others == pytest.approx(0.05, abs=0.005)  # of a tenth, half are the same action again
    seen = []
    monkeypatch.setattr(given[0][0], "run", lambda observations: seen.append(observations) or observations)
    given[2][0].run(np.zeros((10_000, 4), np.float32))
    np.testing.assert_allclose(seen[0].std(0), 0.1 * actor.observations.std(0), rtol=0.05)


def test_an_interrupted_measurement_leaves_no_file(tmp_path, monkeypatch):
    loaded = load_policy(saved(tmp_path, "cartpole", width="1/8"))

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "play", stop)
    with pytest.raises(KeyboardInterrupt):
        export(loaded, tmp_path / "out.onnx", int8=True, episodes=1, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.safetensors"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch, package):
    loaded = load_policy(saved(tmp_path, "cartpole", width="1/8"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"export needs {package}: pip install 'potstill\[onnx\]'") as error:
        export(loaded, tmp_path / "out.onnx")
    assert one_line(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "there.onnx"], "there.onnx exists: choose another --out"),
        (["--out", "small.onnx", "--int8"], "small.int8.onnx exists: choose another --out"),
        (["--out", "policy.pt"], "policy.pt: the ending says the format: .onnx, .c, or .zip"),
        (["--out", "policy.pt", "--format", "onnx"], "policy.pt: ONNX files are written as .onnx"),
        (
            ["--out", "policy.zip", "--int8"],
            "sb3 files have no such integers: --int8 goes with onnx and c, --int4 with c",
        ),
        (["--out", "nowhere/policy.onnx"], "cannot write nowhere/policy.onnx: no such file or directory"),
        (["--episodes", "-1"], "episodes must be at least 1"),
        (["--opset", "10"], "--opset is 11 to"),
        (["--threads", "-1"], "threads must be 0 or more"),
    ],
)
def test_a_bad_option_of_export_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    Path("pot").mkdir()
    saved(tmp_path / "pot", "cartpole", width="1/8")
    Path("there.onnx").touch()
    Path("small.int8.onnx").touch()
    with pytest.raises(SystemExit) as stop:
        main(["export", "pot", *options])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert words in err
    assert (err.startswith("potstill: "), err.count("\n")) == (True, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"pot", "small.int8.onnx", "there.onnx"}


def test_export_prints_one_json_object_or_a_table(tmp_path, monkeypatch, capsys):
    as_fast(monkeypatch, float32=0.02, int8=0.02)
    folder = saved(tmp_path, "cartpole", width="4")
    words = ["export", str(folder), "--int8", "--episodes", "2", "--threads", "1"]
    main([*words, "--json", "--out", str(tmp_path / "one.onnx")])
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["env"], list(record["models"]), err) == ("CartPole-v1", ["float32", "int8"], "")
    main([*words, "--out", str(tmp_path / "two.onnx")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["float32", "int8"]
    assert lines[1] == ["path", str(tmp_path / "two.onnx"), str(tmp_path / "two.int8.onnx")]
    assert [f"{record['models'][name]['bytes']:,}" for name in record["models"]] == lines[2][1:]
    assert ["games", "2", "2"] in lines


def test_frames_are_those_of_gymnasiums_own_preprocessing_to_the_last_bit():
    gymnasium.register_envs(ale_py)
    config = replace(TASKS["pong"].env, sticky=0.0, noop_max=0)  # what chance decides is seeded differently
    game = gymnasium.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    game = FrameStackObservation(AtariPreprocessing(game, noop_max=0, frame_skip=4), 4)
    random = np.random.default_rng(0)
    with closing(Envs(config, 1)) as envs, closing(game):
        assert np.array_equal(envs.reset(0)[0], game.reset(seed=0)[0])
        points = 0
        for _ in range(300):
            action = int(random.integers(envs.num_actions))
            step = envs.step(np.array([action]))
            observation, reward, *_ = game.step(config.actions[action])
            assert np.array_equal(step.observations[0], observation)
            assert step.rewards[0] == reward
            points += abs(reward)
        assert points > 0


@pytest.mark.timeout(600)  # a whole game: seconds, but for a busy machine
def test_the_expert_plays_as_well_through_gymnasium_and_onnxruntime(tmp_path):
    export(load_policy(EXPERT), tmp_path / "policy.onnx")
    example = runpy.run_path(str(ROOT / "examples" / "play_onnx.py"))
    ours = json.loads((EXPERT / "result.json").read_text())["score"]
    assert example["play"](str(tmp_path / "policy.onnx"), seed=0) == pytest.approx(ours, abs=2)
