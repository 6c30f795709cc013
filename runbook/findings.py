"""What the plan finds: blockers, warnings and notes, each with its object, its cause and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import psycopg
from psycopg import sql

from runbook import dependents, partition, possible
from runbook.division import Division
from runbook.facts import Finding
from runbook.plan import Plan
from runbook.session import Session
from runbook.statements import spelled
from runbook.words import counted

LEVELS = ("blocker", "warning", "note")


def judge(session: Session, plan: Plan, row: dict[str, Any], division: Division | None) -> tuple[Finding, ...]:
    """All findings, worst first."""
    if plan.restore_from == "backup" or division is None:  # nothing changes its name, so nothing has to be carried over
        return worst_first([*_table(plan, row), *_rights(session, plan), *dependents.references(session, plan)])
    found = [
        *_table(plan, row), *_values(plan, division), *possible.filled(session, plan), *possible.doubled(session, plan),
        *possible.orphaned(session, plan), *possible.recomputed(session, plan), *possible.unlisted(session, plan),
        *possible.rewritten(session, plan), *possible.emptied(session, plan), *_looking(session, plan), *_locking(session, plan),
        *_watched(session), *_unpruned(session, plan), *_names(session, plan), *_rights(session, plan),
        *dependents.objects(session, plan), *dependents.references(session, plan), *dependents.uniqueness(plan),
        *_traffic(session, plan),
    ]  # fmt: skip
    return worst_first(found)


def worst_first(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Blockers, then warnings, then notes."""
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def _table(plan: Plan, row: dict[str, Any]) -> Iterator[Finding]:
    name = plan.full_name
    if row["is_partition"]:
        yield Finding.blocker(name, f"{name} is itself a partition.", "Name its root.")
    elif row["inheritance"] and not row["partitioned"]:
        yield Finding.blocker(name, f"{name} takes part in inheritance.", "Take it out first: ALTER TABLE … NO INHERIT.")
    if not plan.primary_key and plan.restore_from == "source":
        yield Finding.blocker(name, f"{name} has no primary key, so a changed row cannot be found again.", "Give it one first.")
    if row["unlogged"]:
        yield Finding.blocker(
            name,
            f"{name} is unlogged: a crash would empty it in the middle.",
            "ALTER TABLE … SET LOGGED first.",
        )


def _values(plan: Plan, division: Division) -> Iterator[Finding]:
    name = f"{plan.full_name}.{plan.key}"
    if division.nulls:
        such_as = f" (such as {plan.frequent_value!r})" if plan.frequent_value is not None else ""
        yield Finding.blocker(
            name, f"{plan.full_name} has {counted(division.nulls, 'row')} whose {plan.key} is NULL:"
            f" {plan.key} becomes a part of the primary key, which NULL cannot be in.",
            f"Fill them, or set null_value to what NULL shall become{such_as}, or by list give NULL a partition.",
        )  # fmt: skip
    elif plan.key_nullable and plan.null_value is None and not plan.takes_null:
        yield Finding.note(
            name,
            f"{plan.key} may be NULL until the cut-over and is NOT NULL after it; a NULL that comes before stops the cut-over.",
        )
    elif plan.key_nullable and plan.null_value is not None:
        yield Finding.warning(
            name, f"null_value fills {plan.key} until the cut-over only: after it a row without a {plan.key} is refused.",
            f"Let whoever writes give it; where it is left out, ALTER TABLE {plan.full_name} ALTER {plan.key} SET DEFAULT … helps.",
        )  # fmt: skip
    if plan.takes_null:
        yield from _without_primary_key(plan)
    if not plan.takes_any_value:
        if division.homeless:
            listed = ", ".join(f"{value!r} ({rows:,})" for value, rows in division.homeless[:10])
            yield Finding.blocker(
                name, f"{plan.full_name} has {counted(sum(rows for _, rows in division.homeless), 'row')} whose {plan.key} fits no partition: {listed}.",
                'Add a partition for them, or a default partition ({"name": "default"}).',
            )  # fmt: skip
        if plan.key_type != "boolean" or len({value for partition in plan.partitions for value in partition.values}) < 2:
            yield Finding.note(
                name,
                f"After the cut-over a value of {plan.key} that no partition takes is refused (23514); one that comes before stops the cut-over.",
                "Where values grow, let ahead (or partitions) reach further than they do until 05." if plan.partition_by == "range" else "",
            )  # fmt: skip


def _watched(session: Session) -> Iterator[Finding]:
    watching = session.rows("catalog.event_triggers")
    names = [spelled((row["name"],)) for row in watching]
    if watching and (refused := _given_away(session)):
        yield Finding.blocker(
            ", ".join(names),
            f"New tables are given to another role by an event trigger ({', '.join(names)}), so that the ledger could not be kept: {refused}.",
            f"{' '.join(f'ALTER EVENT TRIGGER {name} DISABLE;' for name in names)} meanwhile.",
        )
    for row in watching:
        yield Finding.note(
            row["name"],
            f"The event trigger {row['name']} runs whenever something is created, altered or dropped, and by what it refuses a step would be"
            " stopped, the way back, too.",
            f"Look at {row['function']}; a rehearsal (`runbook rehearse`) tries all but the swap.",
        )


