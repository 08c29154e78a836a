"""A plan's TOML file -> Plan. What is wrong in it is told by its line. `examples/plan.toml` has every key."""

import math
import tomllib
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from potstill.arms import ARMS, Method
from potstill.envs import EnvConfig
from potstill.errors import InputError, meant
from potstill.evaluation import EvalConfig
from potstill.imports import import_modules
from potstill.load import check_own
from potstill.load.callables import is_reference
from potstill.networks import NetworkConfig, Precision, as_options, parse_width
from potstill.storage.files import read_bytes
from potstill.study.plan import NETWORK, Plan, PlannedArm, make_config
from potstill.tasks import find_env
from potstill.training.trainer import CONFIGS

PLAN_LIMIT = 1 << 16  # bytes: no plan is longer
MAX_DOTS = 200  # in a line: tomllib takes time in the square of a dotted key, 20 seconds for one of 60 kB

_AXES = ("widths", "seeds", "teachers")  # which an arm may have of its own
_PLAN_KEYS: tuple[str, ...] = ("name", "env", *_AXES, "critic", "precision", "scores", "pairing")
_PLAN_KEYS += ("imports", "task", "evaluation", "arms", "tune")
_ARM_KEYS = ("method", *_AXES, "from", "width")


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file.

    Raises:
        InputError: with the line, and what would be right.
    """
    path = Path(path)
    try:
        text = read_bytes(path, PLAN_LIMIT, follow=True).decode("utf-8-sig")
        if max(line.count(".") for line in text.split("\n")) > MAX_DOTS:
            raise ValueError(f"a line of it has more than {MAX_DOTS} dots; write a list over several lines")
        if "\\u0000" in text or "\\U00000000" in text:
            raise ValueError("it holds a null character")
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number with too many digits
        raise InputError(f"{path} is not TOML: {error}") from error
    try:
        plan = _plan(_Table(document), path, text)
        plan.specs()
    except _At as error:
        raise InputError(f"{path}, line {line_of(text, error.keys)}: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return plan


def read_settings(values: dict[str, Any], method: Method) -> dict[str, Any]:
    """Settings as a plan writes them to field names, each of the type its field has.

    Raises:
        InputError: there is no such setting, or its value is of another type.
    """
    return _settings(_Table(values), method)


class _At(InputError):
    """What is wrong, and the keys that lead to it."""

    def __init__(self, keys: tuple[str, ...], message: str) -> None:
        self.keys = keys
        super().__init__(message)


class _Table:
    """A table of the plan and the keys that lead to it. What is asked of it is of the type that it should have."""

    def __init__(self, values: dict[str, Any], *here: str) -> None:
        self.values, self.here = values, here

    def wrong(self, key: str, message: str) -> _At:
        return _At((*self.here, key), message)

    def dotted(self, key: str) -> str:
        return ".".join((*self.here, key))

    def check_keys(self, known: Collection[str]) -> None:
        for key in self.values:
            if key not in known:
                raise self.wrong(key, f"{self.dotted(key)} is not a key of a plan; {meant(key, known)}")

    def typed(self, key: str, value: Any, kind: type) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            names = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
            raise self.wrong(key, f"{key} should be {names[kind]}, not {value!r}")
        return value

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        if key not in self.values and default is None:
            raise _At(self.here, f"{self.dotted(key)} is missing")
        return self.typed(key, self.values.get(key, default), kind)

    def choice(self, key: str, options: tuple[str, ...], default: str | None = None) -> Any:
        if (value := self.value(key, str, default)) not in options:
            raise self.wrong(key, f"{key} is one of {', '.join(options)}, not {value!r}")
        return value

    def table(self, key: str) -> "_Table":
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, f"{self.dotted(key)} is a table: [{self.dotted(key)}]")
        return _Table(value, *self.here, key)

    def list(self, key: str, kind: type, default: Any = None) -> tuple[Any, ...]:
        if (value := self.values.get(key, default)) is None:
            raise _At(self.here, f"{key} is missing: a list, at the top of the plan or in the arm")
        if not isinstance(value, list | tuple):
            raise self.wrong(key, f"{key} is a list, not {value!r}")
        return tuple(self.typed(key, item, kind) for item in value)


def _plan(top: _Table, path: Path, text: str) -> Plan:
    top.check_keys(_PLAN_KEYS)
    _checked(("imports",), import_modules, top.list("imports", str, ()), "imports", path.parent)
    env: str = top.value("env", str)
    of_task = {key: hint for key, hint in get_type_hints(EnvConfig).items() if key not in ("id", "atari", "view")}
    played = _typed(top.table("task"), of_task, "task")
    task = _checked(("env",), find_env, env)
    for key, value in played.items():
        task = _checked(("task", key.replace("_", "-")), partial(replace, task, **{key: value}))
    name: str = top.value("name", str, path.stem)
    if not _is_name(name):
        raise _At(("name",), f"name {name!r} becomes a folder: use letters, digits, - and _")
    scored = top.table("evaluation")
    scored.check_keys([known.name.replace("_", "-") for known in fields(EvalConfig)])
    starts, episodes = scored.list("starts", int, ()), scored.value("episodes", int, 100)
    start_games, secondary = (scored.value(key, int, episodes) for key in ("start-games", "secondary-games"))
    if min(episodes, start_games, secondary + 1, *starts) < 1:
        raise _At(("evaluation",), "episodes, starts and start-games are at least 1, secondary-games 0")
    arms = top.table("arms")
    if not arms.values:
        raise _At(("arms",), f"a plan needs arms, such as [arms.rl]; known: {', '.join(ARMS)}")
    made = tuple(arm for name in arms.values for arm in _arms(top, arms.table(name), path.parent, task))
    names = [arm.name for arm in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _At(("arms", twice), f"two arms are called {twice}: another arm's critic makes one of them")
    precisions = {name: arm.name for arm in made for name in arm.precisions}
    if len(precisions) > 1:
        which = ", ".join(f"{arm} {precision}" for precision, arm in precisions.items())
        raise _At(("precision",), f"a plan has one precision for all its arms, or they do not compare: {which}")
    scores = top.list("scores", float, ())
    if not all(map(math.isfinite, scores)) or len(set(scores)) < len(scores):
        raise _At(("scores",), "scores are finite numbers, none twice: those at which sizes are compared")
    for arm in made:
        if arm.origin is not None and next((a.method for a in made if a.name == arm.origin), None) != "distill":
            raise _At(("arms", arm.name, "from"), f"from names an arm of this plan that distils, not {arm.origin!r}")
    evaluation = EvalConfig(episodes, starts, start_games, secondary)
    pairing = top.choice("pairing", ("cross", "cycle"), "cross")
    return Plan(name, env, evaluation, made, text, pairing, _tune(top.table("tune")), scores, played)


def _tune(table: _Table) -> dict[str, Any]:
    """The grid of trials, as `tune` reads it."""
    table.check_keys(("seeds", "widths", "episodes", "arms"))
    if (episodes := table.value("episodes", int, 32)) < 1:
        raise table.wrong("episodes", f"tune.episodes must be at least 1, not {episodes}")
    arms = table.table("arms")
    grids = {name: arms.table(name).values for name in arms.values}
    axes = {"seeds": table.list("seeds", int, ()), "widths": table.list("widths", str, ())}
    return {"episodes": episodes, "arms": grids, **axes} if table.values else {}


def _arms(top: _Table, arm: _Table, folder: Path, task: EnvConfig) -> list[PlannedArm]:
    """An arm as it stands in the plan, once for each critic that it names: `rl`, `rl-split`, `rl-split-1_4`."""
    here, name = arm.here, arm.here[-1]
    if not _is_name(name):
        raise _At(here, f"arm {name!r} becomes part of the names of files: use letters, digits, - and _")
    known = ARMS.get(name)
    if known is None and "method" not in arm.values:
        hint = f"{meant(name, ARMS)} Or give it a method: {', '.join(CONFIGS)}"
        raise _At(here, f"no arm is called {name!r}: {hint}")
    method: Method = arm.choice("method", tuple(CONFIGS), known.method if known is not None else None)
    if known is not None and method != known.method:
        raise arm.wrong("method", f"{name} is an arm of {known.method}: one of {method} needs another name")
    fixed = known.settings if known is not None else {}
    widths, seeds = _axis(top, arm, "widths", str), _axis(top, arm, "seeds", int)
    teachers = _axis(top, arm, "teachers", str) if method != "rl" else ()
    critics: tuple[str, ...] = ()
    if isinstance(arm.values.get("critic"), list) or ("critic" in top.values and "critic" not in arm.values | fixed):
        critics = _axis(top, arm, "critic", str) if method == "rl" else ()
        if "critic" in arm.values and not critics:
            raise arm.wrong("critic", f"critics to compare go with the method rl, not {method}")
    own = {key: v for key, v in arm.values.items() if key not in _ARM_KEYS and not (critics and key == "critic")}
    precision = top.choice("precision", get_args(Precision), "float32")
    one = {"precision": precision} if precision != "auto" else {}  # else the task's preset has its word
    settings = one | fixed | _settings(_Table(own, *here), method)
    by_width = {}
    for width in (each := arm.table("width")).values:
        if width not in widths:
            raise each.wrong(width, f"width {width} is not one of this arm's: {', '.join(widths)}")
        by_width[width] = _settings(each.table(width), method)
    for width in widths:
        _checked(here, make_config, method, task, width, 0, settings | by_width.get(width, {}))
    if method != "finetune" and "from" in arm.values:
        raise arm.wrong("from", "from goes with the method finetune")
    origin = arm.value("from", str) if method == "finetune" else None
    names = {teacher: Path(teacher) for teacher in teachers if is_reference(Path(teacher))}  # of code
    places = tuple(names.get(teacher, (folder / teacher).resolve()) for teacher in teachers)
    for place in places if method == "ppd" else ():
        _checked((*here, "teachers"), check_own, place)
    if len({place.name for place in places}) < len(places):
        raise _At(("teachers",), "two teachers have the same last name, by which their runs are told apart")
    return [
        PlannedArm(name + suffix, method, settings | network, widths, seeds, places, by_width, origin)
        for suffix, network in map(_critic, critics or ("shared",))
    ]


def _critic(named: str) -> tuple[str, dict[str, str]]:
    """What a critic adds to an arm's name and to its settings: shared, full, or a width of its own."""
    if named == "shared":
        return "", {}
    if named == "full":
        return "-split", {"critic": "split"}
    return f"-split-{named.replace('/', '_')}", {"critic": "split", "critic_width": named}


