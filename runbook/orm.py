"""The table, and those around it, as they were and as they must be; and as SQLAlchemy's models, by sqlacodegen."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from inspect import getsource
from types import SimpleNamespace
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    DefaultClause,
    ForeignKeyConstraint,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    TextClause,
    UniqueConstraint,
    inspect,
    text,
)
from sqlalchemy.dialects.postgresql import DOMAIN
from sqlalchemy.exc import SAWarning
from sqlalchemy.types import NullType, UserDefinedType

from runbook import drift, imports
from runbook.ledger import Run
from runbook.plan import fit, with_key
from runbook.references import added, names
from runbook.statements import spelled


class PostgresType(UserDefinedType[Any]):
    """A type of PostgreSQL's that SQLAlchemy does not know."""

    cache_ok = True

    def __init__(self, spelt: str) -> None:
        self.spelt = spelt

    def get_col_spec(self, **_: Any) -> str:
        return self.spelt


def tables(run: Run, *, new: bool) -> MetaData:
    """The table, those that reference it and those that these reference: as they were, or in the final, strict state.

    Read from the live catalogue; only what the other side of the cut-over differs in comes from the plan. Partitions, and
    the keys to them that the server keeps for itself, are left out: nobody writes to them by name.
    """
    plan, metadata = run.plan, MetaData()
    live = run.partitioned
    leaves = {(row["schema"], row["name"]) for row in run.frame("application.leaves").to_dict("records")}
    source = (plan.table.schema_name, plan.table.name)
    needed = {(source, column.name) for column in plan.columns}
    for reference in plan.references:
        needed |= {((reference.schema_name, reference.table), column) for column in reference.columns}
        if live:
            needed.add(((reference.schema_name, reference.table), reference.role_column))
    with run.database.session("application") as session:
        drift.require(session, plan, sorted(needed))
    with warnings.catch_warnings(), run.database.engine.connect() as connection:
        warnings.simplefilter("ignore", SAWarning)  # of types that it does not know, and of expressions
        inspector = inspect(connection)
        roles: dict[tuple[str, str], list[str]] = {(plan.table.schema_name, plan.table.name): []}
        for reference in (*plan.references, *plan.selves):
            roles.setdefault((reference.schema_name, reference.table), [])
        for reference in (*added(run), *plan.own_roles):
            roles[reference.schema_name, reference.table].append(reference.role_column)
        own = {where: Table(where[1], metadata, schema=_schema(where[0], inspector)) for where in roles}
        for where, table in own.items():
            inspector.reflect_table(table, None, exclude_columns=() if new and live else roles[where])
        default = inspector.default_schema_name
        for table in list(metadata.tables.values()):
            if (table.schema or default, table.name) in leaves:
                metadata.remove(table)
        for table in metadata.tables.values():
            unknown = [column for column in table.columns if isinstance(column.type, NullType)]
            place = {"schema": table.schema or default, "table": table.name}
            spelt = run.frame("application.types", **place).set_index("name")["type"].to_dict() if unknown else dict[str, str]()
            for column in unknown:
                column.type = PostgresType(spelt[column.name])
            for key in [key for key in table.foreign_key_constraints if key.referred_table not in metadata.tables.values()]:
                _drop_key(table, key)
    _as_written(run, {(table.schema or default, table.name): table for table in metadata.tables.values()})
    if new != live:
        _reshape(run, own, new)
    for reference in (*added(run), *plan.own_roles):
        table = own[reference.schema_name, reference.table]
        name = fit(f"{reference.table}_{reference.role_column}_present")
        for check in [each for each in named(table) if each.name == name and not (new and live)]:
            table.constraints.discard(check)
        if new and not live and not reference.not_null:
            said = names(run, reference)["required"].as_string(None)
            table.append_constraint(CheckConstraint(text(re.sub(r'"([a-z_][a-z0-9_]*)"', r"\1", said)), name=name))
    if new:
        for reference in (*added(run), *plan.own_roles):
            column = own[reference.schema_name, reference.table].c[reference.role_column]
            if plan.frequent_value is not None:
                said = f"{spelled(plan.frequent_value)}::{re.sub('[(].*?[)]', '', plan.key_type)}"
                column.server_default = DefaultClause(text(said))
    return metadata


def _schema(name: str, inspector: Any) -> str | None:
    return None if name == inspector.default_schema_name else name


def _drop_key(table: Table, key: ForeignKeyConstraint) -> None:
    table.constraints.discard(key)
    for element in key.elements:
        table.foreign_keys.discard(element)
        element.parent.foreign_keys.discard(element)


