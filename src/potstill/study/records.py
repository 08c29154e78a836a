"""A study's folder: one small JSON record per run, `study.json`, and the run directories themselves under `runs/`."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from potstill import __version__, evaluation
from potstill.envs import Envs
from potstill.errors import InputError
from potstill.load import Origin, load
from potstill.networks import NetworkConfig, Policy
from potstill.policies import recorded_result
from potstill.ppo import PPOConfig
from potstill.results import Found, as_record, find_runs, tell
from potstill.storage.checkpoints import write_atomically
from potstill.storage.files import read_json
from potstill.storage.runs import FORMAT_VERSION, InUseError, Run, read_document, working_in
from potstill.study.execute import Ended, execute, identity, teacher_of_run
from potstill.study.plan import WHOLE, Part, Plan, RunSpec
from potstill.training.runtime import Runtime

_COSTS = ("env_steps", "gradient_steps", "training_macs")


def run_study(plan: Plan, out: Path, runtime: Runtime, *, part: Part = WHOLE, **options: Any) -> Iterator[Ended]:
    """Runs what the plan asks for and `out` does not hold yet; every run that ends leaves its record in `out`.

    A run that is recorded as done is never run again. What failed is run again by the next call. Several calls on one
    `out` share the work, and each yields every run. What cannot be read is named on stderr and left; the others go on.

    Args:
        part: the runs alone to do, with those that they begin with.
        options: `workers`, `retries`, `patience` and `start`, as `execute` has them.

    Yields:
        Every run as it ends.

    Raises:
        InputError: `out` holds a record of a run with other settings, or the plan has nothing of such a part.
        StudyInterrupted: as `execute`.
    """
    specs = plan.specs()
    wanted = plan.specs_of(part)
    _check_task(plan, specs, wanted)
    with _alone_in(out) as folder:
        found = find_recorded(out)
        tell(found)
        done = [name for name, record in recorded(specs, out).items() if record["status"] == "done"]
        document = {
            "name": plan.name,
            "plan": plan.text,
            "potstill": __version__,
            "planned": len(specs),
            "scores": plan.scores,
            "task": asdict(plan.task),
        }
        document["random_score"] = _random_score(plan, out, runtime, folder)
        write_atomically(out / "study.json", _json(document))
    for spec in [spec for spec in wanted if spec.name in found.damaged]:  # left as it is
        wanted.remove(spec)
        yield Ended(spec, None, found.damaged[spec.name])
    for ended in execute(wanted, out / "runs", runtime, plan.evaluation, done=done, **options):
        path = out / f"{ended.spec.name}.json"
        try:
            record = make_record(ended, out / "runs")
        except InputError as error:  # a bad line in its metrics, say
            ended = Ended(ended.spec, None, str(error))
            record = make_record(ended, out / "runs")
        record |= {"random_score": document["random_score"]}
        if not _is_noted(path, record):
            write_atomically(path, _json(record))
        yield ended


def _check_task(plan: Plan, specs: list[RunSpec], wanted: list[RunSpec]) -> None:
    """Refuses teachers of another task than the plan's: their students would be held against scores of that. How they
    are played may differ, where no arm learns from the plan's task itself."""
    task, rewarded = plan.task, any(isinstance(spec.config, PPOConfig) for spec in specs)
    for teacher in {spec.teacher for spec in wanted if spec.teacher is not None}:
        env = load(teacher).env
        seen = env
        if env.id == task.id:  # of another task nothing can be said in this one's words
            seen = replace(env, view=(), hidden_rows=task.hidden_rows, layout=task.layout)
        differs = seen != task if rewarded else any(getattr(seen, key) != each for key, each in plan.played.items())
        if env.id != task.id or differs:
            ours = asdict(task)
            other = ", ".join(name.replace("_", "-") for name, value in asdict(seen).items() if value != ours[name])
            left = "the arms that learn from reward" if rewarded else "[task] of the plan"
            how = f" with other {other}: leave out {left}" if env.id == task.id else ""
            raise InputError(f"{teacher.path} plays {env.id}{how}, the plan's task is {task.id}")


@contextmanager
def _alone_in(out: Path) -> Iterator[Run]:
    """Holds the lock of a study's folder, for which it waits: several may begin at once."""
    with ExitStack() as stack:
        while True:
            try:
                folder = stack.enter_context(working_in(out))
                break
            except InUseError:
                time.sleep(0.2)
        yield folder


