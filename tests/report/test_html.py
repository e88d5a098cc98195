import base64
import gzip
import io
import json
import re
from urllib.parse import unquote_to_bytes

import nbformat
import pandas as pd
import pytest
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from numa_lab.errors import MachineMismatch, RunDirectoryError
from numa_lab.measurement.atomic_files import read_json, write_json
from numa_lab.report import figures, html
from numa_lab.report.html import write_report

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FOUR_NODES = ("c0m0", "c1m1", "c2m2", "c3m3", "c0m3", "c3m0", "c0-3i0-3")
NBCONVERT_PLACEHOLDER = "No description has been provided"


def attached(page):
    """Files that a page holds for download, by name."""
    found = {}
    for name, compressed, data in re.findall(r'download="([^"]+?)(\.gz)?" href="data:[^,]+,([^"]+)"', page):
        content = base64.b64decode(unquote_to_bytes(data))
        found[name] = gzip.decompress(content) if compressed else content
    return found


def check_in_browser(chromium, path):
    """What must hold for every page, seen on a desktop by day and on a phone by night."""
    for viewport, scheme in ((DESKTOP, "light"), (PHONE, "dark")):
        with chromium.new_context(viewport=viewport, color_scheme=scheme) as context, context.new_page() as page:
            requests, said = [], []
            page.on("request", lambda request, kept=requests: kept.append(request.url))
            page.on("console", lambda message, kept=said: kept.append(message.text))
            page.on("pageerror", lambda error, kept=said: kept.append(str(error)))
            page.goto(path.as_uri())
            page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
            assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
            assert said == []
            images = page.evaluate("Array.from(document.images, i => [i.alt.trim(), i.naturalWidth])")
            assert all(alt and width for alt, width in images)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
    return len(images)


@pytest.fixture
def no_figures(monkeypatch):
    """Write pages without figures, which take most of the time."""
    monkeypatch.setattr(figures, "run_figures", lambda rows, predicted: [])


@pytest.fixture
def notebook_run(synthetic_run, matrix_rows, monkeypatch, probes):
    """A run of two nodes with probes, and a notebook that shows a figure, a DataFrame, Markdown, JavaScript and an error."""
    run_dir = synthetic_run(matrix_rows, nodes=2)
    write_json(run_dir / "probes.json", probes.to_json())
    plot, shown = figures.spread(matrix_rows), []
    monkeypatch.setattr("IPython.display.display", lambda value, raw=False: shown.append(value))
    plot.show()
    data, metadata = shown[0]._repr_mimebundle_()
    frame = {"text/html": pd.DataFrame({"seconds": [1.0]}).to_html(), "text/plain": "seconds"}
    outputs = [
        new_output("display_data", data, metadata=metadata),
        new_output("display_data", {"image/png": data["image/png"]}),
        new_output("execute_result", frame, execution_count=1),
        new_output("display_data", {"application/javascript": "alert(1)"}),
        new_output("error", ename="ValueError", evalue="<b>", traceback=["\x1b[31mValueError\x1b[0m: <b>"]),
    ]
    cells = [
        new_markdown_cell("# A notebook\n\nwith *words*"),
        new_code_cell("x = '<b>'", outputs=outputs, execution_count=1),
    ]
    (run_dir / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), run_dir / "notebooks" / "06_cross_node_overhead.ipynb")
    (run_dir / "notebooks" / "07_broken.ipynb").write_text("{")
    return run_dir, plot


@pytest.mark.chromium
def test_one_node_in_a_browser(chromium, synthetic_run, synthetic_rows):
    path = write_report(synthetic_run(synthetic_rows(executions=2), failed=1))
    assert check_in_browser(chromium, path) == 9
    page = path.read_text()
    assert path.stat().st_size < html.MOST_BYTES
    assert "One node: nothing to compare" in page
    assert "One binding was measured: there is nothing to compare." in page
    assert "papermill ended with exit status 138: &lt;the kernel died&gt;" in page
    assert "bad0" in page


@pytest.mark.chromium
def test_four_nodes_in_a_browser(chromium, synthetic_run, synthetic_rows):
    rows = synthetic_rows(FOUR_NODES, executions=3, effects={"c0m3": 1.6, "c3m0": 1.6})
    path = write_report(synthetic_run(rows, nodes=4))
    assert check_in_browser(chromium, path) == 9
    page = path.read_text()
    assert path.stat().st_size < html.MOST_BYTES
    for said in (
        "Distances between nodes",
        "a is slower",
        'lang="zh-Hans"',
        "numa-lab sweep --profile quick",
        "c0-3i0-3",
    ):
        assert said in page
    assert "not run" not in page


