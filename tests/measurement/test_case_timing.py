import dataclasses

from numa_lab.attention.shapes import preset
from numa_lab.machine.control_groups import MemoryLimit
from numa_lab.machine.hardware import Cache
from numa_lab.measurement.case_timing import KVPool, pool_bytes


def test_k_and_v_of_the_layers_do_not_overlap_and_fill_the_pool():
    pool = KVPool(1 << 22)
    shape = preset("llama-3-8b", kv_len=64)
    layers = pool.layers(shape)
    starts = [(key.data_ptr(), value.data_ptr()) for key, value in layers]
    assert len(set(starts)) == len(layers) == pool.keys.nbytes // (shape.kv_bytes // 2)
    assert all(key.is_contiguous() and key.isfinite().all() for key, _ in layers)


def test_the_pools_of_all_nodes_leave_room_below_the_limit_of_a_control_group(four_nodes):
    cached = dataclasses.replace(four_nodes, caches=(Cache(3, "Unified", 32 << 20, tuple(range(6))),))
    assert pool_bytes(cached, (0, 1), 1 << 20, sharers=4) == 128 << 20
    limited = dataclasses.replace(cached, memory_limits=(MemoryLimit("/memory.max", 1 << 30, 256 << 20),))
    assert pool_bytes(limited, (0, 1), 1 << 20, sharers=4) == 32 << 20
    assert pool_bytes(limited, (0, 1), 200 << 20, sharers=4) == 200 << 20, (
        "the largest case itself is checked elsewhere"
    )
