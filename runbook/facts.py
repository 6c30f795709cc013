"""What a plan is made of: columns, indexes, references and what else is known of a table; what was found about it."""

from __future__ import annotations

from psycopg import sql
from pydantic import BaseModel, ConfigDict


class Fact(BaseModel):
    """Something known; frozen, and the same JSON whenever it is dumped."""

    model_config = ConfigDict(frozen=True)


class Column(Fact):
    """A column of the source. `compared` says how the comparison hashes it: a key of HASHES, or "value" in a record."""

    name: str
    type: str
    not_null: bool
    generated: bool
    identity: str
    default: str | None
    compared: str
    sequence: str | None
    identity_sequence: str | None
    identity_options: str | None
    statistics: str | None
    options: list[str] | None
    kept: str  # collation, storage, compression, options, statistics target and comment, as one text to compare


class Partition(Fact):
    """A partition to be: its name, its bound as SQL, and how many of the present rows it takes."""

    name: str
    bound: str
    values: tuple[str | None, ...] = ()
    rows: int = 0


class Index(Fact):
    """An index of the source. `everywhere`: it can stand on the root; else only on each partition."""

    name: str
    unique: bool
    primary: bool
    columns: tuple[str, ...]
    tail: str
    constraint: str | None
    constraint_type: str | None
    constraint_definition: str | None
    include: str
    options: str
    index_space: str
    clustered: bool
    replica_identity: bool
    statistics: dict[str, int] | None
    comment: str | None
    constraint_comment: str | None
    everywhere: bool
    retired_name: str
    leaf_names: dict[str, str]

    @property
    def plain(self) -> bool:
        """Whether columns are all that it is made of, without an expression, an operator class or an order of their own; it may be partial."""
        return self.tail.replace('"', "").partition(" WHERE ")[0] == f"btree ({', '.join(self.columns)})"

    @property
    def timing(self) -> str:
        """DEFERRABLE and INITIALLY DEFERRED, where it is a constraint that is."""
        definition = self.constraint_definition or ""
        return " DEFERRABLE" * (" DEFERRABLE" in definition) + " INITIALLY DEFERRED" * definition.endswith("INITIALLY DEFERRED")


class Guard(Fact):
    """A table with one unique index, which keeps a key unique over all partitions that no root's index can keep.

    `parts` holds the name, the expression over a row, and collation and operator class of each key column; `watched`
    are the table's columns that the key is made of, `operators` what compares each part: functions have no search_path.
    """

    index: str
    table: str
    parts: tuple[tuple[str, str, str], ...]
    predicate: str | None
    nulls_not_distinct: bool
    deferrable: bool
    watched: tuple[str, ...]
    operators: tuple[str, ...] = ()


class Key(Fact):
    """A foreign key that points at the table."""

    name: str
    schema_name: str
    table: str
    definition: str
    comment: str | None

    @property
    def place(self) -> tuple[str, str, str]:
        """Schema, table and name: no two keys have all three."""
        return self.schema_name, self.table, self.name

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema_name, self.table)


class Reference(Key):
    """A foreign key that points at the source, and the composite one that will take its place."""

    owner: str
    columns: tuple[str, ...]
    referenced: tuple[str, ...]
    role_column: str
    role_type: str  # not a domain: a column of a domain with a check would rewrite the table
    adds_column: bool
    not_null: bool
    indexed: bool
    composite: str
    leaves: tuple[tuple[str, str], ...] = ()  # where it is partitioned itself
    operators: tuple[str, ...] = ()  # what compares each column: functions have no search_path

    @property
    def tables(self) -> list[sql.Identifier]:
        """The tables that hold its rows."""
        return [sql.Identifier(*leaf) for leaf in self.leaves] or [self.identifier]


class Carried(Fact):
    """An object that the new table must be given: the statement that gives it, and those that retire and restore the old one.

    `leaf` is what each partition is given, with chr(1) for its name (and chr(2) for that of its own statistics); `holder` another
    table whose lock that takes.
    """

    kind: str
    name: str
    definition: str
    retire: str | None = None
    restore: str | None = None
    leaf: str | None = None
    holder: tuple[str, str] | None = None


class MatviewIndex(Fact):
    """An index of a materialized view; `tail` is its definition from the method on."""

    name: str
    unique: bool
    tail: str
    clustered: bool
    comment: str | None


class Matview(Fact):
    """A materialized view that reads the table, with what makes it anew, and the views that read it.

    `rest` is what it is given then, with chr(1) for its name.
    """

    schema_name: str
    name: str
    owner: str
    populated: bool
    head: str
    query: str
    rest: str
    indexes: tuple[MatviewIndex, ...]
    views: tuple[str, ...]
    view_tables: tuple[tuple[str, str], ...]

    @property
    def place(self) -> tuple[str, str]:
        return self.schema_name, self.name

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(*self.place)


class Named(Fact):
    """A named object with the definition that the server rendered."""

    name: str
    definition: str
    validated: bool = True
    comment: str | None = None


class Table(Fact):
    """The table as it is."""

    oid: int
    schema_name: str
    name: str
    owner: str
    rows: int
    table_bytes: int
    index_bytes: int
    tablespace: str
    options: tuple[str, ...]
    replica_identity: str
    comment: str | None
    strangers: tuple[str, ...]


class Finding(Fact):
    """What the plan found: a blocker, a warning or a note; the object, the sentence, the way out."""

    level: str
    object: str
    sentence: str
    way_out: str = ""

    @classmethod
    def blocker(cls, thing: str, sentence: str, way_out: str) -> Finding:
        """What stops the plan."""
        return cls(level="blocker", object=thing, sentence=sentence, way_out=way_out)

    @classmethod
    def warning(cls, thing: str, sentence: str, way_out: str = "") -> Finding:
        """What somebody may have to act on."""
        return cls(level="warning", object=thing, sentence=sentence, way_out=way_out)

    @classmethod
    def note(cls, thing: str, sentence: str, way_out: str = "") -> Finding:
        """What is good to know."""
        return cls(level="note", object=thing, sentence=sentence, way_out=way_out)
