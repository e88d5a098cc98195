import numpy as np
import pytest

from numa_lab.measurement import student_t

DEGREES = np.array([2.0, 2.1, 3.7, 8.0, 29.5, 1000.0])


def test_tables_of_the_distribution_are_met():
    assert student_t.critical_value(0.025, DEGREES[[0, 3]]) == pytest.approx([4.30265, 2.30600], rel=1e-5)
    assert student_t.upper_tail([0.0, 4.30265], DEGREES[[0, 0]]) == pytest.approx([0.5, 0.025], rel=1e-5)


def test_scipy_gives_the_same():
    t = pytest.importorskip("scipy.stats").t
    for value in (0.0, 1e-6, 0.7, 2.0, 8.0, 50.0):
        assert student_t.upper_tail(np.full_like(DEGREES, value), DEGREES) == pytest.approx(
            t.sf(value, DEGREES), rel=1e-9
        )
    for probability in (0.4, 0.025, 0.025 / 6, 1e-5):
        expected = t.isf(probability, DEGREES)
        assert student_t.critical_value(probability, DEGREES) == pytest.approx(expected, rel=1e-9)
