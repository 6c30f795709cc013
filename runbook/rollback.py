"""90: the way back from any step; before the cut-over by taking away, after it by replaying and swapping back."""

from __future__ import annotations

from datetime import UTC, datetime

from psycopg import errors, sql

from runbook import changes, compare, cutover, foreign_keys, locks, partition
from runbook.changes import BACK, Rewritten, Statements
from runbook.database import Session
from runbook.errors import PromiseBroken
from runbook.ledger import STEPS, Action, Evidence, Run, recorded
from runbook.plan import fit
from runbook.references import added
from runbook.restore import SHORT_TAIL
from runbook.sheet import Sheet
from runbook.statements import rendered, statement, trusted


def preview(run: Run) -> Sheet:
    """What this step runs, from where the migration stands now."""
    return Sheet(unswap_statements(run) if _swapped(run) else take_away(run))


def _swapped(run: Run) -> bool:
    return run.finished("cutover", "swap") is not None and run.finished("rollback", "swap") is None


def take_away(run: Run) -> Statements:
    """Before the cut-over: role columns, log triggers, shadow and logs go; no row of the source was ever touched."""
    yield from foreign_keys.remove(run)
    yield from partition.remove(run)


def unswap_statements(run: Run) -> Statements:
    """The inverse of cutover.swap_statements: the original takes its name and everything that hung on it back."""
    plan, names = run.plan, run.names
    yield statement("changes.switch_off_back", **names)
    yield from foreign_keys.drop_old(run)
    yield from foreign_keys.without_legacy(run)
    for reference in added(run):
        yield from foreign_keys.remove_column(run, reference)
    for table in (names["source"], *changes.leaves(run)):
        yield statement("cutover.set_schema", table=table, to=names["staging"])
    yield from cutover.rename(run, retire=False)
    for column in plan.columns:
        if column.sequence and not column.identity:
            yield statement("cutover.own_sequence", sequence=trusted(column.sequence), table=plan.source, column=(column.name,))
    for each in plan.carried:
        if each.kind == "publication":
            yield rendered(each.definition)
    for view in plan.views:
        yield rendered(view.definition)
    yield from cutover.positions(run, retire=False)
    yield statement("rollback.drop_partitioned", **names)
    for each in plan.carried:
        if each.restore:
            yield rendered(each.restore)
    for check in plan.checks:
        if not check.validated:
            yield cutover.add(plan.source, check.name, check.definition)
    for key in plan.outgoing:
        yield cutover.add(plan.source, key.name, key.definition.removesuffix(" NOT VALID") + " NOT VALID", key.comment)
    yield from foreign_keys.add_old(run)


