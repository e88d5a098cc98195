"""What memory allows: bandwidths and latencies between nodes, measured or published, and the time that they predict."""
