"""05: the swap of the names in one short transaction; foreign keys validated afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from psycopg import errors, sql

from runbook import backup, catalog, changes, composite, correction, foreign_keys, locks, matviews, references, restore, swapping
from runbook.changes import Statements
from runbook.errors import ApprovalMissing, PromiseBroken
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.restore import refuse_homeless
from runbook.session import Session
from runbook.sheet import Sheet
from runbook.statements import rendered, spelled, statement

UNFELT_MS = 3000  # what waits for SHARE UPDATE EXCLUSIVE, no reader and no writer waits for


def preview(run: Run) -> Sheet:
    """The very statements of the swap, with the locks that come first."""
    return Sheet([*swapping.lock_statements(run), *swapping.swap_statements(run)])


@recorded("cutover", "approval")
def require_approval(action: Action, approved_by: str = "") -> Evidence:
    """Raises ApprovalMissing without a name; the embedded example approves itself, and says so."""
    run = action.run
    who = run.approver(
        approved_by,
        f"The cut-over of {run.plan.full_name} needs an approval: look at what 03 compared, then set approved_by to the"
        " name of who approves.",
    )
    return action.finish(f"Approved by {who}, for the plan {run.plan.hash[:12]}.", approved_by=who)


@recorded("cutover", "swap")
@references.understood("05_cutover")
def swap(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Swap the names in one short transaction; until it commits the application sees its table as before.

    Nobody queues behind it longer than `lock_timeout_ms` an attempt. Raises LockNotGranted, naming who is in the way,
    when `budget_s` seconds are over; PlanOutdated when the table changed; PromiseBroken for rows without a partition.
    """
    run, session, patience = action.run, action.session, locks.Patience(budget_s, lock_timeout_ms)
    if run.finished("cutover", "approval") is None:
        raise ApprovalMissing(f"The cut-over of {run.plan.full_name} has not been approved: run 05_cutover from its beginning.")
    if backup.gone(run, session):
        raise PromiseBroken(f"The backup {run.plan.backup} is gone: run 01_backup again, and it is made anew, then this.")
    waits: list[tuple[float, float]] = []
    references_logged = foreign_keys.remembered(run)

    def attempt() -> Evidence:
        references.require_intact(run, session)
        _refuse_taken(run, session)
        foreign_keys.refuse_gaps(run, session, references_logged)
        _catch_up(run, session, patience)
        statements = list(swapping.swap_statements(run))
        clock, at = locks.Clock(), time.monotonic() - patience.started
        tables, views = swapping.lock_set(run)
        own, moved = [run.names["shadow"]], swapping.sequences(run)
        try:
            with locks.exclusive(session, patience, tables, views, clock=clock, sequences=moved, ours=own):
                if foreign_keys.gap(run, session, references_logged):
                    raise locks.NotYet("a change of the log's triggers on a referencing table, or of its partitions")
                replayed = _replay_last(run, session, patience)
                session.at_once(statements)
                logging = session.value("changes.logging_back", **run.names)
                session.run("ledger.remember_triggers", triggers=logging, **run.names)
                # In the swap's own transaction, so that the ledger cannot say anything else; how long it took comes after.
                _record(action, patience, replayed, None, waits)
                if replayed:  # again: one may have begun since the first look
                    locks.refuse_late_snapshots(session, patience)
        finally:
            waits.append((at, clock.queued))
        return _record(action, patience, replayed, clock.locked, waits)

    with restore.from_the_copy(run):
        return locks.persist(run.database, session, patience, run.plan.full_name, attempt)


def _refuse_taken(run: Run, session: Session) -> None:
    """Raises PromiseBroken, naming them, for names that the swap gives and that were free when it was planned."""
    schema, wanted = run.plan.table.schema_name, [run.plan.retired, *(each.name for each in run.plan.partitions)]
    wanted += [index.retired_name for index in run.plan.indexes] + [retired for _, retired in swapping.identity_sequences(run)]
    if taken := [f"{schema}.{row['name']}" for row in session.rows("draft.free", schema=schema, names=wanted)]:
        raise PromiseBroken(
            f"The swap of {run.plan.full_name} needs {'a name that is' if len(taken) == 1 else 'names that are'} taken by now: {', '.join(taken)}."
            " Rename what has it, then run 05_cutover again."
        )


