"""What memory was predicted to allow, beside what was measured."""

from __future__ import annotations

import pandas as pd

from numa_lab.report import cases
from numa_lab.report.plots import COLORS, GREY, Plot, canvas, drawn, listed, nothing
from numa_lab.measurement.comparison import CASE

NAME, TITLE = "prediction", "Prediction and measurement"
_KEYS = ["label", *(name for name in CASE if name not in ("backend", "phase"))]


def against_prediction(rows: pd.DataFrame, predicted: pd.DataFrame) -> pd.DataFrame:
    """Decode cases by the fastest backend: median, least and most seconds over executions, and `predicted` seconds.

    `predicted` is what ``numa_lab.measurement.results.load_prediction`` gives; cases that it lacks are left out.
    """
    decode = cases.medians(cases.without_twin(rows))
    decode = decode[decode["phase"] == "decode"]
    if decode.empty or predicted.empty:
        return pd.DataFrame(columns=[*_KEYS, "backend", "seconds", "least", "most", "predicted", "limit", "ratio"])
    decode = cases.fastest_backend(decode)
    measured = (
        decode.groupby([*_KEYS, "backend"])["seconds"].agg(seconds="median", least="min", most="max").reset_index()
    )
    expected = predicted.rename(columns={"seconds": "predicted"})[[*_KEYS, "predicted", "limit"]]
    compared = measured.merge(expected, on=_KEYS)
    return compared.assign(ratio=compared["seconds"] / compared["predicted"])


@drawn
def prediction(rows: pd.DataFrame, predicted: pd.DataFrame) -> Plot:
    """Times of one decode case under each binding, beside what bandwidths measured before let expect."""
    table = against_prediction(rows, predicted)
    if table.empty:
        return nothing(NAME, TITLE, "Nothing was predicted: that takes the probes of a sweep.")
    base = cases.base(cases.medians(cases.without_twin(rows)))
    base = base[(base["phase"] == "decode") & (base["dtype"] == cases.main_dtype(base))]
    shown = table.merge(base[_KEYS].drop_duplicates(), on=_KEYS)
    attention = next(kind for kind in cases.KINDS if (shown["attention"] == kind).any())
    shown = shown[shown["attention"] == attention].sort_values("predicted", ascending=False)
    figure, (ax,) = canvas(height=0.3 * len(shown) + 1.4)
    places, seconds = range(len(shown)), 1e3 * shown["seconds"]
    whiskers = [seconds - 1e3 * shown["least"], 1e3 * shown["most"] - seconds]
    ax.hlines(places, 0, seconds, color="0.9", zorder=0)
    ax.errorbar(seconds, places, xerr=whiskers, fmt="o", color=COLORS[0], ecolor=GREY, capsize=3, label="measured")
    ax.plot(1e3 * shown["predicted"], places, "D", color=COLORS[1], label="predicted from bandwidths")
    ax.set_yticks(places, shown["label"])
    ax.margins(y=0.15)
    ax.set_xlim(left=0)
    ax.set_xlabel("time per step (ms)")
    figure.legend(loc="outside lower center", ncols=2)
    case = cases.case_name(str(attention), "decode", str(shown["dtype"].iloc[0]))
    times = [
        f"{row.label} {1e3 * row.seconds:.3g} ms, predicted {1e3 * row.predicted:.3g}" for row in shown.itertuples()
    ]
    alt = f"Points by binding for {case}: {listed(times)}."
    ax.set_title(f"{case} ({shown['backend'].iloc[0]})")
    note = f"Medians over executions, whiskers from the fastest to the slowest. {prediction_sentence(rows, predicted)}"
    return Plot(NAME, TITLE, figure, alt, table, note)


def prediction_sentence(rows: pd.DataFrame, predicted: pd.DataFrame) -> str:
    """Return how far what was measured lies from what was predicted, over all cases that ``against_prediction`` finds."""
    table = against_prediction(rows, predicted)
    if table.empty:
        return "Nothing was predicted."
    low, middle, high = table["ratio"].quantile([0.0, 0.5, 1.0])
    return (
        f"Over {len(table)} decode cases, measured times are {low:.2f} to {high:.2f} of the predicted ones (median {middle:.2f}): "
        "a case far above 1 is bound by something else than memory."
    )