def _settings(table: _Table, method: Method) -> dict[str, Any]:
    """Settings by field name, each of the type its field has."""
    hints = get_type_hints(CONFIGS[method])
    for own in ("env", "network", "seed"):  # which the plan itself says
        hints.pop(own, None)
    hints |= {name: get_type_hints(NetworkConfig)[name] for name in NETWORK if name != "options"}
    hints["view"] = get_type_hints(EnvConfig)["view"]
    return _typed(table, hints, method)


def _typed(table: _Table, hints: dict[str, Any], whose: str) -> dict[str, Any]:
    """Values by field name, each of the type its field has."""
    settings: dict[str, Any] = {}
    for key, value in table.values.items():
        if key == "network-options" and "family" in hints:
            settings["options"] = as_options(table.table(key).values)
            continue
        name = "family" if key == "network" else key.replace("-", "_")
        if name not in hints:
            hint = meant(name, hints, "see `potstill train --help-all`").replace("_", "-")
            raise table.wrong(key, f"{whose} has no setting {key!r}: {hint}")
        hint = get_args(hints[name])[0] if get_origin(hints[name]) is UnionType else hints[name]
        if get_origin(hint) is tuple:
            settings[name] = table.list(key, get_args(hint)[0])
        elif options := get_args(hint):
            settings[name] = table.choice(key, options)
        else:
            settings[name] = table.typed(key, value, hint)
    return settings


