"""07: the points in which a partitioned table differs for an application, each tried, with what takes its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql

from runbook import partition, references, swapping
from runbook.errors import OutOfOrder, RunbookError
from runbook.facts import Reference
from runbook.ledger import Run
from runbook.plan import Plan, fit, identifiers
from runbook.session import Session, noted
from runbook.statements import sent, spelled, statement, trusted
from runbook.words import counted

# A statement of sql/application.sql: what changes, and what to do; `…_instead` beside it is the replacement.
POINTS = {
    "locks": ("A look-up without {key} locks every partition and its indexes", "name {key} in it, or raise max_locks_per_transaction"),
    "conflict": ("ON CONFLICT on a unique key that lacks {key} finds no constraint any more", "name {key} too, or no target"),
    "duplicate": ("Errors name the partition, and the partition's own constraint", "look at SQLSTATE 23505, not at names"),
    "double": ("Unique means unique in each partition, unless the plan keeps it unique in all", 'plan with unique = "global", or look before'),
    "upsert": ("An upsert cannot change {key}", "an UPDATE of its own moves the row"),
    "inserted": ("RETURNING xmax = 0 (or xmin) of an insert fails", "DO NOTHING returns only what was inserted; 18 has OLD and NEW"),
    "null_key": ("A row whose {key} is NULL is refused: no partition takes it", "give it a value; treat 23514 like 23502"),
    "copy_out": ("COPY of the table to a file fails", "COPY a query"),
    "freeze": ("COPY FREEZE fails", "leave FREEZE out, or load a table before it is attached"),
    "place": ("A ctid is a place in every partition: by ten of them more than ten rows are found, or deleted", "the primary key, or one partition at a time"),
    "size": ("pg_total_relation_size does not count the partitions", "sum over pg_partition_tree"),
    "analyzed": ("Autovacuum never analyzes the root", "ANALYZE it after bulk changes, and every night"),
    "triggers": ("A changed {key} never fires AFTER UPDATE row triggers", "DELETE and INSERT row triggers, a BEFORE UPDATE one, or one for each statement"),
    "prepared": ("A prepared SELECT * fails once when its table gains a column", "name the columns, or prepare it again"),
    "moving": ("A row that another session moves gives 40001, in foreign keys' checks too", "repeat the transaction"),
}  # fmt: skip
OF_REFERENCES = {
    "insert": ("An insert into {table} that does not name {role}: {legacy}", "name {role}"),
    "wrong_role": ("Another {role} than its row's is refused, and never corrected", "take it from the row, as above"),
}
OVERRIDING = "OVERRIDING SYSTEM VALUE "
LEGACY = {"fill": "it is filled in, until the final state refuses it", "strict": "refused, unless the default is right"}
UNTRIED = (
    ("A STABLE function that runs through the instant of the cut-over can miss the last rows", "call it again", "", "only at that instant"),
    ("CREATE INDEX CONCURRENTLY, and DROP INDEX CONCURRENTLY, of the table fail (0A000)",
     "CREATE INDEX … ON ONLY the table, then CONCURRENTLY one on each partition, and ALTER INDEX … ATTACH PARTITION each", "", "never within a transaction"),
)  # fmt: skip


def shown(rows: list[dict[str, Any]], columns: list[str]) -> Any:
    styled = pd.DataFrame(rows, columns=columns).style.hide(axis="index").format(escape="html", precision=2, na_rep="")
    return styled.map(lambda _: "text-align: left; vertical-align: top; white-space: pre-wrap")


@contextmanager
def stage(run: Run, session: Session) -> Iterator[None]:
    """A transaction that is rolled back, in which nobody is waited for long; names are looked for where the table is."""
    with session.transaction(lock_timeout="300ms", row_security="on"):  # as the application's triggers would read
        own = session.value("queries.own_path")  # where its functions look for others
        session.run("queries.path", path=f"{run.names['schema'].as_string(None)}, public, {own}".rstrip(", "))
        yield
        raise psycopg.Rollback


def copy_table(run: Run, session: Session) -> None:
    """The table to be (or the one that it became), with some rows, as a temporary table of the same name."""
    plan, names = run.plan, run.plan.names("pg_temp")
    session.run_all(partition.tables(plan, "pg_temp"))
    for reference in [] if run.partitioned else plan.own_roles:  # else it has the column
        session.run("foreign_keys.add_own_column", **references.names(run, reference) | {"shadow": names["shadow"]})
    name = next((index.name for index in plan.indexes if index.primary), "key")
    key = trusted(plan.new_primary_constraint)
    session.run("ddl.add_constraint", table=names["shadow"], constraint=(name,), definition=key)
    listed = [map(sql.Literal, each.values) for each in plan.partitions if each.values and plan.partition_by == "list"]
    wanted = [sql.SQL("s.{} IN ({})").format(names["key"], sql.SQL(", ").join(values)) for values in listed]
    for some in wanted or [sql.SQL("true").format()]:
        with suppress(psycopg.errors.CheckViolation), session.connection.transaction():  # a row that no partition takes
            session.run("application.copy_rows", **names, some=some)
    if swapping.refuses_moves(run):
        here = {"source": names["shadow"], "keep_function": sql.Identifier("pg_temp", "keep_partition")}
        session.run("cutover.refuse_moves", **names | here)


def _copy_reference(run: Run, session: Session, reference: Reference, its: dict[str, Any]) -> dict[str, Any]:
    """As `copy_table`, a table that references it, with the composite key and what `legacy_inserts` says; its names. Of one that
    references itself the rows that do are in a table of their own."""
    table, number = sql.Identifier("pg_temp", run.plan.table.name), (*run.plan.references, *run.plan.selves).index(reference)
    copy = fit(f"{reference.table}_itself") if reference in run.plan.selves else reference.table
    own: dict[str, sql.Composable] = {
        "reference": sql.Identifier("pg_temp", copy),
        "table": table,
        "source": table,
        "filled": sql.Identifier("pg_temp", "filled"),
    }
    own |= {"note": statement("foreign_keys.note_fill", **own), "itself": references.itself(run, reference, own["filled"])}
    own |= {each: sql.Identifier("pg_temp", f"{each}_{number}") for each in ("fill_function", "named_function")}
    definition = reference.composite.replace(run.plan.source.as_string(None), table.as_string(None))
    named = its | own | {"definition": trusted(definition), "original": reference.identifier, "copy": sql.Identifier(copy)}
    session.run("application.copy_reference", **named)
    if run.plan.legacy_inserts == "fill" and run.state != "finished":
        for each in ("create_filled", "create_fill", "drop_default"):
            session.run(f"foreign_keys.{each}", **named)
    return named


def _names(run: Run, session: Session, there: bool) -> dict[str, Any]:
    """The placeholders of the points: the table itself, or its temporary copy. Of partitions that were dropped since nothing is
    taken."""
    plan, schema = run.plan, run.plan.table.schema_name if there else "pg_temp"
    table = sql.Identifier(schema, plan.table.name)
    standing = {row["name"] for row in session.rows("restore.leaves", parent=spelled(table))}
    partitions = [each for each in plan.partitions if each.name in standing]
    if not partitions:
        raise OutOfOrder(
            f"{plan.full_name} has none of the plan's partitions any more, with whose rows this is tried: 08_monitor goes on without."
        )
    largest = max(partitions, key=lambda each: each.rows).name
    key, columns = sql.Identifier(plan.key), [each.name for each in plan.copied] + [each.role_column for each in plan.own_roles]

    def with_key(value: sql.Composable) -> sql.Composable:
        return sql.SQL(", ").join(value if name == plan.key else sql.Identifier(name) for name in columns)

    sample = [statement("application.sample", **run.names, leaf=sql.Identifier(schema, each.name)) for each in
              sorted(partitions, key=lambda each: -each.rows)]  # fmt: skip
    own = [each for each in partitions if each.name != largest and each.values and each.values[0] is not None]
    return run.names | {
        "table": table, "relation": sql.Literal(table.as_string(None)), "leaf": sql.Identifier(schema, largest),
        "columns_elsewhere": with_key(sql.SQL("(SELECT {} FROM runbook_key)").format(key)), "columns_without": with_key(sql.SQL("NULL")),
        "overriding": sql.SQL(OVERRIDING * any(column.identity == "a" for column in plan.columns)),
        "s_is_o": _same(plan.new_primary_key), "s_is_o_before": _same(plan.primary_key or (plan.key,)),
        "first": sql.Identifier((plan.primary_key or (plan.key,))[0]), "frequent": sql.Literal(plan.frequent_value),
        "some": sql.SQL(" UNION ALL ").join(sample), "fallback": sql.Literal(own[0].values[0] if own else None),
    }  # fmt: skip


def _same(columns: Iterable[str]) -> sql.Composable:
    return sql.SQL(" AND ").join(sql.SQL("s.{0} = o.{0}").format(sql.Identifier(name)) for name in columns)


def show(run: Run) -> Any:
    """Every point in which a partitioned table differs, tried in a transaction that is rolled back, and its replacement.

    On the table itself once it is partitioned; before, on a temporary copy of some rows. 40001 needs two sessions and a
    commit: it is shown on a table of its own.
    """
    with run.action("application", "points", again=True) as action:
        session, there, rows = action.session, run.partitioned, list[dict[str, Any]]()

        def tell(name: str, told: tuple[str, str], names: dict[str, Any]) -> None:
            words = {"key": run.plan.key, "legacy": run.plan.legacy_inserts, "table": "", "role": ""} | names.get("words", {})
            rows.append({"what changes": told[0].format(**words), "what to do": told[1].format(**words)})
            for each, asked, seen in ((name, "statement", "seen"), (f"{name}_instead", "instead", "seen then")):
                with suppress(RunbookError):  # not every point has a replacement that is a statement
                    tried = statement(f"application.{each}", **{name: value for name, value in names.items() if name != "words"})
                    rows[-1] |= {asked: _plain(tried), seen: _try(session, tried, run.plan)}

        with stage(run, session):
            if not there:
                copy_table(run, session)
            names = _names(run, session, there)
            tell("locks", POINTS["locks"], names)
            session.run("application.samples", **names)
            session.run("verify.all_immediate")  # what is rolled back is never checked at a commit
            skipped = {"locks", "moving"} | ({"null_key"} if run.plan.takes_null else set())
            if not there and run.plan.unique == "global":  # the guard is only on the table itself
                skipped.add("double")
            for name, told in POINTS.items():
                if name == "conflict":
                    for index in run.plan.indexes:
                        if index.unique and index.columns and run.plan.key not in index.columns:
                            target = sql.SQL(" ({})").format(names["new_pk"]) if index.primary else sql.SQL("")
                            tell(name, told, names | {"unique_columns": identifiers(index.columns), "target": target})
                elif name not in skipped:
                    tell(name, told, names)
            for reference in (*references.added(run), *run.plan.own_roles):
                own = reference in run.plan.own_roles
                its: dict[str, Any] = references.names(run, reference) | {k: names[k] for k in ("table", "frequent")}
                found = session.rows("application.columns", relation=reference.identifier.as_string(None))
                columns = [row["name"] for row in found if row["name"] != reference.role_column]
                always = any(row["always"] for row in found)
                pairs = zip(reference.referenced, reference.columns, strict=True)
                its |= {
                    "its_columns": identifiers(columns), "columns_listed": identifiers(reference.columns), "its_overriding": sql.SQL(OVERRIDING * always),
                    "r_columns": sql.SQL(", ").join(sql.Identifier("r", name) for name in columns),
                    "s_is_its": sql.SQL(" AND ").join(sql.SQL("s.{} = runbook_its.{}").format(*map(sql.Identifier, each)) for each in pairs),
                    "words": {"table": reference.table, "role": reference.role_column, "legacy": LEGACY[run.plan.legacy_inserts]},
                }  # fmt: skip
                with session.connection.transaction(force_rollback=True):
                    try:
                        with session.connection.transaction():
                            if own and there:  # a row of its own may have others that refer to it, and CASCADE
                                copy_table(run, session)
                            its = _copy_reference(run, session, reference, its) if own or not there else its
                            session.run("application.defer")  # of those who refer to the row, which comes again
                            session.run("application.take", **its)
                            if " DEFERRABLE" in reference.composite:
                                schema = "pg_temp" if own or not there else reference.schema_name
                                session.run("application.at_once", constraint=(schema, reference.name))
                    except psycopg.Error as error:  # its rows are referenced themselves, or somebody holds them
                        rows.append(
                            {"what changes": f"Inserts into {reference.table} were not tried", "seen": _refusal(error, run.plan)}
                        )
                        continue
                    for name, told in OF_REFERENCES.items():
                        tell(name, told, its)
        rows.append(_moving(run, session))
        rows += [dict(zip(("what changes", "what to do", "statement", "seen"), each, strict=True)) for each in UNTRIED]
        where = "itself" if there else "on a temporary copy of some rows"
        action.finish(
            f"{counted(len(rows), 'point was', 'points were')} shown on {run.plan.full_name} {where}.", len(rows), points=rows
        )
    return shown(rows, ["what changes", "statement", "seen", "what to do", "instead", "seen then"])


def _plain(asked: sql.Composed) -> str:
    return "\n".join(line for line in asked.as_string(None).splitlines() if not line.startswith("--"))


def _refusal(error: psycopg.Error, plan: Plan) -> str:
    """What the server says; by whom, where a function of the application's own refuses it, or fails. That, and what the migrating
    role may not do, says nothing of the statement: it was not tried."""
    named = f" ({error.diag.constraint_name} of {error.diag.table_name})" if error.diag.constraint_name else ""
    within = re.search(r'^(PL/\w+|SQL) function "?([^\s("]+)(.*)', error.diag.context or "", re.MULTILINE)
    not_tried = "not tried, " if error.sqlstate == "42501" else ""
    if within and not within[2].startswith(("runbook_", "pg_temp", plan.guard_schema or "runbook_")):
        not_tried = f"{within[2]} refuses it, " if within[3].endswith(" at RAISE") else f"not tried, {within[2]} fails, "
    return f"{not_tried}{error.sqlstate}: {error.diag.message_primary}{named}"


def _try(session: Session, asked: sql.Composed, plan: Plan) -> str:
    """What becomes of it, in a savepoint that is rolled back: an error, the first value that it returns, or how many rows."""
    text = _plain(asked)
    try:
        with (
            session.connection.transaction(force_rollback=True),
            noted(session.statements, text.partition("\n")[0][:120]) as rows,
        ):
            cursor = session.connection.cursor()
            if text.startswith("COPY"):
                with cursor.copy(asked) as copy:
                    for _ in copy if "TO STDOUT" in text else ():
                        pass
                return "it works"
            cursor.execute(sent(asked.as_string(None)))
            while cursor.nextset():
                pass
            rows.append(cursor.rowcount)
            row = cursor.fetchone() if cursor.description else None
            if row is not None:
                return ", ".join("NULL" if each is None else str(each) for each in row.values())
            return "it works" if cursor.rowcount < 0 else counted(cursor.rowcount, "row")
    except psycopg.Error as error:
        return _refusal(error, plan)


def _moving(run: Run, session: Session) -> dict[str, Any]:
    row = dict(zip(("what changes", "what to do"), POINTS["moving"], strict=True))
    ours = {
        name: ("runbook", f"{name}_{run.migration}") for name in ("moving", "moving_a", "moving_b")
    }  # who migrates another table has its own
    session.run("application.moving", **ours)
    try:
        with run.database.session("application") as other, session.transaction(lock_timeout="300ms"):
            session.run("application.moving_waits", **ours)
            other.run("application.moving_moves", **ours)
            tried = sql.SQL("FETCH waiting").format()
            row |= {
                "statement": _plain(statement("application.moving_waits", **ours)) + ";\nFETCH waiting",
                "seen": _try(session, tried, run.plan),
            }
            raise psycopg.Rollback
        again = statement("application.moving_again", **ours)
        return row | {"instead": _plain(again), "seen then": _try(session, again, run.plan)}
    finally:
        session.run("ddl.drop", table=ours["moving"])
