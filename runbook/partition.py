"""02: the shadow with its partitions, and the change log switched on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import pandas as pd
import psycopg
from psycopg import sql

from runbook import changes, locks, references, unique
from runbook.errors import PromiseBroken
from runbook.facts import Column, Finding
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.plan import Plan
from runbook.possible import SAMPLE
from runbook.session import Session
from runbook.sheet import Sheet
from runbook.statements import spelled, statement, trusted
from runbook.words import ended

Statements = changes.Statements


def create(run: Run) -> Statements:
    """The shadow, its partitions, and the logs; the source is only read."""
    yield from changes.create(run)
    yield from unique.prepare(run)
    yield from tables(run.plan, run.staging)
    plan = run.plan
    for reference in plan.own_roles:
        yield statement("foreign_keys.add_own_column", **references.names(run, reference))
    if not plan.takes_any_value:
        yield statement("partition.create_unplaced", **run.names)
    for table in (run.names["shadow"], *changes.leaves(run, run.staging)):
        yield from revoke(table, plan.table.strangers)
        yield from tune(table, plan.columns)
        yield statement("ddl.own", table=table, owner=run.names["owner"])
    for column in plan.columns:
        if column.identity:
            sequence = sql.SQL("SEQUENCE {}").format(sql.Identifier(run.staging, column.identity_sequence or ""))
            yield from revoke(sequence, plan.table.strangers)
    if plan.table.comment:
        yield statement("ddl.comment", table=run.names["shadow"], comment=plan.table.comment)


def tune(table: sql.Composable, columns: Iterable[Column]) -> Statements:
    """What ANALYZE goes by: LIKE does not copy it."""
    for column in columns:
        name = sql.Identifier(column.name)
        if column.statistics not in (None, "-1"):
            yield statement("partition.statistics", table=table, column=name, target=trusted(column.statistics or ""))
        if column.options:
            yield statement("partition.column_options", table=table, column=name, options=trusted(", ".join(column.options)))


def revoke(made: sql.Composable, strangers: Iterable[str]) -> Statements:
    """Take away what default privileges gave on a table or sequence. Before its owner changes: the owner to be may be one of
    the `strangers`."""
    if roles := ", ".join(strangers):
        yield statement("partition.revoke", object=made, roles=trusted(roles))


def tables(plan: Plan, staging: str) -> Statements:
    """The partitioned table and its partitions, in a schema of their own."""
    names = plan.names(staging)
    space = trusted(f"TABLESPACE {spelled((plan.table.tablespace,))}" if plan.table.tablespace else "")
    yield statement("partition.create_shadow", **names, tablespace=space)
    if not plan.takes_null:
        yield statement("partition.require_key", **names)
    for column in plan.columns:
        if column.identity:
            yield statement(
                "partition.add_identity", **names, column=(column.name,), options=trusted(column.identity_options or ""),
                when=sql.SQL("ALWAYS" if column.identity == "a" else "BY DEFAULT"),
                sequence=(staging, column.identity_sequence or ""),
            )  # fmt: skip
    for check in plan.checks:
        if check.validated:
            constraint = {"table": names["shadow"], "constraint": sql.Identifier(check.name)}
            yield statement("ddl.add_constraint", **constraint, definition=trusted(check.definition))
            if check.comment:
                yield statement("partition.comment_constraint", **constraint, comment=check.comment)
    for each in plan.partitions:
        leaf = (staging, each.name)
        yield statement("partition.create_partition", **names, leaf=leaf, bound=trusted(each.bound), tablespace=space)


def rehearse(session: Session, plan: Plan) -> Iterator[Finding]:
    """Make the tables and their keys as temporary ones, with some rows, and take them back: the server itself judges bounds,
    types, checks, keys and the partition key's default. Only ACCESS SHARE is taken on the source."""
    refused = ""
    try:
        with session.connection.transaction(force_rollback=True):
            refused = _refused(session, plan)
            if not refused and not plan.takes_any_value and (default := _refused_default(session, plan)):
                yield default
    except psycopg.errors.InsufficientPrivilege:  # to make temporary tables: then 02 is the first to know
        return
    except psycopg.errors.OutOfMemory:
        refused = (
            f"{len(plan.partitions)} partitions of {plan.full_name} are more than the server's lock table holds: make fewer, or raise"
            " max_locks_per_transaction and restart the server."
        )
    except psycopg.Error as error:
        if named := event_trigger(session, error):
            refuses = spelled((named,))
            yield Finding.blocker(
                refuses,
                f"The event trigger {refuses} does not let tables be made: {ended(error.diag.message_primary or str(error))}",
                f"ALTER EVENT TRIGGER {refuses} DISABLE; meanwhile.",
            )
            return
        detail = f" ({error.diag.message_detail.rstrip('.')})" if error.diag.message_detail else ""
        refused = f"PostgreSQL refuses to partition {plan.full_name} by {plan.key} like that: {error.diag.message_primary or error}{detail}."
    if refused:
        way_out = "Correct what it names, the rows or the check; or key, partition_by, partitions or null_value."
        yield Finding.blocker(plan.full_name, refused, way_out)


