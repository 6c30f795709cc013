"""The repair of a migration that went wrong elsewhere: missing rows come back from the backup, lost keys are made anew."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from psycopg import errors, sql

from runbook import catalog, findings, locks, refill
from runbook.compare import partition_of
from runbook.errors import BadInput, PlanBlocked, PromiseBroken
from runbook.facts import Column, Finding, Partition, Reference, Table
from runbook.ledger import Action, Evidence, Run
from runbook.parameters import Parameters
from runbook.plan import Plan, fit, with_key
from runbook.references import names
from runbook.session import Session
from runbook.sheet import Sheet
from runbook.statements import closed_schema, spelled, statement
from runbook.words import counted

ROUNDS = 20
VALUE = re.compile(r"'((?:[^']|'')*)'|(NULL)|([^\s,()':]+)")


def decide(session: Session, oid: int, given: Parameters, row: dict[str, Any], table: Table, key: Column, database: str) -> Plan:
    """The plan of a repair: partitions, primary key and foreign keys as they are, and what has to be put back.

    Raises BadInput when the table is not partitioned by this key, or the backup is not there.
    """
    root = session.run("repair.root", oid=oid).fetchone()
    if root is None or root["columns"] != [key.name]:
        how = f"by {root['partition_by']} ({', '.join(root['columns'] or ['an expression'])})" if root else "not at all"
        raise BadInput(
            f"{table.schema_name}.{table.name} is partitioned {how}, and a repair by {key.name} was asked for: name its key, or"
            " leave restore_from out to partition it."
        )
    backup = given.backup or fit(f"{table.name}_backup")
    where = {"backup": (table.schema_name, backup), "key": (key.name,), "table": (table.schema_name, table.name)}
    found = session.value("catalog.resolve", name=f"{table.schema_name}.{backup}")
    columns = catalog.columns_of(session, oid)
    lacking = {each.name for each in columns if not each.generated} - {c.name for c in catalog.columns_of(session, found or 0)}
    if lacking:
        what = f"lacks {', '.join(sorted(lacking))}" if found else "is not there"
        raise BadInput(f"{table.schema_name}.{backup} {what}: name with backup the one that has every column of {table.name}.")
    rows = {each["name"]: each["rows"] for each in session.rows("repair.rows", **where)}
    partitions = tuple(_partition(each, rows) for each in session.rows("repair.partitions", oid=oid))
    version = session.connection.info.server_version // 10000
    indexes = catalog.indexes_of(session, table, key.name, [partition.name for partition in partitions], version)
    primary = next((index.columns for index in indexes if index.primary), None)
    if primary is None:
        raise PlanBlocked(
            f"{table.schema_name}.{table.name} has no primary key, so no row can be found again: ALTER TABLE"
            f" {table.schema_name}.{table.name} ADD PRIMARY KEY (…, {key.name}) first."
        )
    for column in dict.fromkeys((*primary, key.name)):
        _refuse_unlike(session, (table.schema_name, backup, column), (table.schema_name, table.name, column))
    plan = Plan(
        server_version=version, table=table,
        fingerprint=catalog.fingerprint(session, oid), key=key.name, key_type=key.type, key_nullable=not key.not_null,
        partition_by=root["partition_by"], partitions=partitions, columns=columns,
        takes_any_value=any(partition.bound == "DEFAULT" for partition in partitions),
        primary_key=_identity(session, primary, key.name, where), indexes=indexes, checks=(), outgoing=(), referenced_tables=(),
        references=catalog.references_of(session, table, key.name), views=(), view_tables=(), carried=(),
        frequent_value=session.value("repair.frequent", **where),
        null_value=None if given.null_value is None else str(given.null_value), unique=given.unique,
        legacy_inserts=given.legacy_inserts, backup=backup, backup_method="table", restore_from="backup", findings=(),
    )  # fmt: skip
    lost = [_lost(session, plan, name, tuple(columns), database) for name, columns in (given.references or {}).items()]
    known = {(each.schema_name, each.table, each.columns[: len(plan.primary_key)]) for each in plan.references}
    lost = [each for each in lost if (each.schema_name, each.table, each.columns) not in known]
    plan = plan.model_copy(update={"references": (*plan.references, *lost)})
    seen = (*findings.judge(session, plan, row, None), *_findings(session, plan))
    return plan.model_copy(update={"findings": findings.worst_first(seen)})


def _refuse_unlike(session: Session, one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """Raises BadInput where two columns (schema, table, name) are of types that nothing compares."""
    names = {"left_table": one[:2], "left_column": ("l", one[2]), "right_table": other[:2], "right_column": ("r", other[2])}
    try:
        with session.connection.transaction():
            session.run("repair.alike", **names)
    except errors.UndefinedFunction as error:
        raise BadInput(
            f"{'.'.join(one)} cannot be compared with {'.'.join(other)} ({error.diag.message_primary}): ALTER TABLE {spelled(one[:2])} ALTER"
            f" {spelled((one[2],))} TYPE … first."
        ) from None


def _partition(row: dict[str, Any], rows: dict[str, int]) -> Partition:
    values: tuple[str | None, ...] = ()
    if " IN (" in row["bound"]:
        matches = VALUE.finditer(row["bound"].partition(" IN ")[2])
        values = tuple(None if each[2] else each[3] or each[1].replace("''", "'") for each in matches)
    return Partition(name=row["name"], bound=row["bound"], values=values, rows=rows.get(row["name"], 0))


def _identity(session: Session, primary: tuple[str, ...], key: str, where: dict[str, Any]) -> tuple[str, ...]:
    """What names a row in table and backup: the primary key without the partition key, which may have changed since the
    backup, unless that is not unique there."""
    own = tuple(column for column in primary if column != key)
    columns = sql.SQL(", ").join(map(sql.Identifier, own))
    return own if own and session.value("repair.unique", **where, columns=columns) else primary


def _lost(session: Session, plan: Plan, table: str, columns: tuple[str, ...], database: str) -> Reference:
    """The composite key that a table should have, and has lost or never got."""
    oid, schema, name = catalog.find(session, table, database)
    row = session.row("repair.referencing", oid=oid, columns=list(columns))
    own = [column for column in plan.primary_key if column != plan.key]
    if not set(columns) <= set(row["columns"]) or len(columns) != len(plan.primary_key):
        doubled = (
            f" {', '.join(own)} alone does not name one row of {plan.backup} each: it is there twice, or NULL."
            if own and own != [*plan.primary_key]
            else ""
        )
        raise BadInput(
            f"references has {', '.join(columns) or 'no column'} for {schema}.{name}: name the columns of it that stand for"
            f" {', '.join(plan.primary_key)} of {plan.full_name}; it has {', '.join(row['columns'])}.{doubled}"
        )
    role = fit(f"{columns[0].removesuffix(f'_{plan.primary_key[0]}')}_{plan.key}")
    if plan.key in plan.primary_key:  # it has that column already
        role = columns[plan.primary_key.index(plan.key)]
    if role in row["columns"]:
        _refuse_unlike(session, (schema, name, role), (plan.table.schema_name, plan.table.name, plan.key))
    composite = sql.SQL("FOREIGN KEY ({}) REFERENCES {} ({}) ON UPDATE CASCADE ON DELETE NO ACTION").format(
        sql.SQL(", ").join(map(sql.Identifier, dict.fromkeys((*columns, role)))), plan.source,
        sql.SQL(", ").join(map(sql.Identifier, with_key(plan.primary_key, plan.key))),
    )  # fmt: skip
    return Reference(
        name=fit(f"{name}_{'_'.join(columns)}_fkey", row["constraints"] or ()), schema_name=schema, table=name,
        owner=row["owner"], definition="", columns=columns, referenced=plan.primary_key, role_column=role,
        role_type=str(session.value("catalog.base_type", oid=plan.table.oid, key=plan.key)),
        adds_column=role not in row["columns"], not_null=row["not_null"], indexed=row["indexed"],
        composite=composite.as_string(None), comment=None,
    )  # fmt: skip


def _findings(session: Session, plan: Plan) -> Iterator[Finding]:
    run = Run(None, 0, plan)  # type: ignore[arg-type]  # for its names only
    backup = f"{plan.table.schema_name}.{plan.backup}"
    for each in session.rows("repair.partitions", oid=plan.table.oid):
        if each["partitioned"]:
            yield Finding.blocker(
                each["name"], f"{each['name']} is itself partitioned, which a repair does not look into.",
                f"Insert the rows of {backup} that it lacks by hand, or DETACH it first.",
            )  # fmt: skip
    if fires := refill.triggers(session, plan):
        yield Finding.warning(
            plan.full_name, f"{', '.join(fires)} {'fires' if len(fires) == 1 else 'fire'} for each row that is put back: what a trigger writes elsewhere stays,"
            " and one that changes the row stops 03.",
            f"Where that would be wrong, ALTER TABLE {spelled((plan.table.schema_name, plan.table.name))} DISABLE TRIGGER … while 03 runs.",
        )  # fmt: skip
    if doubled := refill.twice(session, run):
        yield Finding.blocker(plan.full_name, doubled, f"Delete those that are wrong; {backup} may tell which.")
    missing = session.value("repair.missing", **run.names)
    yield Finding.note(
        plan.full_name, f"{counted(missing, 'row')} of {backup} {'is' if missing == 1 else 'are'} missing in {plan.full_name}."
    )
    homeless = session.rows("repair.homeless", **run.names, partition_of=partition_of(session, plan.source))
    left = [each for each in homeless if each["value"] is not None or plan.null_value is None]
    if left and not plan.takes_any_value:
        listed = ", ".join(f"{'NULL' if each['value'] is None else repr(each['value'])} ({each['rows']:,})" for each in left)
        said = f"{backup} has rows whose {plan.key} fits no partition: {listed}."
        yield Finding.blocker(backup, said, f"Attach a partition of {plan.full_name} for them, or for NULL set null_value.")
    for reference in lost(run):
        own, name = names(run, reference), f"{reference.schema_name}.{reference.table}"
        if session.value("foreign_keys.partitioned", **own):
            said = f"{name}, which is to get a foreign key to {plan.full_name}, is itself partitioned, which a repair cannot do."
            yield Finding.blocker(name, said, "Leave it out of references, and add its column and key by hand.")
        seen = session.row("repair.dangling", **own)
        if seen["rows"]:
            who = f"{', '.join(seen['keys'])}{' and others' if seen['more'] else ''}"
            said = f"{counted(seen['rows'], 'row')} of {name} {'refers' if seen['rows'] == 1 else 'refer'} to rows that neither {plan.full_name} nor {backup} has: {who}."
            yield Finding.blocker(name, said, "Correct or delete them first.")
        for other in session.rows("repair.other_keys", **own, same=list(reference.columns)):
            yield Finding.warning(
                name, f"{other['name']} of {name} refers to {other['referenced']} by the same columns: a row that this lacks is refused still.",
                f"ALTER TABLE {spelled(reference.identifier)} DROP CONSTRAINT {spelled((other['name'],))}; if {plan.full_name} took its place.",
            )  # fmt: skip


def lost(run: Run) -> list[Reference]:
    """The references whose foreign key was gone when the repair was planned."""
    return [reference for reference in run.plan.references if not reference.definition]


def nothing_to(action: Action, do: str) -> Evidence:
    """An action of a migration that a repair has no use for."""
    return action.finish(f"There is nothing to {do}: a repair writes the table itself.")


def statements_of(run: Run, reference: Reference) -> Iterator[sql.Composed]:
    """The column where it is missing, help for writers that do not know it, and the composite key, NOT VALID at first."""
    own = names(run, reference)
    if reference.adds_column:
        yield statement("foreign_keys.add_column", **own)
        if not reference.not_null:
            yield statement("foreign_keys.require_role", **own)
        if run.plan.legacy_inserts == "fill":
            yield from closed_schema(run.staging, there=True)
            yield statement("foreign_keys.create_filled", **own)
            yield statement("foreign_keys.create_fill", **own)
            yield statement("foreign_keys.drop_default", **own)
    yield statement("foreign_keys.add_key", **own)


def preview_keys(run: Run) -> Sheet:
    """What makes the lost keys anew."""
    return Sheet([each for reference in lost(run) for each in (*statements_of(run, reference), *_validations(run, reference))])


def _validations(run: Run, reference: Reference) -> Iterator[sql.Composed]:
    own = names(run, reference)
    if reference.adds_column and not reference.not_null:
        yield statement("ddl.validate", table=own["reference"], constraint=own["check_name"])
    yield statement("ddl.validate", table=own["reference"], constraint=own["constraint"])


def add_columns(action: Action, lock_timeout_ms: int, budget_s: float) -> Evidence:
    """Column and key in one short transaction a table: from its commit on, no new row can refer to nobody."""
    run, session = action.run, action.session
    for reference in lost(run):
        if session.value("repair.key_exists", **names(run, reference), key_name=reference.name):
            continue
        patience = locks.Patience(budget_s, lock_timeout_ms)
        both = [run.plan.source, reference.identifier]
        locks.apply(run.database, session, patience, reference.table, list(statements_of(run, reference)), both)
    return action.finish(
        f"{counted(len(lost(run)), 'lost foreign key')} of {run.plan.full_name} {'is' if len(lost(run)) == 1 else 'are'} there again, not validated yet."
    )


def fill(action: Action, batch_rows: int) -> Evidence:
    """Give every referencing row its user's role, range by range, then validate the keys: readers and writers go on.

    Raises PromiseBroken when rows refer to nobody, or stay held by others.
    """
    run, session, total = action.run, action.session, 0
    for reference in lost(run):
        own, rounds = names(run, reference), 0
        while wrong := session.value("repair.wrong", **own):
            time.sleep(0.1 * rounds)
            rounds += 1
            if rounds == 2 and (doubled := refill.twice(session, run)):
                raise PromiseBroken(f"{doubled} Delete those that are wrong, then run 04_foreign_keys again.")
            if rounds > ROUNDS:
                refill.refuse_stuck(run, session, reference, own, wrong)
            total += refill.fill_round(
                session, reference, own, wrong, max(1, batch_rows // 50 // rounds)
            )  # what moves stops fewer
        try:
            for each in _validations(run, reference):
                with session.transaction(lock_timeout="5s"):
                    session.run(each)
        except errors.ForeignKeyViolation:
            raise PromiseBroken(
                f"{reference.schema_name}.{reference.table} has rows that refer to none of {run.plan.full_name}: correct or"
                " delete them, then run 04_foreign_keys again."
            ) from None
    sentence = f"{counted(total, 'row')} of referencing tables {'was' if total == 1 else 'were'} given their {run.plan.key}; {counted(len(lost(run)), 'lost key is', 'lost keys are')} valid."
    return action.finish(sentence, total)


def check_keys(action: Action) -> Evidence:
    """Raises PromiseBroken unless every foreign key that points at the table is there and valid."""
    run = action.run
    rows = action.session.rows("cutover.validated", table_text=spelled(run.plan.source))
    valid = {(row["schema"], row["name"], row["key"]) for row in rows if row["validated"]}
    if bad := [reference.name for reference in run.plan.references if reference.place not in valid]:
        raise PromiseBroken(f"The foreign keys {', '.join(bad)} are missing or not valid: run 04_foreign_keys again.")
    return action.finish(
        f"{counted(len(run.plan.references), 'foreign key points', 'foreign keys point')} at {run.plan.full_name}, and {'is' if len(run.plan.references) == 1 else 'all are'} valid."
    )


def take_away(run: Run) -> Iterator[sql.Composed]:
    """The keys, columns and triggers that the repair made; the rows that it put back stay."""
    with run.database.session("repair") as session:  # where its key is, its column is of the same transaction
        made = [each for each in lost(run) if session.value("repair.key_exists", **names(run, each), key_name=each.name)]
    for reference in made:
        own = names(run, reference)
        yield statement("ddl.drop_constraint", table=own["reference"], constraint=own["constraint"])
        if reference.adds_column:
            yield statement("foreign_keys.drop_fill", **own)
            yield statement("ddl.drop_constraint", table=own["reference"], constraint=own["check_name"])
            yield statement("foreign_keys.drop_column", **own)
    yield statement("ddl.drop_schema", schema=run.names["staging"])
