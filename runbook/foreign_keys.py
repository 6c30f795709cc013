"""04: the role column on every referencing table, logged, filled in and kept right until the cut-over."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from psycopg import sql
from psycopg.errors import DeadlockDetected, LockNotAvailable, SerializationFailure

from runbook import locks, pace, repair
from runbook.changes import SHORT_TAIL, UNDER_LOCKS, Statements
from runbook.database import Session
from runbook.errors import PromiseBroken
from runbook.facts import Reference
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.plan import with_key
from runbook.references import added, names, tables
from runbook.sheet import Sheet
from runbook.statements import spelled, statement, trusted
from runbook.words import counted
from runbook.workers import gaps, parallel

# (what, statement, the tables that it needs SHARE ROW EXCLUSIVE on for an instant)
Validations = Iterator[tuple[str, sql.Composed, list[sql.Identifier]]]


def log_table(run: Run, reference: Reference) -> Statements:
    """The reference's own log; made outside the short transaction."""
    yield statement("foreign_keys.create_log", **names(run, reference))
    yield statement(f"foreign_keys.create_{'row_' if reference.leaves else ''}log_function", **names(run, reference))


def column(run: Run, reference: Reference) -> Statements:
    """The role column and its log triggers, in one transaction: no row can slip in between.

    Where most rows refer to one value it is the default. Where they do not (by range, by hash) the column is empty until it
    is filled, and required only from the cut-over on."""
    yield statement("foreign_keys.add_column", **names(run, reference))
    yield from _switch_on(run, reference)
    if not reference.not_null and not _required_late(run):
        yield statement("foreign_keys.require_role", **names(run, reference))


def _switch_on(run: Run, reference: Reference) -> Statements:
    own = names(run, reference)
    yield statement(f"foreign_keys.switch_on{'_rows' if reference.leaves else ''}", **own)
    leaves = [table for table, _ in tables(run, reference)] if reference.leaves else []
    for table in (reference.identifier, *leaves):
        yield statement("foreign_keys.always_on", **own, table=table)


def script(run: Run) -> Statements:
    """The whole step for tables that nobody writes to."""
    for reference in added(run):
        yield from log_table(run, reference)
        yield from column(run, reference)
        yield statement("foreign_keys.fill_all", **names(run, reference))
        yield statement("foreign_keys.clear_log", **names(run, reference))
        if not reference.not_null and not _required_late(run):
            yield _validate(run, reference)


def _required_late(run: Run) -> bool:
    return run.plan.frequent_value is None and run.plan.restore_from == "source"


def remove(run: Run, references: list[Reference] | None = None) -> Statements:
    """The inverse: triggers, check and column go (of `references` only, where they are named)."""
    for reference in added(run) if references is None else references:
        yield statement("foreign_keys.switch_off", **names(run, reference))
        yield from remove_column(run, reference)


def remove_column(run: Run, reference: Reference) -> Statements:
    """The role column and its check go."""
    yield statement("foreign_keys.drop_check", **names(run, reference))
    yield statement("foreign_keys.drop_column", **names(run, reference))


def preview(run: Run) -> Sheet:
    """What this step runs, and the composite keys that 05 will create."""
    if run.plan.restore_from == "backup":
        return repair.preview_keys(run)
    keys = (statement("foreign_keys.add_key", **names(run, reference)) for reference in run.plan.references)
    return Sheet([*script(run), *keys])


def _validate(run: Run, reference: Reference) -> sql.Composed:
    own = names(run, reference)
    return statement("foreign_keys.validate", table=own["reference"], constraint=own["check_name"])


