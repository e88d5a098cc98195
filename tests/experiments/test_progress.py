import threading

import pytest

from numa_lab.experiments.progress import ticking


class Bar:
    def __init__(self):
        self.drawn = threading.Event()

    def refresh(self):
        self.drawn.set()


def test_a_bar_is_drawn_anew_until_the_step_ends():
    bar, before = Bar(), set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), ticking(bar, seconds=0.01):
        assert bar.drawn.wait(30)
        raise ZeroDivisionError
    assert set(threading.enumerate()) == before
