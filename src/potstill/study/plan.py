"""What a study runs: arms x widths x seeds x teachers -> specifications, each of one run."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from potstill.arms import Method
from potstill.distill import DistillConfig
from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.evaluation import EvalConfig
from potstill.load import Origin, load, nameless, origin_of
from potstill.networks import NetworkConfig, parse_width
from potstill.ppo import PPOConfig
from potstill.storage.runs import branch_name, config_hash
from potstill.tasks import find_env
from potstill.training.trainer import CONFIGS
from potstill.views import FULL, chosen

Config = PPOConfig | DistillConfig
RESULTS = 1  # raised by a change that lets the same config come to other results
OF_BITS = 2  # the same, of students of 8 and 4 bits: their statistics are rounded since
MAX_RUNS = 100_000

NETWORK = ("family", "critic", "critic_width", "options")
"""Of an arm's settings, those of its network; the others are its method's."""


class RunSpec(NamedTuple):
    """One run: everything that decides its outcome."""

    name: str  # of its directory and its record
    arm: str
    config: Config
    teacher: Origin | None = None
    start_from: "RunSpec | None" = None  # whose policy to begin with
    trunk: "RunSpec | None" = None  # the run of a larger budget that it branches off
    share: str = ""  # of that budget
    played: tuple[tuple[str, Any], ...] = ()  # how a teacher that names no task is played, as the plan says

    @property
    def method(self) -> Method:
        if not isinstance(self.config, PPOConfig):
            return next(method for method, config in CONFIGS.items() if config is type(self.config))
        return "finetune" if self.start_from is not None else "ppd" if self.teacher is not None else "rl"

    @property
    def needs(self) -> set[str]:
        """The runs that must be over before it begins."""
        return {spec.name for spec in (self.start_from, self.trunk) if spec is not None}

    @property
    def inherited(self) -> float:
        """Share of its training that the run does which it branches off."""
        if self.trunk is None or isinstance(self.config, DistillConfig):
            return 0.0
        return self.config.constant_updates / self.config.updates

    def identity(self, teacher_hash: str | None) -> str:
        """12 hex digits that change with whatever would change the result; `teacher_hash` is of the teacher's file."""
        first = self.start_from.identity(teacher_hash) if self.start_from is not None else None
        results = OF_BITS if getattr(self.config, "bits", 32) < 32 else RESULTS
        document = {"results": results, "method": self.method, "config": _plain(asdict(self.config))}
        document |= {"played": [list(pair) for pair in self.played]} if self.played else {}
        return config_hash(document | {"teacher": teacher_hash, "start_from": first})


@dataclass(frozen=True)
class PlannedArm:
    """One way to make a policy, at some widths, from some seeds and teachers."""

    name: str
    method: Method
    settings: dict[str, Any]
    widths: tuple[str, ...]
    seeds: tuple[int, ...]
    teachers: tuple[Path, ...]  # empty for a method without one
    by_width: dict[str, dict[str, Any]] = field(default_factory=dict)
    origin: str | None = None  # the arm whose students a finetune begins with

    @property
    def precisions(self) -> set[str]:
        """Of its runs: one, in a plan that was read."""
        whole = [self.settings | self.by_width.get(width, {}) for width in self.widths]
        return {str(settings.get("precision", "auto")) for settings in whole}


class Part(NamedTuple):
    """The runs of a plan to do now. Each empty axis stands for all that the plan has."""

    arms: tuple[str, ...] = ()
    """Do only the runs of these arms, and those that they begin with; default: all that the plan has."""
    widths: tuple[str, ...] = ()
    """Do only the runs of these widths."""
    seeds: tuple[int, ...] = ()
    """Do only the runs of these seeds."""


WHOLE = Part()


@dataclass(frozen=True)
class Pool:
    """How many runs go on at once, and where."""

    workers: int = 0
    """Runs at a time; 0 takes as many as fill the cores."""
    retries: int = 1
    """How often a run whose process died is started again, from its last save."""
    patience: float = 900.0
    """Seconds without a sign of life after which a run counts as hung."""
    executor: Literal["local", "ray"] = "local"
    """Where runs go: the cores of this machine, or a Ray cluster."""
    ray_address: str | None = None
    """Address of the cluster, such as 10.0.0.1:6379 or auto; default: one made of this machine's cores."""
    gpus_per_run: float = 0.0
    """GPUs that Ray keeps for each run; 0.25 puts four on one."""

    def __post_init__(self) -> None:
        if not self.gpus_per_run >= 0:
            raise InputError(f"gpus-per-run must be 0 or more, not {self.gpus_per_run}")
        if self.executor == "local" and self.ray_address is not None:
            raise InputError("--ray-address goes with --executor ray")
        if self.executor == "local" and self.gpus_per_run:
            raise InputError("--gpus-per-run goes with --executor ray: elsewhere every run takes --device")


