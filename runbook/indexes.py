"""The shadow's indexes: built on every partition, adopted by the root; then what the planner and vacuum want to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

from runbook import unique as unique_keys
from runbook.changes import Statements
from runbook.errors import RunbookError
from runbook.facts import Index
from runbook.ledger import Run
from runbook.plan import fit
from runbook.statements import rendered, spelled, statement, trusted


@dataclass
class Build:
    """An index of a partition to be built. `after` is the unique one that PostgreSQL asks about a row before this one: its
    order is that of their OIDs, and an application may know the constraint that refuses a row by name."""

    statements: list[sql.Composed]
    leaf: str = ""
    name: str = ""
    index: str = ""  # whose part it is
    adopt: tuple[sql.Composed, ...] = ()  # once it is built
    after: Build | None = None
    pid: int = 0  # of the session that builds it
    ended: bool = False


def builds(run: Run) -> list[Build]:
    """Every index of every partition, the largest partitions first. Of their indexes first those that refuse rows, in the
    source's order; then those that sort texts, which takes twice as long: a long one that begins last keeps the others waiting."""
    plan, found = run.plan, list[Build]()
    texts = {column.name for column in plan.columns if column.compared.endswith("text")}
    refusing = [index for index in plan.indexes if index.unique or index.constraint]
    others = sorted((index for index in plan.indexes if index not in refusing), key=lambda each: texts.isdisjoint(each.columns))
    for partition in sorted(plan.partitions, key=lambda partition: -partition.rows):
        leaf, last = sql.Identifier(run.staging, partition.name), None
        for index in (*refusing, *others):
            name = index.leaf_names[partition.name]
            first, *adopt = _leaf_index(run, index, leaf, name)
            last = Build([first], partition.name, name, index.name, tuple(adopt), last if index in refusing else None)
            found.append(last)
    return found


@contextmanager
def explained(run: Run, build: Build, kind: type[RunbookError]) -> Iterator[None]:
    """Raises an error of this kind that names the index, where what it rests on is not any more what it was when the original's was
    built; without a row's values, which the server's own may have."""
    try:
        yield
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.errors.ProgramLimitExceeded) as error:
        # Of other kinds are what an event trigger or our own rights refuse.
        known = {"22": "", "42": error.diag.message_primary, "54": error.diag.message_primary}
        told = known.get((error.sqlstate or "")[:2])
        if not build.index or told is None or isinstance(error, psycopg.errors.InsufficientPrivilege):
            raise
        raise kind(
            f"The index {build.index} of {run.plan.full_name} cannot be built anew: {told or f'error {error.sqlstate}, {type(error).__name__}'}. Since"
            f" it was built, a function, a type or the storage that it rests on has changed (REINDEX INDEX {build.index} would fail, too): mend"
            " that, or drop the index and run 00_plan again."
        ) from error


def _leaf_index(run: Run, index: Index, leaf: sql.Identifier, name: str) -> Statements:
    if index.primary:
        nulls = trusted("NULLS NOT DISTINCT" if "NULLS" in run.plan.new_primary_constraint.partition("(")[0] else "")
        rest = trusted(index.options + index.index_space.removeprefix(" USING INDEX"))
        yield statement(
            "restore.create_unique",
            index=(name,),
            leaf=leaf,
            columns=run.names["new_pk"],
            include=trusted(index.include),
            nulls=nulls,
            rest=rest,
        )
        kind = "UNIQUE" if run.plan.takes_null else "PRIMARY KEY"
        yield statement("restore.adopt", index=(name,), leaf=leaf, kind=trusted(kind), timing=trusted(index.timing))
    elif index.constraint_type == "x":
        yield statement(
            "ddl.add_constraint",
            table=leaf,
            constraint=(name,),
            definition=trusted(index.constraint_definition or ""),
        )
    else:
        unique = sql.SQL("UNIQUE" if index.unique else "")
        yield statement("restore.create_index", index=(name,), leaf=leaf, unique=unique, tail=trusted(index.tail))
        if index.constraint_type == "u":
            yield statement("restore.adopt", index=(name,), leaf=leaf, kind=trusted("UNIQUE"), timing=trusted(index.timing))
    if not index.everywhere:
        yield from _comments(index, leaf, (run.staging, name))


def _comments(index: Index, table: sql.Composable, name: tuple[str, str]) -> Statements:
    if index.comment:
        yield statement("partition.comment_index", index=name, comment=index.comment)
    if index.constraint_comment:
        yield statement("partition.comment_constraint", table=table, constraint=name[1:], comment=index.constraint_comment)


def adopt(run: Run) -> Statements:
    """The root's primary key and indexes, which adopt those of the partitions; then the guards' triggers."""
    names = run.names
    for index in run.plan.indexes:
        name = sql.Identifier(index.name)
        if index.primary:
            definition = trusted(run.plan.new_primary_constraint)
            yield statement("ddl.add_constraint", table=names["shadow"], constraint=name, definition=definition)
        elif index.everywhere and index.constraint:
            definition = trusted(index.constraint_definition or "")
            yield statement("ddl.add_constraint", table=names["shadow"], constraint=name, definition=definition)
        elif index.everywhere:
            unique = sql.SQL("UNIQUE" if index.unique else "")
            yield statement("restore.create_index", leaf=names["shadow"], index=name, unique=unique, tail=trusted(index.tail))
        else:
            continue
        yield from _comments(index, names["shadow"], (run.staging, index.name))
    yield from unique_keys.attach(run)


def remove(run: Run) -> Statements:
    """The inverse: a copy that begins again wants none."""
    yield from unique_keys.remove(run)
    yield from unique_keys.prepare(run)
    tables = [(run.names["shadow"], None), *((sql.Identifier(run.staging, each.name), each.name) for each in run.plan.partitions)]
    for table, leaf in tables:
        for index in run.plan.indexes:
            name = index.leaf_names[leaf] if leaf else index.name
            if index.constraint:
                yield statement("ddl.drop_constraint", table=table, constraint=(name,))
            yield statement("restore.drop_index", index=(run.staging, name))


def storage(run: Run) -> Iterator[list[list[sql.Composed]]]:
    """The source's storage options on every partition, VACUUM and ANALYZE: a list a table; the lists of one group go side by side."""
    options = list(run.plan.table.options)
    alone = run.plan.server_version >= 18  # before, ANALYZE of the root is of all partitions as well
    root = [statement("restore.analyze_root", **run.names, only=trusted("ONLY" if alone else ""))]
    leaves = [
        [
            statement("restore.storage", leaf=leaf),
            *([statement("restore.storage_options", leaf=leaf, options=trusted(", ".join(options)))] if options else []),
            *_statistics(run, leaf, partition.name),
            statement("restore.vacuum", leaf=leaf, analyze=trusted("ANALYZE, " if alone else "")),
        ]
        for partition in run.plan.partitions
        for leaf in [sql.Identifier(run.staging, partition.name)]
    ]
    yield from [[root, *leaves]] if alone else [leaves, [root]]


def _statistics(run: Run, leaf: sql.Composable, partition: str) -> Statements:
    """Extended statistics of the root are of all partitions together: how many rows of one partition a filter finds, PostgreSQL
    asks that partition's own."""
    used = set[str]()
    for each in run.plan.carried:
        if each.kind == "statistics" and each.leaf:
            used.add(own := fit(f"{partition}_{each.name}", used))
            name = spelled((run.plan.table.schema_name, own))
            yield rendered(each.leaf.replace("\1", leaf.as_string(None)).replace("\2", name))
