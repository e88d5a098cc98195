"""Figures of what placement does: the cost of remote memory, and where the pages lay."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure

from numa_lab.placement.binding import Binding, MemPolicy
from numa_lab.placement.receipt import Receipt
from numa_lab.report import cases
from numa_lab.report.plots import BAND, COLORS, GREY, MARKERS, WIDTH_INCHES, Plot, canvas, drawn, listed, nothing, number
from numa_lab.measurement.labels import is_local

SIDE_BY_SIDE, ANNOTATED = 8, 16  # nodes up to which two heatmaps fit beside each other, and cells hold three digits
LARGEST_CELL_INCHES = 0.42


@drawn
def overhead_heatmap(rows: pd.DataFrame, dtype: str | None = None) -> Plot:
    """Time under every CPU node and memory node, relative to the fastest local binding of the same kind and phase.

    Bindings that are no pair of single nodes (interleaved, preferred, touched first, unbound) stand below as points.

    Parameters
    ----------
    rows
        Tidy rows.
    dtype
        The dtype to draw; by default the one in which most cases were measured. The table holds all.
    """
    name, title = "overhead", "Cross-node overhead"
    table = relative_times(cases.fastest_backend(cases.base(cases.medians(cases.without_twin(rows)))))
    if table.empty:
        return nothing(name, title, "No case has a steady sample.")
    dtype = dtype or cases.main_dtype(rows)
    shown = table[table["dtype"] == dtype]
    panels = cases.panels(shown)
    if not panels:
        return nothing(name, title, f"No case in {dtype}; measured were {listed(sorted(set(table['dtype'])))}.")
    pairs = shown[shown["binding"].map(_is_pair)]
    others = shown.drop(pairs.index)
    nodes = sorted({int(node) for column in ("CPU nodes", "memory nodes") for node in pairs[column]})
    columns = min(len(panels), 3 if len(nodes) == 1 else 2 if len(nodes) <= SIDE_BY_SIDE else 1)
    lines = math.ceil(len(panels) / columns)
    cell = min(LARGEST_CELL_INCHES, (WIDTH_INCHES - 0.5 - 0.2 * columns) / columns / max(1, len(nodes)))
    heights = [lines * (cell * len(nodes) + 0.42) + 0.95] if nodes else []
    heights += [0.26 * others["binding"].nunique() + 1.45] if len(others) else []
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    slower = f"slower than the {_reference(shown)} (%)"
    if nodes:
        _heatmaps(parts[0], pairs, panels, nodes, (lines, columns), slower)
    if len(others):
        _other_bindings(parts[-1], others, panels, slower)
    note = f"{dtype}; medians over the executions of a binding, with all threads that it allows."
    if shown["binding"].nunique() > 1:
        note += f" 0 % is the {_reference(shown)} of the panel; a binding over several nodes has more threads than one node."
    return Plot(name, title, figure, _overhead_words(shown, dtype), table, note)


def relative_times(base: pd.DataFrame) -> pd.DataFrame:
    """Return median time of each binding, and its ratio to the fastest local binding (where none is local, to the fastest)."""
    if base.empty:
        return pd.DataFrame()
    panel, binding = ["attention", "phase", "dtype"], ["label", "cpu_nodes", "mem_nodes", "policy", "threads"]
    medians = base.groupby([*panel, *binding], as_index=False).agg(
        executions=("seconds", "size"), milliseconds=("seconds", lambda seconds: 1e3 * seconds.median())
    )
    fastest = (
        pd.concat([cases.local(group) for _, group in medians.groupby(panel)]).groupby(panel)["milliseconds"].min()
    )
    medians["relative time"] = (
        medians["milliseconds"] / fastest.reindex(pd.MultiIndex.from_frame(medians[panel])).to_numpy()
    )
    return medians.rename(columns={"label": "binding", "cpu_nodes": "CPU nodes", "mem_nodes": "memory nodes"})


def _reference(shown: pd.DataFrame) -> str:
    """Return what times are relative to."""
    return "fastest local binding" if shown["binding"].map(is_local).any() else "fastest binding"


def _is_pair(label: str) -> bool:
    """Return whether a binding is a cell of the matrix: one CPU node and one memory node, bound."""
    binding = Binding.parse(label)
    return binding.policy is MemPolicy.BIND and len(binding.cpu_nodes) == len(binding.mem_nodes) == 1


def _heatmaps(
    part: SubFigure,
    pairs: pd.DataFrame,
    panels: list[tuple[str, str]],
    nodes: list[int],
    grid: tuple[int, int],
    slower: str,
) -> None:
    percent = 100 * (pairs["relative time"] - 1)
    norm = Normalize(min(0.0, percent.min()), max(5.0, percent.max()))
    axes = part.subplots(*grid, squeeze=False, sharex=True, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels, strict=False):
        chosen = pairs[(pairs["attention"] == panel[0]) & (pairs["phase"] == panel[1])].assign(percent=percent)
        shape = {"index": "CPU nodes", "columns": "memory nodes"}
        matrix = (
            chosen.pivot_table(values="percent", **shape)
            .rename(index=int, columns=int)
            .reindex(nodes)
            .reindex(columns=nodes)
        )
        if len(nodes) == 1:  # nothing to compare, so the cell holds the time itself
            texts = chosen.pivot_table(values="milliseconds", **shape).map(lambda value: f"{number(value)} ms")
        else:
            texts = matrix.map(lambda value: "" if pd.isna(value) else f"{value:.0f}")
        heatmap(ax, matrix, texts, norm)
        ax.set_title(cases.case_name(*panel))
    part.supxlabel("memory node", fontsize=9.5)
    part.supylabel("CPU node", fontsize=9.5)
    if len(nodes) == 1:
        part.suptitle("One node: nothing to compare; cells hold the time per call")
        return
    bar = part.colorbar(
        axes.flat[0].collections[0],
        ax=axes,
        orientation="horizontal",
        location="top",
        shrink=0.9,
        aspect=35,
        label=slower,
    )
    bar.outline.set_visible(False)


def heatmap(ax: Axes, matrix: pd.DataFrame, texts: pd.DataFrame, norm: Normalize, cmap: str = "cividis_r") -> None:
    """Draw CPU nodes against memory nodes, with a text in each cell as long as there is room; unmeasured cells hold a dash."""
    # It brings scipy.stats: most of a second, which an execution that only measures need not wait for.
    import seaborn as sns

    every = math.ceil(len(matrix) / ANNOTATED)
    sns.heatmap(
        matrix, ax=ax, cmap=cmap, norm=norm, annot=texts if every == 1 else False, fmt="", cbar=False, square=True,
        linewidths=0.5, linecolor="white", annot_kws={"size": 9}, xticklabels=every, yticklabels=every,
    )  # fmt: skip
    for row, column in zip(*matrix.isna().to_numpy().nonzero(), strict=True):
        ax.text(column + 0.5, row + 0.5, "–", ha="center", va="center", color=GREY)
    for text in ax.texts:
        text.set_in_layout(False)  # it lies inside its cell; measuring hundreds of texts takes seconds
    ax.set(xlabel=None, ylabel=None, facecolor=BAND)
    ax.grid(visible=False)
    ax.tick_params(length=0, rotation=0)


def _other_bindings(part: SubFigure, others: pd.DataFrame, panels: list[tuple[str, str]], slower: str) -> None:
    ax = part.subplots()
    labels = sorted(set(others["binding"]), reverse=True)
    for index, panel in enumerate(panels):
        chosen = others[(others["attention"] == panel[0]) & (others["phase"] == panel[1])]
        offset = (index - (len(panels) - 1) / 2) * 0.09
        ax.plot(
            100 * (chosen["relative time"] - 1), [labels.index(label) - offset for label in chosen["binding"]], linestyle="",
            marker=MARKERS[index], color=COLORS[index], markersize=6, label=cases.case_name(*panel),
        )  # fmt: skip
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(-0.6, len(labels) - 0.4)
    ax.set(xlabel=slower, title="Bindings that are no pair of nodes")
    part.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _overhead_words(shown: pd.DataFrame, dtype: str) -> str:
    slowest = shown.loc[shown["relative time"].idxmax()]
    remote = shown[shown["binding"].map(_is_pair) & (shown["CPU nodes"] != shown["memory nodes"])]
    case = cases.case_name(slowest["attention"], slowest["phase"], dtype)
    alt = f"Heatmaps of time by CPU node and memory node in {dtype}, for {listed([cases.case_name(*p) for p in cases.panels(shown)])}. "
    if shown["binding"].nunique() == 1:
        return alt + f"Only {slowest['binding']} was measured: there is nothing to compare."
    alt += f"The slowest is {slowest['binding']} in {case} with {slowest['relative time']:.2f} times the {_reference(shown)}"
    if remote.empty:
        return alt + "; no remote binding was measured."
    return alt + f"; the median over remote bindings is {remote['relative time'].median():.2f} times."


@drawn
def pages(rows: pd.DataFrame) -> Plot:
    """Where the pages of each tensor lay after the measurement, as shares per node.

    Bindings with the same memory binding are one bar, since it alone decides where pages go; where memory is not bound,
    only preferred, or K and V are touched first by one thread, the CPU nodes decide as well and the whole label is the bar.
    """
    name, title = "pages", "Pages per node and tensor"
    table = _pages_table(rows)
    if table.empty:
        return nothing(name, title, "No receipt holds pages.")
    shares = table.assign(bar=table["binding"].map(_memory_part))
    shares = shares.pivot_table(index=["tensor", "bar"], columns="node", values="pages", aggfunc="sum", fill_value=0)
    shares = 100 * shares.div(shares.sum(axis=1), axis=0)
    tensors = list(dict.fromkeys(table["tensor"]))
    bars = sorted(set(shares.index.get_level_values("bar")), key=lambda bar: (len(bar), bar), reverse=True)
    figure, axes = canvas(1, len(tensors), height=0.24 * len(bars) + 1.5, sharey=True)
    palette = dict(zip(shares.columns, _node_colors(len(shares.columns)), strict=True))
    for ax, tensor in zip(axes, tensors, strict=True):
        left = pd.Series(0.0, index=bars)
        for node in shares.columns:
            widths = shares.loc[tensor, node].reindex(bars, fill_value=0.0)
            segments = ax.barh(bars, widths, left=left, color=palette[node], height=0.75, label=_node_name(node))
            numbers = [f"{node}" if width >= 25 and node >= 0 else "" for width in widths]
            ax.bar_label(segments, numbers, label_type="center", fontsize=9, color=_ink(palette[node]))
            left += widths
        ax.set_title(tensor)
        ax.set_xticks([0, 50, 100])
        ax.set_xlim(0, 100)
        ax.grid(False)
        ax.margins(y=0.02)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, title="share of pages (%)",
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    note = (
        "Bars are memory bindings (m: bound, i: interleaved, w: by weight, p and P: preferred, f: touched first by one thread, "
        "m*: where the CPUs first touched). Pages counted after each case."
    )
    return Plot(name, title, figure, _pages_words(table), table, note)


def _pages_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return median pages of each tensor and node over the receipts of a binding."""
    counted = []
    receipts = rows[["execution_id", "label", "requested", "effective", "observed"]].drop_duplicates(
        ["label", "observed"]
    )
    for _, row in cases.without_twin(receipts).iterrows():
        for tensor, counts in Receipt.from_columns(row).pages_after.items():
            counted += [(row["label"], tensor, node, count) for node, count in counts.items()]
    frame = pd.DataFrame(counted, columns=["binding", "tensor", "node", "pages"])
    order = {tensor: position for position, tensor in enumerate(dict.fromkeys(frame["tensor"]))}
    medians = frame.groupby(["binding", "tensor", "node"], as_index=False)["pages"].median()
    medians["pages"] = medians["pages"].round().astype(int)
    return medians.sort_values(["binding", "tensor", "node"], key=lambda c: c.map(order) if c.name == "tensor" else c)