@pytest.mark.chromium
def test_attached_notebooks_are_whole_pages_of_their_own(chromium, notebook_run, no_figures, tmp_path):
    run_dir, plot = notebook_run
    path = write_report(run_dir)
    assert check_in_browser(chromium, path) == 2
    page, files = path.read_text(), attached(path.read_text())
    assert set(files) == {
        "rows.csv", "comparisons.json", "machine.json", "plan.json", "probes.json", "06_cross_node_overhead.html"
    }  # fmt: skip
    assert "07_broken.ipynb can&#39;t be attached" in page
    written = tmp_path / "notebook.html"
    with chromium.new_context() as context, context.new_page() as opened:
        opened.goto(path.as_uri())
        with opened.expect_download() as download:
            opened.click("a[download^='06_cross_node_overhead.html']")
        download.value.save_as(written)
    assert written.read_bytes() == files["06_cross_node_overhead.html"]
    assert check_in_browser(chromium, written) == 2
    notebook = written.read_text()
    assert NBCONVERT_PLACEHOLDER not in notebook
    assert plot.alt.split(".")[0] in notebook
    assert "x = &#39;&lt;b&gt;&#39;" in notebook or "x = '&lt;b&gt;'" in notebook
    assert "<script" not in notebook + page


def test_attached_data_are_those_of_the_run(synthetic_run, synthetic_rows, no_figures):
    rows = synthetic_rows(executions=2)
    run_dir = synthetic_run(rows)
    files = attached(write_report(run_dir).read_text())
    read = pd.read_csv(io.BytesIO(files["rows.csv"]), keep_default_na=False)
    assert len(read) == len(rows)
    assert read["seconds"].sum() == pytest.approx(rows["seconds"].sum(), rel=1e-5)
    assert json.loads(files["machine.json"]) == read_json(run_dir / "machine.json")


def test_a_page_that_grows_too_large_holds_less_and_says_so(notebook_run, monkeypatch):
    run_dir, plot = notebook_run
    monkeypatch.setattr(figures, "run_figures", lambda rows, predicted: [plot])
    usual = write_report(run_dir).read_text()
    monkeypatch.setattr(html, "MOST_BYTES", len(usual) - 1000)
    less = write_report(run_dir).read_text()
    assert len(less) < len(usual)
    assert {"medians.csv", "06_cross_node_overhead.html"} < set(attached(less))
    assert "medians stand for them" in less
    monkeypatch.setattr(html, "MOST_BYTES", 1)
    least = write_report(run_dir).read_text()
    assert "06_cross_node_overhead.html" not in attached(least)
    assert "Executed notebooks are not attached" in least
    monkeypatch.setattr(html, "MOST_URI_BYTES", 1000)
    assert "06_cross_node_overhead.html is too large to attach" in write_report(run_dir).read_text()


def test_emulated_machines_and_sample_data_are_labelled_on_top(synthetic_run, synthetic_rows, no_figures):
    run_dir = synthetic_run(synthetic_rows(executions=1), emulated=True)
    page = write_report(run_dir.rename(run_dir.with_name("sample"))).read_text()
    top = page[: page.index("<main")]
    assert "<strong>Emulated machine</strong>" in top
    assert "<strong>Sample data</strong>" in top


def test_findings_refused_rows_and_stopped_sweeps_are_told(synthetic_run, synthetic_rows, no_figures):
    run_dir = synthetic_run(synthetic_rows(executions=2), failed=1)
    finding = {
        "name": "THP",
        "seen": "It is <off>.",
        "why": "It costs.",
        "fix": "echo always > x\nbuy <memory>",
        "severity": "warning",
    }
    write_json(run_dir / "machine.json", read_json(run_dir / "machine.json") | {"findings": [finding]})
    (run_dir / "rejected").mkdir()
    (run_dir / "rejected" / "bad0.parquet").touch()
    first = next((run_dir / "executions").glob("*.parquet"))
    first.unlink()
    first.with_suffix(".json").unlink()
    page = write_report(run_dir).read_text()
    assert "Warning: THP" in page
    assert "It is &lt;off&gt;." in page
    assert "echo always &gt; x</code></pre>\n<p>or</p>\n<pre" in page, "each way has a box of its own"
    assert 'aria-label="What to do about THP, way 2 of 2"><code>buy &lt;memory&gt;</code></pre>' in page
    assert "Its rows are kept in rejected/bad0.parquet." in page
    assert "The sweep was stopped before it." in page


def test_a_run_that_is_empty_half_written_or_mixed_is_refused(synthetic_run, synthetic_rows, tmp_path):
    with pytest.raises(RunDirectoryError, match="not a directory"):
        write_report(tmp_path / "none")
    run_dir = synthetic_run(synthetic_rows(executions=1))
    machine = read_json(run_dir / "machine.json")
    write_json(run_dir / "machine.json", machine | {"fingerprint": "another"})
    with pytest.raises(MachineMismatch):
        write_report(run_dir)
    write_json(run_dir / "machine.json", machine)
    (run_dir / "plan.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"plan\.json"):
        write_report(run_dir)
    assert not list(run_dir.glob("*report.html*"))
