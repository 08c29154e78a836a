"""A plan's TOML file -> Plan. What is wrong in it is told by its line.

imports = ["./my_tasks.py"]               # modules or files of your own; the only way a plan names code
env = "pong"
widths = ["1/8", "1/4"]
seeds = [0, 1, 2]
teachers = ["../data/experts/pong/seed-0"]     # from the plan's own folder; or a zip, an .onnx file, module:name
critic = ["shared", "full", "1/4"]        # an arm of rl for each: rl, rl-split, rl-split-1_4; without it, shared
scores = [5, 10]                          # at which the report compares sizes
precision = "float32"                     # of all arms; without it, float32

[evaluation]
episodes = 100
starts = [50, 200, 500]                   # also scored after so many random steps

[arms.rl]                                 # a key of ARMS, or any name with a `method`
total-timesteps = 1_500_000               # any setting of `potstill train` or `potstill distill`
branch = ["1/8", "1/4", "1/2"]            # also a run of each of these shares of that budget, which costs its end alone
[arms.rl.width."1/8"]                     # for one width alone
max-learning-rate = 5e-3
[arms.distill-student]
"""

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from potstill.arms import ARMS, Method
from potstill.distill import DistillConfig
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.imports import import_modules
from potstill.load.callables import is_reference
from potstill.networks import NetworkConfig, Precision, as_options, parse_width
from potstill.ppo import PPOConfig
from potstill.storage.files import read_bytes
from potstill.study.plan import NETWORK, Plan, PlannedArm, make_config
from potstill.tasks import find_env

PLAN_LIMIT = 1 << 16  # bytes: no plan is longer
MAX_DOTS = 200  # in a line: tomllib takes time in the square of a dotted key, 20 seconds for one of 60 kB

