"""02: the shadow with its partitions, and the change log switched on."""

from __future__ import annotations

import pandas as pd
from psycopg import sql

from runbook import changes, locks
from runbook.database import Session
from runbook.errors import PromiseBroken
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.sheet import Sheet
from runbook.statements import statement, trusted

Statements = changes.Statements


def create(run: Run) -> Statements:
    """The shadow, its partitions, and the logs; the source is only read."""
    plan, names = run.plan, run.names
    yield from changes.create(run)
    yield statement("partition.create_shadow", **names)
    for column in plan.columns:
        if column.identity:
            yield statement(
                "partition.add_identity", **names, column=(column.name,), options=trusted(column.identity_options or ""),
                when=sql.SQL("ALWAYS" if column.identity == "a" else "BY DEFAULT"),
                sequence=(run.staging, column.identity_sequence or ""),
            )  # fmt: skip
    for check in plan.checks:
        if check.validated:
            yield statement(
                "partition.add_check",
                table=names["shadow"],
                constraint=(check.name,),
                definition=trusted(check.definition),
            )
            if check.comment:
                yield statement(
                    "partition.comment_constraint",
                    table=names["shadow"],
                    constraint=(check.name,),
                    comment=check.comment,
                )
    tablespace = sql.SQL("TABLESPACE {}").format(sql.Identifier(plan.table.tablespace)) if plan.table.tablespace else sql.SQL("")
    tables: list[sql.Composable] = [names["shadow"]]
    for partition in plan.partitions:
        leaf = sql.Identifier(run.staging, partition.name)
        yield statement(
            "partition.create_partition",
            **names,
            leaf=leaf,
            bound=trusted(partition.bound),
            tablespace=tablespace,
        )
        tables.append(leaf)
    if not plan.takes_any_value:
        yield statement("partition.create_unplaced", **names)
    for table in tables:
        for column in plan.columns:
            if column.statistics not in (None, "-1"):
                yield statement(
                    "partition.statistics",
                    table=table,
                    column=(column.name,),
                    target=trusted(column.statistics or ""),
                )
            if column.options:
                yield statement(
                    "partition.column_options",
                    table=table,
                    column=(column.name,),
                    options=trusted(", ".join(column.options)),
                )
        yield statement("partition.own", table=table, owner=names["owner"])
    if plan.table.comment:
        yield statement("partition.comment", table=names["shadow"], comment=plan.table.comment)


def remove(run: Run) -> Statements:
    """The inverse of create and of switching the log on."""
    yield from changes.switch_off(run)
    yield statement("partition.drop", **run.names)


def preview(run: Run) -> Sheet:
    """The statements of this step, with real names."""
    return Sheet([*create(run), *changes.switch_on(run)])


@recorded("partition", "shadow")
def create_shadow(action: Action) -> Evidence:
    """Make the shadow and its partitions, in one transaction with the ledger's row."""
    run, session = action.run, action.session
    with session.transaction(lock_timeout="5s"):
        for each in create(run):
            session.run(each)
        names = ", ".join(partition.name for partition in run.plan.partitions)
        return action.finish(f"The shadow of {run.plan.full_name} and its partitions {names} are there, empty.")


@recorded("partition", "log")
def start_log(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Switch the change log on: SHARE ROW EXCLUSIVE on the source for an instant, retried when writers hold it."""
    run, session = action.run, action.session
    patience = locks.Patience(budget_s, lock_timeout_ms)

    def attempt() -> Evidence:
        with locks.exclusive(session, patience, [run.plan.source], mode="SHARE ROW EXCLUSIVE"):
            for each in changes.switch_on(run):
                session.run(each)
            states = session.value("changes.trigger_states", oid=run.names["source_oid"])
            session.run("ledger.remember_triggers", triggers=states, **run.names)
            return action.finish(f"Every change of {run.plan.full_name} is logged from now on.", attempts=patience.attempts)

    return locks.persist(run.database, session, patience, run.plan.full_name, attempt)


def tree(run: Run) -> pd.DataFrame:
    """The partitions with their bounds, as the catalog has them: the shadow's, or after the cut-over the table's."""
    return run.frame("partition.staged", shadow_text=_text(run, "source" if run.finished("cutover", "swap") else "shadow"))


@recorded("partition", "check")
def check(action: Action) -> Evidence:
    """Raises PromiseBroken unless every planned partition stands and the log's triggers are on."""
    run = action.run
    _require(run, action.session)
    return action.finish(f"{len(run.plan.partitions)} partitions stand and the change log is on.")


def _require(run: Run, session: Session) -> None:
    rows = session.rows("partition.staged", shadow_text=_text(run, "shadow"))
    missing = {partition.name for partition in run.plan.partitions} - {row["partition"] for row in rows}
    if missing:
        raise PromiseBroken(
            f"The partitions {', '.join(sorted(missing))} of {run.plan.full_name} are missing: run 02_partition again."
        )
    changes.refuse_gaps(run, session)


def _text(run: Run, name: str) -> sql.Literal:
    return sql.Literal(run.names[name].as_string(None))
