"""The role of rows that need another than the default: filled in by their addresses, then by a log, at last under the locks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from psycopg.errors import DeadlockDetected, LockNotAvailable, SerializationFailure

from runbook import changes, locks, pace
from runbook.changes import SHORT_TAIL, UNDER_LOCKS
from runbook.errors import PromiseBroken, function_of, raised
from runbook.facts import Reference
from runbook.ledger import Run
from runbook.references import added, names, tables
from runbook.session import Session
from runbook.statements import spelled
from runbook.workers import gaps, parallel

BRIEFLY_MS = 50  # so long a trigger of the application's waits for a row while we hold others: far below deadlock_timeout
BUDGET_S = 120
# Triggers of the application read as anywhere: no policy binds us on a table that we own, 00 sees to that, and the checks ask without.
CORRECTING = {"runbook__correcting": "on", "row_security": "on"}


@contextmanager
def explained(run: Run, reference: Reference) -> Iterator[None]:
    """Raises PromiseBroken, with the function or the constraint and the way out, where the referencing table lets none of its rows be
    updated."""
    try:
        yield
    except psycopg.OperationalError:  # a lock, an interrupt, a connection
        raise
    except psycopg.Error as error:
        name, again = f"{reference.schema_name}.{reference.table}", "then run 04_foreign_keys again."
        if (function := function_of(error)) and isinstance(error, psycopg.errors.InsufficientPrivilege) and not raised(error):
            raise PromiseBroken(
                f"{function}, which is run when {reference.role_column} of {name} is filled in, wants a right that the migrating role lacks"
                f" (42501: {error.diag.message_primary}): GRANT it, or make the function SECURITY DEFINER; {again}"
            ) from None
        if function and isinstance(
            error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedFunction | psycopg.errors.UndefinedObject
        ):
            raise PromiseBroken(
                f"{function}, which is run when {reference.role_column} of {name} is filled in, does not find what it names ({error.sqlstate}:"
                f" {error.diag.message_primary}): it relies on the application's search_path or settings. Give the migrating role the same (ALTER ROLE"
                f" … SET), or the function its own (ALTER FUNCTION … SET search_path); {again}"
            ) from None
        if function:
            said = "" if raised(error) else f": {error.diag.message_primary}"
            raise PromiseBroken(
                f"{function} does not let {reference.role_column} of {name} be filled in ({error.sqlstate}{said}). Let it pass an update where"
                f" current_setting('runbook.correcting', true) = 'on', and name each column where it takes a row as a whole, as OLD.* does; or ALTER"
                f" TABLE {name} DISABLE TRIGGER for its trigger; {again}"
            ) from None
        if isinstance(error, psycopg.errors.CheckViolation) and error.diag.constraint_name:
            raise PromiseBroken(
                f"{reference.role_column} cannot be filled in where a row of {name} breaks {error.diag.constraint_name}, as rows from before a"
                f" NOT VALID check may: correct them, or drop the check; {again}"
            ) from None
        raise


def fill_in(
    run: Run, session: Session, reference: Reference, table: sql.Identifier, batch_rows: int, logged: bool = False
) -> tuple[int, int]:
    """How many rows of the table (of those that the log knows, where `logged`) needed another value than they have, and how many
    of them were given it here: some changed or moved meanwhile, and some may have been held by somebody."""
    own = names(run, reference) | {"reference": table}
    session.run("ddl.drop", table=own["places"])  # of a run that died
    rows = session.run(f"foreign_keys.collect_{'logged' if logged else 'places'}", **own).rowcount
    blocks = int(session.value("foreign_keys.blocks", reference_text=spelled(own["places"])))
    indexed = sorted({row["name"] for row in session.rows("foreign_keys.one_of_every_index", reference_text=spelled(table))})
    own["assignments"] = sql.SQL(", ").join(
        [
            sql.SQL("{} = k.value").format(own["role_column"]),
            *(sql.SQL("{0} = w.{0}").format(sql.Identifier(each)) for each in indexed),
        ]
    )
    progress = pace.Progress(reference.table, rows)
    filled: list[int] = []

    def one(worker: Session, each: tuple[int, int]) -> None:
        place = {"first": sql.Literal(f"({each[0]},0)"), "last": sql.Literal(f"({each[1]},0)")}

        def update(query: str, limit_ms: int) -> int:
            with worker.transaction(lock_timeout=f"{limit_ms}ms", synchronous_commit="off", **CORRECTING):
                return worker.run(query, **(own | place)).rowcount

        try:
            done = update("foreign_keys.fill_places", 10)
        except LockNotAvailable:
            patience = locks.Patience(BUDGET_S, BRIEFLY_MS)
            done = locks.persist(
                run.database, worker, patience, reference.table, lambda: update("foreign_keys.fill_free_places", BRIEFLY_MS)
            )
        filled.append(done)
        progress.add(done, lambda: int(worker.value("changes.length", **run.names)))

    try:
        parallel(run, 0, list(gaps([], blocks, max(1, batch_rows * blocks // max(1, rows)))), one)
    finally:
        progress.close()
    session.run("ddl.drop", table=own["places"])
    return rows, sum(filled)


def drain(run: Run, session: Session, reference: Reference, batch_rows: int = 2000) -> int:
    """Work the reference's log off until its tail is short, or gets no shorter; returns how many rows were corrected.

    A key is forgotten once none of its rows is wrong. No more than `batch_rows` rows are held at once, of however few keys."""
    own, corrected, before = names(run, reference), 0, sys.maxsize
    while True:
        changes.vacuum(session, own["reference_log"])
        with session.transaction("REPEATABLE READ", lock_timeout="5s"):
            session.run("foreign_keys.forget_right", **own)
        left = length(session, own)
        if not left:
            return corrected

        def some() -> int:
            with session.transaction(lock_timeout=f"{BRIEFLY_MS}ms", **CORRECTING):
                return session.run("foreign_keys.correct_some", **own, size=batch_rows).rowcount

        rows = locks.persist(run.database, session, locks.Patience(BUDGET_S, BRIEFLY_MS), reference.table, some)
        if rows >= batch_rows:
            for table, _ in tables(run, reference, session):
                rows += fill_in(run, session, reference, table, batch_rows, logged=True)[1]
        corrected += rows
        if left >= before or (left <= SHORT_TAIL and not rows):  # what comes meanwhile is another round's
            return corrected
        before = left


def length(session: Session, own: dict[str, sql.Composable]) -> int:
    """How many entries a reference's log has."""
    return int(session.value("foreign_keys.log_length", **own))


