"""Colour frames in: the file prepares what it sees as the pipeline of training does."""

from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest
from small_runs import sharpened

from potstill import views
from potstill.cli import main
from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.export import export, raw
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.tasks import TASKS


def saved(folder, env=TASKS["pong"].env, shape=(4, 84, 84), actions=3):
    policy = Policy(NetworkConfig("1/32"), shape, actions, dtype="uint8" if len(shape) == 3 else "float32")
    sharpened(policy, seed=1, times=1_000)
    probe = np.random.default_rng(0).integers(0, 255, (8, *shape)).astype(np.uint8 if len(shape) == 3 else np.float32)
    save_policy(folder / "policy.safetensors", policy, env, probe, {})
    return folder / "policy.safetensors"


@pytest.mark.parametrize(("source", "target"), [(210, 84), (160, 84), (250, 84), (6, 3)])
def test_a_line_is_shrunk_as_opencv_does(source, target):
    line = np.random.default_rng(0).integers(0, 255, (source, 1)).astype(np.float32)
    wanted = cv2.resize(line, (1, target), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(views.area(source, target) @ line, wanted, rtol=1e-4)


def test_weights_of_a_part_add_up_to_one():
    assert views.area(5, 2).tolist() == [
        pytest.approx([0.4, 0.4, 0.2, 0.0, 0.0]),
        pytest.approx([0.0, 0.0, 0.2, 0.4, 0.4]),
    ]


@pytest.mark.parametrize(("opset", "skip"), [(11, 4), (18, 4), (11, 1)])
def test_over_a_game_it_sees_what_training_showed_and_does_the_same(tmp_path, monkeypatch, opset, skip):
    monkeypatch.setattr(raw, "LONGEST", 120)
    file = saved(tmp_path, replace(TASKS["pong"].env, frame_skip=skip))
    record = export(load_policy(file), tmp_path / "raw.onnx", raw=True, opset=opset)
    played = record["models"]["float32"]["raw"]
    assert (played["steps"], played["other_actions"]) == (120, 0)
    assert played["pixels_off"] < 120 * 5  # of 28,224 each, by one level
    graph = onnx.load(tmp_path / "raw.onnx").graph
    assert [value.name for value in graph.input] == ["frames", "state", "first"]
    assert [value.name for value in graph.output] == ["logits", "action", "state_out"]


def test_a_file_that_sees_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "LONGEST", 20)
    monkeypatch.setattr(raw, "GREY", (0.5, 0.25, 0.25))
    with pytest.raises(InputError, match=r"a pixel differs by [0-9]+ levels at step 1: no file is left"):
        export(load_policy(saved(tmp_path)), tmp_path / "raw.onnx", raw=True)
    assert not (tmp_path / "raw.onnx").exists()


def test_another_task_is_refused(tmp_path, capsys):
    file = saved(tmp_path, EnvConfig("CartPole-v1"), (4,), 2)
    with pytest.raises(SystemExit):
        main(["export", str(file), "--out", str(tmp_path / "raw.onnx"), "--raw"])
    assert "--raw prepares Atari's frames" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(file), "--out", str(tmp_path / "raw.c"), "--raw"])
    assert "--opset and --raw are ONNX's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["policy.safetensors"]
