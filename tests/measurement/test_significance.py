import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numa_lab.measurement import significance


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_never_below_the_p_value_nor_above_bonferroni(p_values):
    adjusted = significance.holm(p_values)
    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= min(1.0, p * len(p_values)) + 1e-12
    assert [adjusted[i] for i in np.argsort(p_values)] == sorted(adjusted)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.lists(st.floats(0.001, 100), min_size=1, max_size=8))
def test_no_sample_makes_it_fail_or_warn(a, b):
    ratio = significance.ratio_of_medians(a, b)
    assert ratio.ratio == pytest.approx(np.median(a) / np.median(b))
    assert math.isnan(ratio.low) == (min(len(a), len(b)) < significance.MIN_EXECUTIONS)


def test_executions_without_any_spread_prove_no_noiseless_machine():
    nearly = significance.ratio_of_medians([1.0] * 3, [1.001] * 3)
    assert nearly.low < 1 < nearly.high
    assert nearly.p_value > 0.05
    assert significance.ratio_of_medians([1.2] * 5, [1.0] * 5).low > 1.19


@pytest.mark.parametrize("executions", [3, 5, 8])
def test_the_interval_misses_the_truth_as_seldom_as_it_says(executions):
    a, b = np.exp(np.random.default_rng(0).normal(0, 0.02, (2, 1000, executions)))
    missed = sum(not r.low <= 1 <= r.high for r in significance._ratios(a, b))
    assert missed <= 60  # 50 are allowed to be
