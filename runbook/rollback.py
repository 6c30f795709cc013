"""90: the way back from any step; before the cut-over by taking away, after it by replaying and swapping back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from psycopg import errors, sql

from runbook import (
    attaching,
    backup,
    changes,
    composite,
    cutover,
    drift,
    foreign_keys,
    locks,
    losses,
    matviews,
    partition,
    repair,
    swapping,
    unique,
)
from runbook.changes import BACK, Rewritten, Statements
from runbook.errors import NotEqual, OutOfOrder, PromiseBroken
from runbook.facts import Matview, Reference
from runbook.ledger import STEPS, Action, Evidence, Run, recorded
from runbook.plan import fit
from runbook.references import added, gained, understood
from runbook.references import names as reference_names
from runbook.session import Session
from runbook.sheet import Listing, Sheet, nothing
from runbook.statements import rendered, spelled, statement, trusted
from runbook.words import counted


def preview(run: Run) -> Listing:
    """What this step runs, from where the migration stands now."""
    if run.state != "open":
        return nothing(run.plan.full_name, run.state)
    return Sheet(unswap_statements(run, run.plan.matviews) if run.swapped else take_away(run))


def _closed(run: Run, session: Session) -> str:
    """A sentence when this migration was rolled back before. Raises OutOfOrder when it was finished."""
    state = session.row("ledger.remembered", **run.names)["state"]
    if state == "finished":
        raise OutOfOrder(f"The migration of {run.plan.full_name} was finished: the original is gone, and with it the way back.")
    return f"The migration of {run.plan.full_name} was rolled back already." if state == "rolled back" else ""


def take_away(run: Run, references: list[Reference] | None = None) -> Statements:
    """Before the cut-over: role columns (of `references`), triggers, shadow and logs go; the source's rows were never touched."""
    if run.plan.restore_from == "backup":
        yield from repair.take_away(run)
        return
    yield from foreign_keys.remove(run, references)
    yield from partition.remove(run)


def unswap_statements(run: Run, views: Iterable[Matview] = ()) -> Statements:
    """The inverse of swapping.swap_statements: the original takes its name and everything that hung on it back."""
    plan, names = run.plan, run.names
    yield statement("changes.switch_off_back", **names)
    yield from matviews.give_back(run, views)
    if any(each.kind == "function of its rows" for each in plan.carried):
        yield swapping.unchecked()
    yield from composite.drop_old(run)
    yield from foreign_keys.without_legacy(run)
    for reference in added(run):
        yield from foreign_keys.remove_column(run, reference)
    for each in plan.carried:
        if each.kind == "sequence":  # or it would move to another schema with the table
            yield statement("rollback.free_sequence", sequence=trusted(each.name))
        if each.kind == "function of its rows" and each.retire:
            yield rendered(each.retire)
    # With its partitions, wherever they are and whoever attached them; one that was detached since is nobody's but its owner's.
    yield statement("cutover.set_schema", table=names["source"], to=names["staging"])
    yield from swapping.rename(run, retire=False)
    for each in plan.carried:
        if each.restore:
            yield rendered(each.restore)
    for view in plan.views:
        yield rendered(view.definition)
    yield from swapping.positions(run, retire=False)
    yield statement("rollback.drop_partitioned", **names)
    yield from unique.remove(run)
    if swapping.refuses_moves(run):
        yield statement("cutover.allow_moves", **names)
    for check in plan.checks:
        if not check.validated:
            yield swapping.add(plan.source, check.name, check.definition, check.comment)
    for key in plan.outgoing:
        yield swapping.add(plan.source, key.name, key.definition.removesuffix(" NOT VALID") + " NOT VALID", key.comment)
    yield from composite.add_old(run)