def _refused(session: Session, plan: Plan) -> str:
    """Why some rows or the keys are refused, as a sentence, else nothing."""
    shadow = plan.names("pg_temp")["shadow"]
    session.run_all(tables(plan, "pg_temp"))
    if refused := _try_rows(session, plan):
        return refused
    keys = {index.name: index.constraint_definition or "" for index in plan.indexes if index.constraint and index.everywhere}
    keys |= {index.name: plan.new_primary_constraint for index in plan.indexes if index.primary}
    for name, definition in keys.items():
        session.run("ddl.add_constraint", table=shadow, constraint=(name,), definition=trusted(definition))
    return ""


def _refused_default(session: Session, plan: Plan) -> Finding | None:
    """What an INSERT that leaves the key out will meet; a sequence is not asked, which would count."""
    key = next(column for column in plan.columns if column.name == plan.key)
    default = key.default or session.row("draft.domain", type=key.type, key_text=spelled((key.name,)))["default"]
    if default is None or "nextval(" in default:
        return None
    only = [trusted("d" if column == key else "NULL") for column in plan.copied]  # nor are other columns' defaults
    names = {**plan.names("pg_temp"), "columns": plan.listed()["columns"], "only": sql.SQL(", ").join(only)}
    names |= {"default": trusted(default), "type": trusted(key.type)}
    try:
        with session.connection.transaction(force_rollback=True):
            session.run("partition.try_default", **names)
    except psycopg.errors.CheckViolation as error:
        if not error.diag.constraint_name:  # the row met no partition; what else refuses it does so already
            return Finding.warning(
                f"{plan.full_name}.{plan.key} DEFAULT", f"The default of {plan.key} ({default}) fits no partition: an INSERT that leaves {plan.key} out will be refused (23514).",
                f'Add a partition for it, or a default partition ({{"name": "default"}}); or ALTER TABLE {plan.full_name} ALTER {plan.key} SET DEFAULT … first.',
            )  # fmt: skip
    except psycopg.Error:  # as where it reads what only the application's sessions set
        pass
    return None


def refused_by_path(session: Session, plan: Plan) -> tuple[str, str]:
    """The first index with a function that looks for others by the search_path, and what is said of it: neither CREATE INDEX has
    one (from 17 on) nor the function of the trigger that keeps a key unique. Else nothing. Tried on some rows."""
    tries = [
        (guard.index, statement("partition.try_guard", **unique.names(plan, guard, "pg_temp"), size=SAMPLE))
        for guard in plan.guards
    ]
    sample = sql.Identifier("pg_temp", "runbook_sample")
    for index in plan.indexes if plan.server_version >= 17 and not plan.takes_null else ():
        build = statement(
            "restore.create_index", unique=trusted(""), index=("runbook_try",), leaf=sample, tail=trusted(index.tail)
        )
        tries.append(
            (index.name, sql.SQL("; ").join([statement("partition.take_sample", **plan.names("pg_temp"), size=SAMPLE), build]))
        )
    for name, each in tries:
        try:
            with session.connection.transaction(force_rollback=True):
                session.connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
                session.run(each)
        except (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedObject) as error:
            if event_trigger(session, error):  # it was run with our path
                continue
            return name, error.diag.message_primary or str(error)
        except psycopg.Error:  # as where no temporary table may be made, or on a standby: another finding's, or a later step's
            continue
    return "", ""


def event_trigger(session: Session, error: psycopg.Error) -> str:
    """The event trigger whose function raised this; empty where none did."""
    said = (error.diag.context or "").replace(".", " ")
    functions = {
        row["name"]: row["function"].partition("(")[0].rpartition(".")[2] for row in session.rows("catalog.event_triggers")
    }
    return next((name for name, function in functions.items() if f" {function}(" in said), "")


