"""Comparing two tables exactly: count and hash sum of every row, per partition, in one snapshot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from runbook import changes
from runbook.changes import Way
from runbook.database import Session
from runbook.errors import NotEqual
from runbook.ledger import Run
from runbook.statements import trusted

Sums = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Comparison:
    """What was seen: rows compared, and per partition its count and hash sum (the same on both sides)."""

    sentence: str
    rows: int
    sums: dict[str, Any]


def exactly(run: Run, session: Session, way: Way) -> Comparison:
    """Compare origin and copy in one REPEATABLE READ snapshot, leaving out the keys that still wait in the log.

    In any snapshot these are equal, under full load, so the check is exact. Raises NotEqual, naming partitions,
    counts and the first keys that differ. Both sides are read at the same time, in two sessions that share the snapshot.
    """
    with session.transaction("REPEATABLE READ"):
        changes.hold(run, session, way)
        snapshot = session.value("restore.export_snapshot")
        names = _names(run, session, way)
        reading: list[Session] = []
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(_sums_beside, run, snapshot, names, reading)
            try:
                mine = _sums(session.rows("restore.sums_of_partitioned", **names))
                beside = other.result()
            except BaseException:  # an interrupt, above all: nobody waits for the other's sums any more
                for each in reading:
                    with suppress(psycopg.Error):
                        each.connection.cancel_safe(timeout=5)
                raise
        if mine == beside:
            rows = sum(count for count, _ in mine.values())
            waiting = changes.length(run, session, way)
            return Comparison(
                f"{rows:,} rows are equal in both, to the byte, in {len(mine)} partitions; {waiting:,} changes wait in the log.",
                rows, {name: {"rows": count, "hash": value} for name, (count, value) in mine.items()},
            )  # fmt: skip
        differing = session.rows("restore.differing", **names, limit=20)
    none = (0, "")
    parts = [
        f"{name}: {mine.get(name, none)[0]:,} against {beside.get(name, none)[0]:,} rows"
        for name in sorted({*mine, *beside})
        if mine.get(name) != beside.get(name)
    ]
    keys = ", ".join(f"{row['key']} {row['finding']}" for row in differing)
    raise NotEqual(
        f"{run.plan.full_name} and its copy differ in {'; '.join(parts)}. First keys: {keys}."
        " Do not go on: roll back with 90_rollback and begin again, or find out who wrote past the change log."
    )


def _sums_beside(run: Run, snapshot: str, names: dict[str, sql.Composable], reading: list[Session]) -> Sums:
    with run.database.session("compare") as session, session.transaction("REPEATABLE READ"):
        reading.append(session)
        session.run(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        return _sums(session.rows("restore.sums_of_plain", **names))


def _sums(rows: list[dict[str, Any]]) -> Sums:
    return {row["partition"]: (row["rows"], str(row["hash"])) for row in rows}


def _names(run: Run, session: Session, way: Way) -> dict[str, sql.Composable]:
    plan = run.plan
    root = run.names["shadow" if way is changes.FORWARD else "source"]
    return {
        **run.names, "origin": run.names[way.origin], "copy": run.names[way.copy], "log": run.names[way.log],
        "partitioned": root, "plain": run.names["source" if way is changes.FORWARD else "retired"],
        "d_hash": plan.hashed("d"), "s_hash": plan.hashed("s"), "partition_of": partition_of(session, root),
    }  # fmt: skip


def partition_of(session: Session, root: sql.Composable) -> sql.Composable:
    """An expression over a source row: the partition that would take it, by PostgreSQL's own rules."""
    cases: list[sql.Composable] = []
    default: sql.Composable = sql.SQL("'(no partition)'")
    for row in session.rows("restore.partition_rules", parent=root.as_string(None)):
        if row["is_default"] or row["rule"] is None:
            default = sql.Literal(row["partition"])
        else:
            cases.append(sql.SQL("WHEN {} THEN {}").format(trusted(row["rule"]), sql.Literal(row["partition"])))
    return sql.SQL("CASE {} ELSE {} END").format(sql.SQL(" ").join(cases), default) if cases else default
