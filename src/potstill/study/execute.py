"""Runs the cells of a plan, one single-threaded process per core, and goes on where an earlier call stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from potstill import telemetry
from potstill.errors import InputError
from potstill.jobs import Machine, file_hash, new_distillation, resolved
from potstill.policies import load_policy
from potstill.runs import Run, StopRequested, stop_on_signals
from potstill.study.plan import Cell


class StudyInterrupted(Exception):
    """The study was asked to stop; its runs are saved."""

    def __init__(self, stop: StopRequested) -> None:
        assert stop.requested is not None
        self.code = 128 + stop.requested
        super().__init__(f"stopped by {stop.requested.name}; the same command goes on with it")


@dataclass
class _Worker:
    cell: Cell
    run: Run
    process: "subprocess.Popen[bytes]"


def execute(cells: Sequence[Cell], out: Path, machine: Machine, workers: int = 0) -> list[str]:
    """Runs all cells that are not done yet, at most `workers` at a time (0: one per core).

    Each is a process of its own: what kills one leaves the others alone. Its output goes to log.txt in its directory.

    Returns:
        The names of the runs that failed.

    Raises:
        InputError: a run in `out` belongs to another plan, or what is asked for does not fit.
        StudyInterrupted: SIGINT or SIGTERM; the workers have saved and stopped.
    """
    if workers < 0:
        raise InputError(f"workers must be 0 or more, not {workers}")
    workers = workers or machine.cores
    single = replace(machine, threads=1)
    runs = {cell.name: _open_or_create(cell, out, single) for cell in cells}
    waiting = [cell for cell in cells if runs[cell.name].status != "done"]
    total, failed = len(cells), []
    active: list[_Worker] = []
    began, finished_here = time.monotonic(), 0
    console = Console(stderr=True)
    with stop_on_signals() as stop, Live(console=console, auto_refresh=False, transient=True) as live:
        printed = 0.0
        try:
            while (waiting or active) and not stop.requested:
                while waiting and len(active) < workers:
                    cell = waiting.pop(0)
                    active.append(_Worker(cell, runs[cell.name], _start(runs[cell.name], single, out)))
                time.sleep(0.5)
                for worker in [w for w in active if w.process.poll() is not None]:
                    active.remove(worker)
                    finished_here += 1
                    if worker.run.status != "done":
                        failed.append(worker.cell.name)
                left = _time_left(began, finished_here, active, len(waiting))
                if console.is_terminal:
                    live.update(_table(active, total, len(waiting), failed, left), refresh=True)
                elif time.monotonic() - printed > 30 and not machine.quiet:
                    printed = time.monotonic()
                    done = total - len(waiting) - len(active) - len(failed)
                    words = "  ".join(f"{w.cell.name} {_progress(w.run)[0]}" for w in active)
                    print(
                        f"study  {done}/{total} done, {len(failed)} failed  {words}  {left} left",
                        file=sys.stderr,
                        flush=True,
                    )
        finally:  # asked to stop, or failed here: no worker is left behind, and each saves first
            for worker in active:
                worker.process.send_signal(signal.SIGTERM)
            for worker in active:
                worker.process.wait()
        if stop.requested:
            raise StudyInterrupted(stop)
    return failed


def _open_or_create(cell: Cell, out: Path, machine: Machine) -> Run:
    path = out / cell.name
    if not path.exists():
        return new_distillation(cell.config, cell.teacher, path, machine)
    run = Run.open(path)
    stored = run.config.get("config", {})
    config = cell.config
    if config.precision == "auto":  # measuring it again might come to something else
        config = replace(config, precision=stored.get("precision", "auto"))
    if stored != resolved(config, machine):
        raise InputError(f"{path} is a run with other settings: choose another --out")
    if run.config.get("teacher_hash") != file_hash(load_policy(cell.teacher).path):
        raise InputError(f"{path} is a run with another teacher: choose another --out")
    return run


def _start(run: Run, machine: Machine, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "potstill", "distill", "--resume", str(run.path), "--data", str(out / "data")]
    command += ["--threads", str(machine.threads), "--device", machine.device, "--evaluate", str(machine.evaluate)]
    command += ["--save-every", str(machine.save_every), *(["--track"] if machine.track else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(run.path / "log.txt", "ab") as log:
        # Its own session: Ctrl-C reaches this process alone, which then asks its workers to save.
        return subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )


def _progress(run: Run) -> tuple[str, float]:
    """What a run says of itself, and the share of its training that is done."""
    if not run.metrics_path.exists():
        return "starting", 0.0
    records = telemetry.read(run.metrics_path)
    if not records:
        return "starting", 0.0
    total = int(run.config["config"]["total_timesteps"])
    share = min(records[-1]["step"] / total, 1.0)
    agreement = records[-1].get("agreement")
    words = "evaluating" if share >= 1.0 else f"{share:.0%}"
    return words + (f", agreement {agreement:.3f}" if agreement is not None else ""), share


def _time_left(began: float, finished: int, active: list[_Worker], waiting: int) -> str:
    """Extrapolated from the runs of this call; says nothing before there is anything to go by."""
    done = finished + sum(0.8 * _progress(w.run)[1] for w in active)  # evaluation takes about the last fifth
    if done < 0.05:
        return "--:--"
    seconds = (time.monotonic() - began) / done * (len(active) + waiting + finished - done)
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _table(active: list[_Worker], total: int, waiting: int, failed: list[str], left: str) -> Table:
    done = total - waiting - len(active) - len(failed)
    table = Table(
        title=f"{done} of {total} done, {waiting} waiting, {len(failed)} failed, {left} left", title_justify="left"
    )
    table.add_column("run")
    table.add_column("progress")
    for worker in active:
        table.add_row(worker.cell.name, _progress(worker.run)[0])
    return table
