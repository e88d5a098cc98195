"""The browser that opens reports, and runs to draw."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from numa_lab.bandwidth.node_bandwidths import NodeProbes

FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


@pytest.fixture(scope="session")
def chromium():
    """Headless Chromium of the system."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.fail(
            f"None of {', '.join(names)} is installed: apt-get install chromium | dnf install chromium | "
            "conda install -c conda-forge chromium"
        )
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def matrix_rows(synthetic_rows):
    """Rows of two nodes under every pair of them, interleaved, touched first and unbound, with c0m1 half as slow again."""
    labels = ("c0m0", "c0m1", "c1m0", "c1m1", "c0-1i0-1", "c0-1f0", "c*m*")
    return synthetic_rows(labels, executions=3, effects={"c0m1": 1.5}, samples=3)


@pytest.fixture
def probes():
    """Probes of two nodes, the second without CPUs."""
    return NodeProbes(
        nodes=(0, 1),
        read_bytes_per_s=((40e9, 20e9), (None, None)),
        latency_ns=((95.0, 180.0), (None, None)),
        all_nodes_bytes_per_s=40e9,
        threads=(2, 0),
        pages={0: {0: 65536}, 1: {1: 65536}},
        notes=(),
        seconds=1.0,
    )
