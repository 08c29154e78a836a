import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill import evaluation
from potstill.evaluation import EvalConfig
from potstill.networks import NetworkConfig, Policy
from potstill.policies import load_policy, save_policy
from potstill.storage.runs import Run
from potstill.tasks import TASKS
from potstill.training import assessment
from potstill.training.assessment import assess
from potstill.training.runtime import Runtime

RUNTIME = Runtime(device="cpu", threads=1, quiet=True)
CONFIG = EvalConfig(episodes=6, secondary_games=4, starts=(2, 5), start_games=3)
GAMES = 6 + 4 + 3 + 3  # CartPole has nothing sticky


@pytest.fixture(scope="module")
def teacher(save_teacher, tmp_path_factory):
    save_teacher(path := tmp_path_factory.mktemp("policies") / "teacher")
    return load_policy(path)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    policy = Policy(NetworkConfig(width="1/32"), (4,), 2).initialise(torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("policies") / "policy.safetensors"
    save_policy(path, policy, TASKS["cartpole"].env, np.zeros((1, 4), dtype=np.float32), {})
    return load_policy(path)


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run", {"kind": "train"})
    with run.lock():
        yield run


@pytest.fixture
def begun(monkeypatch):
    """What is played, match by match: (actions, games, steps before the policy takes over)."""
    play, matches = evaluation.play, []

    def noted(*arguments, **options):
        matches.append((options["actions"], options["episodes"], options["start"].steps))
        return play(*arguments, **options)

    monkeypatch.setattr(evaluation, "play", noted)
    return matches


def stop_in_match(number, monkeypatch):
    """Ctrl-C after the second game of a match."""
    play, matches = evaluation.play, []

    def stopping(*arguments, **options):
        matches.append(options)
        for so_far in play(*arguments, **options):
            yield so_far
            if len(matches) == number and len(so_far.episodes) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "play", stopping)


def test_minatar_which_others_play_with_stickiness_is_not_played_without_it(begun):
    expert = load_policy(Path(__file__).parents[2] / "data" / "experts" / "minatar-breakout" / "seed-0")
    record = assess(expert, RUNTIME, EvalConfig(episodes=1), None)
    assert begun == [("greedy", 1, 0), ("sampled", 1, 0)]
    assert (expert.env.sticky, record["score_nosticky"]) == (0.1, None)


def test_the_games_beside_the_main_ones_have_a_number_of_their_own(student):
    some, none, all_ = (assess(student, RUNTIME, EvalConfig(episodes=4, secondary_games=n), None) for n in (2, 0, None))
    assert [played["secondary_games"] for played in (some, none, all_)] == [2, 0, 4]
    assert (none["score_sampled"], none["score_nosticky"]) == (None, None)
    assert some["score"] == none["score"] == all_["score"]
    for played, episodes in ((some, 2), (all_, 4)):
        *_, alone = evaluation.play(student.policy, student.env, episodes=episodes, seed=1, actions="sampled")
        assert played["score_sampled"] == alone.summary()["mean"]
    assert some["score_sampled"] != all_["score_sampled"]


def test_a_teacher_without_a_readable_result_is_played_again(teacher, tmp_path, begun):
    shutil.copy(teacher.path, tmp_path)
    (tmp_path / "result.json").write_text("{")
    unknown = load_policy(tmp_path)
    of_itself = assess(unknown, RUNTIME, CONFIG, unknown)
    assert of_itself["teacher_score"] == of_itself["score"]
    assert (of_itself["agreement"], of_itself["kl"]) == (1.0, pytest.approx(0, abs=1e-6))
    assert begun.count(("greedy", 6, 0)) == 1  # its own games, which are the teacher's


@pytest.mark.parametrize("match", [1, 2, 4])
def test_games_of_an_evaluation_that_was_stopped_are_not_played_again(match, student, teacher, run, begun, monkeypatch):
    whole = assess(student, RUNTIME, CONFIG, teacher)
    planned = begun.copy()
    with monkeypatch.context() as patch:
        stop_in_match(match, patch)
        with pytest.raises(KeyboardInterrupt):
            assess(student, RUNTIME, CONFIG, teacher, run)
    begun.clear()
    assert assess(student, RUNTIME, CONFIG, teacher, run) == whole
    assert begun == planned[match - 1 :]


def test_the_directory_says_how_many_games_were_played(student, run, monkeypatch):
    stop_in_match(3, monkeypatch)
    monkeypatch.setattr(assessment, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        assess(student, RUNTIME, CONFIG, None, run)
    told = json.loads(run.games_path.read_text())
    assert (told["played"], told["games"], len(told["matches"])) == (6 + 4 + 2, GAMES, 2)


def test_games_of_another_policy_or_other_ones_of_it_are_played(student, teacher, run, begun):
    assess(student, RUNTIME, CONFIG, None, run)
    for policy, config, new in (
        (student, CONFIG, 0),
        (teacher, CONFIG, 4),
        (student, replace(CONFIG, secondary_games=3, starts=(2, 6)), 2),
    ):
        begun.clear()
        kept = assess(policy, RUNTIME, config, None, run)
        assert len(begun) == new
        assert kept == assess(policy, RUNTIME, config, None)


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"matches": 3}', '{"matches": {"KEY": 3}}', '{"matches": {"KEY": {}}}']
)
def test_games_that_cannot_be_read_are_played_again(damage, student, run):
    whole = assess(student, RUNTIME, CONFIG, None, run)
    keys = json.loads(run.games_path.read_text())["matches"]
    run.games_path.write_text(damage.replace("KEY", next(iter(keys))))
    assert assess(student, RUNTIME, CONFIG, None, run) == whole
