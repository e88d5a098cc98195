import base64
import dataclasses
import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from numa_lab.measurement import comparison
from numa_lab.report import figures, plots

ONE_NODE_ONE_EXECUTION = {"labels": ("c0m0",), "executions": 1}


def check(plot):
    """What must hold for every figure: nothing is cut, and it can be read and read aloud."""
    plot.figure.draw_without_rendering()
    width, height = plot.figure.get_size_inches()
    cut = plot.figure.get_tightbbox()
    assert min(cut.x0, cut.y0) > -0.02, f"{plot.name} is cut at its left or lower edge"
    assert cut.x1 < width + 0.02, f"{plot.name} is cut at its right edge"
    assert cut.y1 < height + 0.02, f"{plot.name} is cut at its upper edge"
    letters = [text for text in plot.figure.findobj(Text) if text.get_text().strip()]
    assert all(text.get_fontsize() >= 9 for text in letters)
    assert len(plot.alt) > 20
    assert plot.title
    assert plot.note
    assert plot.missing <= plot.table.empty
    return plot


def test_figures_of_a_matrix_say_what_is_seen(matrix_rows):
    settings = dict(mpl.rcParams)
    drawn = {plot.name: check(plot) for plot in figures.run_figures(matrix_rows, pd.DataFrame())}
    assert list(drawn) == [
        "overhead", "backends", "spread", "prediction", "limit", "threads", "kv_len", "batch", "pages", "order", "cold",
    ]  # fmt: skip
    assert [plot.name for plot in drawn.values() if plot.missing] == ["backends", "prediction"]
    assert "The slowest is c0m1" in drawn["overhead"].alt
    assert " 1.5" in drawn["overhead"].alt or " 1.4" in drawn["overhead"].alt
    assert {"c0-1i0-1", "c0-1f0", "c*m*"} < set(drawn["overhead"].table["binding"])
    assert "17.07 %" in drawn["spread"].alt
    assert "4.37 %" in drawn["spread"].alt
    assert "with 2 threads it is 2," in drawn["threads"].alt
    assert "(MHA bfloat16, torch)" in drawn["limit"].alt
    assert "% of the memory read limit" in drawn["limit"].alt
    assert "All pages of the 5 bindings that bind memory lay on the nodes that were asked for." in drawn["pages"].alt
    assert "lag-1 autocorrelation" in drawn["order"].alt
    assert "3.0 times" in drawn["cold"].alt
    assert plt.get_fignums() == [], "a figure stays open in pyplot"
    assert dict(mpl.rcParams) == settings


def test_one_node_and_one_execution_is_drawn_as_far_as_it_goes(synthetic_rows):
    drawn = {
        plot.name: check(plot) for plot in figures.run_figures(synthetic_rows(**ONE_NODE_ONE_EXECUTION), pd.DataFrame())
    }
    assert [name for name, plot in drawn.items() if plot.missing] == ["backends", "prediction", "order"]
    assert "Only c0m0 was measured" in drawn["overhead"].alt
    shown = [text.get_text() for text in drawn["spread"].figure.findobj(Text)]
    assert "One node: nothing to compare" in shown
    assert "source guide, GQA: 17.07 %" in shown


@pytest.mark.parametrize(
    ("column", "kept", "missing"),
    [
        ("phase", "prefill", ["backends", "threads", "kv_len", "batch"]),
        ("dtype", "float32", ["backends", "threads", "kv_len", "batch"]),
        ("label", "c0m1", ["backends"]),
        ("label", "none", ["overhead", "backends", "limit", "threads", "kv_len", "batch", "pages", "order", "cold"]),
        ("cold", True, ["overhead", "backends", "limit", "threads", "kv_len", "batch", "order", "cold"]),
    ],
)
def test_what_was_not_measured_is_said_and_nothing_fails(matrix_rows, column, kept, missing):
    drawn = figures.run_figures(matrix_rows[matrix_rows[column] == kept], pd.DataFrame())
    assert [plot.name for plot in drawn if plot.missing and plot.name != "prediction"] == missing
    for plot in drawn:
        check(plot)
        assert not plot.missing or plot.note in plot.alt


def test_hundreds_of_cpus_and_sixteen_nodes_stay_readable(synthetic_rows, local_bindings):
    rows = synthetic_rows(tuple(local_bindings(16)), executions=2, samples=2)
    wide = rows["threads"] == 2
    rows.loc[wide, "threads"] = 384
    for draw in (figures.overhead_heatmap, figures.spread, figures.pages, figures.thread_scaling, figures.run_order):
        check(draw(rows))


