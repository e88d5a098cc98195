from numa_lab.attention.shapes import preset
from numa_lab.sampling import KVPool


def test_k_and_v_of_the_layers_do_not_overlap_and_fill_the_pool():
    pool = KVPool(1 << 22)
    shape = preset("llama-3-8b", kv_len=64)
    layers = pool.layers(shape)
    starts = [(key.data_ptr(), value.data_ptr()) for key, value in layers]
    assert len(set(starts)) == len(layers) == pool.keys.nbytes // (shape.kv_bytes // 2)
    assert all(key.is_contiguous() and key.isfinite().all() for key, _ in layers)
