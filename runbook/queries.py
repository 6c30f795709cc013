"""The application's real statements: where they are found, and what the planner makes of each, before and after."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from runbook.errors import BadInput
from runbook.ledger import Run
from runbook.plan import Plan
from runbook.points import POINTS, copy_table, shown, stage
from runbook.redaction import valueless
from runbook.session import Session
from runbook.statements import rendered, spelled, trusted
from runbook.words import counted

# What a statement may say that no plan shows to fail, or to do more than before.
HAZARDS = {
    POINTS["inserted"][0]: re.compile(r"\binsert\b.*\breturning\b.*\b[xc]m(?:in|ax)\b", re.IGNORECASE | re.DOTALL),
    POINTS["place"][0]: re.compile(r"\bctid\b", re.IGNORECASE),
}
ANALYZED = 16  # the first version with EXPLAIN (GENERIC_PLAN)


def statements(plan: Plan, session: Session, file: str = "") -> tuple[list[tuple[int, str]], str]:
    """(calls, text) of each statement that names the table or a view of it, and where they are from.

    From `file`, where one is named: statements that end with a semicolon at a line's end, $1 for what varies. Else from
    pg_stat_statements, where that is. Raises BadInput for a file that cannot be read.
    """
    names = [plan.table.name, *(name for _, name in plan.view_tables)]
    mentioned = re.compile(
        rf'(?<![\w$])"?({"|".join(re.escape(name.replace(chr(34), chr(34) * 2)) for name in names)})"?(?![\w$])', re.IGNORECASE
    )
    if file:
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"queries names {file}, which cannot be read ({getattr(error, 'strerror', None) or 'it is no UTF-8'}): give a file of SQL statements."
            ) from None
        parts = re.split(r";[ \t]*(?:\n|$)", re.sub(r"(?m)^\s*--.*\n", "", text + "\n"))
        found = [(1, part.strip()) for part in parts if mentioned.search(part)]
        if not found:
            raise BadInput(
                f"queries names {file}, and none of the statements in it names {plan.full_name}: give those that the application uses, each with a"
                " semicolon at its line's end."
            )
        return found, file
    view = session.value("queries.statistics")
    try:
        with session.connection.transaction():
            rows = session.rows("queries.statements", statistics=trusted(view)) if view else []
    except psycopg.errors.ObjectNotInPrerequisiteState:  # created, but not in shared_preload_libraries
        view, rows = None, []
    found = [(row["calls"], row["query"]) for row in rows if mentioned.search(row["query"])]
    return found, "pg_stat_statements" if view else ""


def explained(session: Session, text: str, partitions: set[str]) -> dict[str, Any]:
    """The planner's cost for any values, the partitions that the plan reads, and whether it prunes; None where it reads none.

    A generic plan shows what it can skip only when it is about to run: GENERIC_PLAN lists every partition. So the plan is
    asked for twice: by its prepared form, with NULL for each value, for what it skips; by GENERIC_PLAN for the rest.
    """
    cursor = session.connection.cursor()
    try:
        with session.connection.transaction(force_rollback=True):
            cursor.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            # binary: the extended protocol, which takes one statement only, whatever stands in the text.
            cursor.execute(sql.SQL("PREPARE runbook_query AS {}").format(trusted(text)), binary=True)
            values = sql.SQL(", ").join([sql.NULL] * session.value("queries.parameters"))
            form = sql.SQL("({})").format(values) if values.as_string(None) else sql.SQL("")
            skips = plan = session.value(sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE runbook_query{}").format(form))
            if session.connection.info.server_version // 10000 >= ANALYZED:
                plan = session.value(sql.SQL("EXPLAIN (FORMAT JSON, GENERIC_PLAN) {}").format(trusted(text)))
    finally:
        if session.connection.info.transaction_status != psycopg.pq.TransactionStatus.INERROR:
            cursor.execute("DEALLOCATE ALL")
    nodes = list(_nodes(skips[0]["Plan"]))
    reads = {
        node["Relation Name"] for node in nodes if node.get("Relation Name") in partitions and node["Node Type"] != "ModifyTable"
    }
    skipped = any(node.get("Subplans Removed") for node in nodes)
    known = bool(reads) or skipped
    return {
        "cost": plan[0]["Plan"]["Total Cost"],
        "reads": sorted(reads),
        "prunes": len(reads) < len(partitions) if known else None,
    }


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)


@contextmanager
def _side(run: Run, session: Session, after: bool) -> Iterator[None]:
    """The database as it was, or will be: names mean the other table by temporary views, which the planner sees through."""
    there = run.partitioned
    with stage(run, session):
        if there == after:
            yield
            return
        texts = [session.value("queries.view_of", view=sql.Identifier(*each).as_string(None)) for each in run.plan.view_tables]
        if there or _built(run):
            table = run.names["retired" if there else "shadow"]
            session.run("queries.redirect", name=run.names["name"], text=sql.SQL("SELECT * FROM {}").format(table))
        else:
            copy_table(run, session)
        for each, text in zip(run.plan.view_tables, texts, strict=True):
            if each in _redirected(run):
                session.run("queries.redirect", name=(each[1],), text=rendered(unqualified(run, text.rstrip(";"))))
        yield


def _built(run: Run) -> bool:
    """Whether the shadow has its rows and its indexes."""
    return run.finished("restore", "check") is not None


def _redirected(run: Run) -> list[tuple[str, str]]:
    """The views that a temporary one can stand for: of several of one name, or of the table's, only one can."""
    first = {name: (schema, name) for schema, name in reversed(run.plan.view_tables) if name != run.plan.table.name}
    return [each for each in run.plan.view_tables if each in first.values()]


