import time

import pytest

from numa_lab import timing
from numa_lab.errors import InvalidInput


def test_the_cold_call_is_apart_and_every_turn_is_called_once():
    turns = []

    def call(turn):
        turns.append(turn)
        time.sleep(0.02 if turn == 0 else 0.001)

    between = []
    taken = timing.measure(call, seconds=0.1, after_sample=lambda: between.append(len(turns)))
    assert taken.cold_seconds >= 0.02
    assert taken.median_seconds < 0.02
    assert turns == list(range(len(turns)))
    assert len(between) == len(taken.samples) >= timing.MIN_SAMPLES


def test_calls_below_the_clock_are_repeated_within_a_sample():
    taken = timing.measure(lambda turn: None, seconds=0.05)
    assert taken.calls_per_sample > 100
    assert 0 < taken.median_seconds < 1e-4


def test_a_slow_call_is_sampled_all_the_same():
    taken = timing.measure(lambda turn: time.sleep(0.01), seconds=0.001)
    assert len(taken.samples) == timing.MIN_SAMPLES
    assert not taken.settled


def test_halves_that_drift_do_not_agree():
    assert timing._halves_agree([1.0, 1.01, 1.02, 1.0])
    assert not timing._halves_agree([2.0, 1.9, 1.1, 1.0])
    assert not timing._halves_agree([1.0, 1.0])


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_no_time_is_refused(seconds):
    with pytest.raises(InvalidInput, match=f"seconds={seconds}: expected a positive time"):
        timing.require_seconds(seconds)
