import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill import imports
from potstill.cli import main
from potstill.distill import DistillConfig
from potstill.distributions import distribution_of
from potstill.envs import EnvConfig
from potstill.errors import InputError
from potstill.networks import NetworkConfig, Policy
from potstill.objectives import find_objective, forward_kl
from potstill.policies import load_policy, save_policy

LOSSES = """
import torch

def hellinger(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return 1 - (p * q).sqrt().sum(-1)

def summed(student, teacher, temperature):
    return hellinger(student, teacher, temperature).sum()

def constant(student, teacher, temperature):
    return torch.zeros(len(student))
"""


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch):
    imports._named.clear()
    imports._handed.clear()
    monkeypatch.setenv(imports.VARIABLE, "")


@pytest.fixture
def losses(tmp_path):
    path = tmp_path / "my_losses.py"
    path.write_text(LOSSES)
    return path


def test_an_objective_of_a_file_that_the_user_named_is_used_as_it_stands(losses):
    imports.import_modules(str(losses))
    student, teacher = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 50.0]])
    loss = find_objective("my_losses:hellinger").categorical(student, teacher, 1.0)
    assert loss.item() == pytest.approx(1 - 0.5**0.5)  # sqrt(1 * 1/2)


def test_of_several_choices_an_objective_of_ones_own_is_given_each_in_turn(losses):
    imports.import_modules([str(losses)])
    own = find_objective("my_losses:hellinger")
    student, teacher = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 50.0, 50.0, 0.0]])
    loss = distribution_of((2, 2), continuous=False).loss(own)(student, teacher, 1.0)
    assert loss.item() == pytest.approx(2 * (1 - 0.5**0.5))


def test_code_that_the_user_did_not_name_is_refused_with_the_option_that_allows_it():
    with pytest.raises(InputError, match="os:system is code of module os: allow it with --import os"):
        DistillConfig(objective="os:system")


def test_what_a_named_module_took_from_elsewhere_is_not_its_own(tmp_path):
    (tmp_path / "my_shell.py").write_text("from os import system\n")
    imports.import_modules([str(tmp_path / "my_shell.py")])
    with pytest.raises(InputError, match="my_shell defines no function or class 'system'"):
        imports.find("my_shell:system", "--objective")


@pytest.mark.parametrize(
    ("name", "message"),
    [("summed", r"returned \(\): it should be one loss per state, \(3,\)"), ("constant", "nothing could be learned")],
)
def test_a_loss_that_is_none_is_told_in_one_line(losses, name, message):
    imports.import_modules([str(losses)])
    with pytest.raises(InputError, match=message):
        find_objective(f"my_losses:{name}").gaussian(torch.zeros(3, 2, requires_grad=True), torch.zeros(3, 2), 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_the_kind", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first$"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_module_that_does_not_import_is_one_line_with_its_own_first(tmp_path, text, message):
    (tmp_path / "my_broken.py").write_text(text)
    with pytest.raises(InputError, match=f"--import .*my_broken.py cannot be imported: {message}"):
        imports.import_modules([str(tmp_path / "my_broken.py")])
    assert "my_broken" not in sys.modules
    assert imports.imported() == ()


def test_a_function_handed_over_in_python_has_a_name_and_a_lambda_has_none():
    assert imports.allow(forward_kl) == "potstill.objectives:forward_kl"
    assert imports.find("potstill.objectives:forward_kl", "--objective") is forward_kl


def test_what_no_other_process_can_import_has_a_name_for_this_one_alone(monkeypatch):
    one, other = (lambda student, teacher, temperature: None), (lambda student, teacher, temperature: None)
    assert [imports.allow(each) for each in (one, other, one)] == ["python:lambda", "python:lambda-2", "python:lambda"]
    assert imports.find("python:lambda-2", "--objective") is other
    with pytest.raises(InputError, match="python:lambda was handed over in Python, and workers cannot import it"):
        imports.check_shared("auto", "python:lambda")
    imports._handed.clear()
    with pytest.raises(InputError, match="--objective python:lambda was handed over in Python, where no other process"):
        imports.find("python:lambda", "--objective")


def test_workers_inherit_what_was_named(losses):
    imports.import_modules(["json", str(losses)])
    there = imports.environment()
    assert there[imports.VARIABLE] == os.pathsep.join(["json", str(losses)])
    folders = there["PYTHONPATH"].split(os.pathsep)
    assert str(Path(__file__).parent) in folders
    assert str(Path(np.__file__).parents[1]) not in folders


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    words = "--env cartpole --total-timesteps 1024 --num-envs 4 --num-steps 32 --minibatch-size 64 --evaluate 0"
    main(["train", *words.split(), "--quiet", "--threads", "1", "--out", str(out)])
    return out


def test_a_run_with_an_objective_of_ones_own_records_it_and_goes_on_only_with_leave(
    losses, teacher, tmp_path, capsys, monkeypatch
):
    out, words = tmp_path / "student", "--total-timesteps 640 --evaluate 2 --quiet --threads 1"
    main(["distill", str(teacher), "--import", str(losses), "--objective", "my_losses:hellinger", *words.split(),
          "--out", str(out)])  # fmt: skip
    assert json.loads((out / "result.json").read_text())["objective"] == "my_losses:hellinger"
    assert json.loads((out / "config.json").read_text())["imports"] == ["my_losses"]
    (out / "result.json").unlink()
    imports._named.clear()
    monkeypatch.setenv(imports.VARIABLE, "")
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--resume", str(out)])
    assert stop.value.code == 2
    assert (
        "my_losses:hellinger is code of module my_losses: allow it with --import my_losses" in capsys.readouterr().err
    )


def test_a_policy_of_a_network_of_ones_own_opens_with_its_module_and_else_says_which(tmp_path):
    (tmp_path / "my_nets.py").write_text(
        "import torch\n\ndef wide(shape, width):\n    return torch.nn.Linear(*shape, 3)\n"
    )
    imports.import_modules([str(tmp_path / "my_nets.py")])
    policy = Policy(NetworkConfig(family="my_nets:wide"), (4,), 2)
    save_policy(tmp_path / "policy.safetensors", policy, EnvConfig("CartPole-v1"), np.zeros((1, 4), np.float32), {})
    assert load_policy(tmp_path).policy.family == "my_nets:wide"
    imports._named.clear()
    with pytest.raises(InputError, match=r"^--network my_nets:wide is code of module my_nets: allow it with --import"):
        load_policy(tmp_path)


def test_a_plans_imports_lie_beside_it_and_reach_its_workers(losses, teacher, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(f"""
imports = ["./my_losses.py"]
env = "cartpole"
widths = ["1/8"]
seeds = [0]
teachers = ["{teacher}"]
[evaluation]
episodes = 2
[arms.hellinger]
method = "distill"
objective = "my_losses:hellinger"
total-timesteps = 640
""")
    main(["study", "run", str(plan), "--out", str(tmp_path / "study"), "--workers", "1"])
    record = json.loads(next(Path(tmp_path / "study").glob("hellinger*.json")).read_text())
    assert (record["status"], record["arm"], record["objective"]) == ("done", "hellinger", "my_losses:hellinger")
