from types import SimpleNamespace

import pytest

from numa_lab.errors import InvalidInput
from numa_lab.measurement import timing


@pytest.fixture
def clock(monkeypatch):
    """Time that passes where a test says so: of calls alone, however busy the machine."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_cold_call_is_apart_and_every_turn_is_called_once(clock):
    turns = []

    def call(turn):
        turns.append(turn)
        clock.now += 0.02 if turn == 0 else 0.001

    between = []
    taken = timing.measure(call, seconds=0.1, after_sample=lambda: between.append(len(turns)))
    assert taken.cold_seconds == pytest.approx(0.02)
    assert taken.samples == pytest.approx([0.001] * len(taken.samples))
    assert turns == list(range(len(turns)))
    assert len(between) == len(taken.samples) >= timing.MIN_SAMPLES


def test_calls_below_the_clock_are_repeated_within_a_sample(clock):
    def call(_turn):
        clock.now += 1e-6

    taken = timing.measure(call, seconds=0.05)
    assert taken.calls_per_sample == 1000
    assert taken.median_seconds == pytest.approx(1e-6)


def test_a_slow_call_is_sampled_all_the_same(clock):
    def call(_turn):
        clock.now += 0.01

    taken = timing.measure(call, seconds=0.001)
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
