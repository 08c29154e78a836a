"""What a study runs: a TOML file -> cells, each one run.

env = "pong"
widths = ["1/8", "1/4"]
seeds = [0, 1, 2]
teachers = ["../experts/pong/seed-0"]     # from the plan's own folder

[evaluation]
episodes = 100
starts = [50, 200, 500]                   # also scored after so many random steps

[arms.rl]                                 # a key of ARMS, or any name with a `method`
total-timesteps = 1_500_000               # any setting of `potstill train` or `potstill distill`
[arms.rl.width."1/8"]                     # for one width alone
max-learning-rate = 5e-3
[arms.distill-student]
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from potstill.distill import DistillConfig
from potstill.envs import find_env
from potstill.errors import InputError
from potstill.files import read_bytes
from potstill.networks import NetworkConfig, parse_width
from potstill.ppo import PPOConfig
from potstill.presets import PPO_PRESETS
from potstill.runs import config_hash

Method = Literal["rl", "distill", "ppd", "finetune"]
Config = PPOConfig | DistillConfig
RESULTS = 1  # raised by a change that lets the same config come to other results
PLAN_LIMIT = 1 << 16  # bytes: no plan is longer
MAX_DOTS = 200  # in a line: tomllib takes time in the square of a dotted key, 20 seconds for one of 60 kB
MAX_CELLS = 100_000

ARMS: dict[str, tuple[Method, dict[str, Any]]] = {
    "rl": ("rl", {}),
    "rl-split": ("rl", {"critic": "split"}),
    "distill-student": ("distill", {"lead": "student"}),
    "distill-teacher": ("distill", {"lead": "teacher"}),
    "distill-mixed": ("distill", {"lead": "mixed"}),
    "ppd": ("ppd", {}),
    "finetune": ("finetune", {}),
}
"""Arms whose name says it all: their method, and the settings that make them what they are."""

_PLAN_KEYS = ("name", "env", "widths", "seeds", "teachers", "pairing", "evaluation", "arms", "tune")
_ARM_KEYS = ("method", "widths", "seeds", "teachers", "from", "width")
_NETWORK = ("family", "critic", "critic_width")


class Cell(NamedTuple):
    """One run: everything that decides its outcome."""

    name: str  # of its directory and its record
    arm: str
    config: Config
    teacher: Path | None = None
    start_from: "Cell | None" = None  # whose policy to begin with

    @property
    def method(self) -> Method:
        if isinstance(self.config, DistillConfig):
            return "distill"
        return "finetune" if self.start_from is not None else "ppd" if self.teacher is not None else "rl"

    def identity(self, teacher_hash: str | None) -> str:
        """12 hex digits that change with whatever would change the result; `teacher_hash` is of the teacher's file."""
        first = self.start_from.identity(teacher_hash) if self.start_from is not None else None
        document = {"results": RESULTS, "method": self.method, "config": _plain(asdict(self.config))}
        return config_hash(document | {"teacher": teacher_hash, "start_from": first})


@dataclass(frozen=True)
class Evaluation:
    """How every run of a study is scored."""

    episodes: int = 100
    """Whole games, greedy."""
    starts: tuple[int, ...] = ()
    """Also score greedy play after this many steps of a random policy."""
    start_games: int = 0
    """Games after each of these; a plan that does not say plays `episodes`."""
    beside_games: int = 0
    """Games with sampled actions, and without stickiness; a plan that does not say plays `episodes`, trials none."""


@dataclass(frozen=True)
class Arm:
    """One way to make a policy, at some widths, from some seeds and teachers."""

    name: str
    method: Method
    settings: dict[str, Any]
    widths: tuple[str, ...]
    seeds: tuple[int, ...]
    teachers: tuple[Path, ...]  # empty for a method without one
    by_width: dict[str, dict[str, Any]] = field(default_factory=dict)
    origin: str | None = None  # the arm whose students a finetune begins with


class Part(NamedTuple):
    """The runs of a plan to do now. Each empty axis stands for all that the plan has."""

    arms: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


WHOLE = Part()


