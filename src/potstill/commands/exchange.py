"""`potstill import-sb3`, `import-weights`, `export`, `push` and `pull`: policies from elsewhere, and to elsewhere."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from potstill.api import Record, in_words
from potstill.load import load, sb3
from potstill.load.check import check_sb3
from potstill.load.state_dicts import load_weights
from potstill.load.weights import Q_TEMPERATURE, save_import
from potstill.networks import NetworkConfig
from potstill.options import Unnamed, describe_value, parse
from potstill.tasks import find_env
from potstill.training.runtime import Runtime


@dataclass(frozen=True)
class _ImportSb3:
    model: Positional[Path]
    """The .zip that Stable-Baselines3 or sb3-contrib saved, with MlpPolicy or CnnPolicy."""
    env: str
    """Its task, which it does not name: cartpole, pong, an ALE game as ale/<rom>, or a Gymnasium id."""
    out: Path
    """Directory of the policy; must not exist."""
    temperature: float = Q_TEMPERATURE
    """Divides the Q-values of a DQN into logits. Its greedy play does not depend on it."""
    statistics: Path | None = None
    """VecNormalize's .pkl, or none. Default: the one beside the zip."""
    check: bool = False
    """Compare with the actions of Stable-Baselines3's own `predict`, where that is installed. Nothing that the zip
    holds is run for it, either."""


def import_sb3(arguments: Sequence[str]) -> None:
    """`potstill import-sb3`."""
    options = parse(_ImportSb3, arguments, "import-sb3")
    task = sb3.as_sb3(find_env(options.env))
    loaded = sb3.load_sb3(options.model, task, temperature=options.temperature, statistics=options.statistics)
    checked = {"checked": check_sb3(loaded)} if options.check else {}
    save_import(loaded, options.out)
    print(options.out)
    facts = {"parameters": loaded.policy.size().parameters, "family": loaded.policy.family} | checked
    print(Record({key: loaded.document["provenance"][key] for key in ("algorithm", "sb3_version")} | facts))


@dataclass(frozen=True)
class _ImportWeights:
    weights: Positional[Path]
    """What torch.save wrote of a state dict: CleanRL's .cleanrl_model, a .pt or .pth. It is read as data."""
    env: str
    """Its task, which it does not name: cartpole, pong, an ALE game as ale/<rom>, or a Gymnasium id."""
    out: Path
    """Directory of the policy; must not exist."""
    network: str = "auto"
    """Of one that is not CleanRL's: mlp, nature or linear, whose layers are those of the file in their order; or
    module:name, your own network, whose features are the logits, or the means of continuous actions."""
    network_option: Annotated[tuple[str, ...], UseAppendAction] = ()
    """key=value, an argument of the network, such as activation=relu of mlp (tanh without it). May be repeated."""
    statistics: Path | None = None
    """none, of CleanRL's ppo_continuous_action, says that nothing normalised the observations."""


def import_weights(arguments: Sequence[str]) -> None:
    """`potstill import-weights`."""
    options = parse(_ImportWeights, arguments, "import-weights")
    network = NetworkConfig(family=options.network, options=options.network_option)
    loaded = load_weights(
        options.weights,
        sb3.as_sb3(find_env(options.env)),
        network=network if options.network != "auto" or options.network_option else None,
        statistics=options.statistics,
    )
    save_import(loaded, options.out)
    print(options.out)
    provenance = loaded.document["provenance"]
    facts = {"source": provenance["source"], "algorithm": provenance["algorithm"], "network": str(loaded.policy)}
    print(Record(facts))


