"""The catalog as facts: what a table is, what hangs on it, what it is allowed to become."""

from __future__ import annotations

import difflib
import hashlib
import re
from functools import cache
from typing import Any

from psycopg import sql

from runbook.errors import BadInput
from runbook.facts import Carried, Column, Guard, Index, Named, Reference, Table
from runbook.plan import fit, with_key
from runbook.session import Session
from runbook.statements import spelled, statement, trusted

Row = dict[str, Any]


def find(session: Session, table: str, database: str) -> tuple[int, str, str]:
    """(oid, schema, name) of the table that a parameter names; raises BadInput with the names that come near, or with the schemas
    where several are meant."""
    meant = session.rows("catalog.resolve", name=table)
    if not meant:
        known = [row["name"] for row in session.rows("catalog.tables")]
        names = {name.casefold(): name for each in known for name in (each, each.partition(".")[2])}
        near = [names[each] for each in difflib.get_close_matches(table.casefold(), names, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(known)[:12]) or 'no tables at all'}."
        raise BadInput(f"{table} is not a table of {database}: {hint}")
    equally = [each for each in meant if each["preference"] == meant[0]["preference"]]
    if len(equally) > 1 and not meant[0]["visible"]:
        schemas = ", ".join(each["schema"] for each in equally)
        raise BadInput(f"{table} is a table in several schemas ({schemas}): say which, as {meant[0]['schema']}.{table}.")
    found = meant[0]["oid"]
    row = session.row("catalog.table", oid=found)
    if row["schema"] in ("pg_catalog", "information_schema"):
        raise BadInput(f"{row['schema']}.{row['name']} is the server's own: name a table of yours.")
    return found, row["schema"], row["name"]


def table_of(row: Row) -> Table:
    return Table(
        oid=row["oid"], schema_name=row["schema"], name=row["name"], owner=row["owner"], rows=max(row["estimated_rows"], 0),
        table_bytes=row["table_bytes"], index_bytes=row["index_bytes"], tablespace=row["tablespace"], options=tuple(row["options"]),
        replica_identity=row["replica_identity"], comment=row["comment"], strangers=tuple(row["strangers"]),
    )  # fmt: skip


def columns_of(session: Session, oid: int) -> tuple[Column, ...]:
    return tuple(Column.model_validate(row) for row in session.rows("catalog.columns", oid=oid))


def indexes_of(session: Session, table: Table, key: str, leaves: list[str], version: int) -> tuple[Index, ...]:
    """The valid indexes, each with the names that it will have on every partition and on the retired table."""
    taken = {row["name"] for row in session.rows("catalog.relations", schema=table.schema_name)}
    found = []
    for row in session.rows("catalog.indexes", oid=table.oid):
        if not row["valid"]:
            continue
        stem = row["name"].removeprefix(table.name)
        names = {}
        for leaf in leaves:
            names[leaf] = fit(f"{leaf}{stem if stem != row['name'] else '_' + stem}", taken)
            taken.add(names[leaf])
        retired = fit(f"{row['name']}_retired", taken)
        taken.add(retired)
        columns = tuple(row["columns"] or ())
        if row["constraint_type"] == "x":
            everywhere = version >= 17 and within_key(row["constraint_definition"], key)
        else:
            everywhere = row["primary"] or not row["unique"] or (key in columns and not row["has_expression"])
        placed = {"columns": columns, "everywhere": everywhere, "retired_name": retired, "leaf_names": names}
        found.append(Index.model_validate({**row, **placed}))
    return tuple(found)


def guards_of(session: Session, oid: int, key: str) -> tuple[Guard, ...]:
    """A guard for every unique key that lacks the partition key, the old primary key too."""
    rows = session.rows("catalog.guards", oid=oid, key=key)
    return tuple(Guard.model_validate({**row, "table": fit(f"{row['index']}_values")}) for row in rows)


def guard_schema(session: Session, table: Table) -> str:
    """A free name for the schema of the guards."""
    stem = table.name if table.schema_name == "public" else f"{table.schema_name}_{table.name}"
    return fit(f"{stem}_unique", {row["name"] for row in session.rows("catalog.schemas")})


def within_key(exclusion: str, key: str) -> bool:
    """Whether an exclusion constraint only ever excludes rows of the same partition."""
    return bool(re.search(rf'[ (]"?{re.escape(key)}"? WITH =[,)]', exclusion))


def fingerprint(session: Session, oid: int) -> str:
    """A digest of all that a plan rests on, what is carried over included; run with qualified names. Prepared: it is asked for
    again under locks, and most of its time is its planning."""
    name = (f"runbook_definition_{oid}",)
    if not session.value("catalog.prepared", name=name[0]):
        session.run("catalog.prepare_definition", name=name, lines=_lines(sql.Literal(oid)))
    return f"{reading()} {session.value('catalog.definition', name=name)}"


@cache
def reading() -> str:
    """Of what a fingerprint is one: with another version of the runbook it may be of other things."""
    return hashlib.sha256(_lines(sql.Literal(0)).as_string(None).encode()).hexdigest()[:8]


def comparable(plan_fingerprint: str) -> bool:
    """Whether this version of the runbook can tell by it that a table was altered."""
    return plan_fingerprint.startswith(f"{reading()} ")


