"""Tables as Drizzle (drizzle-orm/pg-core) declares them.

By hand: drizzle-kit pull needs Node, reads only what is there already, writes a table for each partition and leaves the
composite primary key of a partitioned table out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    DefaultClause,
    ForeignKeyConstraint,
    Identity,
    Index,
    MetaData,
    Table,
    TextClause,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import ARRAY, DOMAIN, ENUM
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import SAWarning

from runbook.orm import named

# The server's type: Drizzle's builder, and its options with the groups of the pattern.
BUILDERS = {
    r"(VARCHAR|CHAR)\((\d+)\)": "{0}|length: {1}",
    r"NUMERIC\((\d+), (-?\d+)\)": "numeric|precision: {0}, scale: {1}",
    r"(TIMESTAMP|TIME)\((\d+)\) WITH TIME ZONE": "{0}|withTimezone: true, precision: {1}",
    r"(TIMESTAMP|TIME)\((\d+)\) WITHOUT TIME ZONE": "{0}|precision: {1}",
    r"(TIMESTAMP|TIME) WITH TIME ZONE": "{0}|withTimezone: true",
    r"(TIMESTAMP|TIME) WITHOUT TIME ZONE": "{0}",
    r"BIGINT": "bigint|mode: 'bigint'",
    r"DOUBLE PRECISION": "doublePrecision",
    r"BOOL": "boolean",
    r"(VARCHAR|CHAR|TEXT|UUID|BOOLEAN|INTEGER|SMALLINT|REAL|NUMERIC|JSONB?|DATE|INTERVAL|INET|CIDR|MACADDR8?)": "{0}",
}
DIALECT: Any = PGDialect_psycopg()  # type: ignore[no-untyped-call]
SERIAL = {"integer": "serial", "smallint": "smallserial", "bigint": "bigserial"}


class Drizzle:
    """Tables in Drizzle's words: `names` has that of each table and column, in camelCase and unique; what is used is imported."""

    def __init__(self, metadata: MetaData) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # tables that reference each other
            self.tables = metadata.sorted_tables
        self.used: set[str] = set()
        self.declared: dict[str, str] = {}
        self.left_out: list[str] = []
        self.names: dict[Any, str] = {}
        taken: set[str] = set()
        for table in self.tables:
            self.names[table] = _free(_camel(_singular(table.name), "table") + "Schema", taken)
            columns: set[str] = set()
            for column in table.c:
                self.names[column] = _free(_camel(column.name, "column"), columns)

    def text(self) -> str:
        tables = [self.table(place, table) for place, table in enumerate(self.tables)]
        imports = sorted(self.used - {"sql", "AnyPgColumn"}) + ["type AnyPgColumn"] * ("AnyPgColumn" in self.used)
        head = ["import { sql } from 'drizzle-orm';"] * ("sql" in self.used)
        head.append(f"import {{ {', '.join(imports)} }} from 'drizzle-orm/pg-core';")
        return "\n\n".join(["\n".join(head + self.left_out), *self.declared.values(), *tables]) + "\n"

    def use(self, name: str) -> str:
        self.used.add(name)
        return name

    def expression(self, expression: object) -> str:
        escaped = re.sub(r"([\\`]|\$\{)", r"\\\1", str(expression))
        return f"{self.use('sql')}`{escaped}`"

    def table(self, place: int, table: Table) -> str:
        if not table.schema:
            make = self.use("pgTable")
        else:
            variable = f"{_camel(table.schema, 'schema')}PgSchema"
            self.declared[table.schema] = f"export const {variable} = {self.use('pgSchema')}({_quoted(table.schema)});"
            make = f"{variable}.table"
        columns = [f"  {self.names[column]}: {self.column(place, column)}," for column in table.c]
        extra = [f"  {each}," for each in self.extra(table)]
        end = [", (table) => [", *extra, "]);"] if extra else [");"]
        head = f"export const {self.names[table]} = {make}({_quoted(table.name)}, {{"
        return "\n".join([head, *columns, "}" + end[0], *end[1:]])

    def column(self, place: int, column: Column[Any]) -> str:
        said = str(column.server_default.arg) if isinstance(column.server_default, DefaultClause) else None
        built = self.type(column, SERIAL if said and said.startswith("nextval(") else {})
        builder = built.partition("(")[0]
        if builder in SERIAL.values():
            said = None
        alone = column.primary_key and len(_table(column).primary_key.columns) == 1
        if not column.nullable and not alone:
            built += ".notNull()"
        if said is not None:
            built += self.default(builder, said)
        if column.computed is not None:
            built += f".generatedAlwaysAs({self.expression(column.computed.sqltext)})"
        if isinstance(column.identity, Identity):
            built += ".generatedAlwaysAsIdentity()" if column.identity.always else ".generatedByDefaultAsIdentity()"
        if alone:
            built += ".primaryKey()"
        for key in _table(column).foreign_key_constraints:
            if len(key.elements) == 1 and key.elements[0].parent is column:
                target = key.elements[0].column
                later = self.tables.index(_table(target)) >= place
                arrow = f"(): {self.use('AnyPgColumn')} =>" if later else "() =>"
                actions = [f"{on}: {_quoted(said.lower())}" for on, said in _actions(key)]
                options = f", {{ {', '.join(actions)} }}" if actions else ""
                built += f".references({arrow} {self.names[_table(target)]}.{self.names[target]}{options})"
        return built

    def type(self, column: Column[Any], instead: Mapping[str, str]) -> str:
        """Its builder, or what is written `instead` of that: whatever is used once is imported."""
        kind: Any = column.type
        dimensions = 0
        if isinstance(kind, ARRAY):
            kind, dimensions = kind.item_type, kind.dimensions or 1
        if isinstance(kind, DOMAIN):
            kind = kind.data_type
        name = _quoted(column.name)
        if isinstance(kind, ENUM) and kind.name:
            builder = f"{_camel(kind.name, 'kind')}Enum"
            values = ", ".join(map(_quoted, kind.enums))
            self.declared[kind.name] = f"export const {builder} = {self.use('pgEnum')}({_quoted(kind.name)}, [{values}]);"
            return f"{builder}({name})" + ".array()" * dimensions
        spelt = kind.compile(dialect=DIALECT) if str(kind) != "NULL" else "unknown"
        for pattern, form in BUILDERS.items():
            if found := re.fullmatch(pattern, spelt):
                builder, _, options = form.format(*(each.lower() for each in found.groups())).partition("|")
                builder = self.use(instead.get(builder, builder))
                return f"{builder}({name}{f', {{ {options} }}' * bool(options)})" + ".array()" * dimensions
        made = f"{self.use('customType')}<{{ data: unknown }}>({{ dataType: () => {_quoted(spelt.lower())} }})"
        return f"{made}({name})" + ".array()" * dimensions

    def default(self, builder: str, said: str) -> str:
        """A default as Drizzle has it: known functions, texts, numbers and booleans as themselves, the rest as SQL."""
        if (builder, said) == ("uuid", "gen_random_uuid()"):
            return ".defaultRandom()"
        if builder in ("timestamp", "date", "time") and said in ("now()", "CURRENT_TIMESTAMP"):
            return ".defaultNow()"
        word = re.fullmatch(r"'((?:[^']|'')*)'::[\w\s]+", said)
        if word and builder in ("varchar", "text", "char"):
            return f".default({_quoted(word[1].replace(chr(39) * 2, chr(39)))})"
        if builder == "boolean" and (truth := re.fullmatch(r"'?(true|false)'?(?:::boolean)?", said)):
            return f".default({truth[1]})"
        if builder in ("integer", "smallint", "real", "doublePrecision") and re.fullmatch(r"[\d.]+", said):
            return f".default({said})"
        return f".default({self.expression(said)})"

    def extra(self, table: Table) -> Iterator[str]:
        def listed(columns: Iterable[Any], prefix: Callable[[Any], str] = lambda _: "table") -> str:
            return ", ".join(f"{prefix(column)}.{self.names[column]}" for column in columns)

        primary = list(table.primary_key.columns)
        if len(primary) > 1:
            yield f"{self.use('primaryKey')}({{ columns: [{listed(primary)}] }})"
        for key in sorted(table.foreign_key_constraints, key=lambda each: str(each.name)):
            if len(key.elements) > 1:
                foreign = listed(
                    [e.column for e in key.elements], lambda c: "table" if _table(c) is table else self.names[_table(c)]
                )
                actions = "".join(f".{on}({_quoted(said.lower())})" for on, said in _actions(key))
                columns = listed([element.parent for element in key.elements])
                yield f"{self.use('foreignKey')}({{ columns: [{columns}], foreignColumns: [{foreign}] }}){actions}"
        for each in sorted(named(table), key=lambda each: str(each.name)):
            if isinstance(each, UniqueConstraint):
                yield f"{self.use('unique')}({_quoted(str(each.name))}).on({listed(each.columns)})"
            elif isinstance(each, CheckConstraint) and isinstance(each.name, str):
                yield f"{self.use('check')}({_quoted(each.name)}, {self.expression(each.sqltext)})"
            elif isinstance(each, Index):
                options = each.dialect_options["postgresql"]
                if options.get("include") or options.get("nulls_not_distinct"):
                    self.left_out.append(
                        f"// {each.name} of {table.name} is left out: Drizzle has no INCLUDE and no NULLS NOT DISTINCT."
                    )
                    continue
                make, where = self.use("uniqueIndex" if each.unique else "index"), options.get("where")
                some = "" if where is None else f".where({self.expression(where)})"
                keys = ", ".join(
                    self.expression(key) if isinstance(key, TextClause) else listed([key]) for key in each.expressions
                )
                using = f"using({_quoted(options['using'])}, " if options.get("using") else "on("
                yield f"{make}({_quoted(str(each.name))}).{using}{keys}){some}"


def _actions(key: ForeignKeyConstraint) -> list[tuple[str, str]]:
    found = (("onDelete", key.ondelete), ("onUpdate", key.onupdate))
    return [(on, re.sub(r" \(.*", "", said)) for on, said in found if said]


def _table(column: Any) -> Table:
    table: Table = column.table
    return table


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _singular(name: str) -> str:
    for end, one in (("ies", "y"), ("sses", "ss"), ("ss", "ss"), ("xes", "x"), ("ches", "ch"), ("us", "us"), ("s", "")):
        if name.endswith(end):
            return name.removesuffix(end) + one
    return name


def _camel(name: str, otherwise: str) -> str:
    parts = re.findall(r"[^\W_]+", name)
    joined = "".join(part[0].upper() + part[1:] if number else part[0].lower() + part[1:] for number, part in enumerate(parts))
    joined = f"_{joined}" if joined[:1].isdigit() else joined
    return joined if joined.isidentifier() else otherwise


def _free(name: str, taken: set[str]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name}{number}", number + 1
    taken.add(free)
    return free
