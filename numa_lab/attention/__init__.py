"""What is computed: shapes, the float64 reference and the backends of attention; it knows nothing of NUMA nodes.

Nothing is imported here, so that ``numa_lab.attention.shapes`` loads without torch.
"""
