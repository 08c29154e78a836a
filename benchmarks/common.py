"""What the benchmarks share: one thread, the machine's name, child processes, and where results go."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def one_thread() -> None:
    """This process computes as a study's runs do: on one core."""
    from potstill.training.runtime import (
        Runtime,
    )  # torch comes with it, and whoever measures start-up must not pay for it

    Runtime(threads=1).apply()


def child(
    command: Sequence[str | Path], cwd: Path = ROOT, each: Callable[[Row], None] = lambda row: None
) -> tuple[list[Row], float]:
    """Runs `python COMMAND` to its end.

    Args:
        each: called with every line of JSON it prints, when it prints it.

    Returns:
        All of these, and the peak resident memory of the process, GiB.
    """
    rows: list[Row] = []
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                each(rows[-1])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"python {shlex.join(map(str, command))} failed")
    return rows, usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def sb3_pong(num_envs: int, sticky: float, seed: int) -> "VecEnv":
    """Pong as Stable-Baselines3 plays it, stacks of four frames, with the emulator's own sticky actions, as ours.

    Frames are skipped once, by the wrapper.
    """
    import ale_py
    import cv2
    import gymnasium
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    cv2.setNumThreads(1)
    gymnasium.register_envs(ale_py)
    emulator = {"repeat_action_probability": sticky}
    return VecFrameStack(make_atari_env("PongNoFrameskip-v4", num_envs, seed=seed, env_kwargs=emulator), 4)


def say(**row: Any) -> None:
    """A line of JSON for the process that called this one with `child`."""
    print(json.dumps(row), flush=True)


def others(name: str, who: str, seed: int) -> list[Row]:
    """The records saved under that name so far, but those of this contender and seed.

    Read anew before each `save`, so that two contenders may be measured at the same time, each on a core of its own.
    """
    path = RESULTS / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text())["runs"] if path.exists() else []
    return [row for row in rows if (row["who"], row["seed"]) != (who, seed)]


def save(name: str, rows: list[Row], **facts: Any) -> Path:
    """Keeps whole records in benchmarks/results/, with the command, the commit and the machine that made them."""
    document = {"command": _command(), "commit": commit(), "machine": _machine(), **facts, "runs": rows}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def publish(name: str, rows: list[Row], keys: Sequence[str], **facts: Any) -> None:
    """Saves the records, and prints those `keys` of them as a Markdown table with the command, commit and machine."""
    path = save(name, rows, **facts)
    print("| " + " | ".join(key.replace("_", " ") for key in keys) + " |\n" + "|---" * len(keys) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(key)) for key in keys) + " |")
    machine = _machine()
    print(f"\n`{_command()}` at commit `{commit()}`, {machine['cpu']}, {machine['cores']} cores, torch"
          f" {machine['torch']}: [{path.relative_to(ROOT)}](../{path.relative_to(ROOT)})")  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _command() -> str:
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.check_output(["git", "-C", str(ROOT), *words], text=True).strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def _machine() -> Row:
    from importlib.metadata import version

    from potstill.training.runtime import processor

    return {"cpu": processor(), "cores": os.cpu_count(), "torch": version("torch"), "python": platform.python_version()}
