"""`potstill evaluate`, `watch`, `report` and `info`: what tells of policies, studies and the machine."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from potstill import api
from potstill.arms import arm_of, look_of
from potstill.errors import InputError
from potstill.load import load_all
from potstill.networks import resolve_device
from potstill.options import Unnamed, fitted, lacking, parse
from potstill.policies import LoadedPolicy
from potstill.storage.files import read_json
from potstill.training.runtime import Runtime, processor


@dataclass(frozen=True)
class _Evaluate(Unnamed):
    policy: Positional[Path]
    """A run directory, an expert directory, a checkpoint, a Stable-Baselines3 .zip, a .cleanrl_model, an .onnx
    file, or module:name."""
    episodes: int = 100
    """Whole games to play."""
    sticky: float | None = None
    """Probability of a sticky action; default: as the policy was trained."""
    actions: Annotated[str, arg(metavar="greedy|sampled")] = "greedy"
    """The most probable action, or one drawn from the policy."""
    start: str | None = None
    """Who plays the first k steps of each game: random:200, or POLICY:200."""
    teacher: Path | None = None
    """Report agreement with, and KL divergence from, this policy too."""
    seed: int = 1
    """Seeds the games and the sampling."""
    device: str = "auto"
    """cuda, mps or cpu."""
    threads: int = 0
    """CPU threads; 0 takes all cores."""
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


def evaluate(arguments: Sequence[str]) -> None:
    """`potstill evaluate`."""
    options = vars(parse(_Evaluate, arguments, "evaluate"))
    json_only = options.pop("json")
    with redirect_stdout(sys.stderr):  # what a simulator prints is no part of the result
        record = api.evaluate(**options, quiet=json_only and not sys.stderr.isatty())
    print(json.dumps(record, allow_nan=False) if json_only else record)


@dataclass(frozen=True)
class _Watch(Unnamed):
    policies: Positional[tuple[Path, ...]]
    """One policy, or several to stand side by side: run directories, expert directories, checkpoints, or
    Stable-Baselines3 .zips."""
    out: Path = Path("game.mp4")
    """The film, .mp4, .gif or a page, .html; must not exist."""
    seed: int = 1
    """Seeds the game."""
    max_steps: int = 3_000
    """Agent steps to film at most (15 a second of play)."""
    actions: Annotated[str, arg(metavar="greedy|sampled")] = "greedy"
    """The most probable action, or one drawn from the policy."""
    inside: bool = False
    """Draw the network of one small policy beside its game: its weights, and what they make of each frame."""


def watch(arguments: Sequence[str]) -> None:
    """`potstill watch`."""
    from potstill.watch import film

    options = vars(parse(_Watch, arguments, "watch"))
    paths = options.pop("policies")
    if not paths:
        raise lacking("watch", "POLICIES")
    loaded = load_all(paths, options.pop("env"), statistics=options.pop("statistics"))
    film(list(zip(_roles(paths, loaded), loaded, strict=True)), **options)
    print(options["out"])


def _roles(paths: Sequence[Path], loaded: Sequence[LoadedPolicy]) -> list[str]:
    """What a film calls policies: teacher beside its student, else how they came to be; without a run, the file."""
    documents = [read_json(file) if (file := path / "config.json").is_file() else {} for path in paths]
    taught_by = {document.get("teacher_hash") for document in documents} - {None}

    def role(path: Path, policy: LoadedPolicy, document: dict[str, Any]) -> str:
        if taught_by and policy.hash in taught_by:
            return "teacher"
        if not document:
            return path.stem
        return "student" if document.get("kind") == "distill" else look_of(arm_of(document)).label

    return [role(*each) for each in zip(paths, loaded, documents, strict=True)]


@dataclass(frozen=True)
class _Report:
    studies: Positional[tuple[Path, ...]]
    """Folders of studies' records, such as data/results/first/pong, or of run directories: one page, one task each."""
    out: Path | None = None
    """The page, .html; an older one there is replaced. Default: report.html in the (first) study's folder."""
    resamples: int = 10_000
    """Resamples of every bootstrap."""
    seed: int = 0
    """Seeds the resamples."""


def report(arguments: Sequence[str]) -> None:
    """`potstill report`."""
    from potstill.report import page

    options = parse(_Report, arguments, "report")
    if options.resamples < 100:
        raise InputError(f"resamples must be 100 or more, not {options.resamples}: percentiles are read from them")
    if not options.studies:
        raise lacking("report", "STUDIES")
    out = options.out or options.studies[0] / "report.html"
    with Console(stderr=True).status("potstill report: computing and drawing"):
        said = page.write(options.studies, out, options.seed, options.resamples)
    for line in said:
        print(fitted(line))
    print(out)


@dataclass(frozen=True)
class _Info:
    """Versions, devices, cores: what a bug report needs."""


def info(arguments: Sequence[str]) -> None:
    """`potstill info`."""
    import platform
    from importlib import metadata

    import torch

    from potstill import __version__
    from potstill.networks import resolve_precision

    parse(_Info, arguments, "info")
    cpu = torch.device("cpu")
    print(f"potstill    {__version__}")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    packages = "torch ale-py gymnasium numpy scipy polars safetensors tyro matplotlib"
    for package in f"{packages} minatar Box2D tensorboard wandb onnx onnxruntime".split():
        try:
            print(f"{package:<11} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<11} not installed (optional)")
    print(f"processor   {processor()}")
    print(f"cores       {Runtime().cores}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    print(f"device      {resolve_device('auto')} (cuda {cuda}, mps {mps})")
    print(f"precision   {str(resolve_precision('auto', cpu)).removeprefix('torch.')} on the CPU, as measured just now")
