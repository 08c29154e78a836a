import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill import __version__, evaluation
from potstill.distill import DistillConfig
from potstill.menu import COMMANDS
from potstill.networks import NetworkConfig, Policy
from potstill.options import FIRST, peek
from potstill.policies import save_policy
from potstill.ppo import PPOConfig
from potstill.storage.runs import Run
from potstill.tasks import TASKS
from potstill.training.runtime import Runtime, processor

ROOT = Path(__file__).parents[1]
TINY = ["--total-timesteps", "256", "--num-envs", "4", "--num-steps", "64", "--minibatch-size", "64"]
TINY += ["--width", "1/8", "--normalise-inputs", "40", "--precision", "float32"]
RUNTIME = ["--device", "cpu", "--threads", "1"]
RECORD = {"mean", "ci95", "median", "std", "episodes", "distinct", "p_negative", "parameters", "macs", "bytes"}
RECORD |= {"latency_ms", "returns"}


@pytest.fixture(autouse=True)
def handlers():
    """A process in the background may ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """CartPole policies `one` and `two`, and one of Pong."""
    folder = tmp_path_factory.mktemp("policies")
    for name, task, shape in (("one", "cartpole", (4,)), ("two", "cartpole", (4,)), ("pong", "pong", (4, 84, 84))):
        seed = len(list(folder.iterdir()))
        policy = Policy(NetworkConfig(width="1/32"), shape, 2 if task == "cartpole" else 3)
        policy.initialise(torch.Generator().manual_seed(seed))
        probe = (
            np.random.default_rng(seed).integers(0, 4, (4, *shape)).astype(np.float32 if shape == (4,) else np.uint8)
        )
        (folder / name).mkdir()
        save_policy(folder / name / "policy.safetensors", policy, TASKS[task].env, probe, {})
    return folder


def is_one_line(text):
    return text.startswith("potstill: ") and text.count("\n") == 1


def test_evaluate_json_is_one_object_on_stdout_and_nothing_else(call, policies):
    code, out, _ = call("evaluate", policies / "one", "--episodes", 4, "--json", *RUNTIME)
    record = json.loads(out)
    assert code == 0
    assert set(record) >= RECORD
    assert not {"agreement", "kl"} & set(record)
    assert record["episodes"] == len(record["returns"]) == 4
    assert record["mean"] == sum(record["returns"]) / 4
    assert (record["actions"], record["sticky"], record["start_steps"]) == ("greedy", 0.0, 0)


def test_evaluate_with_a_teacher_tells_how_far_the_policy_is_from_it(call, policies):
    words = ["evaluate", policies / "one", "--episodes", 2, "--json", *RUNTIME]
    far, near = (json.loads(call(*words, "--teacher", policies / name)[1]) for name in ("two", "one"))
    assert set(far) >= RECORD | {"agreement", "kl", "agreement_teacher_states", "kl_teacher_states"}
    assert (near["agreement"], near["agreement_teacher_states"]) == (1.0, 1.0)
    assert near["kl"] < 1e-6 < far["kl"]


def test_evaluate_plays_the_same_games_for_the_same_seed(call, policies):
    words = ["evaluate", policies / "one", "--episodes", 4, "--json", "--actions", "sampled", *RUNTIME]
    again, same, other = (json.loads(call(*words, "--seed", seed)[1])["returns"] for seed in (3, 3, 4))
    assert again == same != other


def test_evaluate_prints_its_figures_for_people(call, policies):
    code, out, err = call("evaluate", policies / "one", "--episodes", 2, *RUNTIME)
    assert code == 0
    mean = next(line.split()[-1] for line in out.splitlines() if line.startswith("mean score"))
    assert f"  score {float(mean):.3g}  " in err  # how it stands while it plays
    assert any(line.split() == ["games", "2"] for line in out.splitlines())
    assert "returns" not in out
    assert "evaluate CartPole-v1, width 1/32" in err


@pytest.mark.parametrize("who", ["random", "policy"])
def test_a_game_may_start_with_somebody_elses_play(call, policies, who):
    who = policies / "two" if who == "policy" else who
    words = ["evaluate", policies / "one", "--episodes", 4, "--json", *RUNTIME]
    record = json.loads(call(*words, "--start", f"{who}:1000")[1])
    assert record["start_steps"] == 1000
    assert record["returns"] != json.loads(call(*words)[1])["returns"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--start", "random"], "start 'random' is not understood; write random:200 or POLICY:200"),
        (["--start", "random:"], "is not understood"),
        (["--start", "random:-5"], "is not understood"),
        (["--start", "random:²"], "is not understood"),
        (["--start", ":20"], "is not understood"),
        (["--start", "nobody:20"], "cannot read nobody"),
        (["--sticky", "0.25"], "CartPole-v1 has no sticky actions"),
        (["--sticky", "1.5"], "sticky must be a probability"),
        (["--actions", "best"], "actions are greedy or sampled, not 'best'"),
        (["--episodes", "0"], "episodes must be at least 1"),
        (["--threads", "-1"], "threads must be 0 or more"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--teacher", "nobody"], "cannot read nobody"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--seed", str(2**63)], "seed must be below 2^63"),
    ],
)
def test_a_bad_option_of_evaluate_is_one_line_and_exit_code_2(call, policies, options, words):
    code, out, err = call("evaluate", policies / "one", "--episodes", 2, "--json", *options)
    assert (code, out) == (2, "")
    assert words in err
    assert is_one_line(err)


def test_a_teacher_of_another_task_is_refused_before_any_game(call, policies, monkeypatch):
    monkeypatch.setattr(evaluation, "play", None)
    code, _, err = call("evaluate", policies / "one", "--teacher", policies / "pong", *RUNTIME)
    assert code == 2
    assert "reads observations of shape" in err
    assert is_one_line(err)


def test_train_makes_a_run_and_touches_no_other(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Of a flag given twice, as `python pong.py --env cartpole` does, the last one counts.
    words = ["train", "--env", "pong", "--env", "cartpole", *TINY, *RUNTIME, "--evaluate", 2]
    code, out, err = call(*words)
    run = next(Path("cartpole_run").iterdir())
    assert (code, out.splitlines()[0]) == (0, str(run))
    assert run.name.endswith("_seed-0")
    assert "256/256" in err
    result = json.loads((run / "result.json").read_text())
    assert (result["env"], result["status"], result["episodes"]) == ("CartPole-v1", "done", 2)
    assert any(line.split() == ["distinct", "games", str(result["distinct"])] for line in out.splitlines())

    code, out, err = call("train", "--resume", run)
    assert (code, out, err) == (2, "", f"potstill: {run} is finished: its result is in result.json\n")
    code, out, err = call(*words, "--out", run)
    assert (code, out, err) == (2, "", f"potstill: {run} exists: choose another --out\n")
    assert call(*words, "--quiet")[0] == 0
    assert len(list(Path("cartpole_run").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--env", "cartpol"], "no environment is called 'cartpol'; did you mean cartpole?"),
        (["--env", "ALE/Pong-v5"], "write ale/pong"),
        (["--total-timesteps", "0"], "total-timesteps must be at least 1, not 0"),
        (["--num-envs", "-4"], "num-envs must be at least 1, not -4"),
        (["--learning-rate", "nan"], "learning-rate must be positive and finite, not nan"),
        (["--width", "0"], "width must be above 0"),
        (["--width", "wide"], "width 'wide' is not a number"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--seed", str(2**63)], "seed must be below 2^63, not 9223372036854775808"),
        (["--threads", "1000000"], f"threads must be at most {8 * os.cpu_count()} on this machine"),
        (["--total-timesteps", str(2**70)], f"total-timesteps must be below 2^63, not {2**70}"),
        (["--total-timesteps", str(2**62)], "total-timesteps must be at most 1,099,511,627,776, not 4,611"),
        (["--num-steps", str(2**40)], "num-envs x num-steps must be 2 to 1,099,511,627,776, not 8,796,093,022,208"),
        (["--num-envs", "1", "--num-steps", "1"], "num-envs x num-steps must be 2 to"),
        (["--num-envs", "1000000000"], "num-envs must be at most 65,536, not 1,000,000,000"),
        (["--epochs", str(2**64)], "epochs must be below 2^63"),
        (["--evaluate", str(2**64)], "episodes must be below 2^63"),
        (["--evaluate", "-1"], "evaluate must be 0 or more, not -1"),
        (["--threads", "-1"], "threads must be 0 or more, not -1"),
        (["--save-every", "nan"], "save-every must be 0 or more, not nan"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--sticky", "0.25"], "CartPole-v1 has no sticky actions"),
        (["--network", "nature"], "reads images"),
        (["--network", "my_nets:build"], "code of module my_nets: allow it with --import my_nets"),
        (["--network-option", "layer=64"], "network mlp has no option 'layer': it has layers, activation"),
        (["--out", "file/run"], "cannot make file/run: "),
        (["--resume", "nowhere"], "nowhere does not exist"),
        (["--resume", "nowhere", "--out", "here"], "--out names a new one: leave one of them out"),
        (["--resume", "file"], "file is a file, not a run directory"),
    ],
)
def test_a_bad_option_of_train_is_one_line_and_makes_nothing(call, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, out, err = call("train", "--env", "cartpole", *options)
    assert (code, out) == (2, "")
    assert words in err
    assert is_one_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --num-envs many", "train: --num-envs is a whole number, not 'many'"),
        ("train --num-envs 50%", "train: --num-envs is a whole number, not '50%'"),
        ("train --gamma 99%", "train: --gamma is a number, not '99%': write 0.99"),
        ("train --precision float8", "train: invalid choice 'float8' for argument '--precision'. Expected one of"),
        ("train --env", "train: Missing value for argument '--env'"),
        ("compress one --keep 95%", "compress: --keep is a number, not '95%': write 0.95"),
        ("compress one --max-parameters 50%", "compress: --max-parameters is a whole number, not '50%'"),
        ("evaluate one --sticky 12.5%", "evaluate: --sticky is a number, not '12.5%': write 0.125"),
        ("compare --seeds 0 x", "compare: --seeds: Could not find valid parse for arguments: ['0', 'x']"),
        ("evaluate", "evaluate needs POLICY, such as potstill evaluate data/experts/pong/seed-0"),
        ("evaluate --episodes 3", "evaluate needs POLICY, such as potstill evaluate data/experts/pong/seed-0"),
        ("watch", "watch needs POLICIES, such as potstill watch data/experts/pong/seed-0"),
        ("watch --seed 2", "watch needs POLICIES, such as potstill watch data/experts/pong/seed-0"),
        ("report", "report needs STUDIES, such as potstill report data/results/first/pong"),
        ("compress", "compress needs TEACHER, such as potstill compress data/experts/pong/seed-0 --keep 0.95"),
        ("export", "export needs POLICY, such as potstill export data/experts/pong/seed-0 --out policy.c"),
        ("study run", "study run needs PLAN, such as potstill study run plans/quick.toml"),
        ("study table results", "study table needs --out, such as potstill study table data/results/first/pong --out"),
        ("import-sb3 model.zip", "import-sb3 needs --env and --out, such as potstill import-sb3 model.zip --env pong"),
        ("push", "push needs POLICY and REPO_ID, such as potstill push data/experts/pong/seed-0 USER/NAME"),
    ],
)
def test_a_value_of_another_kind_and_a_missing_word_are_told_in_one_line_with_what_would_be_right(call, words, said):
    code, out, err = call(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"potstill: {said}")
    assert is_one_line(err)


def test_distill_needs_a_teacher(call, policies, tmp_path):
    code, _, err = call("distill", "--out", tmp_path / "run")
    assert (code, is_one_line(err)) == (2, True)
    assert "distill needs TEACHER, such as potstill distill data/experts/pong/seed-0" in err
    code, _, err = call("distill", "--resume", tmp_path, "--out", tmp_path / "run")
    assert (code, is_one_line(err)) == (2, True)
    assert "leave one of them out" in err
    code, _, err = call("distill", tmp_path, "--out", tmp_path / "run")
    assert (code, is_one_line(err)) == (2, True)
    assert "holds no policy.safetensors" in err
    assert list(tmp_path.iterdir()) == []


def test_distill_makes_a_run_named_after_what_it_is(call, policies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["distill", policies / "one", "--total-timesteps", 256, "--num-envs", 4, "--batch-size", 16]
    code, out, _ = call(*words, "--warmup-steps", 16, "--seed", 3, *RUNTIME, "--evaluate", 0)
    run = next(Path("distill_run").iterdir())
    assert (code, out) == (0, f"{run}\n")
    assert run.name.endswith("_width-1_8_student_seed-3")
    assert json.loads((run / "result.json").read_text())["teacher"] == str(policies / "one")


def test_a_training_that_diverges_ends_with_exit_code_1(call, tmp_path):
    words = ["--import", "json", "train", "--env", "cartpole", *TINY, *RUNTIME, "--quiet", "--out", tmp_path / "run"]
    code, out, err = call(*words, "--learning-rate", "1e20", "--max-learning-rate", "1e20")
    assert (code, out) == (1, "")
    assert err.startswith("potstill: train failed: ")
    assert "lower --learning-rate" in err
    assert is_one_line(err)
    assert Run.open(tmp_path / "run").status == "failed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_the_evaluation_tells_how_to_go_on(call, tmp_path, monkeypatch, number, code):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "latency", lambda policy: signal.raise_signal(number))
        words = ["train", "--env", "cartpole", *TINY, *RUNTIME, "--quiet", "--evaluate", 2]
        assert call(*words, "--out", run) == (
            code,
            "",
            f"potstill: stopped by {number.name}; continue with --resume {run}\n",
        )
    code, out, _ = call("train", "--resume", run, *RUNTIME, "--quiet", "--evaluate", 2)
    assert (code, out.splitlines()[0]) == (0, str(run))
    assert not (run / "resume.safetensors").exists()


def test_a_signal_where_nothing_is_to_be_saved_just_stops(call, policies, monkeypatch):
    monkeypatch.setattr(evaluation, "latency", lambda policy: signal.raise_signal(signal.SIGTERM))
    code, out, err = call("evaluate", policies / "one", "--episodes", 2, "--json", *RUNTIME)
    assert (code, out, err) == (143, "", "potstill: stopped\n")


def test_an_unknown_command_is_answered_with_the_nearest(call):
    assert call("trian") == (2, "", "potstill: no command is called 'trian'; did you mean train?\n")
    code, _, err = call("xyzzy")
    assert (code, is_one_line(err)) == (2, True)
    assert all(command in err for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("evaluate one --evaluate 30", "evaluate has no option --evaluate; did you mean --episodes?"),
        ("distill one --episodes=30", "distill has no option --episodes; did you mean --evaluate?"),
        ("compress one --episodes 30", "compress has no option --episodes; did you mean --games?"),
        ("train --lr 0.1", "train has no option --lr; did you mean --learning-rate?"),
        ("train --timesteps 9 --gama 1", "train has no option --timesteps; did you mean --total-timesteps?"),
        ("train --gama 1", "train has no option --gama; did you mean --gamma?"),
        ("train --teachers-name 1", "train has no option --teachers-name; did you mean --teacher?"),
        ("distill --teacher one", "distill has no option --teacher; see potstill distill --help"),
        ("train cartpole", "'cartpole' is one word too many for train: it may want an option before it, such as"),
        ("info now", "'now' is one word too many for info: it may want an option before it"),
        ("report one two --xyz", "report has no option --xyz; see potstill report --help"),
        (
            "study plan.toml",
            "no command is called 'study plan.toml'; write one of study run, study status, study tune,",
        ),
        ("study", "no command is called 'study'; write one of study run, study status, study tune, study table"),
        ("compress one --width=1/8", "compress has no option --width; did you mean --max-parameters?"),
    ],
)
def test_a_word_that_a_command_does_not_know_is_one_line_that_names_the_right_one(call, words, told):
    code, out, err = call(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"potstill: {told}")
    assert is_one_line(err)


def test_help_lists_every_command(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for command, each in COMMANDS.items():
        assert f"\n  potstill {command:<14}  {each.does}\n" in out
    assert call() == (2, out, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_its_defaults(call, command):
    code, out, err = call(*command.split(), "--help-all")
    assert (code, err) == (0, "")
    assert f"usage: potstill {command}" in out
    assert not re.search(r"\(default:\s*\)|\{\[", out)
    assert {
        "train": f"(default: {PPOConfig().total_timesteps})",
        "distill": f"(default: {DistillConfig().total_timesteps})",
        "compare": "(default: 1/4 1/8 1/16)",
        "study run": "(default: 900.0)",
        "study status": "--json",
        "study tune": "(default: 1)",
        "study table": "(required)",
        "report": "(default: 10000)",
        "compress": "(default: 0.95)",
        "evaluate": "(default: 100)",
        "watch": "(default: game.mp4)",
        "export": "(default: 20)",
        "import-sb3": "(default: 0.01)",
        "import-weights": "(default: auto)",
        "push": "(default: mit)",
        "pull": "(default: main)",
        "info": "-h, --help",
    }[command] in " ".join(out.replace("│", " ").split())


OPTION = re.compile(r"^  (?:-h, )?(--[a-z][a-z0-9-]*)", re.MULTILINE)


def test_a_long_help_shows_what_is_needed_first_on_two_screens_and_one_word_shows_all(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    known, long = set(), []
    for command in COMMANDS:
        short, whole = (call(*command.split(), word)[1] for word in ("--help", "--help-all"))
        assert max(map(len, (short + whole).splitlines())) <= 80
        assert len(short.splitlines()) <= 48, command
        assert f"\n\nSuch as: potstill {command}" in short
        first, every = OPTION.findall(short), OPTION.findall(whole)
        known.update(option.removeprefix("--") for option in every)
        assert not {f"--{name}" for name in COMMANDS[command].without}.intersection(every)
        assert "{None}" not in whole
        assert "(default: None)" not in whole
        if short != whole:
            long.append(command)
            assert short.endswith(f"\n{len(every) - len(first)} more options: potstill {command} --help-all\n")
            assert first == [option for option in every if option.removeprefix("--") in FIRST]
    assert long == ["train", "distill", "compare", "study run", "study tune", "compress"]
    assert known >= FIRST - {"help-all"}


def test_the_example_of_a_command_names_what_there_is():
    check = runpy.run_path(str(ROOT / "scripts" / "check_docs.py"))["broken_command"]
    for command, (_, _, example, _) in COMMANDS.items():
        assert check(f"potstill {command} {example}", check_flags=True) == []
        assert all((ROOT / word).exists() for word in example.split() if word.startswith(("data/", "plans/")))


def test_the_defaults_shown_are_those_of_the_task(call):
    _, out, _ = call("train", "--env", "cartpole", "--help-all")
    shown = " ".join(out.replace("│", " ").split())
    assert "(default: cartpole)" in shown
    assert "Probability that the emulator repeats" in shown
    assert "(default: 0.25)" not in shown  # Pong's stickiness


def test_a_help_text_breaks_its_lines_at_the_width_of_the_terminal_alone(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    _, out, _ = call("train", "--help")
    assert "or a Gymnasium id. The other defaults shown are this task's. (default: pong)" in out


def test_info_names_the_versions_and_the_machine(call):
    code, out, err = call("info")
    assert (code, err) == (0, "")
    for package in ("torch", "gymnasium", "ale-py"):
        assert f"{package:<11} {metadata.version(package)}\n" in out
    assert f"potstill    {__version__}\n" in out
    assert f"processor   {processor()}\ncores       {Runtime().cores}\n" in out
    assert "Traceback" not in out


def test_the_last_value_of_a_flag_counts_in_both_spellings():
    assert peek(["--env", "a", "--env=b"], "--env", "pong") == "b"
    assert peek(["--env=b", "--env", "a"], "--env", "pong") == "a"
    assert peek(["--environment", "a"], "--env", "pong") == "pong"


def test_compare_refuses_the_options_of_a_single_distillation(call, policies, tmp_path):
    for flag in ("--width", "--lead", "--seed"):
        code, _, err = call("compare", "--teachers", policies / "one", flag, "1", "--out", tmp_path / "out")
        assert (code, is_one_line(err)) == (2, True)
        assert f"compare has no option {flag}; did you mean {flag}s?" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "command"), [("pong", "train"), ("distill", "distill"), ("run_script", "compare")])
def test_a_front_door_shows_the_help_of_its_command(script, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert f"usage: potstill {command}" in capsys.readouterr().out


def test_help_comes_at_once():
    def seconds():
        before = os.times()
        subprocess.run([sys.executable, "-m", "potstill", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.7


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "potstill", "--version"], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"potstill {__version__}\n", "")


def test_pong_py_saves_when_it_is_terminated(tmp_path):
    run = tmp_path / "run"
    words = ["--env", "cartpole", *TINY, "--total-timesteps", "100000000", *RUNTIME, "--out", str(run)]
    process = subprocess.Popen([sys.executable, str(ROOT / "pong.py"), *words], stderr=subprocess.PIPE, text=True)
    try:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_bytes():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        _, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143
    assert err.splitlines()[-1] == f"potstill: stopped by SIGTERM; continue with --resume {run}"
    assert Run.open(run).status == "interrupted"
    assert Run.open(run).config["command"].startswith("python pong.py --env cartpole")


@pytest.mark.parametrize(
    "words", ["study --import json status", "study --import=json status", "--import json study status"]
)
def test_an_import_may_stand_anywhere_in_a_command(words, capsys):
    from potstill.cli import main

    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    assert "potstill study status" in capsys.readouterr().out
