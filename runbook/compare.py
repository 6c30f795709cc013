"""Comparing two tables exactly: count and hash sum of every row, per partition, in one snapshot."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from runbook import changes, possible
from runbook.changes import Way
from runbook.errors import NotEqual
from runbook.ledger import Run
from runbook.plan import equal
from runbook.session import Session
from runbook.statements import spelled, statement, trusted
from runbook.words import counted

Sums = dict[str, tuple[int, int]]  # rows and hash of every partition


@dataclass(frozen=True)
class Comparison:
    """What was seen: rows compared, per partition its count and hash sum (the same on both sides), and how many changes
    that were left out."""

    sentence: str
    rows: int
    sums: dict[str, Any]
    waiting: int


def exactly(run: Run, session: Session, way: Way, apart: Sequence[sql.Identifier] = ()) -> Comparison:
    """Compare origin and copy in one REPEATABLE READ snapshot, leaving out the keys that still wait in the log, and of the plain table
    those that stand `apart`, in partitions that were detached.

    In any snapshot these are equal, under full load, so the check is exact: the partitions' sums add up to the plain
    table's. Raises NotEqual, naming partitions, counts and the first keys that differ. Both sides are read at the same
    time, in two sessions that share the snapshot, unless others are at work.
    """
    alone = session.alone
    with session.transaction("REPEATABLE READ", max_parallel_workers_per_gather=0):  # two processes, and no more
        changes.hold(run, session, way)
        snapshot = session.value("restore.export_snapshot")
        waiting = changes.length(run, session, way)
        partitioned, plain = queries(run, session, way, apart)
        reading: list[Session] = []
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(_sums_beside, run, snapshot, plain, reading) if alone else None
            try:
                mine = _sums(session.rows(partitioned))
                beside = other.result() if other else _sum(session.row(plain))
            except BaseException:  # an interrupt, above all: nobody waits for the other's sums any more
                for each in reading:
                    with suppress(psycopg.Error):
                        each.connection.cancel_safe(timeout=5)
                raise
        if (sum(rows for rows, _ in mine.values()), sum(hash_ for _, hash_ in mine.values())) == beside:
            return Comparison(
                f"{counted(beside[0], 'row is', 'rows are')} equal in both, to the byte, in {counted(len(mine), 'partition that has rows', 'partitions that have rows')}; {counted(waiting, 'change waits', 'changes wait')} in the log.",
                beside[0],
                {name: {"rows": rows, "hash": str(value)} for name, (rows, value) in mine.items()},
                waiting,
            )
        names = _names(run, session, way, apart)
        theirs = _sums(session.rows("restore.sums_of_plain_by_partition", **names))
        differing = session.rows("restore.differing", **names, limit=20)
        if way is changes.FORWARD and (computed := list(possible.recomputed(session, run.plan, None))):
            raise NotEqual(
                f"{run.plan.full_name} and its copy differ. {' '.join(each.sentence for each in computed)} Roll back with 90_rollback; then"
                f" {' '.join(each.way_out for each in computed)}"
            )
    parts = [
        f"{name}: {mine.get(name, (0, 0))[0]:,} against {counted(theirs.get(name, (0, 0))[0], 'row')}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    keys = ", ".join(f"{row['key']} {row['finding']}" for row in differing)
    raise NotEqual(
        f"{run.plan.full_name} and its copy differ in {'; '.join(parts)}. First keys: {keys}."
        " Do not go on: roll back with 90_rollback and begin again, or find out who wrote past the change log."
    )


def detached(run: Run, session: Session) -> list[sql.Identifier]:
    """Partitions that somebody detached since the cut-over and kept: what they took along is not lost."""
    added = statement("verify.added", **run.names)
    rows = session.rows("verify.detached", **run.names, known=statement("verify.known", **run.names, added=added))
    return [sql.Identifier(row["schema"], row["name"]) for row in rows]


def total(sums: Collection[dict[str, Any]]) -> tuple[int, int]:
    """Rows and hash of all partitions together."""
    return sum(each["rows"] for each in sums), sum(int(each["hash"]) for each in sums)


def question(run: Run, session: Session, apart: Sequence[sql.Identifier] = ()) -> sql.Composed:
    """One statement by which anybody can ask at any later time whether the result equals the retired table."""
    return statement("verify.equal", **_names(run, session, changes.BACK, apart, later=True))


def queries(run: Run, session: Session, way: Way, apart: Sequence[sql.Identifier] = ()) -> tuple[sql.Composed, sql.Composed]:
    """The two statements whose sums are compared: of every partition, and of the plain table."""
    names = _names(run, session, way, apart)
    leaves = session.rows("restore.leaves", parent=spelled(names["partitioned"]))
    each = (
        statement("restore.sums_of_leaf", **names, leaf_name=row["name"], leaf=(row["schema"], row["name"])) for row in leaves
    )
    return sql.SQL("\nUNION ALL\n").join(each), statement("restore.sums_of_plain", **names)


def _sums_beside(run: Run, snapshot: str, plain: sql.Composed, reading: list[Session]) -> tuple[int, int]:
    with (
        run.database.session("compare") as session,
        session.transaction("REPEATABLE READ", max_parallel_workers_per_gather=0),
    ):
        reading.append(session)
        session.run(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        return _sum(session.row(plain))


def _sum(row: dict[str, Any]) -> tuple[int, int]:
    return row["rows"], int(row["hash"])


def _sums(rows: list[dict[str, Any]]) -> Sums:
    return {row["partition"]: (row["rows"], int(row["hash"])) for row in rows if row["rows"]}


def _names(
    run: Run, session: Session, way: Way, apart: Sequence[sql.Identifier] = (), *, later: bool = False
) -> dict[str, sql.Composable]:
    plan = run.plan
    root = run.names["shadow" if way is changes.FORWARD else "source"]
    names = {
        **run.names, "origin": run.names[way.origin], "copy": run.names[way.copy], "log": run.names[way.log],
        "partitioned": root, "plain": run.names["source" if way is changes.FORWARD else "retired"],
        "d_hash": plan.hashed("d"), "s_hash": plan.hashed("s"), "partition_of": partition_of(session, root),
    }  # fmt: skip
    # Now, while the log is empty, no anti-join has to be paid for every row; later it has something.
    empty = not later and changes.length(run, session, way) == 0
    for row in ("s", "d"):
        still = statement("restore.not_waiting", log=names["log"], row_is_k=names[f"{row}_is_k"])
        names[f"{row}_counts"] = sql.SQL("true") if empty else still
    a_is_s = equal("a", plan.primary_key, "s", plan.primary_key, plan.key_equals)
    elsewhere = [statement("verify.not_apart", **names, leaf=leaf, a_is_s=a_is_s) for leaf in apart]
    names["s_counts"] = sql.SQL("\n   AND ").join([names["s_counts"], *elsewhere])
    return names


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
