"""The plan: what is known of the table and what was decided, frozen; nothing later reads the catalog for it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from typing import Any

from psycopg import sql

from runbook.errors import PlanOutdated
from runbook.facts import Carried, Column, Fact, Finding, Guard, Index, Matview, Named, Partition, Reference, Table
from runbook.statements import trusted

# How a column is hashed, by what sql/catalog.sql says of its type: the value's own function where equal means the same
# bytes, else its text. A function of the value's own costs a third less than a record's.
HASHES = {
    "text": "hashtextextended({}::text, {})",
    "collated text": 'hashtextextended({}::text COLLATE "C", {})',
    "uuid": "uuid_hash_extended({}, {})",
    "int2": "hashint2extended({}, {})",
    "int4": "hashint4extended({}, {})",
    "int8": "hashint8extended({}, {})",
    "bool": "hashint4extended({}::int4, {})",
    "timestamp": "timestamp_hash_extended({}, {})",
    "timestamptz": "timestamptz_hash_extended({}, {})",
}
HASHES_BEFORE_18 = HASHES | {"timestamptz": "timestamp_hash_extended({} AT TIME ZONE 'UTC', {})"}


def digest(plan: Any) -> str:
    """sha256, in hexadecimal, of a plan's JSON with its keys in order: the ledger's jsonb keeps an order of its own."""
    text = json.dumps(plan, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stored(row: dict[str, Any]) -> Plan:
    """The plan of a row of the ledger; raises PlanOutdated where it is not the one that was frozen."""
    if (now := digest(row["plan"])) != row["plan_hash"]:
        raise PlanOutdated(
            f"The plan of {row['source']} that the ledger holds is another ({now[:12]}) than was frozen ({row['plan_hash'][:12]}): somebody altered"
            " runbook.migration, and nothing is done by it. Put its plan back as it was: the record's evidence.json has it."
        )
    return Plan.model_validate(row["plan"])


class Plan(Fact):
    """Everything that the steps need. Its hash names it from 00 to the record's last page."""

    server_version: int
    table: Table
    fingerprint: str
    key: str
    key_type: str
    key_nullable: bool
    partition_by: str
    partitions: tuple[Partition, ...]
    takes_any_value: bool
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    key_equals: tuple[str, ...] = ()  # what compares each column of the primary key
    key_types: tuple[str, ...] = ()  # what it is made of: a domain may forbid the NULLs by which the log notes a TRUNCATE
    indexes: tuple[Index, ...]
    checks: tuple[Named, ...]
    outgoing: tuple[Named, ...]
    referenced_tables: tuple[tuple[str, str], ...]
    references: tuple[Reference, ...]
    selves: tuple[Reference, ...] = ()
    views: tuple[Named, ...]
    view_tables: tuple[tuple[str, str], ...]
    matviews: tuple[Matview, ...] = ()
    carried: tuple[Carried, ...]
    frequent_value: str | None
    null_value: str | None
    unique: str
    guards: tuple[Guard, ...] = ()
    guard_schema: str = ""
    legacy_inserts: str
    backup: str
    backup_method: str
    restore_from: str
    findings: tuple[Finding, ...]

    @cached_property
    def hash(self) -> str:
        """The digest of the plan as JSON."""
        return digest(self.model_dump(mode="json"))

    @property
    def new_primary_key(self) -> tuple[str, ...]:
        """The old primary key, then the partition key where it was not part of it already."""
        return with_key(self.primary_key, self.key)

    @property
    def takes_null(self) -> bool:
        """Whether a partition is meant for rows without a key: it stays nullable then, and no primary key can hold it."""
        return self.key_nullable and any(None in partition.values for partition in self.partitions)

    @property
    def new_primary_constraint(self) -> str:
        """What the primary key becomes, as SQL."""
        kind = "PRIMARY KEY" if not self.takes_null else "UNIQUE NULLS NOT DISTINCT" if self.server_version > 14 else "UNIQUE"
        own = next((index for index in self.indexes if index.primary), None)
        rest = own.include + own.options + own.index_space + own.timing if own else ""
        return f"{kind} ({identifiers(self.new_primary_key).as_string(None)}){rest}"

    @property
    def retired(self) -> str:
        return fit(f"{self.table.name}_retired")

    @property
    def source(self) -> sql.Identifier:
        return sql.Identifier(self.table.schema_name, self.table.name)

    @property
    def full_name(self) -> str:
        return f"{self.table.schema_name}.{self.table.name}"

    @property
    def blockers(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "blocker"]

    @property
    def own_roles(self) -> list[Reference]:
        """The references of the table to itself that need a role column: the shadow has it from the beginning, and what is
        copied into the shadow looks it up."""
        return list({each.role_column: each for each in self.selves if each.adds_column}.values())

    def becomes(self, key: Named) -> str:
        """The definition of a foreign key of the table on the partitioned one."""
        return next((each.composite for each in self.selves if each.name == key.name), key.definition)

    @property
    def copied(self) -> tuple[Column, ...]:
        """Columns that are copied; generated ones are computed again."""
        return tuple(column for column in self.columns if not column.generated)

    def internal(self, name: str) -> str:
        """A name for a table of the runbook's own beside the shadow, which no table or index to be has."""
        leaves = (index.leaf_names.values() for index in self.indexes)
        return fit(name, {self.table.name, *(p.name for p in self.partitions), *(i.name for i in self.indexes), *chain(*leaves)})

    def value(self, column: Column, alias: str) -> sql.Composable:
        """A column as it is to stand in the shadow: NULL in the key becomes the plan's value for it."""
        plain = sql.Identifier(alias, column.name)
        if column.name != self.key or self.null_value is None:
            return plain
        # Of a domain coalesce makes its base type, and a row of that is compared with none of the domain's.
        return sql.SQL("CAST(coalesce({}, {}) AS {})").format(plain, sql.Literal(self.null_value), trusted(column.type))

    def names(self, staging: str) -> dict[str, sql.Composable]:
        """The placeholders that every statement of this plan may use. Aliases: s origin, d copy, k log."""
        keys = [f"k{number}" for number, _ in enumerate(self.primary_key, 1)]
        return {
            "source": self.source,
            "schema": sql.Identifier(self.table.schema_name),
            "name": sql.Identifier(self.table.name),
            "owner": sql.Identifier(self.table.owner),
            "retired": sql.Identifier(self.table.schema_name, self.retired),
            "retired_name": sql.Identifier(self.retired),
            "backup": sql.Identifier(self.table.schema_name, self.backup or "backup"),
            "staging": sql.Identifier(staging),
            "shadow": sql.Identifier(staging, self.table.name),
            "unplaced": sql.Identifier(staging, self.internal("unplaced")),
            "log": sql.Identifier(staging, self.internal("changes")),
            "back": sql.Identifier(staging, self.internal("changes_back")),
            "log_function": sql.Identifier(staging, "log_changes"),
            "back_function": sql.Identifier(staging, "log_changes_back"),
            "truncate_function": sql.Identifier(staging, "log_truncate"),
            "source_oid": sql.Literal(self.table.oid),
            "keep_function": sql.Identifier(self.table.schema_name, fit(f"{self.table.name}_keep_partition")),
            "key_text": sql.Literal(self.key),
            "name_text": sql.Literal(self.table.name),
            "source_text": sql.Literal(self.source.as_string(None)),
            "key": sql.Identifier(self.key),
            "key_type": trusted(self.key_type),
            "partition_by": sql.SQL("{} ({})").format(trusted(self.partition_by.upper()), sql.Identifier(self.key)),
            **self.listed(self.own_roles),
            "s_hash": self.hashed("s"),
            **{f"{alias}_key": self.value(column, alias) for column in self.columns if column.name == self.key for alias in "sv"},
            "s_pk": sql.SQL(", ").join(sql.Identifier("s", name) for name in self.primary_key),
            "d_pk": sql.SQL(", ").join(sql.Identifier("d", name) for name in self.primary_key),
            "new_pk": identifiers(self.new_primary_key),
            "old_pk": sql.SQL(", ").join(sql.Identifier("o", name) for name in self.primary_key),
            "n_pk": sql.SQL(", ").join(sql.Identifier("n", name) for name in self.primary_key),
            "row_old": sql.SQL(", ").join(sql.SQL("OLD.{}").format(sql.Identifier(name)) for name in self.primary_key),
            "row_new": sql.SQL(", ").join(sql.SQL("NEW.{}").format(sql.Identifier(name)) for name in self.primary_key),
            "keys": identifiers(keys),
            "k_keys": sql.SQL(", ").join(sql.Identifier("k", name) for name in keys),
            "key_aliases": sql.SQL(", ").join(
                sql.SQL("{} AS {}").format(sql.Identifier(name), sql.Identifier(key))
                for name, key in zip(self.primary_key, keys, strict=True)
            ),
            "log_columns": sql.SQL(", ").join(
                sql.SQL("{}::{} AS {}").format(sql.Identifier(name), trusted(kind), sql.Identifier(key))
                for name, kind, key in zip(self.primary_key, self.key_types or self._key_types, keys, strict=True)
            ),
            "marker": sql.SQL(", ").join([sql.SQL("NULL")] * len(keys)),
            "s_is_k": equal("s", self.primary_key, "k", keys, self.key_equals),
            "d_is_k": equal("d", self.primary_key, "k", keys, self.key_equals),
            "d_is_s": equal("d", self.primary_key, "s", list(self.primary_key), self.key_equals),
            "s_placed": sql.SQL("true")
            if not self._may_be_null
            else sql.SQL("{} IS NOT NULL").format(sql.Identifier("s", self.key)),
        }

    @property
    def _key_types(self) -> tuple[str, ...]:
        kinds = {column.name: column.type for column in self.columns}
        return tuple(kinds[name] for name in self.primary_key)

    def listed(self, roles: Iterable[Reference] = ()) -> dict[str, sql.Composable]:
        """The columns that are copied; to the shadow with the role columns that it has more than its source."""
        values = {column.name: self.value(column, "s") for column in self.copied}
        key = next(column for column in self.columns if column.name == self.key)
        for each in roles:
            values[each.role_column] = sql.SQL("(SELECT {} FROM ONLY {} m WHERE {})").format(
                self.value(key, "m"), self.source, equal("m", each.referenced, "s", each.columns)
            )
        return {
            "columns": identifiers(values),
            "s_columns": sql.SQL(", ").join(
                sql.SQL("{} AS {}").format(value, sql.Identifier(name)) for name, value in values.items()
            ),
            "s_row": sql.SQL("ROW({})").format(sql.SQL(", ").join(values.values())),
            "d_row": sql.SQL("ROW({})").format(sql.SQL(", ").join(sql.Identifier("d", name) for name in values)),
        }

    @property
    def _may_be_null(self) -> bool:
        return self.key_nullable and self.null_value is None and not self.takes_null

    def hashed(self, alias: str) -> sql.Composable:
        """A row's hash as the comparison sums it: every column's own, so that no record has to be made of a row; text
        where equality does not promise the same bytes. What has no entry in HASHES shares one record."""
        forms = HASHES if self.server_version >= 18 else HASHES_BEFORE_18
        parts: list[sql.Composable] = []
        records: list[sql.Composable] = []
        for seed, column in enumerate(self.columns, 1):
            value = self.value(column, alias) if not column.generated else sql.Identifier(alias, column.name)
            if form := forms.get(column.compared):
                own = trusted(form).format(value, sql.Literal(seed))
                parts.append(own if column.not_null else sql.SQL("coalesce({}, {})").format(own, sql.Literal(seed)))
            else:
                records.append(value)
        if records:
            parts.append(sql.SQL("hash_record_extended(ROW({}), 0)").format(sql.SQL(", ").join(records)))
        return sql.SQL("({})").format(sql.SQL(" # ").join(parts))