@recorded("rollback", "swap", again=True)
@understood("90_rollback")
def swap_back(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Replay what changed since the cut-over into the original, compare, and swap the names back in one short transaction.

    Nothing to do before the cut-over. Raises PromiseBroken, naming them, when rows have come that the original's
    unique keys cannot take, or columns and dependent objects that it does not have; LockNotGranted when the budget is over.
    No write made in either state is lost.
    """
    run, session = action.run, action.session
    if closed := _closed(run, session):
        return action.finish(closed, swapped=False)
    if not run.swapped:
        before = run.finished("rollback", "swap")  # which somebody asks for again before the rest is done
        was_swapped = bool(before and before.facts.get("swapped"))
        return action.finish(f"{run.plan.full_name} has the original's name; there is nothing to swap back.", swapped=was_swapped)
    losses.refuse_out_of_turn(run, session)
    losses.refuse_renamed(run, session)
    logged = session.value("catalog.there", name=spelled(run.names["back"]))
    for what, name, there in (
        ("The original", "retired", losses.is_original(run, session)),
        ("The log of the way back", "back", logged),
    ):
        if not there:
            raise PromiseBroken(
                f"{what}, {spelled(run.names[name])}, is there no more, and with it the way back: give it its name back where it was renamed,"
                " then run 90_rollback again; else 91_finish ends the migration."
            )
    losses.refuse(run, session)
    unlike = losses.unlike(run, session)
    patience, clock = locks.Patience(budget_s, lock_timeout_ms), locks.Clock()
    logging = session.row("ledger.remembered", **run.names)["triggers"]
    total, seen, stale, others, anew = 0, None, "", "", matviews.waiting(run, session)
    statements = list(unswap_statements(_as_it_is(run, session), anew))
    besides = ", besides those that an earlier attempt took over" if session.value("rollback.tried", **run.names) else ""

    def attempt() -> Evidence:
        nonlocal total, logging, seen, stale, others
        now = session.value("changes.logging_back", **run.names)
        if now != logging:  # triggers switched off, partitions attached, detached, truncated: what was not logged is looked for
            losses.refuse_dropped(run, session, logging)
            losses.resync(run, session)
            logging = now
        keys, horizon = losses.replay(run, session, patience)
        total += keys
        if seen is None:
            try:
                compared = losses.compared(run, session, logging)
            except NotEqual as differing:
                if others:
                    raise
                others = losses.given(run, session, differing)
                raise locks.NotYet("rows of the original that somebody wrote") from None
            stale = matviews.refresh(run, session, anew)
            seen = compared
        locks.wait_for_snapshots(session, horizon, patience)  # for which nothing dead could be cleaned away
        changes.vacuum(session, run.names["back"], last=True)
        tables, views = swapping.lock_set(run, session)
        views += [sql.Identifier(*reader) for view in anew for reader in view.view_tables]
        with locks.exclusive(
            session, patience, tables, views, clock=clock, ours=[run.names["retired"]],
            sequences=[*swapping.sequences(run), *map(matviews.hold, anew)], logs=swapping.logs(run, session), dropped=[run.plan.source],
        ):  # fmt: skip
            losses.refuse(run, session)
            if session.value("changes.logging_back", **run.names) != logging:
                raise locks.NotYet("a change of the table's partitions, or of the log's triggers on them")
            try:
                last = changes.apply_last(run, session, BACK)
            except Rewritten as rewritten:
                raise locks.NotYet(str(rewritten)) from None
            except errors.UniqueViolation:  # the next attempt's replay names it
                raise locks.NotYet("a row that the original's unique keys cannot take") from None
            if last:
                locks.refuse_late_snapshots(session, patience)
            session.at_once(statements)
            # The forward steps are undone with the same commit: the ledger never says that the table is still swapped.
            session.run("ledger.undo", migration=run.migration, steps=list(STEPS[2:]))
            changed = total + last
            sentence = f"{run.plan.full_name} is the original table again; {counted(changed, 'change')} since the cut-over went with it{besides}."
            evidence = action.finish(sentence, changed, swapped=True, compared=seen.rows)
            if last:  # again: one may have begun since the first look
                locks.refuse_late_snapshots(session, patience)
            return evidence

    with losses.explained(run):
        evidence = locks.persist(run.database, session, patience, run.plan.full_name, attempt)
    sentence = f"{evidence.sentence} Names were locked for {clock.locked * 1000:.0f} ms.{others}{unlike}{stale}"
    return action.finish(sentence, evidence.rows, **evidence.facts, locked_s=clock.locked)


def _as_it_is(run: Run, session: Session) -> Run:
    """The run, with the leaves of a referencing table that became partitioned since the cut-over: its key has to be made by leaf."""

    def now(reference: Reference) -> Reference:
        names = reference_names(run, reference)
        if reference.leaves or not session.value("foreign_keys.partitioned", **names):
            return reference
        rows = session.rows("foreign_keys.tables", **names)
        return reference.model_copy(update={"leaves": tuple((row["schema"], row["name"]) for row in rows)})

    return replace(run, plan=run.plan.model_copy(update={"references": tuple(map(now, run.plan.references))}))


@recorded("rollback", "clean", again=True)
@understood("90_rollback")
def clean(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Take away what the migration made: role columns, triggers, shadow, logs; validate the old foreign keys again."""
    run, session = action.run, action.session
    if closed := _closed(run, session):
        return action.finish(closed)
    if run.swapped:
        raise PromiseBroken(f"{run.plan.full_name} has not been swapped back: run 90_rollback from its beginning.")
    losses.refuse_out_of_turn(run, session)
    partitioned = session.value("foreign_keys.partitioned", reference_text=spelled(run.plan.source))
    if partitioned and run.plan.restore_from == "source" and swapping.standing(session, [run.names["retired"]]):
        raise PromiseBroken(
            f"{run.plan.full_name} is partitioned, and the ledger knows of no cut-over: rows of runbook.action were deleted. Put back what the"
            " record's evidence.json has of it, then run 90_rollback again."
        )
    retired = run.finished("rollback", "swap")
    gone_back = retired is not None and retired.facts.get("swapped")  # and what was on the referencing tables went with that
    if not gone_back:
        losses.refuse_renamed(run, session)
    patience, going = locks.Patience(budget_s, lock_timeout_ms), "" if gone_back else losses.on_roles(run, session)
    _validate(_as_it_is(run, session), session, lock_timeout_ms, budget_s)
    # A role column that this migration did not add is the application's own.
    mine = [each for each in added(run) if gained(run, session, each)]

    def attempt() -> Evidence:
        tables, shadow = swapping.unlogged(run, session), swapping.standing(session, [run.names["shadow"]])
        with locks.exclusive(session, patience, tables, ours=shadow, logs=swapping.logs(run, session), dropped=shadow):
            session.run_all((*attaching.forget(run, session), *matviews.forget(run)))
            session.run_all(take_away(run, [] if gone_back else mine))
            session.run("ledger.undo", migration=run.migration, steps=list(STEPS[2:]))
            return action.finish(
                f"Nothing of the migration is left on {run.plan.full_name} and the tables that reference it.{going}"
            )

    return locks.persist(run.database, session, patience, run.plan.full_name, attempt)


def _validate(run: Run, session: Session, lock_timeout_ms: int, budget_s: float) -> None:
    valid = [each for each in run.plan.references if each.definition and not each.definition.endswith("NOT VALID")]
    wanted: dict[tuple[str, str, str], sql.Composable] = {each.place: each.identifier for each in valid}
    own = run.plan.table
    wanted |= {(own.schema_name, own.name, each.name): run.plan.source for each in run.plan.outgoing if each.validated}
    for row in session.rows("cutover.validated", table_text=run.plan.source.as_string(None)):
        table, name = wanted.get((row["schema"], row["name"], row["key"])), row["key"]
        if row["validated"] or table is None:
            continue
        cutover.validate(run, session, locks.Patience(budget_s), name, statement("ddl.validate", table=table, constraint=(name,)))
    for reference in valid:
        if composite.by_leaf(run, reference):
            for what, each, tables in composite.validate(run, reference, reference.definition, session):
                cutover.validate(run, session, locks.Patience(budget_s, lock_timeout_ms), what, each, tables)


@recorded("rollback", "check")
def check(action: Action, keep_backup: bool = False) -> Evidence:
    """Raises PromiseBroken unless the table is defined as it was when it was planned; then the backup goes, too.

    `keep_backup` renames it with the UTC time instead. The migration is closed in the ledger and can be started again.
    """
    run, session = action.run, action.session
    if closed := _closed(run, session):
        return action.finish(closed)
    altered = drift.told(session, run.plan)
    if run.finished("rollback", "clean") is None:
        raise PromiseBroken(f"The migration of {run.plan.full_name} has not been taken away: run 90_rollback from its beginning.")
    with session.transaction(lock_timeout="10s"):
        try:
            released = _release_backup(run, session, keep_backup)
        except errors.DependentObjectsStillExist as error:
            raise PromiseBroken(
                f"The migration of {run.plan.full_name} is taken back, and only its backup is left: {' '.join((error.diag.message_detail or '').split())}."
                " Drop that, or set keep_backup, then run 90_rollback again."
            ) from None
        session.run("ledger.undo", migration=run.migration, steps=list(STEPS))
        session.run("ledger.set_state", state="rolled back", migration=run.migration)
        said = f"{run.plan.full_name} is what it was.{altered} {released}"
        if run.plan.restore_from == "backup":
            said = f"The keys and columns of the repair are gone; the rows that it put back stay, and so does {run.plan.backup}.{altered}"
        return action.finish(said, same=not altered)


def _release_backup(run: Run, session: Session, keep: bool) -> str:
    made = run.finished("backup", "make")
    if made is None:
        return "There was no backup."
    if "archive" in made.facts:
        return f"The archive {made.facts['archive']} stays."
    if backup.gone(run, session):
        return f"The backup {run.plan.backup} was there no more."
    if keep:
        name = fit(f"{run.plan.backup}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        session.run("ddl.rename", table=run.names["backup"], to=(name,))
        return f"The backup is {name} now."
    session.run("ddl.drop", table=run.names["backup"])
    return f"The backup {run.plan.backup} is gone."