@dataclass(frozen=True)
class _Export(Unnamed):
    policy: Positional[Path]
    """A run directory, an expert directory, a checkpoint, or a Stable-Baselines3 .zip."""
    out: Path | None = None
    """The file; must not exist. Default: policy.onnx, policy.c or policy.zip."""
    format: Literal["onnx", "c", "sb3"] | None = None
    """onnx, or c: a .c and a .h of C99 for a microcontroller, or sb3: a zip that Stable-Baselines3's
    PPO loads. All hold the normalisation. Default: as --out ends."""
    int8: bool = False
    """Write a quantised version beside it too (policy.int8.onnx, policy_int8.c), unless that is larger or slower."""
    int4: bool = False
    """Write C with weights of 4 bits too (policy_int4.c), unless that is larger or slower."""
    raw: bool = False
    """Of Atari, in ONNX: colour frames of 210 x 160 in; grey, resizing and stacking are in the file."""
    opset: int | None = None
    """Version of ONNX's operators, 11 by default: a newer one shuts older runtimes out."""
    episodes: int = 20
    """Whole games that the file plays, greedy, and as many under each disturbance; 0 plays none."""
    seed: int = 1
    """Seeds these games."""
    threads: int = 0
    """CPU threads for the games; 0 takes all cores."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def export(arguments: Sequence[str]) -> None:
    """`potstill export`."""
    from potstill.export import export as written
    from potstill.export.actor import demands

    options = vars(parse(_Export, arguments, "export"))
    runtime, json_only = Runtime(threads=options.pop("threads")), options.pop("json")
    runtime.apply()
    loaded = load(options.pop("policy"), options.pop("env"), statistics=options.pop("statistics"))
    out = options.pop("out") or Path("policy").with_suffix({"c": ".c", "sb3": ".zip"}.get(options["format"], ".onnx"))
    record = written(loaded, out, **options, threads=runtime.cores, quiet=json_only and not sys.stderr.isatty())
    if json_only:
        print(json.dumps(record, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    models = list(record["models"].values())
    names = ("path", "bytes", "constants", "flash", "stack", "latency_ms", "latency_p95_ms")
    rows = {name: [model[name] for model in models] for name in names if name in models[0]}
    for games in ("score", "action_noise", "observation_noise", "delay"):
        for name in ("mean", "ci95", "worst", "episodes") if games == "score" else ("mean",):
            if games in models[0]:
                rows[name if games == "score" else f"{name}, {games}"] = [model[games][name] for model in models]
    table = Table("", *record["models"], box=None)
    for name, values in rows.items():
        table.add_row(in_words(name), *(Text(describe_value(value)) for value in values))
    Console(width=1_000).print(table)
    print(f"card: {out}.json", *demands(loaded.policy), sep="\n")
    tied = f", {record['tied']} ties broken otherwise" if record["tied"] else ""
    print(f"outputs within {record['max_difference']:.1g} of PyTorch's on {record['observations']} observations{tied}")
    if played := record["models"]["float32"].get("raw"):
        figures = ", ".join(f"{name.replace('_', ' ')} {played[name]:g}" for name in played)
        print(f"from colour frames, over a game: {figures}")
    for name, why in record["left_out"].items():
        print(f"no {name} file: {why}")


@dataclass(frozen=True)
class _Push:
    policy: Positional[Path]
    """A run directory, an expert directory or a checkpoint."""
    repo_id: Positional[Annotated[str, arg(metavar="REPO_ID")]]
    """USER/NAME on the Hub; made where it does not exist."""
    private: bool = False
    """Make it private."""
    film: Path | None = None
    """An .mp4 of a game, such as `potstill watch` makes, which the Hub plays on the policy's page."""
    message: str = ""
    """The commit's message. Default: task and width."""
    licence: Annotated[str, arg(name="license")] = "mit"
    """The licence you give it, by the Hub's name for it."""


def push(arguments: Sequence[str]) -> None:
    """`potstill push`."""
    from potstill.export import hub

    options = vars(parse(_Push, arguments, "push"))
    print(hub.push(options.pop("policy"), options.pop("repo_id"), **options))


@dataclass(frozen=True)
class _Pull:
    repo_id: Positional[Annotated[str, arg(metavar="REPO_ID")]]
    """USER/NAME on the Hub."""
    out: Path
    """Directory of the policy; must not exist."""
    revision: str = "main"
    """A branch, a tag or a commit."""
    env: str | None = None
    """The task of a Stable-Baselines3 repository, such as sb3/ppo-CartPole-v1, whose zip is imported."""


def pull(arguments: Sequence[str]) -> None:
    """`potstill pull`."""
    from potstill.export import hub
    from potstill.policies import recorded_result

    options = parse(_Pull, arguments, "pull")
    env = sb3.as_sb3(find_env(options.env)) if options.env is not None else None
    loaded, commit = hub.pull(options.repo_id, options.out, options.revision, env)
    size, known = loaded.policy.size(), recorded_result(loaded) or {}
    print(options.out)
    facts = {"env": loaded.env.id, "width": loaded.policy.config.width, "parameters": size.parameters}
    print(Record(facts | {key: known[key] for key in ("score", "ci95") if key in known} | {"commit": commit}))
