"""A policy -> the figures that a run is reported with: its games, and how far it is from its teacher."""

import math
import time
from contextlib import suppress
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch

from potstill import evaluation, telemetry
from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.networks import Policy
from potstill.policies import LoadedPolicy, recorded_result
from potstill.storage.runs import Run, config_hash, read_document
from potstill.training.runtime import Runtime

KEYS = ("ci95", "median", "std", "p_negative", "distinct", "episodes", "point_win_rate", "returns")  # of the main match
SAVE_EVERY = 5.0  # seconds between two notes of how many games were played


def assess(
    loaded: LoadedPolicy,
    runtime: Runtime,
    eval_config: EvalConfig,
    teacher: LoadedPolicy | None,
    run: Run | None = None,
) -> dict[str, Any]:
    """The figures every run is reported with: greedy and sampled, with and without stickiness, beside its teacher. The
    lock of `run` gets a sign of life with every game; its directory keeps what was played until that is done."""
    policy, env, count = loaded.policy, loaded.env, eval_config.episodes
    secondary = count if eval_config.secondary_games is None else eval_config.secondary_games
    known = recorded_result(teacher) if teacher is not None else None  # which many students need, none measured again
    matches = {"greedy": _Match(policy, env, "greedy", count)}
    if secondary:
        matches["sampled"] = _Match(policy, env, "sampled", secondary)
    if secondary and env.sticky and env.atari:  # others' scores of Atari are without; MinAtar's have its stickiness
        # Without stickiness a greedy policy meets some 30 starts, and more games only repeat them.
        matches["not sticky"] = _Match(policy, replace(env, sticky=0.0), "greedy", min(secondary, 30))
    for steps in eval_config.starts:
        matches[f"after {steps}"] = _Match(policy, env, "greedy", eval_config.start_games or count, steps)
    if teacher is not None and not known:
        matches["teacher"] = _Match(teacher.policy, teacher.env, "greedy", count)
    played = _play(matches, f"evaluate {env.id}, width {policy.config.width}", runtime, run, loaded.alone)

    main = played["greedy"]
    record = {"score": main["mean"], **{key: main[key] for key in KEYS}}
    for key, match in (("score_sampled", "sampled"), ("score_nosticky", "not sticky")):
        record[key] = played[match]["mean"] if match in played else None
    record["secondary_games"] = secondary
    if eval_config.starts:
        scored = {0: main} | {steps: played[f"after {steps}"] for steps in eval_config.starts}
        record["starts"] = {
            str(steps): {"score": games["mean"]} | {key: games[key] for key in ("point_win_rate", "episodes")}
            for steps, games in scored.items()
        }
    if teacher is not None:
        theirs = known or played["teacher"]
        score = theirs["score" if known else "mean"]
        record |= {"teacher_score": score, "teacher_point_win_rate": theirs["point_win_rate"]}
        known_size = not teacher.policy.sees_raw  # of the user's own code nothing is known but how it plays
        record["teacher_parameters"] = teacher.policy.size().parameters if known_size else None
        how: dict[str, Any] = {"threads": runtime.cores, "alone": loaded.alone}
        record |= evaluation.compare(policy, teacher.policy, env, steps=evaluation.steps_beside(count), **how)
    return record


class _Match(NamedTuple):
    """Some games of an evaluation."""

    policy: Policy
    env: EnvConfig
    actions: evaluation.Actions
    episodes: int
    start_steps: int = 0

    @property
    def identity(self) -> str:
        """All that decides how the games go."""
        weights = sha256()
        for name, tensor in self.policy.state_dict().items():
            weights.update(name.encode() + tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
        games = {"actions": self.actions, "episodes": self.episodes, "start": self.start_steps}
        return config_hash({"policy": weights.hexdigest(), "env": asdict(self.env), **games})


def _play(
    matches: dict[str, _Match], title: str, runtime: Runtime, run: Run | None, alone: bool
) -> dict[str, dict[str, Any]]:
    """Plays the matches; those that an earlier process of the run came to the end of are not played again."""
    kept = _kept_matches(run) if run is not None else {}
    keys = {name: match.identity for name, match in matches.items()}

    def done() -> int:
        return sum(match.episodes for name, match in matches.items() if keys[name] in kept)

    total, saved = sum(match.episodes for match in matches.values()), -math.inf
    with telemetry.Progress(title, total, done(), runtime.quiet, unit="games") as bar:
        for name, (policy, env, actions, episodes, start_steps) in matches.items():
            if keys[name] in kept:
                continue
            before, start = done(), evaluation.Start(start_steps)
            for so_far in evaluation.play(
                policy, env, episodes=episodes, seed=1, actions=actions, start=start, threads=runtime.cores, alone=alone
            ):
                games = len(so_far.episodes)
                bar.update(before + games, **{name: so_far.score})
                if run is not None:
                    run.touch_lock()
                    if games < episodes and time.perf_counter() - saved > SAVE_EVERY:
                        run.write_games({"played": before + games, "games": total, "matches": kept})
                        saved = time.perf_counter()
            kept[keys[name]] = so_far.summary()
            if run is not None:
                run.write_games({"played": done(), "games": total, "matches": kept})
    return {name: kept[key] for name, key in keys.items()}


def _kept_matches(run: Run) -> dict[str, dict[str, Any]]:
    """What `_play` noted; nothing where that is not whole, as the games can be played again."""
    with suppress(InputError):
        matches = read_document(run.games_path).get("matches")
        if isinstance(matches, dict):
            whole = {"mean", *KEYS}
            return {key: match for key, match in matches.items() if isinstance(match, dict) and match.keys() >= whole}
    return {}
