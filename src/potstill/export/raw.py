"""Atari's preprocessing inside an ONNX graph: colour frames in, as the emulator gives them, and action out."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.envs import EnvConfig, emulator
from potstill.errors import InputError
from potstill.views import GREY, area

if TYPE_CHECKING:
    from onnx import ModelProto

LONGEST = 5_000  # steps of the game that checks a file


def wrap(model: "ModelProto", screen: tuple[int, int]) -> "ModelProto":
    """A policy's graph that prepares what it sees itself: grey, the greater of two frames, resized by area, stacked.

    Inputs: `frames` (2, rows, columns, 3) uint8, the last two emulator frames of an agent step, or the first frame of a
    game twice; `first` (1,) bool, whether it is that; `state` (stack, 84, 84) uint8, the `state_out` of the step
    before, of a first step anything. Outputs: those of the policy, of one observation, and `state_out`.

    Args:
        model: as `onnx.build` gives it; it is left as it is.
        screen: rows and columns of the emulator's picture.
    """
    from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

    whole = ModelProto()
    whole.CopyFrom(model)
    graph = whole.graph
    (observation,) = graph.input
    _, stack, rows, columns = (dim.dim_value for dim in observation.type.tensor_type.shape.dim)
    constants = {
        "raw.grey": np.array(GREY, np.float32),
        "raw.rows": area(screen[0], rows),
        "raw.columns": area(screen[1], columns).T,
        "raw.one": np.array([1]),
        "raw.end": np.array([stack]),
        "raw.zero": np.array([0]),
        "raw.stack": np.array([stack, rows, columns]),
        "raw.shape": np.array([1, stack, rows, columns]),
    }
    graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items())
    nodes: list[Any] = []

    def node(operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        out = out or f"raw.{operator.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [out], **attributes))
        return out

    x = node("Cast", "frames", to=TensorProto.FLOAT)
    x = node("Round", node("MatMul", x, "raw.grey"))
    old = whole.opset_import[0].version < 18  # when axes were attributes
    x = node("ReduceMax", x, axes=[0], keepdims=1) if old else node("ReduceMax", x, "raw.zero", keepdims=1)
    x = node("Round", node("MatMul", node("MatMul", "raw.rows", x), "raw.columns"))
    before = node("Slice", node("Cast", "state", to=TensorProto.FLOAT), "raw.one", "raw.end", "raw.zero")
    x = node("Where", "first", node("Expand", x, "raw.stack"), node("Concat", before, x, axis=0))
    x = node("Cast", x, to=TensorProto.UINT8, out="state_out")
    node("Reshape", x, "raw.shape", out="observation")
    own = [*graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *own])
    shapes = {"frames": [2, *screen, 3], "state": [stack, rows, columns]}
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name, shape in shapes.items())
    graph.input.append(helper.make_tensor_value_info("first", TensorProto.BOOL, [1]))
    graph.output.append(helper.make_tensor_value_info("state_out", TensorProto.UINT8, [stack, rows, columns]))
    checker.check_model(whole, full_check=True)
    return whole


def check(raw: Any, plain: Any, env: EnvConfig, actions: list[int], seed: int = 0) -> dict[str, Any]:
    """Plays a game, 5,000 steps of it at most, and holds what a raw file sees and does against Gymnasium's pipeline,
    whose observations are potstill's own to the last bit, and the same file without its preprocessing.

    Args:
        raw, plain: sessions of onnxruntime.
        actions: the environment's own, by index.

    Returns:
        The `steps` of the game, its `score`, the `pixels_off` (by one level, of rounding), and the `other_actions`.

    Raises:
        InputError: a pixel differs by more than one level, or more than one action in a hundred; or a package is
            missing.
    """
    from gymnasium.error import DependencyNotInstalled
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    try:
        colour, grey = emulator(env), AtariPreprocessing(emulator(env), noop_max=0, frame_skip=env.frame_skip)
    except DependencyNotInstalled as error:
        raise InputError("--raw is checked against Gymnasium's pipeline: pip install opencv-python-headless") from error
    stacked: Any = FrameStackObservation(grey, env.frame_stack)
    frame, _ = colour.reset(seed=seed)
    seen, _ = stacked.reset(seed=seed)
    frames, state = [frame, frame], np.zeros(seen.shape, np.uint8)
    steps, score, pixels_off, other_actions, over = 0, 0.0, 0, 0, False
    while not over and steps < LONGEST:
        inputs = {"frames": np.stack(frames), "state": state, "first": np.array([steps == 0])}
        action, state = raw.run(["action", "state_out"], inputs)
        off = np.abs(state.astype(int) - seen)
        (wanted,) = plain.run(["action"], {"observation": seen[None]})
        steps, pixels_off = steps + 1, pixels_off + int((off > 0).sum())
        other_actions += int(action[0] != wanted[0])
        if off.max() > 1:
            raise InputError(f"--raw: a pixel differs by {off.max()} levels at step {steps}: no file is left")
        own, frames = actions[int(wanted[0])], []
        seen, reward, terminated, truncated, _ = stacked.step(own)
        score, over = score + float(reward), bool(terminated or truncated)
        while not over and len(frames) < env.frame_skip:
            frames.append(colour.step(own)[0])
        frames = (2 * frames)[-2:]  # of one emulator frame a step, that twice
    if other_actions > math.ceil(steps / 100):
        raise InputError(f"--raw: {other_actions} of {steps} actions differ: no file is left")
    return {"steps": steps, "score": score, "pixels_off": pixels_off, "other_actions": other_actions}