def _try_rows(session: Session, plan: Plan) -> str:
    """Copy some rows, of those that null_value fills too; returns what refuses them, without anybody's data."""
    names = {**plan.names("pg_temp"), **plan.listed()}
    conditions = [names["s_placed"]]
    if plan.key_nullable and plan.null_value is not None:
        conditions.append(sql.SQL("s.{} IS NULL").format(names["key"]))
    try:
        with session.connection.transaction(force_rollback=True):
            if not plan.takes_any_value:
                session.run("partition.create_unplaced", **names)
            for some in conditions:
                session.run("partition.try_rows", **names, some=some, size=SAMPLE)
    except psycopg.Error as error:
        said = error.diag.message_primary if (error.sqlstate or "")[:2] in ("23", "42") else f"error {error.sqlstate}"
        return f"Rows of {plan.full_name} cannot be copied as they are: {said}."
    return ""


def measure(session: Session, plan: Plan) -> list[tuple[str, float, float]]:
    """(choice, microseconds a row inserted, megabytes more) for a sample of the table in temporary tables, taken back again."""
    costs = []
    with session.connection.transaction(force_rollback=True):
        rows = sum(each.rows for each in plan.partitions)
        session.run_all(tables(plan, "pg_temp"))
        if not plan.takes_any_value:
            session.run("partition.create_unplaced", **plan.names("pg_temp"))
        names = {**plan.names("pg_temp"), **plan.listed()}
        session.run("partition.create_sample", **names, size=SAMPLE)
        for choice in ("per_partition", "global"):
            if choice == "global":
                for guard in plan.guards:
                    for each in (
                        *unique.build(plan, guard, "pg_temp", "pg_temp"),
                        *unique.keep(plan, guard, "pg_temp", "pg_temp"),
                    ):
                        session.run(each)
            guards = [guard.table for guard in plan.guards] if choice == "global" else []
            every = sql.SQL(", ").join([names["shadow"], *(sql.Identifier("pg_temp", guard) for guard in guards)])
            session.run("partition.insert_sample", **names)  # the first time fills caches and plans
            session.run("partition.empty_sample", tables=every)
            started = time.perf_counter()
            taken = session.run("partition.insert_sample", **names).rowcount
            spent = time.perf_counter() - started
            size = session.value("partition.size_of", names=guards)
            session.run("partition.empty_sample", tables=every)
            costs.append((choice, round(spent / max(1, taken) * 1e6, 1), round(int(size) / max(1, taken) * rows / 1e6, 1)))
    return costs


def remove(run: Run) -> Statements:
    """The inverse of create and of switching the log on."""
    yield from changes.switch_off(run)
    yield statement("partition.drop", **run.names)
    yield from unique.remove(run)


def preview(run: Run) -> Sheet:
    """The statements of this step, with real names."""
    return Sheet([*create(run), *changes.switch_on(run)])


@recorded("partition", "shadow")
def create_shadow(action: Action) -> Evidence:
    """Make the shadow and its partitions, in one transaction with the ledger's row."""
    run, session = action.run, action.session
    with session.transaction(lock_timeout="5s"):
        session.run_all(create(run))
        names = ", ".join(partition.name for partition in run.plan.partitions)
        return action.finish(f"The shadow of {run.plan.full_name} and its partitions {names} are there, empty.")


@recorded("partition", "log")
def start_log(action: Action, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Switch the change log on: SHARE ROW EXCLUSIVE on the source for an instant, retried when writers hold it."""
    run, session = action.run, action.session
    patience = locks.Patience(budget_s, lock_timeout_ms)

    def attempt() -> Evidence:
        with locks.exclusive(session, patience, [run.plan.source], mode="SHARE ROW EXCLUSIVE"):
            session.run_all(changes.switch_on(run))
            states = session.value("changes.trigger_states", oid=run.names["source_oid"])
            session.run("ledger.remember_triggers", triggers=states, **run.names)
            return action.finish(f"Every change of {run.plan.full_name} is logged from now on.", attempts=patience.attempts)

    return locks.persist(run.database, session, patience, run.plan.full_name, attempt)


def tree(run: Run) -> pd.DataFrame:
    """The partitions with their bounds, as the catalog has them: the shadow's, or after the cut-over the table's."""
    return run.frame("partition.staged", shadow_text=spelled(run.names["source" if run.swapped else "shadow"]))


@recorded("partition", "check")
def check(action: Action) -> Evidence:
    """Raises PromiseBroken unless every planned partition stands and the log's triggers are on."""
    run, session = action.run, action.session
    rows = session.rows("partition.staged", shadow_text=spelled(run.names["shadow"]))
    missing = {partition.name for partition in run.plan.partitions} - {row["partition"] for row in rows}
    if missing:
        raise PromiseBroken(
            f"The partitions {', '.join(sorted(missing))} of {run.plan.full_name} are missing: run 02_partition again."
        )
    changes.refuse_gaps(run, session)
    return action.finish(f"{len(run.plan.partitions)} partitions stand and the change log is on.")
