"""What the way back could lose: changes that no log knows of, rows that the original cannot take, objects made since the cut-over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import errors, sql

from runbook import catalog, changes, compare, drift, locks, swapping
from runbook.changes import BACK, Rewritten
from runbook.errors import NotEqual, OutOfOrder, PromiseBroken
from runbook.growth import half_detached
from runbook.ledger import Run
from runbook.references import added, gained, names
from runbook.session import Session
from runbook.statements import spelled, statement, trusted
from runbook.words import counted


def replay(run: Run, session: Session, patience: locks.Patience) -> tuple[int, str]:
    """Bring the original to the table's state; where a TRUNCATE left no keys, by looking at every row. As long as the patience lasts."""
    while True:
        try:
            with whole(run, session):
                return changes.catch_up(run, session, patience, BACK)
        except Rewritten:
            if patience.spent():
                raise locks.NotYet(f"a TRUNCATE of {run.plan.full_name}") from None
            resync(run, session)


@contextmanager
def whole(run: Run, session: Session) -> Iterator[None]:
    """What runs inside needs the original's unique keys; raises PromiseBroken, naming the rows that they cannot take."""
    try:
        yield
    except errors.UniqueViolation as error:
        raise PromiseBroken(_doubles(run, session, error)) from None


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Raises PromiseBroken for what the server refuses because of what was made since the cut-over, and says what to do about it."""
    name, again = run.plan.full_name, "then run 90_rollback again."
    try:
        yield
    except (errors.InvalidTableDefinition, errors.ObjectNotInPrerequisiteState) as error:
        raise PromiseBroken(
            f"A view that reads {name}, or what else rests on it, was changed since the cut-over as the original's cannot be"
            f" ({error.diag.message_primary}): take that back, or drop it, {again}"
        ) from None
    except (errors.DuplicateTable, errors.DuplicateObject, errors.DuplicateFunction, errors.WrongObjectType) as error:
        raise PromiseBroken(
            f"The way back of {name} needs a name that was given to something else since the cut-over ({error.diag.message_primary}):"
            f" rename that, {again}"
        ) from None
    except errors.ExclusionViolation as error:
        constraint = str(error.diag.constraint_name).removesuffix("_retired")
        raise PromiseBroken(
            f"The way back of {name} is closed while rows stand in it that {constraint} of the original excludes: correct those that"
            f" came since the cut-over, {again}"
        ) from None
    except (
        errors.UndefinedTable,
        errors.UndefinedColumn,
        errors.UndefinedObject,
        errors.UndefinedFunction,
        errors.InvalidSchemaName,
    ) as error:
        raise PromiseBroken(
            f"The way back of {name} names what was renamed or dropped since the cut-over ({error.diag.message_primary}): give it its name back,"
            f" or make it again, {again}"
        ) from None
    except errors.DependentObjectsStillExist as error:
        said = " ".join((error.diag.message_detail or str(error)).split())
        here = re.sub(
            rf"(?<!function ){run.staging}\.", f"{run.plan.table.schema_name}.", said
        )  # where the table was when it failed
        raise PromiseBroken(
            f"Objects that were made since the cut-over depend on {name} and would go with it: {here}. Drop them first, {again}"
        ) from None


def _doubles(run: Run, session: Session, error: Exception) -> str:
    found = []
    for index in run.plan.indexes:
        if index.unique and index.plain and " WHERE " not in index.tail and run.plan.key not in index.columns:
            columns = sql.SQL(", ").join(map(sql.Identifier, index.columns))
            rows = session.rows("rollback.doubles", **{**run.names, "columns": columns})
            found += [f"{', '.join(index.columns)} {row['key']} ({row['rows']} rows)" for row in rows]
    return (
        f"The way back of {run.plan.full_name} is closed while rows stand in it that the original's unique keys cannot take:"
        f" {'; '.join(found) or str(error)}. Correct them, then run 90_rollback again."
    )


def is_original(run: Run, session: Session) -> bool:
    """Whether the table that has the retired original's name is the original; in a restored database its index tells."""
    indexes, retired = [each.retired_name for each in run.plan.indexes], spelled(run.names["retired"])
    return bool(session.value("rollback.original", retired_text=retired, indexes=indexes, source_oid=run.plan.table.oid))


