"""Plays whole games of an exported policy: onnxruntime and Gymnasium's own pipeline, nothing of potstill."""

import argparse
import json

import ale_py
import gymnasium
import numpy as np
import onnxruntime
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation


def play(model: str, seed: int) -> float:
    """The score of one game."""
    session = onnxruntime.InferenceSession(model)
    metadata = session.get_modelmeta().custom_metadata_map
    env, seen, actions = (json.loads(metadata[key]) for key in ("env", "observation", "actions"))
    if env["id"].startswith("ALE/"):
        gymnasium.register_envs(ale_py)
        game = gymnasium.make(env["id"], frameskip=1, repeat_action_probability=env["sticky"])
        game = AtariPreprocessing(game, noop_max=env["noop_max"], frame_skip=seen["frame_skip"])
        game = FrameStackObservation(game, seen["frame_stack"])
    else:
        game = gymnasium.make(env["id"])
    observation, _ = game.reset(seed=seed)
    if env.get("fire_on_reset"):
        observation, *_ = game.step(1)
    score, over = 0.0, False
    state = {given.name: np.zeros((1, given.shape[1]), np.float32) for given in session.get_inputs()[1:]}  # its memory
    while not over:
        action, *after = session.run(
            ["action", *["next_state"] * len(state)], {"observation": observation[None]} | state
        )
        state = dict(zip(state, after, strict=True))
        own = actions[action[0]] if isinstance(actions, list) else action[0]  # an index, or continuous actions
        observation, reward, terminated, truncated, _ = game.step(own)
        score, over = score + float(reward), terminated or truncated
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="what `potstill export` wrote, such as policy.onnx")
    parser.add_argument("--games", type=int, default=1, help="whole games to play, of seeds 0, 1, ... (default: 1)")
    options = parser.parse_args()
    scores = [play(options.model, seed) for seed in range(options.games)]
    print(f"mean {sum(scores) / len(scores):g} of {scores}")
