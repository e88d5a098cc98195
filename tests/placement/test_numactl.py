import dataclasses

from numa_lab.placement.numactl import taskset_words


def test_a_command_keeps_to_the_mask_of_this_process(four_nodes):
    masked = dataclasses.replace(four_nodes, allowed_cpus=(0, 1, 3))
    assert taskset_words(masked) == ["taskset", "-c", "0-1,3"]
    assert taskset_words(four_nodes) == []
