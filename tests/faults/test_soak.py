"""A short soak of forked processes. `python tests/faults/soak.py` is a long one, of processes as users start them."""

import pytest
from soak import GROWTH, Soak, soak


@pytest.mark.timeout(1300)  # half a minute where two cores are free
def test_a_study_under_random_kills_ends_as_one_left_in_peace_and_leaves_nothing(tmp_path):
    soaked = soak(tmp_path, runs=12, seed=0, minutes=20)
    print(soaked)
    assert (soaked.lost, soaked.different, soaked.left) == ([], [], [])
    assert soaked.unnamed == []
    assert len(soaked.swapped) >= 2
    assert not soaked.grows
    assert sum(soaked.drivers_killed.values()) >= 1
    assert sum(soaked.workers_killed.values()) >= 3


def test_a_driver_whose_memory_grows_is_noticed():
    steady, growing = [100.0, 300.0, *[301.0] * 18], [100.0, *range(300, 320)]
    assert not Soak(memory=[steady, [1.0]]).grows
    assert Soak(memory=[[1.0], growing]).grows
    assert GROWTH < 0.05 * 300
