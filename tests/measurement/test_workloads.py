import dataclasses

import pytest

from numa_lab.errors import InvalidInput
from numa_lab.machine.control_groups import MemoryLimit
from numa_lab.measurement.workloads import PROFILES, case_key, usable_bytes, workload
from numa_lab.placement.binding import Binding

GIB = 1 << 30


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_measures_each_kind_and_phase_once(profile):
    cases = workload(profile, "llama-3-8b", memory_bytes=100 * GIB).cases(cores=4)
    assert {(case.shape.kind, case.shape.phase) for case in cases} == {
        (kind, phase) for kind in ("gqa", "mha", "mqa") for phase in ("decode", "prefill")
    }
    assert {1, 2, 4} == {case.threads for case in cases}
    assert len({case_key(case) for case in cases}) == len(cases), "a case is measured twice"


def test_a_single_core_has_one_thread_count():
    assert {case.threads for case in workload("quick", "llama-3-8b", memory_bytes=100 * GIB).cases(1)} == {1}


def test_the_guide_keeps_its_own_batch_and_length_and_shrinks_with_a_message():
    whole = workload("quick", "guide", memory_bytes=1000 * GIB)
    assert (whole.base.batch, whole.base.kv_len, whole.message) == (512, 512, "")
    scaled = workload("quick", "guide", memory_bytes=2 * GIB)
    assert scaled.largest_kv_bytes <= 2 * GIB
    assert "512" in scaled.message


@pytest.mark.parametrize(
    ("profile", "model", "kv_len", "message"),
    [("slow", "guide", 0, "smoke, quick"), ("quick", "llama-9", 0, "llama-3-8b"), ("quick", "guide", -1, "kv_len=-1")],
)
def test_unknown_names_list_the_known_ones(profile, model, kv_len, message):
    with pytest.raises(InvalidInput, match=message):
        workload(profile, model, kv_len, memory_bytes=GIB)


def test_the_shapes_are_those_that_a_control_group_has_room_for(four_nodes):
    small = dataclasses.replace(four_nodes, memory_limits=(MemoryLimit("/sys/fs/cgroup/memory.max", GIB // 2, 0),))
    for label in ("c0m0", "c0-1i0-3", "c*m*"):
        assert usable_bytes(small, Binding.parse(label)) == GIB // 4, "whatever is in use now: plan and execution agree"
    assert usable_bytes(four_nodes, Binding.parse("c0-1i0-3")) == 2 * GIB
    assert "may take" in workload("quick", "guide", memory_bytes=usable_bytes(small, Binding())).message