def refuse_dropped(run: Run, session: Session, then: str) -> None:
    """Raises PromiseBroken where partitions were dropped since the cut-over, or made anew, whose rows the original still has: they would
    go there, too. `then` is what `changes.logging_back` said at the cut-over."""
    restored = session.value("verify.oid", root=spelled(run.names["retired"])) != run.plan.table.oid
    tables = None if restored else [int(each.split(" ", 1)[0]) for each in then.split(", ")]
    with session.qualified():  # a bound is told as the plan has it, and its operators may be an extension's
        gone = session.rows("rollback.dropped", **run.names, added=statement("verify.added", **run.names), then=tables)
        own = {**run.names, "belonged": _belonged(run, session, [row["bound"] for row in gone])}
        found = session.row("rollback.missing", **own)
        aside = [row["name"] for row in session.rows("rollback.set_aside", then=tables or [])]
    if not found["rows"]:
        return
    said = []
    for anew, one, many in ((False, "is there no more", "are there no more"), (True, "was made anew", "were made anew")):
        if names := [row["name"] for row in gone if row["anew"] == anew]:
            said.append(f"{', '.join(names)} {one if len(names) == 1 else many}")
    logged = f" ({found['logged']:,} of them changed or deleted since the cut-over)" if found["logged"] else ""
    insert = " ".join(statement("rollback.put_back", **own).as_string(None).split("\n"))
    guards = " (once the tables of values have forgotten them, by the statements that 20 shows)" if run.plan.guards else ""
    again = (
        f"ATTACH {', '.join(aside)} again, which stood in it then, where the rows are there; or make"
        if aside
        else "To have them back, make"
    )
    raise PromiseBroken(
        f"{' and '.join(said)}, and the way back takes the table as it is: {counted(found['rows'], 'row')} of the original would go, too{logged}."
        f" {again} the partition again where it is missing, and run{guards} {insert}, for which its row triggers fire. Where they are to go, delete"
        f" them from {spelled(run.names['retired'])}. Then run 90_rollback again."
    )


def _belonged(run: Run, session: Session, bounds: list[str | None]) -> sql.Composable:
    """As a condition on the original: which of its rows belonged to partitions with these bounds."""
    conditions: list[sql.Composable] = (
        [sql.SQL("{} IS NULL").format(run.names["key"])] if run.plan.null_value is not None and bounds else []
    )
    for bound in bounds:
        if bound in (None, "DEFAULT"):
            takers = session.rows("rollback.takers", source_text=spelled(run.plan.source))
            nobody = sql.SQL(" AND ").join([trusted("true"), *(trusted(f"({row['bound']}) IS NOT TRUE") for row in takers)])
            conditions.append(statement("rollback.unknown", **run.names, nobody=nobody))
            continue
        probe, leaf = ("pg_temp", "runbook_probe"), ("pg_temp", "runbook_probe_1")
        with session.connection.transaction(force_rollback=True):
            session.run("rollback.probe", **run.names, probe=probe, leaf=leaf, bound=trusted(str(bound)))
            texts = {"probe_text": spelled(probe), "leaf_text": spelled(leaf), "source_text": spelled(run.plan.source)}
            conditions.append(trusted(session.value("rollback.bound", **texts)))
    return sql.SQL(" OR ").join([trusted("false"), *(sql.SQL("({})").format(each) for each in conditions)])


def compared(run: Run, session: Session, logging: str) -> compare.Comparison:
    """The table and its original, compared; raises NotYet when what was logged is another than it was."""
    try:
        return compare.exactly(run, session, BACK)
    except Rewritten:
        raise locks.NotYet(f"a TRUNCATE of {run.plan.full_name}") from None
    except NotEqual:
        if session.value("changes.logging_back", **run.names) == logging:
            raise
        raise locks.NotYet("a change of the table's partitions, or of the log's triggers on them") from None


def given(run: Run, session: Session, found: NotEqual) -> str:
    """What differs in the original, though no log knows of it, goes into the log: the table has what counts. Returns what is said."""
    refuse_surplus(run, session)
    resync(run, session)
    differing = str(found).partition(" differ in ")[2].partition(" Do not go on")[0].rstrip(".")
    return f" {spelled(run.names['retired'])} differed in rows that no log knows of, as when somebody wrote to it: it was given the table's ({differing})."


def refuse_surplus(run: Run, session: Session) -> None:
    """Raises PromiseBroken where the original has rows that the table never had, or lost past the log: nobody but a person can tell."""
    with session.transaction("REPEATABLE READ"):
        rows = session.value("rollback.surplus", **{**run.names, **run.plan.listed()})
    if rows:
        retired = spelled(run.names["retired"])
        raise PromiseBroken(
            f"{counted(rows, 'row stands', 'rows stand')} in {retired} that {run.plan.full_name} does not have, and no log knows of it: somebody"
            f" inserted into the one, or deleted from the other past its triggers. Insert them into {run.plan.full_name} or delete them from"
            f" {retired}, then run 90_rollback again."
        )


def resync(run: Run, session: Session) -> None:
    """Every key that differs goes into the log, whatever was logged."""
    either = sql.SQL(", ").join(
        sql.SQL("coalesce({}, {})").format(sql.Identifier("s", name), sql.Identifier("d", name)) for name in run.plan.primary_key
    )
    with session.transaction("REPEATABLE READ"):
        session.run("changes.hold", origin=run.names["source"])
        filled = sql.SQL(", ").join(run.plan.value(column, "d") for column in run.plan.copied)
        session.run(
            "rollback.resync",
            **{**run.names, **run.plan.listed()},
            either_pk=either,
            d_filled_row=sql.SQL("ROW({})").format(filled),
        )


