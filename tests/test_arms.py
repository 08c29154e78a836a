"""One row per arm: what a single run's config is called, and how an arm nobody knows is drawn."""

import pytest

from potstill.arms import ARMS, REWARD, STUDENTS, arm_of, look_of, order_of


@pytest.mark.parametrize(
    ("document", "arm"),
    [
        ({"kind": "train", "config": {"network": {"critic": "shared"}}}, "rl"),
        ({"kind": "train", "config": {"network": {"critic": "split", "critic_width": "1"}}}, "rl-split"),
        ({"kind": "train", "config": {"network": {"critic": "split", "critic_width": "1/4"}}}, "rl-split-1_4"),
        ({"kind": "distill", "config": {"lead": "student"}}, "distill-student"),
        ({"kind": "distill", "config": {"lead": "mixed"}}, "distill-mixed"),
        ({"kind": "train", "teacher": "there", "config": {}}, "ppd"),
        ({"kind": "train", "initial": "there", "config": {}}, "finetune"),
        ({"kind": "train", "arm": "mine", "config": {}}, "mine"),
    ],
)
def test_a_runs_config_says_its_arm(document, arm):
    assert arm_of(document) == arm


def test_every_arm_is_told_apart_in_a_figure_and_an_unknown_one_comes_last():
    assert len({(arm.colour, arm.marker) for arm in ARMS.values()}) == len(ARMS) == len((*REWARD, *STUDENTS))
    assert look_of("mine").short == "mine"
    assert sorted(["mine", "ppd", "another", "rl"], key=order_of) == ["rl", "ppd", "another", "mine"]