_PLAN_KEYS = (
    "name",
    "env",
    "widths",
    "seeds",
    "teachers",
    "critic",
    "precision",
    "scores",
    "pairing",
    "evaluation",
    "arms",
    "tune",
    "imports",
)
_ARM_KEYS = ("method", "widths", "seeds", "teachers", "from", "width")


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
        plan = _plan(document, path, text)
        plan.specs()
    except _At as error:
        raise InputError(f"{path}, line {line_of(text, error.keys)}: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return plan


def read_settings(table: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Settings as a plan writes them to field names, each of the type its field has.

    Raises:
        InputError: there is no such setting, or its value is of another type.
    """
    try:
        return _settings(table, method, ())
    except _At as error:
        raise InputError(str(error)) from error


class _At(Exception):
    """What is wrong, and the keys that lead to it."""

    def __init__(self, keys: tuple[str, ...], message: str) -> None:
        self.keys = keys
        super().__init__(message)


def _plan(document: dict[str, Any], path: Path, text: str) -> Plan:
    _known(document, _PLAN_KEYS, ())
    _checked(
        ("imports",),
        lambda names: import_modules(names, "imports", path.parent),
        _list(document, "imports", str, (), ()),
    )
    env = _text(document, "env", ())
    _checked(("env",), find_env, env)
    name = _text(document, "name", (), path.stem)
    if not _is_name(name):
        raise _At(("name",), f"name {name!r} becomes a folder: use letters, digits, - and _")
    pairing = _choice(document, "pairing", ("cross", "cycle"), "cross")
    scored = _table(document, "evaluation", ())
    if "beside-games" in scored:  # as plans of the first study have it
        scored["secondary-games"] = scored.pop("beside-games")
    _known(scored, tuple(known.name.replace("_", "-") for known in fields(EvalConfig)), ("evaluation",))
    starts = _list(scored, "starts", int, ("evaluation",), ())
    episodes = _value(scored.get("episodes", 100), int, ("evaluation", "episodes"))
    start_games = _value(scored.get("start-games", episodes), int, ("evaluation", "start-games"))
    secondary_games = _value(scored.get("secondary-games", episodes), int, ("evaluation", "secondary-games"))
    if min(episodes, start_games, secondary_games, *starts) < 1:
        raise _At(("evaluation",), "episodes, starts, start-games and secondary-games are at least 1")
    arms = _table(document, "arms", ())
    if not arms:
        raise _At(("arms",), f"a plan needs arms, such as [arms.rl]; known: {', '.join(ARMS)}")
    made = tuple(arm for name in arms for arm in _arms(document, name, path.parent, env))
    names = [arm.name for arm in made]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _At(("arms", twice), f"two arms are called {twice}: another arm's critic makes one of them")
    precisions = {name: arm.name for arm in made for name in arm.precisions}
    if len(precisions) > 1:
        which = ", ".join(f"{arm} {precision}" for precision, arm in precisions.items())
        raise _At(("precision",), f"a plan has one precision for all its arms, or they do not compare: {which}")
    scores = _list(document, "scores", float, (), ())
    if not all(map(math.isfinite, scores)) or len(set(scores)) < len(scores):
        raise _At(("scores",), "scores are finite numbers, none twice: those at which sizes are compared")
    for arm in made:
        if arm.origin is not None and next((a.method for a in made if a.name == arm.origin), None) != "distill":
            raise _At(("arms", arm.name, "from"), f"from names an arm of this plan that distils, not {arm.origin!r}")
    evaluation = EvalConfig(episodes, starts, start_games, secondary_games)
    return Plan(name, env, evaluation, made, text, pairing, _table(document, "tune", ()), scores)  # type: ignore[arg-type]  # checked


def _arms(document: dict[str, Any], name: str, folder: Path, env: str) -> list[PlannedArm]:
    """An arm as it stands in the plan, once for each critic that it names: `rl`, `rl-split`, `rl-split-1_4`."""
    here = ("arms", name)
    table = _table(document["arms"], name, ("arms",))
    if not _is_name(name):
        raise _At(here, f"arm {name!r} becomes part of the names of files: use letters, digits, - and _")
    known = ARMS.get(name)
    method, fixed = (known.method, known.settings) if known is not None else (None, {})
    if "method" in table or method is None:
        if "method" not in table:
            near = difflib.get_close_matches(name, ARMS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(ARMS)}"
            raise _At(here, f"no arm is called {name!r}: {hint} Or give it a method: rl, distill, ppd or finetune")
        method = _choice(table, "method", get_args(Method), None, here)  # type: ignore[assignment]
    assert method is not None
    has_teacher = method != "rl"
    widths = _axis(document, table, "widths", str, here)
    seeds = _axis(document, table, "seeds", int, here)
    teachers = _axis(document, table, "teachers", str, here) if has_teacher else ()
    critics: tuple[str, ...] = ()
    if isinstance(table.get("critic"), list) or ("critic" in document and not {"critic"} & {*table, *fixed}):
        critics = _axis(document, table, "critic", str, here) if method == "rl" else ()
        if "critic" in table and not critics:
            raise _At((*here, "critic"), f"critics to compare go with the method rl, not {method}")
    own = {key: value for key, value in table.items() if key not in _ARM_KEYS and not (critics and key == "critic")}
    precision = _choice(document, "precision", get_args(Precision), "float32")
    one = {"precision": precision} if precision != "auto" else {}  # else the task's preset has its word
    settings = one | fixed | _settings(own, method, here)
    by_width = {}
    for width in _table(table, "width", here):
        if width not in widths:
            raise _At((*here, "width", width), f"width {width} is not one of this arm's: {', '.join(widths)}")
        by_width[width] = _settings(_table(table["width"], width, (*here, "width")), method, (*here, "width", width))
    for width in widths:
        whole = settings | by_width.get(width, {})
        _checked(here, lambda w, s=whole: make_config(method, env, w, 0, s), width)
    origin = None
    if method == "finetune":
        origin = _text(table, "from", here)
    elif "from" in table:
        raise _At((*here, "from"), "from goes with the method finetune")
    names = {teacher: Path(teacher) for teacher in teachers if is_reference(Path(teacher))}  # of code
    places = tuple(names.get(teacher, (folder / teacher).resolve()) for teacher in teachers)
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


def _settings(table: Mapping[str, Any], method: Method, here: tuple[str, ...]) -> dict[str, Any]:
    """Settings by field name, each of the type its field has."""
    hints = get_type_hints(DistillConfig if method == "distill" else PPOConfig)
    for own in ("env", "network", "seed"):  # which the plan itself says
        hints.pop(own, None)
    hints |= {name: get_type_hints(NetworkConfig)[name] for name in NETWORK if name != "options"}
    settings: dict[str, Any] = {}
    for key, value in table.items():
        if key == "network-options":
            settings["options"] = as_options(_table(table, key, here))
            continue
        name = "family" if key == "network" else key.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see `potstill train --help`"
            raise _At((*here, key), f"{method} has no setting {key!r}: {hint}")
        hint = hints[name]
        if get_origin(hint) is tuple:
            settings[name] = _list(table, key, str, here)
        elif options := get_args(hint):
            if value not in options:
                raise _At((*here, key), f"{key} is one of {', '.join(map(str, options))}, not {value!r}")
            settings[name] = value
        else:
            settings[name] = _value(value, hint, (*here, key))
    return settings


def _is_name(text: str) -> bool:
    """Whether a text may be a file's name, or begin one, anywhere."""
    plain = all(letter.isalnum() or letter in "-_." for letter in text)
    return plain and 0 < len(text) <= 64 and not text.startswith(".")


def _known(table: Mapping[str, Any], keys: tuple[str, ...], here: tuple[str, ...]) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(keys)}"
            raise _At((*here, key), f"{'.'.join((*here, key))} is not a key of a plan; {hint}")


def _value(value: Any, kind: type, keys: tuple[str, ...]) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        raise _At(keys, f"{keys[-1]} should be {names[kind]}, not {value!r}")
    return value


def _text(table: Mapping[str, Any], key: str, here: tuple[str, ...], default: str | None = None) -> str:
    if key not in table and default is None:
        raise _At(here, f"{'.'.join((*here, key))} is missing")
    value: str = _value(table.get(key, default), str, (*here, key))
    return value


def _choice(
    table: Mapping[str, Any], key: str, options: tuple[str, ...], default: str | None, here: tuple[str, ...] = ()
) -> str:
    value = _text(table, key, here, default)
    if value not in options:
        raise _At((*here, key), f"{key} is one of {', '.join(options)}, not {value!r}")
    return value


def _table(table: Mapping[str, Any], key: str, here: tuple[str, ...]) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise _At((*here, key), f"{'.'.join((*here, key))} is a table: [{'.'.join((*here, key))}]")
    return value


def _list(
    table: Mapping[str, Any], key: str, kind: type, here: tuple[str, ...], default: Any = None
) -> tuple[Any, ...]:
    value = table.get(key, default)
    if value is None:
        raise _At(here, f"{key} is missing: a list, at the top of the plan or in the arm")
    if not isinstance(value, list | tuple):
        raise _At((*here, key), f"{key} is a list, not {value!r}")
    return tuple(_value(item, kind, (*here, key)) for item in value)


def _axis(
    document: Mapping[str, Any], arm: Mapping[str, Any], key: str, kind: type, here: tuple[str, ...]
) -> tuple[Any, ...]:
    """An axis of the grid: the arm's own, or else the plan's."""
    table, here = (arm, here) if key in arm or key not in document else (document, ())
    values = _list(table, key, kind, here)
    named = ("shared", "full") if key == "critic" else ()
    meant = {
        _checked((*here, key), parse_width, value) if key in ("widths", "critic") and value not in named else value
        for value in values
    }
    if not values or len(meant) < len(values):
        raise _At(
            (*here, key), f"{key} must name at least one, and none twice: {', '.join(map(str, values)) or 'none'}"
        )
    if kind is int and min(values) < 0:
        raise _At((*here, key), f"{key} must not be negative")
    return values


def _checked(keys: tuple[str, ...], check: Any, value: Any) -> Any:
    try:
        return check(value)
    except InputError as error:
        raise _At(keys, str(error)) from error


def line_of(text: str, keys: tuple[str, ...]) -> int:
    """The line, from 1, where the last of `keys` that the text names is set: in its table, or as the table itself."""
    table: tuple[str, ...] = ()
    best, depth = 1, 0
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        here: tuple[str, ...] | None = None
        if stripped.startswith("["):
            table = here = _parts(stripped.strip("[]").split("]")[0])
        elif "=" in stripped and not stripped.startswith("#"):
            here = table + _parts(stripped.split("=")[0])
        if here is not None:
            same = next(
                (i for i, (a, b) in enumerate(zip(here, keys, strict=False)) if a != b), min(len(here), len(keys))
            )
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