def _is_noted(path: Path, record: dict[str, Any]) -> bool:
    """Whether another process on the same folder has written this record already."""
    try:
        there = read_document(path)
    except InputError:
        return False
    return there.get("status") == "done" and there.get("identity") == record["identity"]


def find_recorded(out: Path) -> Found:
    """The records in `out`, and what of it cannot be read."""
    return find_runs(out) if out.is_dir() else Found([], {}, [])


def recorded(specs: list[RunSpec], out: Path) -> dict[str, dict[str, Any]]:
    """The records in `out` of these runs, by name.

    Raises:
        InputError: one is of a run with other settings.
    """
    names = {spec.name: spec for spec in specs}
    found = {record["run"]: record for record in find_recorded(out).records if record["run"] in names}
    hashes: dict[Origin, str] = {}
    for name, record in found.items():
        if record.get("identity") != identity(names[name], hashes):
            raise InputError(
                f"{out / name}.json is of a run with other settings or another teacher than the plan now asks for:"
                " name the study otherwise, choose another --out, or move that record away"
            )
    return found


def status(plan: Plan, out: Path) -> dict[str, Any]:
    """How far a study is: counts of done, running, interrupted, failed and missing runs, and why each failed one did.

    A damaged run counts as failed. `damaged` names the records that cannot be read, `ignored` JSON that is no record.
    """
    specs = plan.specs()
    found, records = find_recorded(out), recorded(specs, out)
    counts = dict.fromkeys(("done", "running", "interrupted", "failed", "missing"), 0)
    failed = {}
    for spec in specs:
        name, path = spec.name, out / "runs" / spec.name
        state = records[name]["status"] if name in records else "missing"
        try:
            if name in found.damaged:
                raise InputError(found.damaged[name])
            if state != "done" and (path / "config.json").is_file():
                now = Run.open(path).status
                if now == "running" or state != "failed":
                    state = {"new": "missing", "done": "interrupted"}.get(now, now)  # done: and not recorded yet
            if state == "failed":
                told = records.get(name) or read_document(path / "result.json")
                failed[name] = str(told.get("error"))
        except InputError as error:
            state, failed[name] = "failed", str(error)
        counts[state] += 1
    return {
        "study": plan.name, "planned": len(specs), **counts, "failures": failed,
        "damaged": found.damaged, "ignored": found.ignored,
    }  # fmt: skip


def make_record(ended: Ended, runs: Path) -> dict[str, Any]:
    """What is kept of a run: its result, what it was, what its teacher cost, its learning curve."""
    spec, run = ended.spec, ended.run
    record: dict[str, Any] = {"run": spec.name}
    if run is not None:
        record = as_record(run.path)
    record["format"] = FORMAT_VERSION
    record |= {"status": "done" if ended.error is None else "failed", "error": ended.error}
    record["identity"] = identity(spec, {})
    teacher = teacher_of_run(spec)
    record |= {"arm": spec.arm, "method": spec.method, "teacher": teacher.name if teacher is not None else None}
    if teacher is not None:
        theirs = recorded_result(load(teacher)) or {}
        record |= {f"teacher_{cost}": theirs.get(cost) for cost in _COSTS}
    if spec.start_from is not None and (runs / spec.start_from.name / "result.json").is_file():
        before = read_document(runs / spec.start_from.name / "result.json")
        record |= {f"initial_{cost}": before.get(cost) for cost in _COSTS}
    return record


def _random_score(plan: Plan, out: Path, runtime: Runtime, folder: Run) -> float:
    """Mean score of a uniformly random policy over 32 games, measured once per study."""
    task = json.loads(_json(asdict(plan.task)))
    with suppress(InputError, KeyError, ValueError, TypeError):
        known = read_json(out / "study.json")
        if known.get("task", task) == task:
            return float(known["random_score"])
    env = plan.task
    with closing(Envs(env, 1)) as envs:
        policy = Policy(NetworkConfig(width="1/32"), **envs.spaces)
    alone = all(spec.config.num_envs == 1 for spec in plan.specs())
    start = evaluation.Start(steps=1 << 40)  # it never takes over
    for so_far in evaluation.play(policy, env, episodes=32, seed=1, start=start, threads=runtime.cores, alone=alone):
        last = so_far
        folder.touch_lock()
    return float(last.summary()["mean"])


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