def _memory_part(label: str) -> str:
    binding = Binding.parse(label)
    return str(Binding((), binding.mem_nodes, binding.policy)).removeprefix("c*") if binding.confines_memory else label


def _node_name(node: int) -> str:
    return f"node {node}" if node >= 0 else "never touched"


def _node_colors(count: int) -> list[str]:
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(colormaps["viridis"]((i + 0.5) / count)) for i in range(count)]


def _ink(background: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = to_rgb(background)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def _pages_words(table: pd.DataFrame) -> str:
    misplaced = [
        (label, int(group.loc[~group["node"].isin(bound.mem_nodes), "pages"].sum()), int(group["pages"].sum()))
        for label, group in table.groupby("binding")
        if (bound := Binding.parse(str(label))).confines_memory
    ]
    wrong = [f"{label}: {outside} of {total} pages" for label, outside, total in misplaced if outside]
    tensors, bindings = listed(list(dict.fromkeys(table["tensor"]))), table["binding"].nunique()
    alt = f"Stacked bars of where the pages of {tensors} lay, for {bindings} bindings. "
    if wrong:
        return alt + f"Pages outside the bound nodes: {listed(wrong)}."
    return alt + f"All pages of the {len(misplaced)} bindings that bind memory lay on the nodes that were asked for."