def _as_written(run: Run, places: dict[tuple[str | None, str], Table]) -> None:
    """Indexes of more than columns get their keys as the server says them: of an expression, an order, a collation or an operator
    class reflection or sqlacodegen loses something."""
    for row in run.frame("application.indexes", tables=[name for _, name in places]).to_dict("records"):
        if (place := (row["schema"], row["table"])) not in places:
            continue
        table = places[place]
        for index in [each for each in table.indexes if each.name == row["name"]]:
            table.indexes.discard(index)
            if all(column in table.c for column in row["columns"]):  # else it is on a role column, in the old schema
                _index(table, row["name"], index.unique, row["definition"], list(index.columns), dict(index.dialect_kwargs))


def _index(table: Table, name: str, unique: bool, definition: str, columns: list[Column[Any]], options: dict[str, Any]) -> None:
    """Adds an index, of what stands between the parentheses of its definition where these are not merely columns, or where
    sqlacodegen would take it for `index=True` by its name."""
    keys = r"(?:^| USING )\w+ \((.*?)\)(?= INCLUDE \(| NULLS NOT | WITH \(| TABLESPACE | WHERE |$)"
    written = re.findall(keys, definition, re.DOTALL)[0]
    given = {option: said for option, said in options.items() if said and option != "postgresql_ops"}
    plain = written.replace('"', "") == ", ".join(column.name for column in columns) and not (given and name.startswith("ix_"))
    escaped = text(re.sub(r"(?<![:\w\\]):(?=\w)", r"\:", written))
    table.append_constraint(Index(name, *(columns if plain else [escaped]), unique=unique, **given))


def _reshape(run: Run, own: dict[tuple[str, str], Table], new: bool) -> None:
    """What partitioning changes, done or undone: keys, the partition key's NOT NULL, the role columns."""
    plan = run.plan
    source = own[plan.table.schema_name, plan.table.name]
    key = source.c[plan.key]
    if plan.primary_key:
        name = next((index.name for index in plan.indexes if index.primary), None)
        for column in source.c:
            column.primary_key = False
        unique = new and plan.takes_null
        for old in [each for each in source.constraints if each.name == name and isinstance(each, UniqueConstraint)]:
            source.constraints.discard(old)
        primary = [source.c[column] for column in (plan.new_primary_key if new else plan.primary_key)]
        source.append_constraint(PrimaryKeyConstraint(*([] if unique else primary), name=None if unique else name))
        if unique:
            source.append_constraint(UniqueConstraint(*primary, name=name))
    key.nullable = plan.takes_null if new else plan.key_nullable
    for index in plan.indexes:
        if index.unique and not index.everywhere:
            columns = [source.c[column] for column in index.columns]
            for there in [each for each in named(source) if each.name == index.name]:
                (source.indexes if isinstance(there, Index) else source.constraints).discard(there)
            if not new and index.constraint_type == "u":
                source.append_constraint(UniqueConstraint(*columns, name=index.name))
            elif not new:
                where = re.search(r" WHERE (\(.*\))$", index.tail)
                options = {
                    "postgresql_where": where and where[1],
                    "postgresql_include": re.findall(r"[^\s\",()]+", index.include)[1:],
                    "postgresql_nulls_not_distinct": " NULLS NOT DISTINCT" in index.tail,
                }
                _index(source, index.name, True, index.tail, columns, options)
    for reference in (*plan.references, *plan.selves):
        table = own[reference.schema_name, reference.table]
        for there in [each for each in table.foreign_key_constraints if each.name == reference.name]:
            _drop_key(table, there)
        columns_, referenced = reference.columns, reference.referenced
        if new and reference.adds_column:
            if reference.role_column not in table.c:
                table.append_column(Column(reference.role_column, key.type, nullable=not reference.not_null))
            columns_, referenced = (*columns_, reference.role_column), with_key(referenced, plan.key)
        table.append_constraint(_key(reference.name, columns_, [source.c[column] for column in referenced],
                                     reference.composite if new else reference.definition))  # fmt: skip


def _key(name: str, columns: Iterable[str], referenced: list[Column[Any]], definition: str) -> ForeignKeyConstraint:
    action = r"(CASCADE|RESTRICT|NO ACTION|SET (?:NULL|DEFAULT)(?: \([^)]*\))?)"
    found = {when: re.search(f" ON {when.upper()} {action}", definition) for when in ("delete", "update")}
    said = {f"on{when}": match[1] for when, match in found.items() if match and match[1] != "NO ACTION"}
    deferred = {"deferrable": True, "initially": "DEFERRED" if " INITIALLY DEFERRED" in definition else None}
    return ForeignKeyConstraint(list(columns), referenced, name=name, **said, **(deferred if " DEFERRABLE" in definition else {}))  # type: ignore[arg-type]


