"""What became of the table since it was planned."""

from __future__ import annotations

from collections.abc import Callable, Collection

from runbook import catalog
from runbook.errors import BadInput, OutOfOrder, PlanOutdated
from runbook.plan import Plan
from runbook.session import Session
from runbook.statements import spelled


def find(session: Session, table: str, database: str) -> tuple[int, str, str]:
    """As `catalog.find`; raises OutOfOrder for a table that was renamed while its migration is open, by whichever name it is asked for."""
    kept = session.value("ledger.exists")
    try:
        found = oid, schema, name = catalog.find(session, table, database)
        known = kept and session.value("ledger.open_by_oid", oid=oid, source=f"{schema}.{name}")
    except BadInput:
        found, known = None, kept and session.value("ledger.open_by_name", table=table)
        if not known:
            raise
    if known or found is None:
        raise OutOfOrder(f"{known}, whose migration is open, is there no more, or by another name: rename it back.")
    return found


def refuse(session: Session, plan: Plan, then: Callable[[], dict[str, str]]) -> None:
    """Raises PlanOutdated, with what was changed, when the table is not what was planned; `then` is what `catalog.lines` said of it."""
    if not catalog.comparable(plan.fingerprint):
        raise PlanOutdated(
            f"The plan {plan.hash[:12]} of {plan.full_name} was made by another version of the runbook: go on with that one, or roll back"
            " with 90_rollback, then plan again with 00_plan."
        )
    if catalog.fingerprint(session, plan.table.oid) != plan.fingerprint:
        raise PlanOutdated(
            f"{plan.full_name} was altered since the plan {plan.hash[:12]} was made ({since(session, plan, then())}): take that back and go on, or"
            " roll back with 90_rollback, then plan again with 00_plan."
        )
    values = [value for each in plan.partitions for value in each.values if value is not None]
    if gone := [row["value"] for row in session.rows("catalog.labels_gone", values=values, type=plan.key_type)]:
        raise PlanOutdated(
            f"{plan.key_type} has no {', '.join(map(repr, gone))} any more, by which {plan.full_name} was planned: give the value its name back"
            " (ALTER TYPE … RENAME VALUE) and go on, or roll back with 90_rollback, then plan again with 00_plan."
        )


def told(session: Session, plan: Plan) -> str:
    """After the way back: whether the table is another than it was planned as."""
    if not catalog.comparable(plan.fingerprint):
        return " Whether others altered it since cannot be told: the plan was made by another version of the runbook."
    if another_server(session, plan):
        return f" Whether others altered it since cannot be told: it was planned on PostgreSQL {plan.server_version}."
    with session.qualified():
        now = catalog.fingerprint(session, session.value("verify.oid", root=spelled(plan.source)))
    return "" if now == plan.fingerprint else " It was altered by others since the plan was made; those changes stay."


def another_server(session: Session, plan: Plan) -> bool:
    """Whether the database was moved to another major version, whose catalog says the same in other words."""
    return session.connection.info.server_version // 10000 != plan.server_version


def _described(kind: str, not_null: bool, default: str | None) -> str:
    return f"{kind}{' NOT NULL' if not_null else ''}{f' DEFAULT {default}' if default is not None else ''}"


def since(session: Session, plan: Plan, then: dict[str, str]) -> str:
    """What was changed of the table since the plan, in words; `then` is what `catalog.lines` said of it."""
    found = session.rows("catalog.columns", oid=plan.table.oid)
    if not found:
        another = session.value("catalog.there", name=spelled((plan.table.schema_name, plan.table.name)))
        return "it is another table now, made or restored since" if another else "the table is gone"
    before = {column.name: (column.type, column.not_null, column.default) for column in plan.columns}
    now = {row["name"]: (row["type"], row["not_null"], row["default"]) for row in found}
    changes = [f"column {name} added" for name in now.keys() - before.keys()]
    changes += [f"column {name} dropped" for name in before.keys() - now.keys()]
    changes += [
        f"column {name} was {_described(*before[name])}, is {_described(*now[name])}"
        for name in before.keys() & now.keys()
        if before[name] != now[name]
    ]
    indexes = {row["name"] for row in session.rows("catalog.indexes", oid=plan.table.oid)}
    changes += [f"index {name} added" for name in indexes - {index.name for index in plan.indexes}]
    changes += [f"index {name} dropped" for name in {index.name for index in plan.indexes} - indexes]
    incoming = session.rows("catalog.incoming", oid=plan.table.oid)
    keys = {(row["schema"], row["table"], row["name"]) for row in incoming}
    planned = {reference.place for reference in (*plan.references, *plan.selves)}
    changes += [f"{schema}.{table} references it now by {name}" for schema, table, name in keys - planned]
    changes += [f"the foreign key {name} of {schema}.{table} is gone" for schema, table, name in planned - keys]
    whole = {reference.place for reference in plan.references if not reference.leaves}
    changes += [f"{row['schema']}.{row['table']}, which references it, is partitioned now" for row in incoming
                if row["leaves"] and (row["schema"], row["table"], row["name"]) in whole]  # fmt: skip
    if not changes:
        now_is = catalog.lines(session, plan.source)
        changes = [what for what in then.keys() | now_is.keys() if then.get(what) != now_is.get(what)]
    return "; ".join(sorted(changes)) or "what hangs on it"


def require(session: Session, plan: Plan, columns: Collection[tuple[tuple[str, str], str]]) -> None:
    """Raises OutOfOrder, naming them, when some of these columns (schema and table, name) are there no more."""
    tables = [table for table, _ in columns]
    wanted = {"schemas": [schema for schema, _ in tables], "tables": [name for _, name in tables]}
    gone = [row["what"] for row in session.rows("catalog.gone", **wanted, columns=[name for _, name in columns])]
    if gone:
        raise OutOfOrder(
            f"{plan.full_name} is not what it was planned to be: {', '.join(gone)} {'was' if len(gone) == 1 else 'were'} dropped or renamed"
            " since. This goes by the plan; 08_monitor goes on without."
        )