def _given_away(session: Session) -> str:
    """What becomes of a table in the ledger's schema where it does not stay ours; tried with the role's own path, and taken back."""
    try:
        with session.connection.transaction(force_rollback=True):
            session.connection.execute("SET LOCAL search_path TO DEFAULT")
            session.run("ddl.create_schema_if_none", schema=("runbook",))
            session.run("catalog.try_table")
            owner = session.value("catalog.tried_owner")
            return f"a new table is owned by {owner}" if owner else ""
    except psycopg.errors.InsufficientPrivilege as error:
        return str(error.diag.message_primary) if partition.event_trigger(session, error) else ""
    except psycopg.Error:  # as on a standby: another finding's
        return ""


def _unpruned(session: Session, plan: Plan) -> Iterator[Finding]:
    if session.value("catalog.pruning") == "off":
        yield Finding.warning(
            plan.full_name,
            f"enable_partition_pruning is off for this role, database or server: every query would read all partitions of {plan.full_name}.",
            "Switch it on (ALTER DATABASE, ALTER ROLE … RESET enable_partition_pruning, or postgresql.conf); 06 fails while it is off.",
        )


def _locking(session: Session, plan: Plan) -> Iterator[Finding]:
    """Locks are kept in a table of a fixed size: where many partitions are looked through, it overflows for everybody."""
    room = session.row("catalog.lock_table")
    each = (len(plan.partitions) + 1) * (1 + len(plan.indexes))
    at_once = room["places"] // each
    if at_once < room["connections"] / 4:
        yield Finding.warning(
            plan.full_name,
            f"A look-up that does not name {plan.key} locks {each:,} tables and indexes, and the server has room for {room['places']:,}: beyond"
            f" {counted(at_once, 'such transaction')} at a time sessions fail (53200), and so may the way back.",
            f"ALTER SYSTEM SET max_locks_per_transaction = {each}; and restart the server, or make fewer partitions.",
        )


def _looking(session: Session, plan: Plan) -> Iterator[Finding]:
    """A function in an index that finds others only by the search_path of whoever writes."""
    if session.value("catalog.reads_rows", oid=plan.table.oid):  # which is said already
        return
    index, said = partition.refused_by_path(session, plan)
    if index:
        yield Finding.blocker(
            index, f"{index} calls a function that looks for others by the search_path, which neither the trigger that keeps a key unique has nor, from 17 on, CREATE INDEX: {said}.",
            'Give it one: ALTER FUNCTION … SET search_path = …; first.',
        )  # fmt: skip


def _without_primary_key(plan: Plan) -> Iterator[Finding]:
    """A partition for NULL: the key stays nullable, and what was the primary key is a unique key."""
    columns = ", ".join(plan.new_primary_key)
    loose = " PostgreSQL 14 lets a row without one stand twice there." if plan.server_version < 15 else ""
    yield Finding.warning(
        plan.full_name, f"With a partition for NULL the primary key becomes a unique key ({columns}): PostgreSQL has no NULL in a primary key.{loose}",
        f"Set null_value instead to keep a primary key, if some value of {plan.key} can stand for NULL.",
    )  # fmt: skip
    for reference in plan.references:
        if reference.adds_column:
            yield Finding.blocker(
                reference.table, f"{reference.table} references {plan.full_name}, and a row whose {plan.key} is NULL cannot be referenced by a composite key.",
                "Set null_value instead of a partition for NULL.",
            )  # fmt: skip
    if any(each.kind == "publication" for each in plan.carried) and plan.table.replica_identity == "d":
        yield Finding.blocker(
            plan.full_name, f"{plan.full_name} is published, and without a primary key its updates and deletes would be refused.",
            "Set null_value instead of a partition for NULL, or ALTER TABLE … REPLICA IDENTITY FULL first.",
        )  # fmt: skip


def _names(session: Session, plan: Plan) -> Iterator[Finding]:
    wanted = [p.name for p in plan.partitions] + [plan.retired]
    schema = sql.Literal(plan.table.schema_name)
    kept = {plan.retired: "the original after the cut-over", plan.backup: "the backup"}
    for name in kept.keys() & {p.name for p in plan.partitions}:
        yield Finding.blocker(
            name, f"A partition is to be called {name}, as {kept[name]} is.", "Choose another name for the partition."
        )
    for row in session.rows("draft.free", schema=schema, names=wanted):
        yield Finding.blocker(
            row["name"],
            f"The name {plan.table.schema_name}.{row['name']} is taken.",
            "Choose another name for the partition, or rename what has it.",
        )
    if session.rows("draft.free", schema=schema, names=[plan.backup]):
        yield Finding.blocker(
            plan.backup, f"A backup {plan.table.schema_name}.{plan.backup} exists, and is never overwritten.",
            "Rename or drop it, or name another with backup.",
        )  # fmt: skip


