"""`potstill compare` and `potstill study`: parse, do the runs, print the table."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional

from potstill import api
from potstill.errors import InputError, printable
from potstill.evaluation import EvalConfig
from potstill.options import parse
from potstill.report import scaling_figures as drawn
from potstill.report.answers import answer
from potstill.report.figures import save
from potstill.report.page import read_study
from potstill.results import runs_table, write_tables
from potstill.storage.checkpoints import write_atomically
from potstill.storage.runs import next_directory, working_in
from potstill.study import records, tune
from potstill.study.execute import StudyInterrupted, execute
from potstill.study.grid import Grid
from potstill.study.plan import WHOLE, Part, Plan, Pool
from potstill.study.planfile import read_plan
from potstill.training.runtime import Runtime


@dataclass(frozen=True)
class _Compare:
    out: Path | None = None
    """Folder of the comparison. Where it exists, only what is missing is run. Default: a new one under distill_run/."""
    workers: int = 0
    """Runs at a time, each on one core; 0 takes all cores."""
    grid: OmitArgPrefixes[Grid] = field(default_factory=Grid)
    runtime: OmitArgPrefixes[Runtime] = field(default_factory=Runtime)
    evaluation: OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)


def compare(arguments: Sequence[str]) -> None:
    """`potstill compare`: a grid of distillations, then its tables and figures."""
    options = parse(_Compare, arguments, "compare", _Compare())
    out = options.out or next_directory(Path("distill_run"), "comparison")
    specs = options.grid.specs()
    try:
        with working_in(out) as folder:
            runs = execute(specs, out, options.runtime, options.evaluation, workers=options.workers, study=folder)
            failed = {ended.spec.name: ended.error for ended in runs if ended.error is not None}
    except StudyInterrupted as stop:
        print(f"potstill: {stop}: --out {out}", file=sys.stderr)
        sys.exit(stop.code)
    write_tables(out)
    _print(api.overview(runs_table(out)))
    for draw in (drawn.size_score, drawn.learning_curves, drawn.score_distributions, drawn.agreement_score):
        path = out / f"{draw.__name__}.png"
        try:
            save(draw(answer(read_study(out).records, resamples=1_000)), path)
            print(path)
        except InputError as error:  # not evaluated, or of several tasks: the table stands without the figure
            print(f"potstill: no {path}: {error}", file=sys.stderr)
    _exit_for(failed, len(specs))


@dataclass(frozen=True)
class _Study:
    plan: Positional[Path]
    """The plan, a TOML file: see docs/reference/plan.md."""
    out: Path | None = None
    """Folder of the study's records, with the run directories under `runs`. Default: results/<name of the plan>."""


@dataclass(frozen=True)
class _StudyTune(_Study):
    pool: OmitArgPrefixes[Pool] = field(default_factory=Pool)
    runtime: OmitArgPrefixes[Runtime] = field(default_factory=lambda: Runtime(threads=1))  # of each run


@dataclass(frozen=True)
class _StudyRun(_StudyTune):
    part: OmitArgPrefixes[Part] = WHOLE


@dataclass(frozen=True)
class _StudyStatus(_Study):
    json: bool = False
    """Print one JSON object on stdout and nothing else."""


@dataclass(frozen=True)
class _StudyTable:
    folder: Positional[Path]
    """Folder of a study's records, or of run directories."""
    out: Path
    """The table: .csv or .parquet; must not exist."""


def study_run(arguments: Sequence[str]) -> None:
    options = parse(_StudyRun, arguments, "study run")
    plan = read_plan(options.plan)
    out = options.out or Path("results") / plan.name
    failed = _drive(plan, out, options, options.part)
    _exit_for(failed, len(plan.specs()))


def _drive(plan: Plan, out: Path, options: _StudyTune, part: Part = WHOLE) -> dict[str, str]:
    """Runs a plan and prints its table; the runs that failed, with the reason."""
    whole, threads = replace(options.runtime, threads=0), options.runtime.threads
    done = api.study(plan, out=out, part=part, pool=options.pool, threads=threads, runtime=whole)
    if done.ran:
        _print(done.__rich__())
    else:
        print(f"nothing to do: all runs of {'the plan' if part == WHOLE else 'this part of the plan'} are done")
    print(out)
    return done.failed


def study_tune(arguments: Sequence[str]) -> None:
    options = parse(_StudyTune, arguments, "study tune")
    plan = read_plan(options.plan)
    trial_plan = tune.tuning_plan(plan)
    out = (options.out or Path("results") / plan.name) / "tune"
    failed = _drive(trial_plan, out, options)
    _exit_for(failed, len(trial_plan.specs()))
    chosen = tune.as_toml(tune.choose(plan, list(records.recorded(trial_plan.specs(), out).values())))
    write_atomically(out / "chosen.toml", chosen.encode())
    print(chosen)
    print(out / "chosen.toml")


def study_status(arguments: Sequence[str]) -> None:
    options = parse(_StudyStatus, arguments, "study status")
    plan = read_plan(options.plan)
    report = records.status(plan, options.out or Path("results") / plan.name)
    if options.json:
        print(json.dumps(report))
        return
    counts = [f"{report[state]} {state}" for state in ("done", "running", "interrupted", "failed")]
    print(f"{report['study']}: {report['planned']} runs, {', '.join(counts)}, {report['missing']} not begun yet")
    for name, error in report["failures"].items():
        print(printable(f"{name}: {error}"))
    for line in (*report["damaged"].values(), *report["ignored"]):
        print(f"potstill: {line}", file=sys.stderr)


def study_table(arguments: Sequence[str]) -> None:
    options = parse(_StudyTable, arguments, "study table")
    if options.out.suffix not in (".csv", ".parquet"):
        raise InputError(f"{options.out} is neither a .csv nor a .parquet")
    if options.out.exists():
        raise InputError(f"{options.out} exists: choose another --out")
    table, data = runs_table(options.folder), BytesIO()
    (table.write_csv if options.out.suffix == ".csv" else table.write_parquet)(data)
    write_atomically(options.out, data.getvalue())
    print(options.out)


def _exit_for(failed: dict[str, str], planned: int) -> None:
    """Nothing fails silently: exit code 1, and why, run by run."""
    if failed:
        print(f"potstill: {len(failed)} of {planned} runs failed (see log.txt there):", file=sys.stderr)
        for name, error in failed.items():
            print(f"  {printable(name)}: {printable(error)}", file=sys.stderr)
        sys.exit(1)


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)