def correct_last(run: Run, session: Session) -> int:
    """Under the cut-over's locks: what is left in the logs, at once."""
    rows = 0
    session.connection.execute("SET LOCAL runbook.correcting = 'on'")
    for reference in added(run):
        own = names(run, reference)
        if (waiting := length(session, own)) > UNDER_LOCKS:
            raise locks.NotYet(f"{waiting:,} changes of {reference.table}, more than can be looked at under the locks")
        if session.value("foreign_keys.to_correct", **own, size=UNDER_LOCKS + 1) > UNDER_LOCKS:
            raise locks.NotYet(
                f"rows of {reference.table} that refer to a row whose {run.plan.key} has just changed, more than can be corrected under the locks"
            )
        with explained(run, reference):
            session.connection.execute("SET LOCAL row_security = on")
            rows += session.run("foreign_keys.correct_last", **own).rowcount
            session.connection.execute("SET LOCAL row_security = off")
        session.run("foreign_keys.clear_log", **names(run, reference))
    return rows


def stuck(session: Session, own: dict[str, sql.Composable]) -> int:
    """How many rows of which the log knows an update leaves as they are: a trigger or a rule undoes it. In one snapshot and under
    their locks: a row that somebody has just written is none of them."""
    for _ in range(20):
        try:
            with session.transaction("REPEATABLE READ", lock_timeout=f"{BRIEFLY_MS}ms", **CORRECTING):
                rows = sql.Literal(session.value("foreign_keys.stuck", **own))
                if rows == sql.Literal("{}"):
                    return 0
                session.run("foreign_keys.correct_stuck", **own, rows=rows)
                return int(session.value("foreign_keys.still_stuck", **own, rows=rows))
        except (LockNotAvailable, SerializationFailure, DeadlockDetected):
            time.sleep(0.1)
    return 0
