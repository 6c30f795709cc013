"""03 of a repair: the rows that are missing come back from the backup, as they were."""

from __future__ import annotations

from contextlib import suppress

from psycopg import errors, sql

from runbook.correction import BRIEFLY_MS
from runbook.errors import NotEqual, PromiseBroken
from runbook.facts import Reference
from runbook.ledger import Action, Evidence, Run
from runbook.pace import Progress
from runbook.plan import Plan
from runbook.session import Session
from runbook.sheet import Sheet
from runbook.statements import spelled, statement, trusted
from runbook.words import counted


def preview_rows(run: Run) -> Sheet:
    """The statement that puts the missing rows back."""
    return Sheet([statement("repair.put_back", **run.names)])


def _names(run: Run) -> dict[str, sql.Composable]:
    """With what a row is to be, of the table's types, and what it became."""
    meant = [sql.SQL("CAST({} AS {})").format(run.plan.value(each, "s"), trusted(each.type)) for each in run.plan.copied]
    became = [sql.Identifier("d", each.name) for each in run.plan.copied]
    rows = {
        name: sql.SQL("ROW({})::text").format(sql.SQL(", ").join(each)) for name, each in (("meant", meant), ("became", became))
    }
    return {**run.names, **rows}


def put_back(action: Action) -> Evidence:
    """Put the backup's rows back that the table lacks; rows that are there are newer and never touched.

    Raises PromiseBroken when one of them clashes with a row that has come since.
    """
    run, session = action.run, action.session
    try:
        with session.transaction(lock_timeout="5s", row_security="on"):  # for the application's triggers
            rows = session.run("repair.put_back", **run.names).rowcount
            fires = triggers(session, run.plan)
            if fires and (session.value("repair.changed", **_names(run)) or session.value("repair.missing", **run.names)):
                raise PromiseBroken(
                    f"A trigger of {run.plan.full_name} ({', '.join(fires)}) changes or keeps off rows that are put back: nothing was put back."
                    " ALTER TABLE … DISABLE TRIGGER … while 03_restore runs."
                )
            ahead = _advance(run, session)
            session.run("ddl.analyze", table=run.names["source"])
            return action.finish(
                f"{counted(rows, 'row')} of {run.plan.backup} {'was' if rows == 1 else 'were'} missing in {run.plan.full_name} and {'is' if rows == 1 else 'are'} back.{ahead}",
                rows,
            )
    except errors.UniqueViolation as error:
        raise PromiseBroken(
            f"A row of {run.plan.backup} clashes with one that {run.plan.full_name} got since, in {error.diag.constraint_name}:"
            " nothing was put back; find out which of the two is right, remove the other, and run 03_restore again."
        ) from None


def fill_round(session: Session, reference: Reference, own: dict[str, sql.Composable], wrong: int, blocks: int) -> int:
    """Give referencing rows their user's role once; rows that somebody holds, or a trigger waits for, are left for another round; so
    are those of a range in which one refers to a row that moved since the statement looked."""
    end, rows = int(session.row("foreign_keys.blocks", **own)["blocks"]), 0
    progress = Progress(reference.table, wrong)
    try:
        for first in range(0, end, blocks):
            place = {"first": f"({first},0)", "last": f"({first + blocks},0)"}
            with (
                suppress(errors.LockNotAvailable, errors.DeadlockDetected, errors.ForeignKeyViolation),
                session.transaction(lock_timeout=f"{BRIEFLY_MS}ms", row_security="on"),
            ):
                filled = session.run("repair.fill_range", **own, **place).rowcount
                progress.add(filled)
                rows += filled
    finally:
        progress.close()
    return rows


def twice(session: Session, run: Run) -> str:
    """What names a row of the table and stands in more than one partition, as a sentence; else nothing."""
    if run.plan.key in run.plan.primary_key:
        return ""
    keys = [row["key"] for row in session.rows("repair.twice", **run.names)]
    listed = f"{', '.join(keys[:5])}{' and others' if len(keys) > 5 else ''}"
    by = f"{run.plan.full_name} has rows of the same {', '.join(run.plan.primary_key)} in more than one partition"
    return f"{by}: {listed}." if keys else ""


def refuse_stuck(run: Run, session: Session, reference: Reference, own: dict[str, sql.Composable], wrong: int) -> None:
    """Raises PromiseBroken for rows that get no role in any round, and says why: others hold them, or a trigger undoes it."""
    rows, one = counted(wrong, "row"), wrong == 1
    with session.transaction():
        free = session.value("repair.free", **own)
    if free:
        raise PromiseBroken(
            f"{rows} of {reference.table} {'keeps' if one else 'keep'} another {reference.role_column} than the row in {run.plan.full_name}, whatever"
            f" is set: a trigger or a rule of {reference.table} undoes the update. Disable it, then run 04_foreign_keys again."
        )
    raise PromiseBroken(
        f"{rows} of {reference.table} {'stays' if one else 'stay'} held by others: end these sessions, then run 04_foreign_keys again."
    )


def triggers(session: Session, plan: Plan) -> list[str]:
    """What fires for each row that is put back."""
    return [row["name"] for row in session.rows("repair.triggers", oid=plan.table.oid)]


def _advance(run: Run, session: Session) -> str:
    said = ""
    for row in session.rows("repair.sequences", oid=run.plan.table.oid):
        name = spelled((row["schema"], row["name"]))
        last = session.value("repair.behind", **run.names, column=(row["column"],), sequence_text=name)
        if last is not None and row["may"]:
            session.run("repair.advance", sequence_text=name, last=last)
            said += f" {row['schema']}.{row['name']} was behind them, and goes on after {last:,}."
        elif last is not None:
            said += f" {row['schema']}.{row['name']} is behind them, and not ours to move: setval('{name}', {last}) is left to its owner."
    return said


def compare(action: Action) -> Evidence:
    """Raises NotEqual unless every row of the backup stands in the table, by its key."""
    run, session = action.run, action.session
    missing = session.value("repair.missing", **run.names)
    if missing:
        raise NotEqual(
            f"{counted(missing, 'row')} of {run.plan.backup} {'is' if missing == 1 else 'are'} not in {run.plan.full_name}: run 03_restore again."
        )
    there = session.rows("repair.rows", **run.names, table=run.plan.source)
    sums = {each["name"]: {"rows": each["rows"]} for each in there}
    total = sum(each["rows"] for each in there)
    return action.finish(f"Every row of {run.plan.backup} is among the {total:,} of {run.plan.full_name}.", total, sums=sums)
