"""Settings for each arm and size from a grid of trials, the same number for all, on seeds that are not used afterwards.

`examples/plan.toml` has such a table, `[tune]`.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.networks import parse_width
from potstill.study.plan import Plan, PlannedArm
from potstill.study.planfile import read_settings

Setting = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The settings of one arm at one width, and what speaks for them."""

    arm: str
    width: str
    setting: Setting
    scores: dict[str, float]  # mean score of every trial by its name; empty where the setting is interpolated
    runs: int  # per trial
    edges: tuple[str, ...]  # settings whose best value is the first or last of its list: the grid should grow


@dataclass(frozen=True)
class Trial:
    """One setting of one arm."""

    arm: str
    name: str
    setting: Setting
    varied: Sequence[str]  # what differs between this arm's trials


def trials(plan: Plan) -> list[Trial]:
    """Every setting that is tried, arm by arm.

    Raises:
        InputError: the plan has no `tune` table, or not the same number of settings for all its arms.
    """
    tables: Mapping[str, Any] = plan.tune.get("arms", {})
    if not tables:
        raise InputError("the plan has no [tune.arms.<arm>] table: a list of values for each setting to tune")
    known = {arm.name: arm for arm in plan.arms}
    made = []
    for name, grid in tables.items():
        if name not in known or known[name].origin is not None:
            can = ", ".join(arm.name for arm in plan.arms if arm.origin is None)
            raise InputError(f"tune.arms.{name} is not an arm of the plan that can be tuned: {can}")
        if not grid or not all(isinstance(values, list) and values for values in grid.values()):
            raise InputError(f"tune.arms.{name} needs a list of values for each setting, such as [1e-3, 2e-3]")
        varied = [key for key, values in grid.items() if len(values) > 1] or list(grid)
        for values in itertools.product(*grid.values()):
            setting = dict(zip(grid, values, strict=True))
            made.append(Trial(name, "_".join([name, *(f"{key}-{setting[key]}" for key in varied)]), setting, varied))
    counts = {name: sum(trial.arm == name for trial in made) for name in tables}
    if len(set(counts.values())) > 1:
        many = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"every arm gets the same number of trials, or the comparison is not fair: {many}")
    return made


def tuning_plan(plan: Plan) -> Plan:
    """The trials as a plan of their own.

    Raises:
        InputError: a seed of the trials is one of the plan's, a width is not, or a setting does not exist.
    """
    seeds, widths = plan.tune.get("seeds", ()), plan.tune.get("widths", ())
    used = {seed for arm in plan.arms for seed in arm.seeds}
    if not seeds or used & set(seeds):
        raise InputError(f"tune.seeds must name seeds that no arm uses; these are used: {sorted(used)}")
    arms = []
    known = {arm.name: arm for arm in plan.arms}
    for trial in trials(plan):
        arm = known[trial.arm]
        if not widths or not set(widths) <= set(arm.widths):
            raise InputError(f"tune.widths must name widths of arm {arm.name}: {', '.join(arm.widths)}")
        whole = arm.settings | read_settings(trial.setting, arm.method)
        arms.append(PlannedArm(trial.name, arm.method, whole, widths, seeds, arm.teachers))
    scored = EvalConfig(plan.tune["episodes"], secondary_games=0)
    return replace(plan, name=f"{plan.name}-tune", arms=tuple(arms), evaluation=scored, tune={})


def choose(plan: Plan, records: Sequence[Mapping[str, Any]]) -> list[Choice]:
    """The best trial of each arm at each width by its mean score, of records of runs that are all done, and what lies
    between for the other widths."""
    choices = []
    tried = trials(plan)
    for arm in dict.fromkeys(trial.arm for trial in tried):
        mine = [trial for trial in tried if trial.arm == arm]
        found: dict[str, Choice] = {}
        for width in plan.tune["widths"]:
            here = [record for record in records if record["width"] == width]
            scores = {trial.name: [r["score"] for r in here if r["arm"] == trial.name] for trial in mine}
            means = {name: float(np.mean(values)) for name, values in scores.items()}
            best = max(mine, key=lambda trial, m=means: m[trial.name])  # type: ignore[misc]  # the first of equals
            chosen = {name: best.setting[name] for name in best.varied}
            found[width] = Choice(arm, width, chosen, means, len(scores[best.name]), _edges(mine, best))
        widths = next(a.widths for a in plan.arms if a.name == arm)
        choices += [found.get(width) or _between(arm, width, found) for width in sorted(widths, key=parse_width)]
    return choices


def as_toml(choices: Sequence[Choice]) -> str:
    """The choices as tables to put into the plan, each with its evidence as a comment."""
    lines = []
    for choice in choices:
        lines.append(f'[arms.{choice.arm}.width."{choice.width}"]')
        if choice.scores:
            ranked = sorted(choice.scores.items(), key=lambda item: -item[1])
            said = ", ".join(f"{name.removeprefix(choice.arm + '_')} {score:.2f}" for name, score in ranked)
            lines.append(f"# mean score of {choice.runs} runs each: {said}")
        else:
            lines.append("# interpolated between the tuned widths")
        lines += [f"# at the edge of its grid, which should grow: {name}" for name in choice.edges]
        lines += [
            f"{name} = {value if type(value) is float else json.dumps(value, ensure_ascii=False)}"
            for name, value in choice.setting.items()
        ]
        lines.append("")
    return "\n".join(lines)


def _edges(tried: Sequence[Trial], best: Trial) -> tuple[str, ...]:
    edges = []
    for name, value in best.setting.items():
        values = [trial.setting[name] for trial in tried]
        ordered = all(type(v) in (int, float) for v in values) and min(values) < max(values)
        if ordered and value in (min(values), max(values)):
            edges.append(name)
    return tuple(edges)


def _between(arm: str, width: str, found: Mapping[str, Choice]) -> Choice:
    """Numbers on a line in the logarithms of width and value; beyond the tuned widths, and for words, the nearest."""
    tuned = sorted(found, key=parse_width)
    x = [math.log(parse_width(known)) for known in tuned]
    at = math.log(parse_width(width))
    nearest = found[tuned[int(np.argmin(np.abs(np.array(x) - at)))]].setting
    setting: Setting = {}
    for name, value in nearest.items():
        values = [found[known].setting[name] for known in tuned]
        if all(type(v) is float and v > 0 for v in values):
            value = float(f"{math.exp(float(np.interp(at, x, np.log(values)))):.3g}")
        setting[name] = value
    return Choice(arm, width, setting, {}, 0, ())