def lines(session: Session, table: sql.Composable) -> dict[str, str]:
    """Of what a table is, by what it is about, a digest each, of which its fingerprint is one of all: what became another is seen,
    and nothing of it is kept."""
    oid, found = sql.SQL("{}::regclass").format(sql.Literal(table.as_string(None))), dict[str, str]()
    with session.qualified():
        for row in session.rows(_lines(oid)):
            found[row["what"]] = "\n".join(sorted([*found.get(row["what"], "").splitlines(), row["line"]]))
    return {what: hashlib.sha256(line.encode()).hexdigest()[:16] for what, line in found.items()}


def _lines(oid: sql.Composable) -> sql.Composed:
    return statement("catalog.lines", oid=oid, carried=statement("catalog.carried", oid=oid))


def checks_of(session: Session, oid: int) -> tuple[Named, ...]:
    return tuple(Named.model_validate(row) for row in session.rows("catalog.checks", oid=oid))


def carried_of(session: Session, table: Table, indexes: tuple[Index, ...]) -> tuple[Carried, ...]:
    """What hangs on the table, each with the statements that carry it over."""
    found = [Carried.model_validate(row) for row in session.rows("catalog.carried", oid=table.oid)]
    root = spelled((table.schema_name, table.name))
    if kind := {"f": "FULL", "n": "NOTHING"}.get(table.replica_identity):
        text = f"ALTER TABLE {{}} REPLICA IDENTITY {kind}"
        found.append(Carried(kind="replica identity", name=kind, definition=text.format(root), leaf=text.format("\1")))
    for index in indexes:
        own = {spelled((table.schema_name, leaf)): name for leaf, name in index.leaf_names.items()}
        everywhere = {root: index.name, **own} if index.everywhere else own
        for number, target in (index.statistics or {}).items():
            each = [
                f"ALTER INDEX {spelled((table.schema_name, name))} ALTER COLUMN {number} SET STATISTICS {target}"
                for name in everywhere.values()
            ]
            found.append(Carried(kind="index statistics", name=f"{index.name} {number}", definition="; ".join(each)))
        if index.clustered:  # a root cannot be
            each = [f"ALTER TABLE {leaf} CLUSTER ON {spelled((name,))}" for leaf, name in own.items()]
            found.append(Carried(kind="cluster on", name=index.name, definition="; ".join(each)))
        if index.replica_identity:
            each = [f"ALTER TABLE ONLY {of} REPLICA IDENTITY USING INDEX {spelled((name,))}" for of, name in everywhere.items()]
            found.append(Carried(kind="replica identity using index", name=index.name, definition="; ".join(each)))
    return tuple(found)


ACTIONS = {"a": "NO ACTION", "r": "RESTRICT", "c": "CASCADE", "n": "SET NULL", "d": "SET DEFAULT"}


def references_of(session: Session, table: Table, key: str) -> tuple[Reference, ...]:
    """The foreign keys that point at the table, each with its composite successor.

    The role column is named after the key column: user_id → user_role; a name that is taken gets a digest.
    """
    found = []
    base = str(session.value("catalog.base_type", oid=table.oid, key=key))
    added: dict[int, dict[tuple[str, ...], str]] = {}
    for row in session.rows("catalog.incoming", oid=table.oid):
        columns, referenced = tuple(row["columns"]), tuple(row["referenced"])
        names = added.setdefault(row["oid"], {})
        if key in referenced:
            role = columns[referenced.index(key)]
        else:
            first, target = columns[0], referenced[0]
            stem = first.removesuffix(f"_{target}") if first.endswith(f"_{target}") else first
            role = names.setdefault(columns, fit(f"{stem}_{key}", {*row["all_columns"], *names.values()}))
        found.append(
            Reference(
                name=row["name"], schema_name=row["schema"], table=row["table"], owner=row["owner"], definition=row["definition"],
                columns=columns, referenced=referenced, role_column=role, role_type=base, adds_column=key not in referenced, not_null=row["not_null"],
                indexed=row["indexed"], composite=_composite(row, table, key, role, session.connection.info.server_version >= 150000), comment=row["comment"],
                leaves=tuple((schema, name) for schema, name in row["leaves"] or []), operators=tuple(row["operators"]),
            )
        )  # fmt: skip
    return tuple(found)


def _composite(row: Row, table: Table, key: str, role: str, names_columns: bool) -> str:
    """The definition of the composite key: itself where it has the partition key already; else the old one's actions and
    timing, and ON UPDATE CASCADE, which carries a changed partition key along. SET NULL names its columns from 15 on; on 14 it
    empties the role column too, which means nothing without the others."""
    referenced = tuple(row["referenced"])
    if key in referenced:
        return str(row["definition"]).removesuffix(" NOT VALID")
    on_delete = ACTIONS[row["on_delete"]] + (
        " ({})" if row["on_delete"] == "d" or (row["on_delete"] == "n" and names_columns) else ""
    )
    text = sql.SQL("FOREIGN KEY ({}) REFERENCES {} ({}){} ON UPDATE CASCADE ON DELETE {}{}").format(
        sql.SQL(", ").join(map(sql.Identifier, (*row["columns"], role))),
        sql.Identifier(table.schema_name, table.name),
        sql.SQL(", ").join(map(sql.Identifier, with_key(referenced, key))),
        # Of a single column, and where nothing may be NULL, both match alike; the role column may be set where the key is NULL.
        sql.SQL(" MATCH FULL" if row["match"] == "f" and row["not_null"] else ""),
        trusted(on_delete).format(sql.SQL(", ").join(map(sql.Identifier, row["delete_columns"] or row["columns"]))),
        trusted((" DEFERRABLE" if row["deferrable"] else "") + (" INITIALLY DEFERRED" if row["deferred"] else "")),
    )
    return text.as_string(None)
