"""Honest advice: whether there is room for the migration, and when partitioning will not help."""

from __future__ import annotations

import re
from collections.abc import Iterator

from runbook import queries
from runbook.dependents import instead
from runbook.facts import Finding
from runbook.forecast import MB, free
from runbook.plan import Plan
from runbook.session import Session

CALLS, SCANS = 100, 1000  # fewer say nothing
MOST, NEARLY = 0.9, 0.98  # of the rows, in one partition
AFTER_WHERE = re.compile(r"\b(where|on|using)\b.*", re.IGNORECASE | re.DOTALL)
OWN_CHECK = re.compile(r"^\s*SELECT 1 FROM ONLY .* FOR KEY SHARE OF x\s*$", re.DOTALL)  # by which a foreign key asks


def given(session: Session, plan: Plan) -> Iterator[Finding]:
    """What the people who decide should hear, in no order. Only reads; numbers that change by the hour are left out, so that
    the same table has the same plan."""
    if plan.blockers:
        return
    yield from _room(session, plan)
    yield from _memory(session, plan)
    yield from _look_ups(session, plan)
    yield from _skew(plan)
    yield from _places(session, plan)
    yield from _conflicts(session, plan)


def _room(session: Session, plan: Plan) -> Iterator[Finding]:
    there = free(session, plan.table.oid)
    needed = 2 * plan.table.table_bytes + plan.table.index_bytes
    if there is not None and there < needed:
        yield Finding.blocker(
            plan.full_name, f"There is not enough disk: the partitions, their indexes and the backup of {plan.full_name} need up to"
            f" {needed / MB:,.0f} MB, and {there / MB:,.0f} MB are free where it lies.",
            "Make room first; a table that is mostly air needs less after VACUUM FULL.",
        )  # fmt: skip


def _memory(session: Session, plan: Plan) -> Iterator[Finding]:
    size = plan.table.table_bytes + plan.table.index_bytes
    for row in session.rows("advice.memory"):
        if size < row["bytes"]:
            yield Finding.note(
                plan.full_name, f"{plan.full_name} with its indexes ({size / MB:,.1f} MB) is smaller than {row['name']} ({row['bytes'] / MB:,.0f} MB):"
                " it is read from memory as it is, and partitioning will hardly make that faster.",
                "Partition it for what that brings besides (parts that are dropped, reindexed, vacuumed alone), or when it has grown.",
            )  # fmt: skip
            return


def _look_ups(session: Session, plan: Plan) -> Iterator[Finding]:
    """By the statements themselves where somebody counts them, else by the indexes that they used."""
    found, where = queries.statements(plan, session)
    of_key = re.compile(rf'(?<![\w$])"?{re.escape(plan.key)}"?(?![\w$])', re.IGNORECASE)
    asked = [(calls, bool((rest := AFTER_WHERE.search(text)) and of_key.search(rest[0]))) for calls, text in found
             if not re.match(r"\s*insert\b", text, re.IGNORECASE) and not OWN_CHECK.match(text)]  # fmt: skip
    total, named = sum(calls for calls, _ in asked), sum(calls for calls, names in asked if names)
    if total >= CALLS:
        if named < total / 2:
            yield Finding.warning(
                plan.full_name, f"About {round(10 - 10 * named / total)} of 10 calls that read or change rows of {plan.full_name} do not name {plan.key} (by"
                f" {where}): each of them will visit all {len(plan.partitions)} partitions.",
                "Partition by a column that they name, or change them: 07_application judges each.",
            )  # fmt: skip
        return
    scans = session.row("advice.scans", oid=plan.table.oid, key=plan.key)
    if scans["every"] >= SCANS and scans["by_key"] < scans["every"] / 2:
        yield Finding.warning(
            plan.full_name, f"About {round(10 - 10 * scans['by_key'] / scans['every'])} of 10 index scans of {plan.full_name} are of indexes without {plan.key}: unless"
            f" the look-ups name {plan.key} besides, each will visit all {len(plan.partitions)} partitions.",
            "Partition by a column that they name; pg_stat_statements would tell which do.",
        )  # fmt: skip


def _skew(plan: Plan) -> Iterator[Finding]:
    largest, rows = max(plan.partitions, key=lambda each: each.rows), sum(each.rows for each in plan.partitions)
    if len(plan.partitions) > 1 and largest.rows > MOST * rows > 0:
        finding = Finding.warning if largest.rows > NEARLY * rows else Finding.note
        yield finding(
            largest.name, f"{largest.rows / rows:.1%} of the rows fall into {largest.name}: queries that read it gain little.",
            f"Divide by another column than {plan.key}, or divide that partition's values further.",
        )  # fmt: skip


def _places(session: Session, plan: Plan) -> Iterator[Finding]:
    """Housekeeping that deletes by ctid, as `DELETE … WHERE ctid = ANY (ARRAY(SELECT ctid … LIMIT 1000))` does, hits rows that it never chose."""
    if functions := [row["function"] for row in session.rows("advice.by_place", names=_named(plan))]:
        yield Finding.warning(
            plan.full_name, f"{', '.join(functions)} {'changes' if len(functions) == 1 else 'change'} rows by ctid, which is a place in every partition of"
            f" {plan.full_name}: rows of other partitions would be hit, too.",
            "Let it go by the primary key, or compare tableoid as well, before 05_cutover.",
        )  # fmt: skip


def _conflicts(session: Session, plan: Plan) -> Iterator[Finding]:
    """Functions of the database, and of its extensions and queues, of which no list of the application's statements tells."""
    names = "|".join(re.escape(name) for name in _named(plan))
    insert = re.compile(
        rf'\binsert\s+into\s+(?:[\w$"]+\s*\.\s*)?"?(?:{names})"?(?![\w$"])(?:(?!\binsert\s)[^;])*?\bon\s+conflict\s*\(([\w$",\s]+)\)',
        re.IGNORECASE,
    )
    targets = {
        row["function"]: [set(re.findall(r"[\w$]+", target.lower())) for target in insert.findall(row["source"])]
        for row in session.rows("advice.conflicts")
    }
    for index in plan.indexes:
        columns = {name.lower() for name in index.columns}
        functions = [function for function, found in targets.items() if columns in found]
        if functions and index.unique and plan.key not in index.columns:
            what = f"ON CONFLICT ({', '.join(index.columns)})"
            yield Finding.warning(
                index.name, f"{', '.join(functions)} {'inserts' if len(functions) == 1 else 'insert'} into {plan.full_name} with {what}, and"
                f" {'fails' if len(functions) == 1 else 'fail'} from the cut-over on (42P10).",
                f"{instead(plan, index)} Change it with the cut-over.".lstrip(),
            )  # fmt: skip


def _named(plan: Plan) -> list[str]:
    """What a function can call the table: its name, or that of a view of it."""
    return [plan.table.name, *(view.name.rpartition(".")[2] for view in plan.views)]
