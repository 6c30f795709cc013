"""04: the role column on every referencing table, logged, filled in and kept right until the cut-over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from psycopg import sql

from runbook import locks, repair
from runbook.changes import Statements
from runbook.correction import drain, explained, fill_in, stuck
from runbook.errors import PromiseBroken
from runbook.facts import Reference
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.plan import fit, with_key
from runbook.references import added, itself, logged, names, require_intact, tables, understood
from runbook.session import Session
from runbook.sheet import Sheet
from runbook.statements import rendered, statement, trusted
from runbook.words import counted


def log_table(run: Run, reference: Reference) -> Statements:
    """The reference's own log, made with its column: where it is, the way back takes the column for ours."""
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
        yield rendered("BEGIN")
        yield from log_table(run, reference)
        yield from column(run, reference)
        yield rendered("COMMIT")
        yield statement("foreign_keys.fill_all", **names(run, reference))
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
    own = names(run, reference)
    yield statement("ddl.drop_constraint", table=own["reference"], constraint=own["check_name"])
    yield statement("foreign_keys.drop_column", **own)


def preview(run: Run) -> Sheet:
    """What this step runs, and the composite keys that 05 will create."""
    if run.plan.restore_from == "backup":
        return repair.preview_keys(run)
    keys = (statement("foreign_keys.add_key", **names(run, reference)) for reference in run.plan.references)
    return Sheet([*script(run), *keys])


def _validate(run: Run, reference: Reference) -> sql.Composed:
    own = names(run, reference)
    return statement("ddl.validate", table=own["reference"], constraint=own["check_name"])


@recorded("foreign_keys", "columns")
@understood("04_foreign_keys")
def add_columns(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Add the role columns, each with its log, and mark the rows that need another value than the default. Raises PromiseBroken
    for rows that refer to nothing, by a key that 05 would have to validate, before anything is changed."""
    if action.run.plan.restore_from == "backup":
        return repair.add_columns(action, lock_timeout_ms, budget_s)
    run, session = action.run, action.session
    require_intact(run, session)
    _refuse_orphans(run, session)
    for reference in added(run):
        patience = locks.Patience(budget_s, lock_timeout_ms)
        if not logged(run, session, reference):
            statements = [*log_table(run, reference), *column(run, reference)]
        else:  # begun before: its triggers may have been switched off since, and a partition may have come
            statements = [statement("foreign_keys.switch_off", **names(run, reference)), *_switch_on(run, reference)]
        locks.apply(run.database, session, patience, reference.table, statements, [reference.identifier])
    return action.finish(
        f"Referencing tables that have their role column, and a log of their own: {len(added(run))}.",
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
@understood("04_foreign_keys")
def fill(action: Action, batch_rows: int = 2000) -> Evidence:
    """Correct the role of every row whose user is not of the most frequent one, `batch_rows` at once: 2,000 are so few that the
    application waits for one of our row locks some tens of milliseconds at most."""
    if action.run.plan.restore_from == "backup":
        return repair.fill(action, batch_rows)
    run, session, total = action.run, action.session, 0
    require_intact(run, session)
    for reference in added(run):
        own, missed = names(run, reference), 0
        with explained(run, reference):
            for table, _ in tables(run, reference, session):
                needed, filled = fill_in(run, session, reference, table, batch_rows)
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


def keep(run: Run, gone: Sequence[Reference] = ()) -> Statements:
    """For an application that will never name the role column: the fill trigger stays, with functions beside its table, and counts
    no longer."""
    for reference in (each for each in filled(run) if each not in gone):
        yield statement("foreign_keys.drop_fill", **names(run, reference))
        beside = {
            f"{each}_function": sql.Identifier(
                reference.schema_name, fit(f"{reference.table}_{reference.role_column}_{each}_{run.migration}")
            )
            for each in ("fill", "named")
        }
        yield statement(
            "foreign_keys.create_fill",
            **{**names(run, reference), **beside, "note": sql.SQL("NULL"), "itself": itself(run, reference, None)},
        )


def require_late(run: Run, session: Session | None = None) -> Iterator[tuple[Reference, sql.Composed, str]]:
    """(reference, statement, the lock that it needs) for the role columns that are required late: their
    check is validated, then it is NOT NULL where it can be. With a session: only what is left of it."""
    for reference in added(run) if _required_late(run) else []:
        if session is None or session.value("foreign_keys.checked", **names(run, reference)):
            yield reference, _validate(run, reference), "SHARE UPDATE EXCLUSIVE"
            if reference.not_null:
                yield (
                    reference,
                    statement("foreign_keys.require_all", **names(run, reference)),
                    "ACCESS EXCLUSIVE",
                )  # for an instant


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


@recorded("foreign_keys", "check")
@understood("04_foreign_keys")
def check(action: Action) -> Evidence:
    """Raises unless every row of every referencing table has its user's role, those still logged excepted."""
    if action.run.plan.restore_from == "backup":
        return repair.check_keys(action)
    run, session = action.run, action.session
    require_intact(run, session)
    for reference in added(run):
        own = names(run, reference)
        with explained(run, reference):
            if wrong := session.value("foreign_keys.wrong", **own):  # written while the log was off
                session.run("foreign_keys.log_wrong", **own)
                drain(run, session, reference)
                wrong = session.value("foreign_keys.wrong", **own)
            rows = stuck(session, own)
        if rows:
            raise PromiseBroken(
                f"{counted(rows, 'row')} of {reference.table} {'keeps' if rows == 1 else 'keep'} another {reference.role_column} than the"
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


def _refuse_orphans(run: Run, session: Session) -> None:
    """Raises PromiseBroken for rows that came while keys were not checked, as a restore without triggers leaves them. After the
    swap they could be neither validated nor, where each row has a partition key of its own, be given one. Before the columns are
    filled in: the indexes are enough to tell as long as few pages were changed since the last vacuum."""
    table = run.plan.table
    keys = {each.place for each in run.plan.references if _required_late(run) or not each.definition.endswith("NOT VALID")}
    keys |= {(table.schema_name, table.name, each.name) for each in run.plan.outgoing if each.validated}
    for schema, name, key in sorted(keys):
        for found in session.rows("foreign_keys.orphans", schema=schema, table=name, constraint=key):
            search = found["query"]
            with session.transaction(
                max_parallel_workers_per_gather=0
            ):  # one process takes half as long as three did, and others go on
                rows = session.value("foreign_keys.count", search=trusted(search)) if found["readable"] else 0
            if rows:
                raise PromiseBroken(
                    f"{counted(rows, 'row')} of {schema}.{name} {'refers' if rows == 1 else 'refer'} to nothing by {key}, which 05_cutover would have to validate:"
                    f" they came while keys were not checked, and are found by {search}. Correct or delete them, then run 04_foreign_keys again."
                )