def sqlalchemy(run: Run, metadata: MetaData) -> str:
    """Typed declarative models, by sqlacodegen; a relationship keeps its name when its key becomes a composite one."""
    generators = imports.sqlacodegen()
    known = {(each.table, each.name): each.columns for each in (*run.plan.references, *run.plan.selves)}

    class Models(generators.DeclarativeGenerator):  # type: ignore[name-defined, misc]
        """With names by the columns that a key had: for (user_id) sqlacodegen says `user`, for (user_id, user_role) `users`."""

        def generate_relationship_name(self, relationship: Any, global_names: set[str], local_names: set[str]) -> None:
            key = relationship.constraint
            if key is not None and (columns := known.get((key.table.name, key.name))):
                relationship.constraint = SimpleNamespace(table=key.table, columns=[key.table.c[name] for name in columns])
            super().generate_relationship_name(relationship, global_names, local_names)
            relationship.constraint = key

        def generate_relationships(self, source: Any, *others: Any) -> Any:
            """One to one by the columns that a key had: the composite one has more than the unique key over them."""
            unique = [set(key.columns.keys()) for key in source.table.constraints
                      if isinstance(key, (PrimaryKeyConstraint, UniqueConstraint))]  # fmt: skip
            super().generate_relationships(source, *others)
            for each in source.relationships:
                key = each.constraint
                columns = known.get((key.table.name, key.name)) if key is not None and key.table is source.table else None
                if columns and set(columns) in unique:
                    each.type = each.backref.type = generators.RelationshipType.ONE_TO_ONE

        def render_relationship_arguments(self, relationship: Any) -> dict[str, Any]:
            """A join of several columns as one function: `and_` of several functions would call them while the classes are being made."""
            said = dict(super().render_relationship_arguments(relationship))
            for join in ("primaryjoin", "secondaryjoin"):
                if said.get(join, "").startswith("and_("):
                    said[join] = "lambda: " + said[join].replace("lambda: ", "")
                    self.add_literal_import("sqlalchemy", "and_")
            return said

        def collect_imports_for_constraint(self, constraint: Any) -> None:
            super().collect_imports_for_constraint(constraint)
            if isinstance(constraint, Index) and not constraint.columns:
                self.add_literal_import("sqlalchemy", "text")

        def render_index(self, index: Index) -> str:
            keys = [repr(each.text) for each in index.expressions if isinstance(each, TextClause)]
            name = repr(index.name)
            return str(super().render_index(index)).replace(name, ", ".join([name, *(f"text({each})" for each in keys)]), 1)

        def add_import(self, obj: Any) -> None:
            if isinstance(obj, PostgresType):
                self.add_literal_import("sqlalchemy.types", "UserDefinedType")
                self.add_literal_import("typing", "Any")
            else:
                super().add_import(obj)

        def fix_column_types(self, table: Table) -> None:
            for column in table.columns:
                if isinstance(column.type, DOMAIN):  # which it names without importing what it is made of
                    column.type = column.type.data_type
                    if isinstance(column.type, String) and column.type.collation == "default":
                        column.type.collation = None
            super().fix_column_types(table)

        def render_column_type(self, column: Column[Any]) -> str:
            return (
                f"PostgresType({column.type.spelt!r})"
                if isinstance(column.type, PostgresType)
                else str(super().render_column_type(column))
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # of tables that refer to each other
        # A primary key that is a foreign key, too, makes no subclass: sqlacodegen would guess so of the key as it was, not of the composite one.
        models = str(Models(metadata, run.database.engine, ["nojoined"]).generate())
    if "UserDefinedType" in models:
        models = models.replace("class Base(", f"{getsource(PostgresType)}\n\nclass Base(", 1)
    for module in ("datetime", "decimal", "uuid"):  # a column can be called as the module whose type it has
        if re.search(rf"^    {module}: Mapped\[", models, re.MULTILINE):
            models = re.sub(rf"^import {module}$", f"import {module} as {module}_", models, flags=re.MULTILINE)
            models = re.sub(rf"(?<=[\[ ]){module}(?=\.[A-Za-z]+[\],])", f"{module}_", models)
    if re.search(r"^    list: Mapped\[", models, re.MULTILINE):
        models = "import builtins\n" + re.sub(r"(?<=\[)list(?=\[)", "builtins.list", models)
    return models


def named(table: Table) -> list[Any]:
    return [*table.constraints, *table.indexes]