def _rights(session: Session, plan: Plan) -> Iterator[Finding]:
    may = session.row("catalog.privileges", oid=plan.table.oid)
    me, schema = may["me"], may["schema"]

    def become(owner: str) -> str:
        """How to get an owner's rights; of a superuser's nobody should."""
        if owner in may["superusers"]:
            return f"Let a role that is no superuser own it, or work as {owner}."
        quoted = session.value("catalog.quoted", name=owner)
        if session.value("catalog.member", role=owner):  # and does not inherit
            return f"ALTER ROLE {me} SET role = {quoted}; it is a member that does not inherit {quoted}'s rights."
        return f"GRANT {quoted} TO {me};"

    if may["read_only"]:  # whatever the role's default is: the session has set that off
        yield Finding.blocker(
            may["database"],
            f"Nothing can be written in {may['database']}: this server is a standby.",
            "Name the primary; of several hosts, target_session_attrs=read-write finds it.",
        )
    if not may["owner"]:
        yield Finding.blocker(plan.full_name, f"{me} does not own {plan.full_name}.", become(may["owner_name"]))
    if not may["schema_create"]:
        yield Finding.blocker(
            schema,
            f"{me} may not create tables in schema {schema}.",
            f"GRANT CREATE ON SCHEMA {schema} TO {me};",
        )
    if not may["database_create"]:
        yield Finding.blocker(
            may["database"],
            f"{me} may not create the schema runbook.",
            f"GRANT CREATE ON DATABASE {may['own_database']} TO {me};",
        )
    if not may["database_temp"]:
        yield Finding.blocker(
            may["database"],
            f"{me} may not make temporary tables, by which rows are looked at and tried.",
            f"GRANT TEMPORARY ON DATABASE {may['own_database']} TO {me};",
        )
    missing = session.rows("catalog.rights_missing", oid=plan.table.oid, anew=plan.restore_from == "source")
    yield from map(Finding.model_validate, missing)
    for reference in plan.references:
        if not may["superuser"] and not session.value("catalog.owned", oid=sql.SQL("to_regclass({})").format(
                sql.Literal(reference.identifier.as_string(session.connection)))):  # fmt: skip
            yield Finding.blocker(
                reference.table,
                f"{me} does not own {reference.schema_name}.{reference.table}, which references it.",
                become(reference.owner),
            )
    if strangers := ", ".join(plan.table.strangers):
        yield Finding.warning(
            plan.full_name,
            f"Default privileges of {me} would open to {strangers} what is made here; the ledger, the logs, the backup and the tables of values"
            " are closed to all but their owner.",
            "Who dumps the database as one of them needs pg_read_all_data from then on.",
        )
    unreadable = [row["name"] for row in session.rows("draft.unreadable")] if plan.backup_method == "dump" else []
    if unreadable:
        yield Finding.blocker(
            may["database"], f"pg_dump reads the definitions of all tables, and {me} may not read {', '.join(unreadable)}.",
            f'GRANT pg_read_all_data TO {me}; or set backup_method to "table".',
        )  # fmt: skip
    if not may["sees_activity"]:
        yield Finding.warning(
            me, f"{me} cannot see other users' queries and snapshots: blockers are named by pid only, and old snapshots cannot be waited for.",
            f"GRANT pg_read_all_stats TO {me};",
        )  # fmt: skip


def _traffic(session: Session, plan: Plan) -> Iterator[Finding]:
    kept = {
        plan.table.name: (
            plan.full_name,
            "91 has dropped the original",
            "Renew the application's pools between 05 and 91, which says whether older sessions are left.",
        )
    }
    for view in plan.matviews:
        kept[view.name] = f"{view.schema_name}.{view.name}", "05 has made it anew", "Renew the application's pools after 05."
    for name, (of, when, way_out) in kept.items():
        if functions := [row["function"] for row in session.rows("catalog.row_variables", name=name)]:
            yield Finding.warning(
                of,
                f"{', '.join(functions)} {'has' if len(functions) == 1 else 'have'} variables of the type of {of}'s rows: in a session that"
                f" ran one before the cut-over they fail (XX000) once {when}.",
                way_out,
            )
    for row in session.rows("locks.wraparound", oid=plan.table.oid):
        yield Finding.warning(
            plan.full_name,
            f"An autovacuum to prevent wraparound runs on it (pid {row['pid']}) and never yields.",
            "The cut-over waits for it.",
        )