@dataclass(frozen=True)
class Plan:
    """A study: arms x widths x seeds x teachers."""

    name: str
    env: str
    evaluation: Evaluation
    arms: tuple[Arm, ...]
    text: str
    pairing: Literal["cross", "cycle"] = "cross"
    """cross: every seed with every teacher. cycle: seed number i with teacher i modulo their number."""
    tune: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Every run: each arm's first seed at all widths, small ones first, then its second, and so on.

        So a study that is not finished has fewer seeds, not fewer sizes. A run comes after the one it begins with.

        Raises:
            InputError: there are more than 100,000; or a run begins with one that the plan does not make.
        """
        taught = 1 if self.pairing == "cycle" else max(len(arm.teachers) for arm in self.arms) or 1
        if (count := taught * sum(len(arm.widths) * len(arm.seeds) for arm in self.arms)) > MAX_CELLS:
            raise InputError(f"it asks for some {count:,} runs; {MAX_CELLS:,} are planned at most")
        made: dict[str, Cell] = {}
        order = sorted(self.arms, key=lambda arm: arm.origin is not None)
        for width in sorted({width for arm in self.arms for width in arm.widths}, key=parse_width):
            for arm in order:
                if width in arm.widths:
                    made |= {cell.name: cell for cell in self._cells(arm, width, made)}
        origins = {arm.name: arm for arm in self.arms}
        seeds = {arm.name: origins[arm.origin or arm.name].seeds for arm in self.arms}
        return sorted(made.values(), key=lambda cell: seeds[cell.arm].index(cell.config.seed))

    def cells_of(self, part: Part) -> list[Cell]:
        """The runs of this part and those that they begin with, in the order of `cells`.

        Raises:
            InputError: the plan has no such arm, width or seed, or none of the runs that together they name.
        """
        origins = {arm.name: arm.origin for arm in self.arms}
        arms = {*part.arms, *(origins[name] for name in part.arms if name in origins)} or {*origins}
        widths = [parse_width(width) for width in part.widths]
        cells = self.cells()
        for axis, asked, held in (
            ("arm", part.arms, {*origins}),
            ("width", widths, {parse_width(cell.config.network.width) for cell in cells}),
            ("seed", part.seeds, {cell.config.seed for cell in cells}),
        ):
            for value in asked:
                if value not in held:
                    has = ", ".join(str(value) for value in sorted(held))
                    raise InputError(f"the plan has no {axis} {str(value)!r}: it has {has}")
        made = [
            cell
            for cell in cells
            if cell.arm in arms
            and (not widths or parse_width(cell.config.network.width) in widths)
            and (not part.seeds or cell.config.seed in part.seeds)
        ]
        if not made:
            raise InputError("the plan has no run of all these arms, widths and seeds: an arm may have its own")
        return made

    def _cells(self, arm: Arm, width: str, made: Mapping[str, Cell]) -> list[Cell]:
        cells = []
        for number, seed in enumerate(arm.seeds):
            teachers: list[Path | None] = [*arm.teachers] or [None]
            if self.pairing == "cycle":
                teachers = [teachers[number % len(teachers)]]
            for teacher in teachers:
                start_from = None
                if arm.origin is not None:
                    start_from = made.get(cell_name(arm.origin, width, seed, teacher))
                    if start_from is None:
                        raise InputError(
                            f"arm {arm.name} begins with {cell_name(arm.origin, width, seed, teacher)}, which the plan"
                            f" does not make: give {arm.origin} the same widths, seeds and teachers"
                        )
                settings = arm.settings | arm.by_width.get(width, {})
                config = make_config(arm.method, self.env, width, seed, settings)
                name = cell_name(arm.name, width, seed, teacher)
                cells.append(Cell(name, arm.name, config, None if arm.method == "finetune" else teacher, start_from))
        return cells


def cell_name(arm: str, width: str, seed: int, teacher: Path | None) -> str:
    parts = [arm, f"width-{width.replace('/', '_')}", *([f"teacher-{teacher.name}"] if teacher is not None else [])]
    return "_".join([*parts, f"seed-{seed}"])


def make_config(method: Method, env: str, width: str, seed: int, settings: Mapping[str, Any]) -> Config:
    """The config of one run: the task's preset with `settings`, whose keys are field names.

    Raises:
        InputError: a setting does not exist, or its value is not allowed.
    """
    network = NetworkConfig(width=width, **{key: settings[key] for key in _NETWORK if key in settings})
    rest = {key: value for key, value in settings.items() if key not in _NETWORK}
    if method == "distill":
        return replace(DistillConfig(), network=network, seed=seed, **rest)
    base = PPO_PRESETS.get(env, PPOConfig())
    return replace(base, env=find_env(env), network=network, seed=seed, **rest)


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file.

    Raises:
        InputError: with the line, and what would be right.
    """
    path = Path(path)
    try:
        text = read_bytes(path, PLAN_LIMIT, follow=True).decode()
        if max(line.count(".") for line in text.split("\n")) > MAX_DOTS:
            raise ValueError(f"a line of it has more than {MAX_DOTS} dots; write a list over several lines")
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number with too many digits
        raise InputError(f"{path} is not TOML: {error}") from error
    try:
        plan = _plan(document, path, text)
        plan.cells()
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
    env = _text(document, "env", ())
    _checked(("env",), find_env, env)
    name = _text(document, "name", (), path.stem)
    if not _is_name(name):
        raise _At(("name",), f"name {name!r} becomes a folder: use letters, digits, - and _")
    pairing = _choice(document, "pairing", ("cross", "cycle"), "cross")
    scored = _table(document, "evaluation", ())
    _known(scored, tuple(known.name.replace("_", "-") for known in fields(Evaluation)), ("evaluation",))
    starts = _list(scored, "starts", int, ("evaluation",), ())
    episodes = _value(scored.get("episodes", 100), int, ("evaluation", "episodes"))
    start_games = _value(scored.get("start-games", episodes), int, ("evaluation", "start-games"))
    beside_games = _value(scored.get("beside-games", episodes), int, ("evaluation", "beside-games"))
    if min(episodes, start_games, beside_games, *starts) < 1:
        raise _At(("evaluation",), "episodes, starts, start-games and beside-games are at least 1")
    arms = _table(document, "arms", ())
    if not arms:
        raise _At(("arms",), f"a plan needs arms, such as [arms.rl]; known: {', '.join(ARMS)}")
    made = tuple(_arm(document, name, path.parent, env) for name in arms)
    for arm in made:
        if arm.origin is not None and next((a.method for a in made if a.name == arm.origin), None) != "distill":
            raise _At(("arms", arm.name, "from"), f"from names an arm of this plan that distils, not {arm.origin!r}")
    evaluation = Evaluation(episodes, starts, start_games, beside_games)
    return Plan(name, env, evaluation, made, text, pairing, _table(document, "tune", ()))  # type: ignore[arg-type]  # checked


