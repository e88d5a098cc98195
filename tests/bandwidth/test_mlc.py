import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numa_lab.bandwidth import mlc
from numa_lab.bandwidth.node_bandwidths import NodeBandwidths, NodeProbes, socket_groups
from numa_lab.errors import InvalidInput

TEXT = {name: (mlc.FOLDER / f"{name}_mlc.txt").read_text() for name in mlc.PUBLISHED}
BROADWELL = TEXT["broadwell"]
NAMED = "Using Read-only traffic type\n\t\tNuma"  # of the matrix of bandwidths


def cells(measured, name):
    matrix = getattr(measured, name)
    return [cell for row in matrix for cell in row] if matrix else []


@pytest.mark.parametrize(
    ("name", "first", "last", "all_reads", "latency", "sockets"),
    [
        ("broadwell", 36481.7, 36348.1, 144906.6, 73.8, ((0, 1), (2, 3))),
        ("cascadelake", 112846.4, 113114.5, 225686.8, 87.6, ((0,), (1,))),
        ("icelake", 176193.2, 176306.7, 352479.5, 88.9, ((0,), (1,))),
        ("sapphirerapids", 61426.8, None, 491946.4, 95.4, ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_published_machines_are_read_to_the_last_cell(name, first, last, all_reads, latency, sockets):
    measured = mlc.published(name)
    assert measured.read_bytes_per_s[0][0] == first * 1e6
    assert measured.read_bytes_per_s[-1][-1] == (last and last * 1e6)
    assert measured.all_nodes_bytes_per_s == all_reads * 1e6
    assert measured.latency_ns[0][0] == latency
    assert socket_groups(measured) == sockets


def test_a_published_output_that_ends_within_its_last_row_lacks_just_those_cells():
    assert mlc.published("sapphirerapids").gaps == ((7, 6), (7, 7))
    assert cells(mlc.published("sapphirerapids"), "read_bytes_per_s").count(None) == 2


def test_rows_are_cpu_nodes():
    measured = mlc.published("broadwell")
    assert measured.bandwidth(1, 0) == 20194.2e6
    assert measured.latency(0, 3) == 196.0


BETWEEN_NODES = BROADWELL.index("Measuring Memory Bandwidths")


@pytest.mark.parametrize(
    "text",
    [BROADWELL, BROADWELL[BETWEEN_NODES:] + BROADWELL[:BETWEEN_NODES].rstrip(), TEXT["sapphirerapids"]],
    ids=["in order", "peak last", "cut already"],
)
def test_an_output_cut_anywhere_is_refused_or_lacks_values_but_never_has_wrong_ones(text):
    whole = mlc.parse_mlc(text)
    accepted = set()
    for end in range(len(text)):
        try:
            cut = mlc.parse_mlc(text[:end])
        except InvalidInput:
            continue
        for name in ("read_bytes_per_s", "latency_ns"):
            pairs = zip(cells(cut, name), cells(whole, name), strict=False)
            assert all(a in (None, b) for a, b in pairs), text[:end][-40:]
        assert cut.all_nodes_bytes_per_s in (None, whole.all_nodes_bytes_per_s)
        accepted.add(text[:end].count("\n"))
    assert accepted


@st.composite
def outputs(draw):
    """An output in the form of any version, and its cells."""
    count = draw(st.integers(2, 8))
    cpus = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
    cell = st.none() | st.integers(1, 4_000_000).map(lambda tenths: tenths / 10)
    mark = draw(st.sampled_from(".,"))
    matrix = {cpu: draw(st.lists(cell, min_size=count, max_size=count).filter(any)) for cpu in cpus}
    tab, end = (
        draw(st.sampled_from(["\t", "   ", "\u202f \t", "\xa0"])),
        draw(st.sampled_from(["\n", "\t\n", "\r\n", "\n\n"])),
    )
    top, name = draw(st.sampled_from([("\t\tNuma node", "Numa node"), ("\tMemory node", "Socket")]))

    def table(title, *notes):
        rows = [
            [f"{cpu:8}", *("-" if v is None else f"{v:.1f}".replace(".", mark) for v in row)]
            for cpu, row in matrix.items()
        ]
        return [title, *notes, top, tab.join([name, *map(str, range(count))]), *map(tab.join, rows), ""]

    latency = table(
        draw(st.sampled_from(["Measuring idle latencies (in ns)...", "Measuring idle latencies for random access"]))
    )
    # Where the traffic is not named, the command line says that nothing was written.
    named = draw(st.sampled_from([["Using Read-only traffic type"], ["Using read-only traffic type", "Some note"], []]))
    command = (
        [] if named else [f"Command line parameters: {draw(st.sampled_from(['', '--bandwidth_matrix -Y -b200m']))}"]
    )
    parts = [
        table("Measuring Memory Bandwidths between nodes within system ", *named),
        [f"ALL Reads        :\t12{mark}5"],
    ]
    parts += [latency] if draw(st.booleans()) else []
    lines = [line for part in draw(st.permutations(parts)) for line in part]
    return end.join(["Intel(R) Memory Latency Checker - v3.9", *command, *lines, ""]), matrix, count, latency in parts


@given(outputs())
@settings(max_examples=60, deadline=None)
def test_every_versions_form_is_read_back(output):
    text, matrix, count, has_latency = output
    measured = mlc.parse_mlc(text)
    assert measured.nodes == tuple(range(count))
    expected = tuple(tuple(matrix.get(cpu, [None] * count)) for cpu in range(count))
    assert measured.latency_ns == (expected if has_latency else None)
    scaled = tuple(tuple(cell and round(cell * 1e6, 1) for cell in row) for row in expected)
    assert measured.read_bytes_per_s == scaled
    assert measured.all_nodes_bytes_per_s == 12.5e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "nodes 0 1\n0 1.0 2.0\n", "is no output of the Intel Memory Latency Checker"),
        (lambda text: "I ran the Intel Memory Latency Checker", "is no output of the Intel Memory Latency Checker"),
        (lambda text: text[:600], "no bandwidths between nodes: run `mlc`"),
        (lambda text: text.replace("20194.2", "20l94.2"), r"line 27, '1\\t20l94.2.*'20l94.2' is not a positive number"),
        (lambda text: text.replace("20194.2", "nan"), "line 27.*'nan' is not"),
        (lambda text: text.replace("20194.2", "-5.0"), "line 27.*'-5.0' is not"),
        (lambda text: text.replace("20194.2", "0,0"), "line 27.*'0,0' is not"),
        (lambda text: text.replace("20194.2", "20,194"), "line 27.*'20,194' is not"),
        (lambda text: text.replace("20194.2", "20.194,2"), "line 27.*'20.194,2' is not"),
        (lambda text: text.replace("20194.2", "20\xa0194,2"), "line 27.*5 values, expected 4"),
        (lambda text: text.replace("144906.6", "fast"), "line 14.*'fast' is not"),
        (lambda text: text.replace("\t14946.7", ""), "line 27.*3 values, expected 4"),
        (lambda text: text.replace("14946.7", "14946.7\t1.0"), "line 27.*5 values, expected 4"),
        (lambda text: re.sub(r" +3\t15775.*\n", "", text), "bandwidths of nodes 0, 1, 2 and latencies of nodes 0, 1, 2, 3"),
        (lambda text: text.replace("       1\t20194", "       0\t20194"), "line 27.*once"),
        (lambda text: text.replace("       1\t20194", "       9\t20194"), "line 27.*nodes 0, 1, 2, 3, once"),
        (lambda text: text + text, "line 75.*second matrix of latencies"),
        (lambda text: re.sub(r"(?s)(Read-only traffic type\n)\t\tNuma.*?(?=\nMeasuring Loaded)", r"\1", text), "line 20.*no line such as"),
        (lambda text: text.replace("Measuring Memory", "Command line parameters: --bandwidth_matrix -W5\nMeasuring Memory"), "without -W"),
        (lambda text: text.replace(NAMED, "Using 2:1 Reads-Writes traffic type\n\t\tNuma"), "line 23.*not reads alone"),
        (lambda text: text.replace(NAMED, "\t\tNuma"), "line 20.*neither a line.*without -W"),
        (lambda text: "Command line parameters: -otypes.txt\n" + text.replace(NAMED, "\t\tNuma"), "neither"),
        (lambda text: text.replace("in MB/sec", "in GB/sec"), "line 21.*bandwidths in GB/sec, expected MB/sec"),
        (lambda text: text.replace("(in ns)...", "(in clocks)..."), "line 2.*latencies in clocks, expected ns"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_with_its_line(change, message):
    with pytest.raises(InvalidInput, match=message):
        mlc.parse_mlc(change(BROADWELL))


def test_an_output_cut_within_a_number_with_a_decimal_comma_is_refused():
    text = re.sub(r"(\d)\.(\d)", r"\1,\2", TEXT["sapphirerapids"]).rstrip()
    assert mlc.parse_mlc(text) == mlc.published("sapphirerapids")
    for lost in (1, 2):
        with pytest.raises(InvalidInput, match=r"ends within a number|not a positive number"):
            mlc.parse_mlc(text[:-lost])


def test_of_two_outputs_the_command_line_of_one_says_nothing_about_the_other():
    latency, bandwidth = BROADWELL[: BROADWELL.index("Measuring Peak")], BROADWELL[BETWEEN_NODES:]
    unnamed = bandwidth.replace(NAMED, "\t\tNuma")
    tool = "Intel(R) Memory Latency Checker - v3,11\n"
    read = f"{tool}Command line parameters: --bandwidth_matrix\n{unnamed}"
    assert mlc.parse_mlc(latency + read).bandwidth(1, 0) == 20194.2e6
    with pytest.raises(InvalidInput, match="neither a line"):
        mlc.parse_mlc(f"{tool}Command line parameters: --latency_matrix\n{latency}{tool}{unnamed}")


def test_memory_without_cpus_has_a_column_and_no_row():
    measured = mlc.parse_mlc(
        "Intel(R) Memory Latency Checker - v3.9\nMeasuring idle latencies (in ns)...\n\t\tNuma node\n"
        "Numa node\t0\t1\t\n       0\t84.5\t564.5\n\nMeasuring Memory Bandwidths between nodes within system \n"
        "Using Read-only traffic type\n\t\tNuma node\nNuma node\t0\t1\n       0\t30562.8\t4795.3\n\n"
    )
    assert (measured.cpu_nodes, measured.mem_nodes, measured.gaps) == ((0,), (0, 1), ())
    assert measured.latency_ns == ((84.5, 564.5), (None, None))
    assert measured.all_nodes_bytes_per_s is None
    assert socket_groups(measured) == ((0, 1),)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_files_of_windows_are_read(tmp_path, encoding):
    (tmp_path / "mlc.txt").write_bytes(BROADWELL.replace("\n", "\xa0\r\n").encode(encoding))
    assert mlc.read_mlc(tmp_path / "mlc.txt") == mlc.published("broadwell")


def test_an_unknown_machine_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="machine 'skylake': expected one of broadwell, cascadelake"):
        mlc.published("skylake")
    with pytest.raises(InvalidInput, match=r"nowhere\.txt: No such file"):
        mlc.read_mlc(tmp_path / "nowhere.txt")


def alike(latency):
    """Equal bandwidths, with these latencies."""
    nodes = tuple(range(len(latency)))
    return NodeBandwidths(nodes, tuple((1.0,) * len(nodes) for _ in nodes), tuple(map(tuple, latency)), None)


@pytest.mark.parametrize(
    ("latency", "sockets"),
    [
        ([[90, 105], [105, 90]], ((0, 1),)),  # two clusters of one socket
        ([[90, 140], [140, 90]], ((0,), (1,))),
        ([[95, 104, 112, 121]] * 4, ((0, 1, 2, 3),)),  # four clusters of one socket: latencies without a gap
        ([[80, 130, 131, 132], [130, 80, 132, 131], [131, 132, 80, 130], [132, 131, 130, 80]], ((0,), (1,), (2,), (3,))),
        # A ring of four sockets: neighbours are nearer than what lies opposite, and form no groups.
        ([[80, 130, 200, 130], [130, 80, 130, 200], [200, 130, 80, 130], [130, 200, 130, 80]], ((0,), (1,), (2,), (3,))),
        # Ids that alternate over two sockets.
        ([[90, 190, 110, 190], [190, 90, 190, 110], [110, 190, 90, 190], [190, 110, 190, 90]], ((0, 2), (1, 3))),
        # Granite Rapids, 2 sockets of 3 clusters: the same published collection, commit 44b16cbc.
        (
            [
                [96.2, 116.2, 137.9, 252.0, 264.2, 247.6], [117.7, 95.2, 134.9, 223.7, 242.0, 241.2],
                [157.6, 112.7, 95.7, 269.9, 265.8, 204.4], [205.7, 260.6, 244.8, 95.3, 116.0, 135.4],
                [224.5, 241.7, 226.5, 109.5, 95.1, 116.1], [246.8, 239.9, 205.3, 131.1, 110.5, 115.2],
            ],
            ((0, 1, 2), (3, 4, 5)),
        ),
        ([[80]], ((0,),)),
    ],
)  # fmt: skip
def test_sockets_follow_from_latencies(latency, sockets):
    assert socket_groups(alike(latency)) == sockets


def test_sockets_that_are_known_are_taken():
    measured = alike([[90, 190], [190, 90]])
    assert socket_groups(measured, {0: 7, 1: 7}) == ((0, 1),)
    assert socket_groups(measured, {0: 7}) == ((0,), (1,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency_ns": None}, ""),
        ({"nodes": [0]}, "a row and a column for each of 1 nodes"),
        ({"nodes": [0, 0]}, "each once"),
        ({"read_bytes_per_s": [[1.0, "2"], [1.0, 1.0]]}, "read_bytes_per_s of '2'"),
        ({"read_bytes_per_s": None}, "a row and a column"),
        ({"all_nodes_bytes_per_s": 0}, "all_nodes_bytes_per_s of 0"),
        ({"nodes": 2}, "numa-lab probe --json"),
        ({"nodes": ["0", "1"]}, "numa-lab probe --json"),
    ],
)
def test_probes_that_make_no_sense_are_refused(change, message):
    probes = {
        "nodes": [0, 1], "read_bytes_per_s": [[2.0, 1.0], [1.0, 2.0]], "latency_ns": [[1.0, 2.0], [2.0, 1.0]],
        "all_nodes_bytes_per_s": 3.0, "threads": [1, 1],
    }  # fmt: skip
    assert NodeBandwidths.from_json(probes).bandwidth(0, 1) == 1.0
    if message:
        with pytest.raises(InvalidInput, match=message):
            NodeBandwidths.from_json(probes | change)
    else:
        assert NodeBandwidths.from_json(probes | change).latency(0, 1) is None
    probes |= {"pages": {"0": {"0": 9}}, "notes": [], "seconds": 1.0}
    assert NodeProbes.from_json(probes).to_json() == probes
    for lacking in ({"pages": {"a": {}}}, {"threads": None}, {"latency_ns": None}):
        with pytest.raises(InvalidInput):
            NodeProbes.from_json(probes | lacking)
    del probes["latency_ns"]
    with pytest.raises(InvalidInput, match="probes without latency_ns"):
        NodeBandwidths.from_json(probes)
