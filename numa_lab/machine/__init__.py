"""What Linux tells of the machine: its nodes, CPUs, memory and devices, what of them this process may use, and what spoils its speed."""
