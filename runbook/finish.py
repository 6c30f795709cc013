"""91: the end of the way back: the log, the retired table and, if asked, the backup go; the history stays."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import errors

from runbook import attaching, backup, changes, cutover, foreign_keys, locks, losses, matviews, swapping, verify
from runbook.changes import Statements
from runbook.errors import ApprovalMissing, BadInput, OutOfOrder, PromiseBroken
from runbook.facts import Reference
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.references import added, dropped, names, understood
from runbook.session import Session
from runbook.sheet import Listing, Sheet, nothing
from runbook.statements import spelled, statement
from runbook.words import counted


def _tables(run: Run, drop_backup: bool) -> list[str]:
    """What the step drops: the retired table, and the backup's if that is asked for and is one."""
    goes = {"retired": run.plan.restore_from == "source", "backup": drop_backup and run.plan.backup_method == "table"}
    return [name for name, it_does in goes.items() if it_does]


def statements(run: Run, tables: list[str], keep_fill: bool = False, gone: Sequence[Reference] = ()) -> Statements:
    """All of the step, for one short transaction; of the tables those that are the runbook's, and no reference whose table is `gone`."""
    if run.plan.restore_from == "source":
        yield statement("changes.switch_off_back", **run.names)
        for leaf in changes.leaves(run):
            yield statement("changes.switch_off_back_truncate", leaf=leaf)
    yield from foreign_keys.keep(run, gone) if keep_fill else ()
    for reference in [] if keep_fill else [each for each in (*added(run), *run.plan.own_roles) if each not in gone]:
        yield statement("foreign_keys.drop_fill", **names(run, reference))
        if run.plan.frequent_value is not None:
            yield statement("rollback.set_default", **names(run, reference))
    if run.plan.restore_from == "source":
        yield from matviews.forget(run)
    for name in tables:
        yield statement("ddl.drop", table=run.names[name])
    yield statement("ddl.drop_schema", schema=run.names["staging"])


def preview(run: Run, drop_backup: bool = False, keep_fill: bool = False) -> Listing:
    """The statements of this step, with real names."""
    if run.state != "open":
        return nothing(run.plan.full_name, run.state)
    return Sheet(statements(run, _tables(run, drop_backup), keep_fill))


def require(
    run: Run, approved_by: str = "", unneeded_for_h: int = 24, force_strict: bool = False, keep_fill: bool = False
) -> Evidence:
    """Raises unless 06 has passed, someone approves, and no old code needed the fill trigger for `unneeded_for_h` hours, which does
    not matter with `keep_fill`. Asked each time until the end: what was true when somebody approved may not be any more."""
    if force_strict and keep_fill:
        raise BadInput("force_strict ends the fill trigger and keep_fill leaves it there: give one of them.")
    if run.state == "rolled back":
        raise OutOfOrder(f"The migration of {run.plan.full_name} was rolled back: there is nothing to finish.")
    seen = run.finished("finish", "approval") if run.finished("finish", "drop") else None
    return seen or _require(run, approved_by, unneeded_for_h, force_strict, keep_fill)


