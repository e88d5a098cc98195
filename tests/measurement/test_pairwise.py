import math

import numpy as np
import pytest

from numa_lab.measurement import pairwise
from numa_lab.measurement.significance import Ratio

EXECUTIONS = np.array([0.99, 1.0, 1.01, 1.0, 1.0])


def test_a_difference_below_the_noise_floor_is_not_claimed():
    ratio = Ratio(1.05, 1.04, 1.06, 1e-9)
    assert pairwise._verdict(ratio, 1e-9, floor=0.01) == "slower"
    assert pairwise._verdict(ratio, 1e-9, floor=0.05) == "unclear"
    assert pairwise._verdict(ratio, 0.2, floor=0.01) == "unclear"
    assert pairwise._verdict(ratio, 1e-9, floor=math.nan) == "unclear"
    assert pairwise._verdict(Ratio(1.0, 0.99, 1.01, 0.5), 0.5, floor=0.0) == "same"


def test_noise_widens_no_tie_beyond_five_percent():
    assert pairwise._verdict(Ratio(1.0, 0.9, 1.1, 0.9), 0.9, floor=0.3) == "unclear"


def test_the_choices_of_a_user_are_compared_and_the_twin_is_not():
    samples = dict.fromkeys(("c0m0", "c0m0~aa", "c10m10", "c2m2", "c0m2", "c2m0"), EXECUTIONS)
    compared = pairwise.compare([({"phase": "decode"}, samples)])
    pairs = {(c.a, c.b) for c in compared.comparisons}
    assert ("c2m2", "c10m10") in pairs
    assert ("c0m2", "c2m0") not in pairs, "no binding of one node to its own memory"
    assert len(pairs) == 9
    assert {c.verdict for c in compared.comparisons} == {"same"}


def test_the_noise_floor_needs_the_pair():
    assert pairwise.noise_floor([{"c0m0": EXECUTIONS, "c0m0~aa": 1.07 * EXECUTIONS}]) == pytest.approx(0.07)
    assert math.isnan(pairwise.noise_floor([{"c0m0": EXECUTIONS}]))
    assert pairwise.compare([({}, {})]).comparisons == ()
