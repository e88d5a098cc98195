import threading
from functools import partial

import pytest

from numa_lab.machine import new_threads


def test_functions_run_at_once_and_their_results_come_in_order():
    met, here = threading.Barrier(3), threading.get_ident()

    def meet(number):
        met.wait(timeout=60)
        return number, threading.get_ident()

    numbers, threads = zip(*new_threads.run([partial(meet, number) for number in range(3)]), strict=True)
    assert numbers == (0, 1, 2)
    assert len({*threads, here}) == 4


def test_the_first_error_is_raised_when_all_have_ended():
    failed, ended = threading.Event(), []

    def fail(error):
        failed.set()
        raise error

    def after():
        assert failed.wait(60)
        ended.append(1)
        raise ValueError

    with pytest.raises(SystemExit):
        new_threads.run([after, partial(fail, SystemExit)])
    assert ended