def unqualified(run: Run, text: str) -> str:
    """The text with the table, and its views, named without their schema."""
    places = [(run.plan.table.schema_name, run.plan.table.name), *_redirected(run)]
    for place in places:
        schema, name = (re.escape(each.replace('"', '""')) for each in place)
        text = re.sub(rf'(?<![\w$".])"?{schema}"?\s*\.\s*(?="?{name}(?![\w$]))', "", text)
    return text


def compare(run: Run, file: str = "") -> Any:
    """Each statement before (the source, or the retired table) and after (the shadow, or the result): cost, partitions, pruning.

    Before 03 there is no shadow: then a temporary copy of some rows shows what is pruned, and no cost.
    """
    with run.action("application", "queries", again=True) as action:
        session, there = action.session, run.partitioned
        partitions = {each.name for each in run.plan.partitions}
        if there:  # of which some may have gone since, or come
            partitions = {row["name"] for row in session.rows("restore.leaves", parent=spelled(run.plan.source))}
        found, where = statements(run.plan, session, file)
        values = [value for each in run.plan.partitions for value in each.values if isinstance(value, str)]
        rows: list[dict[str, Any]] = [
            {
                "calls": calls,
                "statement": valueless(text, values),
                "look at": "; ".join(said for said, sign in HAZARDS.items() if sign.search(text)),
            }
            for calls, text in found
        ]
        for after, cost in ((False, "cost before"), (True, "cost after")):
            if there and not after and (run.plan.restore_from == "backup" or run.state == "finished"):
                continue  # nothing is left of what was before
            with _side(run, session, after):
                for row, (_, text) in zip(rows, found, strict=True):
                    try:
                        plan = explained(session, unqualified(run, text), partitions)
                    except psycopg.Error as error:
                        row["not explained"] = f"{error.sqlstate}: {error.diag.message_primary}"
                        continue
                    row[cost] = plan["cost"] if there or not after or _built(run) else None
                    if after:
                        row |= {"prunes": plan["prunes"], "reads": ", ".join(plan["reads"])}
        whole = [row for row in rows if row.get("prunes") is False]
        dearer = [row for row in rows if (row.get("cost after") or 0) > 1.2 * (row.get("cost before") or float("inf"))]
        sentence = f"{counted(len(rows), 'statement')} from {where}: {counted(len(whole), 'reads', 'read')} every partition, {counted(len(dearer), 'costs', 'cost')} more than before."
        if not where:
            sentence = "There is no pg_stat_statements: name a file of statements in queries to see what becomes of them."
        action.finish(sentence, len(rows), said=sentence, statements=rows)
    return shown(
        rows, ["calls", "statement", "cost before", "cost after", "prunes", "reads", "look at", "not explained"]
    ).set_caption(sentence)
