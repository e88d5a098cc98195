"""What the receipts in tidy rows say against the bindings that were asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from numa_lab.placement.receipt import Receipt, Team

RECEIPT_COLUMNS = ("requested", "effective", "observed")


def contradictions(rows: Mapping[str, Iterable[Any]], node_cpus: Mapping[int, Collection[int]]) -> list[str]:
    """Return each way in which a receipt contradicts its binding, as a sentence, and each sentence once.

    Receipts of older runs don't hold the size of the team: there the threads that were seen are held against the column
    ``threads``.

    Parameters
    ----------
    rows
        Tidy rows by columns, such as a DataFrame: looked at are ``threads`` and the three of the receipt.
    node_cpus
        The CPUs of each node that the run was allowed to use.
    """
    sentences: dict[str, None] = {}
    for threads, *columns in dict.fromkeys(
        zip(rows["threads"], *(rows[name] for name in RECEIPT_COLUMNS), strict=True)
    ):
        receipt = Receipt.from_columns(dict(zip(RECEIPT_COLUMNS, columns, strict=True)))
        team = receipt.team or Team(0, len(receipt.threads))
        receipt = replace(receipt, team=replace(team, asked=max(int(threads), team.asked)))
        nodes = receipt.requested.cpu_nodes or tuple(node_cpus)
        cpus = {cpu for node in nodes for cpu in node_cpus.get(node, ())}
        sentences |= dict.fromkeys(receipt.contradictions(cpus, nodes))
    return list(sentences)