def with_key(columns: Iterable[str], key: str) -> tuple[str, ...]:
    """Columns of a key that is unique across partitions: it must contain the partition key."""
    listed = tuple(columns)
    return listed if key in listed else (*listed, key)


def identifiers(names: Iterable[str]) -> sql.Composable:
    """Names as a list of quoted identifiers."""
    return sql.SQL(", ").join(sql.Identifier(name) for name in names)


def equal(
    left: str, left_names: Iterable[str], right: str, right_names: Iterable[str], operators: Iterable[str] = ()
) -> sql.Composable:
    pairs = list(zip(left_names, right_names, strict=True))
    return sql.SQL(" AND ").join(
        sql.SQL("{} {} {}").format(sql.Identifier(left, a), trusted(equals), sql.Identifier(right, b))
        for (a, b), equals in zip(pairs, list(operators) or ["="] * len(pairs), strict=True)
    )


def fit(name: str, taken: Iterable[str] = ()) -> str:
    """The name itself where it fits PostgreSQL's 63 bytes and is free; else shortened, with a digest that keeps it apart."""
    used = set(taken)
    if len(name.encode()) <= 63 and name not in used:
        return name
    for attempt in range(1000):
        digest = hashlib.sha256(f"{name}{attempt or ''}".encode()).hexdigest()[:8]
        short = f"{name.encode()[:54].decode(errors='ignore')}_{digest}"
        if short not in used:
            return short
    raise ValueError(name)