@recorded("foreign_keys", "columns")
def add_columns(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Add the role columns, each with its log, and mark the rows that need another value than the default."""
    if action.run.plan.restore_from == "backup":
        return repair.add_columns(action, lock_timeout_ms, budget_s)
    run, session = action.run, action.session
    for reference in added(run):
        patience = locks.Patience(budget_s, lock_timeout_ms)
        if not session.value("foreign_keys.logged", **names(run, reference)):
            statements = [*log_table(run, reference), *column(run, reference)]
        else:  # begun before: its triggers may have been switched off since, and a partition may have come
            statements = [statement("foreign_keys.switch_off", **names(run, reference)), *_switch_on(run, reference)]

        def attempt(
            reference: Reference = reference, statements: list[sql.Composed] = statements, patience: locks.Patience = patience
        ) -> None:
            with locks.exclusive(session, patience, [reference.identifier]):
                for each in statements:
                    session.run(each)

        locks.persist(run.database, session, patience, reference.table, attempt)
    return action.finish(
        f"Referencing tables that have their role column, and a log of their own: {len(added(run))}.",
        len(added(run)),
        triggers={_of(each): session.value("foreign_keys.trigger_states", **names(run, each)) for each in added(run)},
    )


def _of(reference: Reference) -> str:
    return f"{reference.schema_name}.{reference.table}.{reference.name}"


def remembered(run: Run) -> dict[str, dict[str, str]]:
    """The states of each reference's log triggers as 04 left them."""
    done = run.finished("foreign_keys", "columns")
    return dict(done.facts.get("triggers", {})) if done else {}


def gap(run: Run, session: Session, known: dict[str, dict[str, str]]) -> str:
    """The first referencing table whose log may not know of every change: a trigger was off for a while, or a partition came."""
    for reference in added(run) if known else []:
        before, now = known[_of(reference)], session.value("foreign_keys.trigger_states", **names(run, reference)) or {}
        if any(states is None or before.get(table) != states for table, states in now.items()):
            return reference.table
    return ""


def refuse_gaps(run: Run, session: Session, known: dict[str, dict[str, str]]) -> None:
    """Raises PromiseBroken when changes of a referencing table may have gone unseen; 04 is to be run again, and looks at each row."""
    if table := gap(run, session, known):
        session.run("ledger.undo", migration=run.migration, steps=["foreign_keys"])
        raise PromiseBroken(
            f"The log of {table} was switched off for a while, or a partition of it came since 04: rows may have another"
            f" {run.plan.key} than the row that they refer to. Run 04_foreign_keys again, then this."
        )


@recorded("foreign_keys", "fill")
def fill(action: Action, batch_rows: int = 2000) -> Evidence:
    """Correct the role of every row whose user is not of the most frequent one, `batch_rows` at once: 2,000 are so few that the
    application waits for one of our row locks some tens of milliseconds at most."""
    if action.run.plan.restore_from == "backup":
        return repair.fill(action, batch_rows)
    run, session, total = action.run, action.session, 0
    for reference in added(run):
        own, missed = names(run, reference), 0
        for table, _ in tables(run, reference, session):
            needed, filled = _fill(run, session, reference, table, batch_rows)
            total, missed = total + filled, missed + needed - filled
        total += drain(run, session, reference, batch_rows)
        if missed and session.value("foreign_keys.wrong", **own):
            session.run("foreign_keys.log_wrong", **own)
            total += drain(run, session, reference, batch_rows)
        if not reference.not_null and not _required_late(run):
            with session.transaction(lock_timeout="5s"):
                session.run(_validate(run, reference))
    other = (
        "" if run.plan.frequent_value is None else f": it is not {run.plan.frequent_value!r}, which the others have by default"
    )
    return action.finish(
        f"{counted(total, 'row')} of referencing tables got the {run.plan.key} of the row referred to{other}.", total
    )


def _fill(run: Run, session: Session, reference: Reference, table: sql.Identifier, batch_rows: int) -> tuple[int, int]:
    """How many rows of the table needed another value than the default, and how many of them were given it here: some changed
    or moved meanwhile, and some may have been held by somebody."""
    own = names(run, reference) | {"reference": table}
    session.run("foreign_keys.drop_places", **own)  # of a run that died
    rows = session.run("foreign_keys.collect_places", **own).rowcount
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
        settings = {"runbook__correcting": "on", "synchronous_commit": "off"}
        try:
            with worker.transaction(lock_timeout="10ms", **settings):
                filled.append(worker.run("foreign_keys.fill_places", **(own | place)).rowcount)
        except LockNotAvailable:
            with worker.transaction(lock_timeout="1s", **settings):
                filled.append(worker.run("foreign_keys.fill_free_places", **(own | place)).rowcount)
        progress.add(filled[-1], lambda: int(worker.value("changes.length", **run.names)))

    try:
        parallel(run, 0, list(gaps([], blocks, max(1, batch_rows * blocks // max(1, rows)))), one)
    finally:
        progress.close()
    session.run("foreign_keys.drop_places", **own)
    return rows, sum(filled)


def drain(run: Run, session: Session, reference: Reference, batch_rows: int = 2000) -> int:
    """Work the reference's log off until its tail is short; returns how many rows were corrected."""
    own, corrected, idle = names(run, reference), 0, 0
    backlog = waiting = int(session.value("foreign_keys.log_length", **own))
    if not backlog:
        return 0
    done = 0
    progress = pace.Progress(f"{reference.table}, log", waiting, unit="keys")
    try:
        # What comes meanwhile is another round's: under steady writes it would never end.
        while waiting > 0 and idle < 5 and (done < backlog or waiting > SHORT_TAIL):
            with session.transaction(lock_timeout="5s", runbook__correcting="on"):
                batch = sql.Literal(session.value("foreign_keys.batch", **own, size=batch_rows))
                rows = session.run("foreign_keys.correct_batch", **own, batch=batch).rowcount
                session.run("foreign_keys.return_skipped", **own, batch=batch)
                taken = session.run("foreign_keys.close_batch", **own, batch=batch).rowcount
            corrected += rows
            done += taken
            left = int(session.value("foreign_keys.log_length", **own))
            idle = idle + 1 if left >= waiting or (left <= SHORT_TAIL and rows == 0) else 0
            progress.add(taken)
            waiting = left
    finally:
        progress.close()
    return corrected


def correct_last(run: Run, session: Session) -> int:
    """Under the cut-over's locks: what is left in the logs, at once."""
    rows = 0
    session.connection.execute("SET LOCAL runbook.correcting = 'on'")
    for reference in added(run):
        own = names(run, reference)
        if session.value("foreign_keys.to_correct", **own, size=UNDER_LOCKS + 1) > UNDER_LOCKS:
            raise locks.NotYet(
                f"rows of {reference.table} that refer to a row whose {run.plan.key} has just changed, more than can be corrected under the locks"
            )
        rows += session.run("foreign_keys.correct_last", **own).rowcount
        session.run("foreign_keys.clear_log", **names(run, reference))
    return rows


def drop_old(run: Run) -> Statements:
    """The keys to the source, which the composite ones replace."""
    for reference in run.plan.references:
        yield statement("foreign_keys.drop_key", **names(run, reference))


def add_composite(run: Run) -> Statements:
    """The composite keys, NOT VALID: checked for every new row from now on, for the old ones later under a light lock."""
    for reference in run.plan.references:
        yield from _not_valid(run, reference, reference.composite)


def add_old(run: Run) -> Statements:
    """The inverse of drop_old, NOT VALID."""
    for reference in run.plan.references:
        yield from _not_valid(run, reference, reference.definition.removesuffix(" NOT VALID"))


def by_leaf(run: Run, reference: Reference) -> bool:
    """Whether the key is to be checked on each leaf and then adopted: before 18 a partitioned table takes no NOT VALID key."""
    return bool(reference.leaves) and run.plan.server_version < 18


def _not_valid(run: Run, reference: Reference, definition: str) -> Statements:
    own = {**names(run, reference), "definition": trusted(definition)}
    if not by_leaf(run, reference):
        yield statement("foreign_keys.add_key", **own)
        yield from _comment(reference)
        return
    for leaf, _ in tables(run, reference):
        yield statement("foreign_keys.add_key", **(own | {"reference": leaf}))


def validate(run: Run, reference: Reference, definition: str, session: Session | None = None) -> Validations:
    """Check the old rows of a key that is NOT VALID, under SHARE UPDATE EXCLUSIVE; before 18 a partitioned table adopts its
    partitions' keys then, without a scan of them. With a session: what is left of it."""
    what, own = f"{reference.name} of {reference.table}", {**names(run, reference), "definition": trusted(definition)}
    if not by_leaf(run, reference):
        yield what, statement("foreign_keys.validate", table=reference.identifier, constraint=(reference.name,)), []
        return
    for leaf, validated in tables(run, reference, session):
        if session is None or validated is False:
            yield what, statement("foreign_keys.validate", table=leaf, constraint=(reference.name,)), []
    if session is None or not session.value("foreign_keys.keyed", **own):
        adopt = [statement("foreign_keys.add_key_validated", **own), *_comment(reference)]
        yield what, sql.SQL("; ").join(adopt), [reference.identifier, run.plan.source]


def _comment(reference: Reference) -> Statements:
    if reference.comment:
        constraint, comment = sql.Identifier(reference.name), sql.Literal(reference.comment)
        yield statement("partition.comment_constraint", table=reference.identifier, constraint=constraint, comment=comment)


def legacy(run: Run) -> Statements:
    """From the cut-over on: rows of writers that do not know of the role column."""
    for reference in added(run):
        yield statement("foreign_keys.switch_off", **names(run, reference))
        if _required_late(run):
            yield statement("foreign_keys.require_role", **names(run, reference))
    for reference in filled(run):
        yield statement("foreign_keys.create_filled", **names(run, reference))
        yield statement("foreign_keys.create_fill", **names(run, reference))
        yield statement("foreign_keys.drop_default", **names(run, reference))


def filled(run: Run) -> list[Reference]:
    """The references whose rows get their role from a trigger when the writer does not know of it."""
    return [*added(run), *run.plan.own_roles] if run.plan.legacy_inserts == "fill" else []


def without_legacy(run: Run) -> Statements:
    """The inverse: no fill trigger."""
    for reference in [*added(run), *run.plan.own_roles]:
        yield statement("foreign_keys.drop_fill", **names(run, reference))


def validations(run: Run, session: Session | None = None) -> Validations:
    """What checks the old rows of each composite key."""
    for reference in run.plan.references:
        if session is not None and session.value("cutover.gone", name=reference.identifier.as_string(None)):
            continue  # the table was dropped since
        if not reference.definition.endswith("NOT VALID"):  # and stays that
            yield from validate(run, reference, reference.composite, session)


def require_late(run: Run, session: Session | None = None) -> Iterator[tuple[Reference, sql.Composed, bool]]:
    """(reference, statement, whether it needs ACCESS EXCLUSIVE for an instant) for the role columns that are required late: their
    check is validated, then it is NOT NULL where it can be. With a session: only what is left of it."""
    for reference in added(run) if _required_late(run) else []:
        if session is None or session.value("foreign_keys.checked", **names(run, reference)):
            yield reference, _validate(run, reference), False
            if reference.not_null:
                yield reference, statement("foreign_keys.require_all", **names(run, reference)), True


def state(run: Run) -> pd.DataFrame:
    """Each referencing table: its rows, and how they are spread over the new column."""
    frames = [run.frame("foreign_keys.state", **names(run, reference)) for reference in added(run)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["table", "rows"])


def keys(run: Run) -> pd.DataFrame:
    """The composite keys to come."""
    rows = [
        {
            "table": r.table,
            "key": r.name,
            "columns": ", ".join(with_key(r.columns, r.role_column)),
            "definition": r.composite,
        }
        for r in run.plan.references
    ]
    return pd.DataFrame(rows, columns=["table", "key", "columns", "definition"])


def _stuck(session: Session, own: dict[str, sql.Composable]) -> int:
    """How many rows of which the log knows an update leaves as they are: a trigger or a rule undoes it. In one snapshot and under
    their locks: a row that somebody has just written is none of them."""
    for _ in range(10):
        try:
            with session.transaction("REPEATABLE READ", lock_timeout="1s", runbook__correcting="on"):
                rows = sql.Literal(session.value("foreign_keys.stuck", **own))
                if rows == sql.Literal("{}"):
                    return 0
                session.run("foreign_keys.correct_stuck", **own, rows=rows)
                return int(session.value("foreign_keys.still_stuck", **own, rows=rows))
        except (LockNotAvailable, SerializationFailure, DeadlockDetected):
            continue
    return 0


@recorded("foreign_keys", "check")
def check(action: Action) -> Evidence:
    """Raises unless every row of every referencing table has its user's role, those still logged excepted."""
    if action.run.plan.restore_from == "backup":
        return repair.check_keys(action)
    run, session = action.run, action.session
    for reference in added(run):
        own = names(run, reference)
        if wrong := session.value("foreign_keys.wrong", **own):  # written while the log was off
            session.run("foreign_keys.log_wrong", **own)
            drain(run, session, reference)
            wrong = session.value("foreign_keys.wrong", **own)
        if stuck := _stuck(session, own):
            raise PromiseBroken(
                f"{counted(stuck, 'row')} of {reference.table} {'keeps' if stuck == 1 else 'keep'} another {reference.role_column} than the"
                f" row in {run.plan.full_name},"
                f" whatever is set: a trigger or a rule of {reference.table} undoes the update. Disable it, then run 04_foreign_keys"
                " again."
            )
        if wrong:
            raise PromiseBroken(
                f"{counted(wrong, 'row')} of {reference.table} {'has' if wrong == 1 else 'have'} another {reference.role_column} than the"
                f" row in {run.plan.full_name}:"
                " somebody writes that column, or switches triggers off. End that, then run 04_foreign_keys again."
            )
    return action.finish(f"Every row that references {run.plan.full_name} has its {run.plan.key}.")