@recorded("finish", "approval", again=True)
def _require(action: Action, approved_by: str, unneeded_for_h: int, force_strict: bool, keep_fill: bool) -> Evidence:
    run = action.run
    action.session.run("ledger.withdraw", migration=run.migration, step="finish", action="approval")
    if run.finished("verify", "check") is None:
        broken = [each.promise for each in verify.seen(run) if each.verdict == verify.FAIL]
        found = (
            f" It found broken: {'; '.join(broken[:10])}{f'; and {len(broken) - 10} more' if len(broken) > 10 else ''}."
            if broken
            else ""
        )
        raise OutOfOrder(f"06_verify has not passed for {run.plan.full_name}: the way back stays open until it has.{found}")
    if run.plan.restore_from == "source" and (bad := cutover.unsound(run, action.session)):
        raise OutOfOrder(
            f"The foreign keys {', '.join(bad)} are missing or not valid: if 20_add_partitions was stopped, run it again; else look"
            " with 06_verify."
        )
    if undone := [row["source"] for row in action.session.rows("rollback.undoes", **run.names)]:
        raise OutOfOrder(
            f"The way back of {', '.join(undone)} would end with this one: {run.plan.full_name} gave it a column that its original does not have."
            " Finish that first, or roll this one back."
        )
    who = run.approver(
        approved_by, f"Finishing {run.plan.full_name} ends the way back: set approved_by to the name of who approves."
    )
    helped = [] if force_strict or keep_fill else foreign_keys.filled(run)
    if helped and action.session.value("catalog.there", name=spelled(names(run, helped[0])["filled"])):
        last = action.session.row("rollback.last_filled", **names(run, helped[0]))
        hours = min(last["hours"], last["trigger_hours"])
        if hours < unneeded_for_h:
            needed = f"Old code inserted {counted(last['rows'], 'row')} without the role column, the last {hours:.1f} h ago"
            never = f"Nothing has needed the fill trigger yet, but it came only {hours:.1f} h ago"
            refused = " (old code's inserts are refused then)" if action.run.plan.frequent_value is None else ""
            raise OutOfOrder(
                f"{needed if last['rows'] else never}; unneeded_for_h asks for {unneeded_for_h} h without. Wait, change what 07_application counts, set"
                f" force_strict to end the trigger's help all the same{refused}, or keep_fill to keep it."
            )
    return action.finish(f"Approved by {who}.{_older_sessions(run, action.session)}", approved_by=who, keep_fill=keep_fill)


def _older_sessions(run: Run, session: Session) -> str:
    functions = [row["function"] for row in session.rows("catalog.row_variables", name=run.plan.table.name)]
    older = session.rows("rollback.older_sessions", **run.names) if functions else []
    if not older:
        return ""
    return (
        f" {counted(len(older), 'session is', 'sessions are')} older than the cut-over (pid {', '.join(str(row['pid']) for row in older[:10])}): where one"
        f" ran {', '.join(functions)}, that fails (XX000) once the original is gone, until it is a new one. Renew the pool first."
    )


@recorded("finish", "drop")
@understood("91_finish")
def drop(
    action: Action, drop_backup: bool = False, keep_fill: bool = False, lock_timeout_ms: int = 300, budget_s: float = 120
) -> Evidence:
    """Drop the log, the retired table and, if asked, the backup; referencing tables get the strict form, or `keep_fill` leaves them
    their fill trigger. No way back after it."""
    run, session = action.run, action.session
    approval = run.finished("finish", "approval")
    if approval is None or (approval.facts.get("keep_fill") and not keep_fill):
        how = "" if approval is None else " without keep_fill"
        raise ApprovalMissing(f"Finishing {run.plan.full_name}{how} has not been approved: run 91_finish from its beginning.")
    losses.refuse_renamed(run, session, "then run 91_finish again.")
    patience = locks.Patience(budget_s, lock_timeout_ms)

    def attempt() -> Evidence:
        left_out = dropped(run, session)
        gone = {"retired": not losses.is_original(run, session), "backup": backup.gone(run, session)}
        tables = _tables(run, drop_backup)
        going, others = [each for each in tables if not gone[each]], [spelled(run.names[each]) for each in tables if gone[each]]
        ours, logs = swapping.standing(session, (run.names[name] for name in going)), swapping.logs(run, session)
        try:
            with locks.exclusive(session, patience, swapping.unlogged(run, session), ours=ours, logs=logs, dropped=ours):
                session.run_all((*attaching.forget(run, session), *statements(run, going, keep_fill, left_out)))
                session.run("ledger.set_state", state="finished", migration=run.migration)
                others += dict.fromkeys(f"{each.schema_name}.{each.table}" for each in left_out)
                stays = "".join(f" {each} was there no more." for each in others)
                return action.finish(
                    f"{run.plan.full_name} is on its own: log and retired table are gone, and with them the way back.{stays}"
                )
        except errors.UndefinedTable:
            if dropped(run, session) == left_out:
                raise
            raise locks.NotYet("a referencing table that somebody dropped just now") from None

    try:
        return locks.persist(run.database, session, patience, run.plan.full_name, attempt)
    except errors.DependentObjectsStillExist as error:
        raise PromiseBroken(
            f"Objects depend on what would go now: {' '.join((error.diag.message_detail or str(error)).split())}. Drop them, or end the"
            " migration of the table that they belong to; then run 91_finish again."
        ) from None