def _record(
    action: Action, patience: locks.Patience, replayed: int, locked: float | None, waits: list[tuple[float, float]]
) -> Evidence:
    """What a swap is said to have cost; with the swap itself only that it was: when its answer was lost it stays at that."""
    slowest = max((length for _, length in waits), default=0.0)
    measured = "The answer of its commit was lost, and with it for how long names were locked."
    if locked is not None:
        measured = (
            f"Names were locked for {locked * 1000:.0f} ms; no session waited for us longer than {slowest * 1000:.0f} ms;"
            f" attempts: {len(waits)}."
        )
    sentence = (
        f"{action.run.plan.full_name} is partitioned. {measured} The way back is open: 90_rollback replays what changes from now on"
        " into the retired table and swaps back."
    )
    blockers = [str(each) for each in patience.blockers.values()]
    return action.finish(sentence, replayed, locked_s=locked, attempts=waits, replayed=replayed, blockers=blockers)


def _catch_up(run: Run, session: Session, patience: locks.Patience) -> None:
    """Outside of the locks: replay until the tail is short, correct the references, wait for old snapshots."""
    logs = [run.names["log"], *(references.names(run, each)["reference_log"] for each in references.added(run))]
    for _ in range(
        2
    ):  # again where the logs are long files still: an old snapshot kept what is dead, and what came stands behind
        changes.catch_up(run, session, patience)
        for _ in range(3):  # what came meanwhile: each row that is left is replayed and corrected while everybody waits
            for reference in references.added(run):
                with correction.explained(run, reference):
                    correction.drain(run, session, reference)
            keys, horizon = changes.replay(run, session)
            left = sum(correction.length(session, references.names(run, each)) for each in references.added(run))
            if max(keys, left) <= changes.SHORT_TAIL // 10:
                break
        refuse_homeless(run, session)
        locks.wait_for_snapshots(session, horizon, patience)
        for log in logs:
            changes.vacuum(session, log, last=True)
        if not any(changes.is_long(session, log) for log in logs):
            return


def _replay_last(run: Run, session: Session, patience: locks.Patience) -> int:
    """Under the locks: what is left in the logs; afterwards the shadow is what the source is."""
    run.refuse_outdated(session)
    changes.refuse_gaps(run, session)
    replayed = changes.apply_last(run, session)
    if replayed:
        locks.refuse_late_snapshots(session, patience)
    if correction.correct_last(run, session) and changes.length(run, session):
        # A trigger of a referencing table wrote to the table: touched the row that is referred to, for instance.
        replayed += changes.apply_last(run, session)
        locks.refuse_late_snapshots(session, patience)
    refuse_homeless(run, session)
    if left := changes.length(run, session):
        raise PromiseBroken(
            f"{run.plan.full_name} has {left} rows whose {run.plan.key} is NULL, which no partition takes: fill them, then run"
            " 05_cutover again."
        )
    return replayed