@recorded("rollback", "swap")
def swap_back(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Replay what changed since the cut-over into the original, compare, and swap the names back in one short transaction.

    Nothing to do before the cut-over. Raises PromiseBroken, naming them, when rows have come that the original's
    unique keys cannot take; LockNotGranted when the budget is over. No write made in either state is lost.
    """
    run, session = action.run, action.session
    if not _swapped(run):
        return action.finish(f"{run.plan.full_name} was not cut over; there is nothing to swap back.", swapped=False)
    if {row["partition"] for row in _partitions(run, session)} != {each.name for each in run.plan.partitions}:
        _resync(run, session)
    total = _replay(run, session)
    seen = compare.exactly(run, session, BACK)
    patience = locks.Patience(budget_s, lock_timeout_ms)

    def attempt() -> Evidence:
        _replay(run, session)
        with cutover.locked(run, session, patience) as clock:
            if changes.length(run, session, BACK) > SHORT_TAIL:
                raise cutover.TailTooLong("the log's tail is too long")
            _apply(run, session)
            for each in unswap_statements(run):
                session.run(each)
            sentence = f"{run.plan.full_name} is the original table again; {total:,} changes since the cut-over went with it."
            evidence = action.finish(sentence, total, swapped=True, compared=seen.rows)
        evidence.facts["locked_s"] = clock.seconds
        return evidence

    return locks.persist(run.database, session, patience, run.plan.full_name, attempt)


def _partitions(run: Run, session: Session) -> list[dict[str, str]]:
    return session.rows("rollback.partitions_now", table_text=run.plan.source.as_string(None))


def _resync(run: Run, session: Session) -> None:
    either = sql.SQL(", ").join(
        sql.SQL("coalesce({}, {})").format(sql.Identifier("s", name), sql.Identifier("d", name)) for name in run.plan.primary_key
    )
    with session.transaction("REPEATABLE READ"):
        session.run("changes.hold", origin=run.names["source"])
        session.run("rollback.resync", **run.names, either_pk=either)


def _replay(run: Run, session: Session) -> int:
    total = 0
    while True:
        try:
            keys, _ = changes.replay(run, session, BACK)
        except Rewritten:
            _resync(run, session)
            continue
        except errors.UniqueViolation as error:
            raise PromiseBroken(_doubles(run, session, error)) from None
        total += keys
        if keys <= SHORT_TAIL:
            return total


def _apply(run: Run, session: Session) -> None:
    if session.value("changes.truncated", **{**run.names, "log": run.names["back"]}):
        raise cutover.TailTooLong("the table was truncated meanwhile")
    changes.apply(run, session, BACK)


def _doubles(run: Run, session: Session, error: Exception) -> str:
    found = []
    for index in run.plan.indexes:
        if index.unique and index.columns and run.plan.key not in index.columns:
            columns = sql.SQL(", ").join(map(sql.Identifier, index.columns))
            rows = session.rows("rollback.doubles", **{**run.names, "columns": columns})
            found += [f"{', '.join(index.columns)} {row['key']} ({row['rows']} rows)" for row in rows]
    return (
        f"The way back of {run.plan.full_name} is closed while rows stand in it that the original's unique keys cannot take:"
        f" {'; '.join(found) or str(error)}. Correct them, then run 90_rollback again."
    )


@recorded("rollback", "clean")
def clean(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Take away what the migration made: role columns, triggers, shadow, logs; validate the old foreign keys again."""
    run, session = action.run, action.session
    swapped = run.finished("rollback", "swap")
    if swapped is None or _swapped(run):
        raise PromiseBroken(f"{run.plan.full_name} has not been swapped back: run 90_rollback from its beginning.")
    patience = locks.Patience(budget_s, lock_timeout_ms)
    if swapped.facts.get("swapped"):
        _validate(run, session, patience)

    def attempt() -> Evidence:
        with session.transaction(lock_timeout=f"{lock_timeout_ms}ms"):
            if not swapped.facts.get("swapped"):
                for each in take_away(run):
                    session.run(each)
            session.run("rollback.drop_staging", **run.names)
            return action.finish(f"Nothing of the migration is left on {run.plan.full_name} and the tables that reference it.")

    return locks.persist(run.database, session, patience, run.plan.full_name, attempt)


def _validate(run: Run, session: Session, patience: locks.Patience) -> None:
    pending = [(each.identifier, each.name) for each in run.plan.references if not each.definition.endswith("NOT VALID")]
    pending += [(run.plan.source, each.name) for each in run.plan.outgoing if each.validated]
    for table, name in pending:

        def attempt(table: sql.Composable = table, name: str = name) -> None:
            with session.transaction(lock_timeout="3s"):
                session.run("cutover.validate", table=table, constraint=(name,))

        locks.persist(run.database, session, patience, name, attempt)


@recorded("rollback", "check")
def check(action: Action, keep_backup: bool = False) -> Evidence:
    """Raises PromiseBroken unless the table is defined as it was when it was planned; then the backup goes, too.

    `keep_backup` renames it with the UTC time instead. The migration is closed in the ledger and can be started again.
    """
    run, session = action.run, action.session
    with session.qualified():
        now = session.value("catalog.definition", oid=run.plan.table.oid)
    altered = "" if now == run.plan.fingerprint else " It was altered by others since the plan was made; those changes stay."
    if run.finished("rollback", "clean") is None:
        raise PromiseBroken(f"The migration of {run.plan.full_name} has not been taken away: run 90_rollback from its beginning.")
    with session.transaction(lock_timeout="10s"):
        backup = _release_backup(run, session, keep_backup)
        session.run("ledger.undo", migration=run.migration, steps=list(STEPS))
        session.run("ledger.set_state", state="rolled back", migration=run.migration)
        return action.finish(f"{run.plan.full_name} is what it was.{altered} {backup}", same=not altered)


def _release_backup(run: Run, session: Session, keep: bool) -> str:
    made = run.finished("backup", "make")
    if made is None:
        return "There was no backup."
    if "archive" in made.facts:
        return f"The archive {made.facts['archive']} stays."
    if keep:
        name = fit(f"{run.plan.backup}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        session.run("backup.rename", **run.names, to=(name,))
        return f"The backup is {name} now."
    session.run("backup.drop", **run.names)
    return f"The backup {run.plan.backup} is gone."
