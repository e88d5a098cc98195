"""What memory allows: bandwidths and latencies between nodes, measured or published, and the times that follow from them."""