def _arm(document: dict[str, Any], name: str, folder: Path, env: str) -> Arm:
    here = ("arms", name)
    table = _table(document["arms"], name, ("arms",))
    if not _is_name(name):
        raise _At(here, f"arm {name!r} becomes part of the names of files: use letters, digits, - and _")
    method, fixed = ARMS.get(name, (None, {}))
    if "method" in table or method is None:
        if "method" not in table:
            near = difflib.get_close_matches(name, ARMS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(ARMS)}"
            raise _At(here, f"no arm is called {name!r}: {hint} Or give it a method: rl, distill, ppd or finetune")
        method = _choice(table, "method", get_args(Method), None, here)  # type: ignore[assignment]
    assert method is not None
    taught = method != "rl"
    widths = _axis(document, table, "widths", str, here)
    seeds = _axis(document, table, "seeds", int, here)
    teachers = _axis(document, table, "teachers", str, here) if taught else ()
    own = {key: value for key, value in table.items() if key not in _ARM_KEYS}
    settings = fixed | _settings(own, method, here)
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
    places = tuple((folder / teacher).resolve() for teacher in teachers)
    if len({place.name for place in places}) < len(places):
        raise _At(("teachers",), "two teachers have the same last name, by which their runs are told apart")
    return Arm(name, method, settings, widths, seeds, places, by_width, origin)


def _settings(table: Mapping[str, Any], method: Method, here: tuple[str, ...]) -> dict[str, Any]:
    """Settings by field name, each of the type its field has."""
    hints = get_type_hints(DistillConfig if method == "distill" else PPOConfig)
    for own in ("env", "network", "seed"):  # which the plan itself says
        hints.pop(own, None)
    hints |= {name: get_type_hints(NetworkConfig)[name] for name in _NETWORK}
    settings = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see `potstill train --help`"
            raise _At((*here, key), f"{method} has no setting {key!r}: {hint}")
        hint = hints[name]
        if options := get_args(hint):
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
    meant = {_checked((*here, key), parse_width, value) if key == "widths" else value for value in values}
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


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