def test_misplaced_pages_are_told(matrix_rows):
    observed = matrix_rows["observed"].str.replace('"1": 1024}, "value"', '"0": 24, "1": 1000}, "value"')
    plot = figures.pages(matrix_rows.assign(observed=observed))
    assert "Pages outside the bound nodes: c0m1: 24 of 3072 pages and c1m1: 24 of 3072 pages." in plot.alt


def test_several_backends_are_told_apart(matrix_rows):
    slower = matrix_rows.assign(backend="guide", seconds=2 * matrix_rows["seconds"])
    rows = pd.concat([matrix_rows, slower], ignore_index=True)
    assert {"guide", "torch"} < set(check(figures.limit_share(rows)).table["backend"])
    fastest = figures.overhead_heatmap(rows).table
    pd.testing.assert_frame_equal(fastest, figures.overhead_heatmap(matrix_rows).table)


def test_the_machines_heatmaps_leave_out_what_has_no_cpus(probes):
    bandwidth, latency = map(check, figures.machine_figures(probes))
    assert "2 of 4 pairs measured: from 20 GB/s (CPUs of node 0, memory of node 1) to 40 GB/s" in bandwidth.alt
    assert "40 GB/s in all" in bandwidth.note
    assert "180 ns (CPUs of node 0, memory of node 1)" in latency.alt
    assert bandwidth.table.isna().to_numpy().sum() == 2
    nothing = dataclasses.replace(probes, read_bytes_per_s=((None, None), (None, None)))
    assert check(figures.bandwidth_heatmap(nothing)).missing


def test_a_notebook_shows_a_figure_once_with_its_alt_text_and_its_table(matrix_rows, monkeypatch):
    plot, shown = figures.spread(matrix_rows), []
    monkeypatch.setattr("IPython.display.display", lambda value, raw=False: shown.append(value))
    plot.show()
    image, table = shown
    data, metadata = image._repr_mimebundle_()
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as opened:
        assert opened.size == tuple(int(inches * plots.DPI) for inches in plot.figure.get_size_inches())
    assert metadata["image/png"]["alt"] == plot.alt
    assert "<th></th>" not in table["text/html"]
    assert "spread (%)" in table["text/html"]
    assert "spread (%)" in table["text/plain"]
    assert plot.svg() == plot.svg()
    assert b"source guide, GQA: 17.07 %" in plot.svg()


def test_measurements_stand_beside_what_was_predicted(matrix_rows):
    cases = figures.against_prediction(matrix_rows, pd.DataFrame())
    assert cases.empty
    decode = matrix_rows[matrix_rows["phase"] == "decode"].drop_duplicates(["label", *comparison.CASE])
    usual = decode.groupby("label")["seconds"].transform("median")
    predicted = decode.assign(seconds=usual / 2, limit="memory of node 0").drop(columns=["backend", "phase"])
    plot = check(figures.prediction(matrix_rows, predicted[~predicted["label"].str.contains("~|\\*")]))
    assert set(plot.table["label"]) == {"c0m0", "c0m1", "c1m0", "c1m1", "c0-1i0-1", "c0-1f0"}
    assert "of the predicted ones" in plot.note
    assert (plot.table["seconds"] / plot.table["predicted"] == plot.table["ratio"]).all()
    slow = plot.table[plot.table["label"] == "c0m1"]
    assert "c0m1" in plot.alt
    assert len(slow)


def test_a_slow_backend_that_hides_remote_memory_stands_beside_the_fast_one(synthetic_rows):
    labels = ("c0m0", "c0m1", "c1m0", "c1m1")
    fast = synthetic_rows(labels, effects={"c0m1": 1.5, "c1m0": 1.5}).assign(backend="numba")
    slow = synthetic_rows(labels, effects={"c0m1": 1.02, "c1m0": 1.02}).assign(backend="torch")
    plot = check(figures.overhead_by_backend(pd.concat([fast, slow])))
    worst = plot.table.groupby("backend")["relative time"].max()
    assert worst["numba"] == pytest.approx(1.5, abs=0.05)
    assert worst["torch"] == pytest.approx(1.02, abs=0.05)
    assert "numba up to" in plot.alt
    assert figures.overhead_by_backend(fast).missing
