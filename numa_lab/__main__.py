"""``python -m numa_lab``."""

from numa_lab.cli import main

if __name__ == "__main__":
    main(prog_name="numa-lab")