@recorded("cutover", "validate")
@references.understood("05_cutover")
def validate_foreign_keys(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Validate every key that the swap added NOT VALID: SHARE UPDATE EXCLUSIVE, readers and writers go on. Then materialized
    views are made anew."""
    run, session = action.run, action.session
    done = []
    for what, each, tables in validations(run, session):
        validate(run, session, locks.Patience(budget_s, lock_timeout_ms), what, each, tables)
        done.append(what)
    for reference, each, mode in foreign_keys.require_late(run, session):
        patience = locks.Patience(budget_s, lock_timeout_ms)
        locks.apply(run.database, session, patience, reference.table, [each], [reference.identifier], mode)
    anew = matviews.rebuild(run, session, lock_timeout_ms, budget_s)
    said = f" Materialized views that were made anew: {', '.join(anew)}." if anew else ""
    lines = catalog.lines(session, run.plan.source)  # the way back says what is another
    return action.finish(f"Foreign keys that were validated: {', '.join(done) or 'none'}.{said}", lines=lines)


def validate(
    run: Run, session: Session, patience: locks.Patience, what: str, each: sql.Composed, tables: Sequence[sql.Composable] = ()
) -> None:
    """One of the validations. Writers queue behind a lock on `tables` only; for its own the statement waits longer. Raises
    PromiseBroken for rows that refer to nothing, which came while keys were not checked."""
    try:
        if tables:
            locks.apply(run.database, session, patience, what, [each], tables, "SHARE ROW EXCLUSIVE")
            return
        patience.lock_timeout_ms = UNFELT_MS
        with run.database.session("cutover.validate") as apart:
            apart.give_way()
            locks.apply(run.database, apart, patience, what, [each])
    except errors.ForeignKeyViolation as error:
        place = {"schema": error.diag.schema_name, "table": error.diag.table_name, "constraint": error.diag.constraint_name}
        retired, lacking = spelled(run.names["retired"]), ""
        if place["table"] != run.plan.table.name and session.value("catalog.there", name=retired):
            lacking = f" (or, where {retired} still has those that they refer to, these were lost: put them back into {run.plan.full_name})"
        raise PromiseBroken(
            f"{place['constraint']} of {place['schema']}.{place['table']} cannot be validated, for some of its rows refer to nothing: they came"
            f" while keys were not checked, and are found by {session.value('foreign_keys.orphans', **place)}. The application goes on, and"
            f" what it writes is checked. Correct or delete these rows{lacking}, then run this notebook again."
        ) from None


def validations(run: Run, session: Session | None = None) -> composite.Validations:
    """For every key that is still NOT VALID and was valid before; with a session: what is left of that."""
    yield from composite.validations(run, session)
    plan = run.plan
    there = session.rows("cutover.validated", table_text=plan.source.as_string(None)) if session else []
    for key in plan.outgoing:
        if not key.validated:
            continue
        if plan.server_version >= 18:
            yield key.name, statement("ddl.validate", table=plan.source, constraint=(key.name,)), []
            continue
        own = (plan.table.schema_name, plan.table.name, key.name)
        if own in {(row["schema"], row["name"], row["key"]) for row in there}:
            continue
        for leaf in changes.leaves(run):
            yield key.name, statement("ddl.validate", table=leaf, constraint=(key.name,)), []
        referenced = [sql.Identifier(*table) for table in plan.referenced_tables]
        # It adopts the partitions' keys without a scan.
        yield key.name, swapping.add(plan.source, key.name, plan.becomes(key), key.comment), [*referenced, plan.source]


def script(run: Run, noted: Iterable[sql.Composed] = ()) -> Statements:
    """The whole step as one transaction for psql, with what is `noted` of it, then the validation."""
    yield rendered("BEGIN")
    yield from swapping.lock_statements(run)
    logs = {run.plan.full_name: run.names["log"]}
    logs |= {f"{each.schema_name}.{each.table}": references.names(run, each)["reference_log"] for each in references.added(run)}
    for name, log in logs.items():
        said = f"{name} was written to while the script ran, by somebody or by a trigger, and the script follows nobody: run `runbook rollback`, then the script anew while nobody writes."
        yield statement("cutover.refuse_written", log=log, said=said)
    yield from swapping.swap_statements(run)
    yield from noted
    yield rendered("COMMIT")
    for _, each, _ in validations(run):
        yield each
    for _, each, _ in foreign_keys.require_late(run):
        yield each
    yield from matviews.script(run)


@recorded("cutover", "check")
def check(action: Action) -> Evidence:
    """Raises PromiseBroken unless the name belongs to the partitioned table and every key is valid."""
    run = action.run
    rows = action.session.rows("cutover.validated", table_text=run.plan.source.as_string(None))
    if bad := unsound(run, action.session):
        raise PromiseBroken(f"The foreign keys {', '.join(bad)} are missing or not valid: run 05_cutover again.")
    return action.finish(f"{run.plan.full_name} is the partitioned table; valid foreign keys: {len(rows)}.")


def unsound(run: Run, session: Session) -> list[str]:
    """The foreign keys of the plan that are missing, and those that are not valid though they were, each with its table."""
    plan = run.plan
    rows = session.rows("cutover.validated", table_text=plan.source.as_string(None))
    there = {each.as_string(None) for each in swapping.standing(session, (key.identifier for key in plan.references))}
    planned = {key.place for key in plan.references if key.identifier.as_string(None) in there}
    planned |= {(plan.table.schema_name, plan.table.name, key.name) for key in plan.outgoing}
    lacking = sorted(planned - {(row["schema"], row["name"], row["key"]) for row in rows})
    return [f"{key} of {schema}.{table}" for schema, table, key in loose(run, session) + lacking]


def loose(run: Run, session: Session) -> list[tuple[str, str, str]]:
    """The keys that are not valid and were: in the plan, or when they stood aside for 20. What the catalog says now may be
    what a run that died left; a key that somebody made NOT VALID is none of ours."""
    plan = run.plan
    own = (plan.table.schema_name, plan.table.name)
    strict = {key.place for key in (*plan.references, *plan.selves) if not key.definition.endswith(("NOT VALID", "NOT ENFORCED"))}
    strict |= {(*own, key.name) for key in plan.outgoing if key.validated}
    strict |= {
        (row["schema"], row["table"], row["name"]) for row in session.rows("additions.stood_aside", migration=run.migration)
    }
    rows = session.rows("cutover.validated", table_text=plan.source.as_string(None))
    found = [(row["schema"], row["name"], row["key"]) for row in rows if not row["validated"]]
    return [place for place in found if place in strict]