def unlike(run: Run, session: Session) -> str:
    """What somebody made of the table since the cut-over, or took away: the original knows nothing of it. And what was made on the
    role columns, which go."""
    validated = run.finished("cutover", "validate")
    then, now = validated.facts.get("lines") if validated else None, catalog.lines(session, run.plan.source)
    said = {}
    if isinstance(then, dict) and not drift.another_server(session, run.plan):
        there = {
            spelled(each) for each in swapping.standing(session, (reference.identifier for reference in run.plan.references))
        }
        lost = {
            f"constraint {each.name} of {each.schema_name}.{each.table}"
            for each in run.plan.references
            if spelled(each.identifier) not in there
        }
        said = {
            "Made since the cut-over, and the original has nothing of it": now.keys() - then.keys(),
            "Changed since the cut-over, and in the original as before": {
                each for each in now.keys() & then.keys() if now[each] != then[each]
            },
            "Taken away since the cut-over, and in the original again": {
                each for each in then.keys() - now.keys() if each.replace('"', "") not in lost
            },
        }
    return "".join(f" {what}: {_some(sorted(names))}." for what, names in said.items() if names) + on_roles(run, session)


def on_roles(run: Run, session: Session) -> str:
    """What somebody made on the role columns, and goes with them."""
    named = {"our_keys": [each.name for each in run.plan.references]}
    made = [
        row["what"]
        for each in added(run)
        for row in session.rows("rollback.on_role", **names(run, each), **named, role_text=each.role_column)
    ]
    return f" With the role columns goes what was made on them: {_some(made)}." if made else ""


def _some(names: list[str]) -> str:
    return "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")


def refuse_out_of_turn(run: Run, session: Session) -> None:
    """Raises OutOfOrder while another open migration rests on this one: of two that share a table the later goes back first."""
    for row in session.rows("rollback.entangled", **run.names):
        shared = (
            f"the original of {row['holder']} has {row['role_column']}, which goes with this one"
            if row["knows_it"]
            else f"it gave {row['holder']} the column {row['role_column']}, which the original does not have"
        )
        raise OutOfOrder(
            f"The migration of {row['later']} came after that of {run.plan.full_name} and is still open: {shared}. Roll {row['later']} back first"
            f"{', or finish it,' if row['can_end'] else ','} then run 90_rollback again."
        )


def refuse_renamed(run: Run, session: Session, again: str = "then run 90_rollback again.") -> None:
    """Raises OutOfOrder where a referencing table, or a column of its key, has another name by now: what the migration gave it would be
    left on it. One that was dropped needs nothing."""
    planned = {(each.schema_name, each.table) for each in run.plan.references}
    for reference in run.plan.references:
        place, name = (reference.schema_name, reference.table), f"{reference.schema_name}.{reference.table}"
        there = session.value("catalog.there", name=spelled(reference.identifier))
        found = {(row["schema"], row["name"]): row["triggered"] for row in session.rows(
            "rollback.elsewhere", key_name=reference.name, source_text=spelled(run.plan.source), staging_name=run.staging)}  # fmt: skip
        # Another table may have its name by now: what the migration gave it is found by the triggers.
        now = [".".join(each) for each, triggered in found.items() if each not in planned and (triggered or not there)]
        if now and not (there and (place in found or reference not in added(run))):
            raise OutOfOrder(f"{name} is {now[0]} now, and the migration knows it by its name: rename it back, {again}")
        if not there:
            continue
        wanted = [
            *reference.columns,
            *([reference.role_column] if reference in added(run) and gained(run, session, reference) else []),
        ]
        where = {"schemas": [place[0]] * len(wanted), "tables": [place[1]] * len(wanted)}
        if gone := [row["what"] for row in session.rows("catalog.gone", **where, columns=wanted)]:
            raise OutOfOrder(
                f"{', '.join(gone)}, which the migration knows by name, is there no more: rename it back, or add a column of that name where it was"
                f" dropped, {again}"
            )


def refuse(run: Run, session: Session) -> None:
    """Raises PromiseBroken where columns or owner differ from the original's, or a half detached partition's rows would go unseen."""
    if pending := half_detached(session, session.value("verify.oid", root=spelled(run.plan.source))):
        raise PromiseBroken(f"{pending} Then run 90_rollback again.")
    swapping.refuse_owner(run, session)
    with session.qualified():  # as the plan has them
        now = {row["name"]: row["type"] for row in session.rows("rollback.columns", table_text=run.plan.source.as_string(None))}
    before = {column.name: column.type for column in run.plan.columns}
    before |= {each.role_column: each.role_type.partition(" COLLATE ")[0] for each in run.plan.own_roles}
    if differing := sorted({name for name, _ in now.items() ^ before.items()}):
        raise PromiseBroken(
            f"{run.plan.full_name} was altered since the cut-over, and the original was not: {', '.join(differing)}. Take the change back, then run"
            " 90_rollback again; or keep it, and end the way back with 91_finish."
        )
