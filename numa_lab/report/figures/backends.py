"""What placement costs each backend: where a slow kernel hides NUMA."""

from __future__ import annotations

import pandas as pd

from numa_lab.report import cases
from numa_lab.report.figures.placement import relative_times
from numa_lab.report.plots import COLORS, GREY, MARKERS, Plot, canvas, drawn, listed, nothing


@drawn
def overhead_by_backend(rows: pd.DataFrame) -> Plot:
    """How much slower each binding is for each backend that computed the same decode case.

    A kernel that computes longer than memory takes to deliver shows less of what remote memory costs. Each backend is
    compared with its own fastest local binding.
    """
    name, title = "backends", "Cross-node overhead by backend"
    base = cases.base(cases.medians(cases.without_twin(rows)))
    decode = base[base["phase"] == "decode"] if len(base) else base
    both = decode.groupby(["attention", "dtype"])["backend"].nunique() if len(decode) else pd.Series(dtype=int)
    if not (both > 1).any():
        return nothing(name, title, "No decode case was measured with more than one backend.")
    attention, dtype = both[both > 1].index[0]
    shown = decode[(decode["attention"] == attention) & (decode["dtype"] == dtype)]
    table = pd.concat(
        [relative_times(part).assign(backend=str(backend)) for backend, part in shown.groupby("backend")],
        ignore_index=True,
    )
    bindings = sorted(set(table["binding"]), key=lambda label: (len(label), label), reverse=True)
    if len(bindings) == 1:
        return nothing(name, title, f"Only {bindings[0]} was measured: nothing to compare.")
    figure, (ax,) = canvas(height=0.3 * len(bindings) + 1.5)
    ranges = []
    for i, (backend, part) in enumerate(table.groupby("backend")):
        slower = (100 * (part.set_index("binding")["relative time"] - 1)).reindex(bindings)
        ax.plot(slower, range(len(bindings)), MARKERS[i], color=COLORS[i], label=backend, markersize=7)
        ranges.append(f"{backend} up to {slower.max():.1f} % ({slower.idxmax()})")
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(bindings)), bindings)
    ax.margins(y=0.15)
    ax.set_xlabel("slower than its own fastest local binding (%)")
    figure.legend(loc="outside lower center", ncols=3)
    case = cases.case_name(str(attention), "decode", str(dtype))
    alt = f"Points by binding for {case}: {listed(ranges)} slower than the fastest local binding of the same backend."
    note = f"{case}; medians over the executions of a binding, with all threads that it allows."
    return Plot(name, title, figure, alt, table, note)