@dataclass(frozen=True)
class Plan:
    """A study: arms x widths x seeds x teachers."""

    name: str
    env: str
    evaluation: EvalConfig
    arms: tuple[PlannedArm, ...]
    text: str
    pairing: Literal["cross", "cycle"] = "cross"
    """cross: every seed with every teacher. cycle: seed number i with teacher i modulo their number."""
    tune: dict[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    """At which the report compares sizes, fixed before the runs; without them, the task's."""
    played: dict[str, Any] = field(default_factory=dict)
    """How the task is played, where otherwise than by default: fields of its `EnvConfig`."""

    @property
    def task(self) -> EnvConfig:
        return replace(find_env(self.env), **self.played)

    def specs(self) -> list[RunSpec]:
        """Every run: each arm's first seed at all widths, large ones first, then its second, and so on.

        So a study that is not finished has fewer seeds, not fewer sizes, and no core waits for a large run that began
        last. A run comes after the one it begins with.

        Raises:
            InputError: there are more than 100,000; or a run begins with one that the plan does not make, or with a
                policy of another view or network than its arm asks for.
        """
        teachers = 1 if self.pairing == "cycle" else max(len(arm.teachers) for arm in self.arms) or 1
        if (count := teachers * sum(len(arm.widths) * len(arm.seeds) for arm in self.arms)) > MAX_RUNS:
            raise InputError(f"it asks for some {count:,} runs; {MAX_RUNS:,} are planned at most")
        made: dict[str, RunSpec] = {}
        views: dict[Origin, tuple[str, ...]] = {}
        order = sorted(self.arms, key=lambda arm: arm.origin is not None)
        for width in sorted({width for arm in self.arms for width in arm.widths}, key=parse_width, reverse=True):
            for arm in order:
                if width in arm.widths:
                    made |= {spec.name: spec for spec in self._specs(arm, width, made, views)}
        origins = {arm.name: arm for arm in self.arms}
        seeds = {arm.name: origins[arm.origin or arm.name].seeds for arm in self.arms}
        return sorted(made.values(), key=lambda spec: seeds[spec.arm].index(spec.config.seed))

    def specs_of(self, part: Part) -> list[RunSpec]:
        """The runs of this part and those that they begin with, in the order of `specs`.

        Raises:
            InputError: the plan has no such arm, width or seed, or none of the runs that together they name.
        """
        origins = {arm.name: arm.origin for arm in self.arms}
        arms = {*part.arms, *(origins[name] for name in part.arms if name in origins)} or {*origins}
        widths = [parse_width(width) for width in part.widths]
        specs = self.specs()
        for axis, asked, held in (
            ("arm", part.arms, {*origins}),
            ("width", widths, {parse_width(spec.config.network.width) for spec in specs}),
            ("seed", part.seeds, {spec.config.seed for spec in specs}),
        ):
            for value in asked:
                if value not in held:
                    has = ", ".join(str(value) for value in sorted(held))
                    raise InputError(f"the plan has no {axis} {str(value)!r}: it has {has}")
        made = [spec for spec in specs if spec.arm in arms]
        made = [spec for spec in made if not widths or parse_width(spec.config.network.width) in widths]
        made = [spec for spec in made if not part.seeds or spec.config.seed in part.seeds]
        if not made:
            raise InputError("the plan has no run of all these arms, widths and seeds: an arm may have its own")
        return made

    def _specs(
        self, arm: PlannedArm, width: str, made: Mapping[str, RunSpec], views: dict[Origin, tuple[str, ...]]
    ) -> list[RunSpec]:
        """Those of an arm at a width; `views` remembers what teachers see."""
        specs = []
        found = [origin_of(path, self.env if nameless(path) else None) for path in arm.teachers]
        places = [place._replace(env=place.env and replace(place.env, **self.played)) for place in found]
        for number, seed in enumerate(arm.seeds):
            teachers: list[Origin | None] = [*places] or [None]
            if self.pairing == "cycle":
                teachers = [teachers[number % len(teachers)]]
            for teacher in teachers:
                start_from = None
                if arm.origin is not None:
                    first = run_name(arm.origin, width, seed, teacher)
                    if (start_from := made.get(first)) is None:
                        raise InputError(
                            f"arm {arm.name} begins with {first}, which the plan does not make: give {arm.origin} the"
                            " same widths, seeds and teachers"
                        )
                settings = arm.settings | arm.by_width.get(width, {})
                if arm.method != "distill" and teacher is not None:
                    views[teacher] = seen = views[teacher] if teacher in views else _view_of(teacher)
                    if start_from is not None and isinstance(start_from.config, DistillConfig):
                        seen = chosen(start_from.config.view, seen)
                        settings = _begun(arm, settings, start_from.config.network, seen)
                    settings |= {"view": chosen(settings.get("view", ()), seen)}
                config = make_config(arm.method, self.task, width, seed, settings)
                name = run_name(arm.name, width, seed, teacher)
                spec = RunSpec(name, arm.name, config, None if arm.method == "finetune" else teacher, start_from)
                if arm.method == "distill" and teacher is not None and teacher.env is not None:
                    spec = spec._replace(played=tuple(sorted(self.played.items())))
                specs += [spec, *_branches(spec)]
        return specs


def _view_of(teacher: Origin) -> tuple[str, ...]:
    """What a teacher sees, as its task says or else its file."""
    if teacher.env is not None:
        return teacher.env.view
    with suppress(InputError):  # it is not there yet: its runs are planned anew before they begin
        return load(teacher).env.view
    return ()


def _begun(arm: PlannedArm, settings: dict[str, Any], network: NetworkConfig, view: tuple[str, ...]) -> dict[str, Any]:
    """The settings of an arm that begins with a policy of this network, which sees this: its own are the policy's.

    Raises:
        InputError: it asks for others.
    """
    of_policy = {key: getattr(network, key) for key in NETWORK}
    asked = of_policy | settings | {"view": chosen(settings.get("view", ()), view) or (FULL,)}
    for key, value in (of_policy | {"view": view or (FULL,)}).items():
        if asked[key] != value and "auto" not in (asked[key], value):
            name = {"family": "network", "options": "network-options"}.get(key, key.replace("_", "-"))
            told, wanted = (" ".join(each) or "none" if type(each) is tuple else each for each in (value, asked[key]))
            raise InputError(
                f"arm {arm.name} begins with a policy of {arm.origin}, whose {name} is {told}, not {wanted}: leave out"
                f" {name}"
            )
    return settings | {key: value for key, value in of_policy.items() if value != "auto"}


def _branches(trunk: RunSpec) -> list[RunSpec]:
    """The runs of shares of its budget."""
    config = trunk.config
    if isinstance(config, DistillConfig):
        return []
    return [
        trunk._replace(name=branch_name(trunk.name, share), config=config.of_share(share), trunk=trunk, share=share)
        for share in config.branch
    ]


def run_name(arm: str, width: str, seed: int, teacher: Origin | None) -> str:
    parts = [arm, f"width-{width.replace('/', '_')}", *([f"teacher-{teacher.name}"] if teacher is not None else [])]
    return "_".join([*parts, f"seed-{seed}"])


def make_config(method: Method, env: EnvConfig, width: str, seed: int, settings: Mapping[str, Any]) -> Config:
    """The config of one run: the task's preset with `settings`, whose keys are field names.

    Raises:
        InputError: a setting does not exist, or its value is not allowed.
    """
    network = NetworkConfig(width=width, **{key: settings[key] for key in NETWORK if key in settings})
    of_task = ("view",) if method != "distill" else ()  # a distillation's task is its teacher's
    rest = {key: value for key, value in settings.items() if key not in (*NETWORK, *of_task)}
    config: Config = CONFIGS[method].for_task(replace(env, view=settings.get("view", ())))
    return replace(config, network=network, seed=seed, **rest)


# What came later: at their defaults, runs are what they were.
_LATER = (
    ("options", ()),
    ("layout", "auto"),
    ("bits", 32),
    ("view", ()),
    ("sparsity", 0.0),
    ("sequence", 16),
    ("burn_in", 16),
    ("overlap", False),
)


def _plain(value: Any) -> Any:
    """A config for JSON, without `branch`, which changes nothing of the run itself."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if (key, item) not in _LATER and key != "branch"}
    return value