def _is_name(text: str) -> bool:
    """Whether a text may be a file's name, or begin one, anywhere."""
    plain = all(letter.isalnum() or letter in "-_." for letter in text)
    return plain and 0 < len(text) <= 64 and not text.startswith(".")


def _axis(top: _Table, arm: _Table, key: str, kind: type) -> tuple[Any, ...]:
    """An axis of the grid: the arm's own, or else the plan's."""
    table = arm if key in arm.values or key not in top.values else top
    values = table.list(key, kind)
    numbers = key in ("widths", "critic")
    named = ("shared", "full") if key == "critic" else ()
    meaning = {
        _checked((*table.here, key), parse_width, value) if numbers and value not in named else value
        for value in values
    }
    if not values or len(meaning) < len(values):
        raise table.wrong(key, f"{key} must name at least one, and none twice: {', '.join(map(str, values)) or 'none'}")
    if kind is int and min(values) < 0:
        raise table.wrong(key, f"{key} must not be negative")
    return values


def _checked(keys: tuple[str, ...], check: Callable[..., Any], *given: Any) -> Any:
    try:
        return check(*given)
    except InputError as error:
        raise _At(keys, str(error)) from error


def line_of(text: str, keys: tuple[str, ...]) -> int:
    """The line, from 1, where the last of `keys` that the text names is set: in its table, or as the table itself."""
    table: tuple[str, ...] = ()
    best, depth = 1, 0
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        here: tuple[str, ...] = ()
        if stripped.startswith("["):
            table = here = _parts(stripped.strip("[]").split("]")[0])
        elif "=" in stripped and not stripped.startswith("#"):
            here = table + _parts(stripped.split("=")[0])
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(here, keys, strict=False))))
        if same > depth:
            best, depth = number, same
        if keys and depth == 0 and here == (keys[-1],):  # an arm's axis may stand at the top
            best, depth = number, 1
    return best


def _parts(dotted: str) -> tuple[str, ...]:
    """The keys of `a.b."1/8"`."""
    try:
        table: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    parts: list[str] = []
    while isinstance(table, dict):
        ((part, table),) = table.items()
        parts.append(part)
    return tuple(parts)
