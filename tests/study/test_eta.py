import math
from dataclasses import replace

import pytest

from potstill.distill import DistillConfig
from potstill.networks import NetworkConfig
from potstill.ppo import PPOConfig
from potstill.study.eta import Eta, Underway
from potstill.study.plan import RunSpec


def spec(arm="rl", width="1/8", steps=1000, seed=1):
    config = PPOConfig() if arm.startswith("rl") else DistillConfig()
    config = replace(config, network=NetworkConfig(width=width), total_timesteps=steps, seed=seed)
    return RunSpec(f"{arm}_{width}_{seed}", arm, config, None)


def ended(eta, of, seconds, before=0.0):
    eta.ended(Underway(of, seconds, before, 1.0))


def test_nothing_is_said_before_there_is_anything_to_go_by():
    assert math.isnan(Eta().left([], [spec()], 2))
    assert math.isnan(Eta().left([Underway(spec(), 5.0, 0.0, 0.01)], [spec()], 2))


def test_a_run_alone_is_judged_by_its_own_speed_with_its_games_to_come():
    assert Eta().left([Underway(spec(), 40.0, 0.0, 0.5)], [], 1) == pytest.approx(100.0 - 40.0)


def test_one_that_went_on_from_a_save_is_as_fast_as_what_it_did_since():
    # a quarter of the training in 20 s is 100 s for all of a run, of which half the training, 40 s, was not done here
    assert Eta().left([Underway(spec(), 20.0, 0.5, 0.75)], [], 1) == pytest.approx(100.0 - 40.0 - 20.0)


@pytest.mark.parametrize(
    ("waiting", "seconds"),
    [
        (spec("rl", "1/8", 1000, seed=2), 100.0),
        (spec("rl", "1/2", 1000, seed=2), 300.0),
        (spec("rl", "1/2", 2000, seed=2), 600.0),
        (spec("rl", "1/4"), 200.0),  # a width that has not run: the mean of its arm
        (spec("distill-student", "1/8", 50), 50.0),
        (spec("distill-teacher", "1/8", 100), (0.1 + 0.3 + 1.0) / 3 * 100),  # nothing of its arm either
    ],
)
def test_a_waiting_run_is_like_those_of_its_arm_and_width(waiting, seconds):
    eta = Eta()
    ended(eta, spec("rl", "1/8", 1000), 100.0)
    ended(eta, spec("rl", "1/2", 1000), 300.0)
    ended(eta, spec("distill-student", "1/8", 100), 100.0)
    assert eta.left([], [waiting], 1) == pytest.approx(seconds)


def test_an_ended_run_that_was_resumed_counts_for_the_whole_of_it():
    eta = Eta()
    ended(eta, spec(), 60.0, before=0.5)
    assert eta.left([], [spec(seed=2)], 1) == pytest.approx(100.0)


def test_the_games_of_a_run_take_what_those_of_its_kind_took():
    eta = Eta()
    ended(eta, spec(), 200.0)  # of which half was games, say
    assert eta.left([Underway(spec(seed=2), 110.0, 0.0, 1.0)], [], 1) == pytest.approx(90.0)
    assert eta.left([Underway(spec(seed=2), 210.0, 0.0, 1.0)], [], 1) == 0.0


def test_games_that_are_going_on_tell_how_long_they_take():
    playing = Underway(spec(seed=2), 110.0, 0.0, 1.0, games=300.0)
    assert Eta().left([playing], [], 1) == pytest.approx(300.0)
    eta = Eta()
    ended(eta, spec(), 200.0)
    assert eta.left([playing], [], 1) == pytest.approx(300.0)
    assert Eta().left([playing], [spec(seed=3)], 1) == pytest.approx(300.0 + 410.0)


def test_workers_share_the_work_but_not_the_last_run():
    eta = Eta()
    ended(eta, spec(), 100.0)
    assert eta.left([], [spec(seed=seed) for seed in range(4)], 2) == pytest.approx(200.0)
    assert eta.left([], [spec()], 8) == pytest.approx(100.0)
    long = spec("rl", "1/8", 5000)
    assert eta.left([], [long, spec(seed=2)], 2) == pytest.approx(500.0)


def test_when_all_is_over_nothing_is_left():
    eta = Eta()
    ended(eta, spec(), 100.0)
    assert eta.left([], [], 2) == 0.0


def test_a_branch_that_waits_takes_what_its_trunk_does_not_do_for_it():
    eta, trunk = Eta(), spec("rl", "1/8", 4096 * 40)
    ended(eta, trunk, 400.0)
    config = replace(trunk.config, total_timesteps=4096 * 10, anneal_from=0.8)
    branch = trunk._replace(name="branch", config=config, trunk=trunk, share="1/4")
    assert eta.left([], [branch], 1) == pytest.approx(100.0 * (1 - 0.8 * 0.8))  # a quarter, but for 0.8 of the training
