"""Names with quotes, spaces, upper case, accents, emoji, reserved words and 63 bytes are ordinary input."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql as composed

from runbook import cli
from tests.walk import client, dump, walk


class Names(NamedTuple):
    """What everything is called, and a value of the key."""

    schema: str
    table: str
    key: str
    id: str
    partition: str
    rest: str
    index: str
    constraint: str
    referencing: str
    reference: str
    value: str


def long(letter: str) -> str:
    """63 bytes, most of them half of an accented letter."""
    return letter + "é" * 31


CASES = {
    "quotes": Names('my "schema"', 'the "users"', "it's", "a'b", 'p"1', "p'2", 'ix"', "con'", 'ref"s', 'fk"', 'O\'Neil "x" \\'),
    "spaces and dots": Names(
        "my schema", "the.users", "the key", "an id", "p 1", "p.2", "an ix", "a con", "ref s", "a fk", " a. "
    ),
    "upper case": Names("Schema", "Users", "Role", "Id", "USERS", "uSERS", "Ix", "Con", "Refs", "Fk", "USER"),
    "accents and emoji": Names("schéma", "usuários", "rôle", "ïd", "p🐘", "pé", "ix🐘", "cön", "reférs", "fk🔑", "médecin 🩺"),
    "reserved words": Names("select", "user", "order", "group", "table", "check", "index", "primary", "from", "foreign", "NULL"),
    "percent and braces": Names("%s", "{table}", "%(key)s", "{id}", "100%", "{}", "{0}", "%%", ":refs", "$1", "{value} %s"),
    "our own aliases": Names("n", "s", "k", "d", "a", "b", "c", "p", "r", "w", "x"),
    "63 bytes": Names(*(long(word) for word in ("s", "t", "k", "i", "p", "q", "x", "c", "r", "f")), "v" * 63),
}


def prepare(url: str, names: Names) -> None:
    """A table under these names, with what hangs on it, and a table that references it."""
    identifiers = {name: composed.Identifier(value) for name, value in names._asdict().items() if name != "value"}
    text = composed.SQL("""
        CREATE SCHEMA {schema};
        CREATE TABLE {schema}.{table} ({id} int GENERATED ALWAYS AS IDENTITY,
          {key} text NOT NULL DEFAULT {value}, {index} int DEFAULT 1, s text DEFAULT 's', o text DEFAULT 'o', v text DEFAULT 'v', t text,
          CONSTRAINT {constraint} PRIMARY KEY ({id}), CHECK ({index} > 0), UNIQUE ({index}, {id}));
        CREATE INDEX {index} ON {schema}.{table} ({index});
        CREATE TABLE {schema}.{referencing} ({id} int PRIMARY KEY, {reference} int NOT NULL,
          CONSTRAINT {reference} FOREIGN KEY ({reference}) REFERENCES {schema}.{table} ON DELETE CASCADE);
        CREATE INDEX ON {schema}.{referencing} ({reference});
        CREATE VIEW {schema}.{reference} AS SELECT {key}, {id} FROM {schema}.{table} WHERE {index} > 0;
        COMMENT ON TABLE {schema}.{table} IS {value};
        INSERT INTO {schema}.{table} ({key})
          SELECT CASE WHEN n % 3 = 0 THEN {value} ELSE 'other' END FROM generate_series(1, 30) n;
        INSERT INTO {schema}.{referencing} SELECT n, n FROM generate_series(1, 30) n;
        ANALYZE {schema}.{table}
    """).format(**identifiers, value=composed.Literal(names.value))
    with psycopg.connect(url) as connection:
        connection.execute(text)


def parameters(names: Names) -> dict[str, Any]:
    partitions = {names.partition: [names.value], names.rest: ["other"]}
    return {
        "table": f"{names.schema}.{names.table}",
        "key": names.key,
        "partitions": partitions,
        "backup": "",
        "unique": "per_partition",
    }


FIRST_SHORT = [pytest.param(case, marks=[pytest.mark.long] if number else []) for number, case in enumerate(CASES)]


@pytest.mark.parametrize("case", FIRST_SHORT)
def test_a_table_of_such_names_migrates_verifies_and_rolls_back(database: str, sql: Callable[..., Any], case: str) -> None:
    names = CASES[case]
    prepare(database, names)
    before = dump(database)
    walk(database, **parameters(names))
    leaves = "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid WHERE relkind = 'r' ORDER BY 1"
    assert sorted(name for (name,) in sql(leaves)) == sorted([names.partition, names.rest])
    with psycopg.connect(database) as connection:
        read = composed.SQL("SELECT tableoid::regclass::oid, count(*) FROM {}.{} GROUP BY 1 ORDER BY 2")
        rows = connection.execute(read.format(composed.Identifier(names.schema), composed.Identifier(names.table))).fetchall()
    assert [count for _, count in rows] == [10, 20]
    walk(database, "90_rollback", **parameters(names))
    assert dump(database, "--exclude-schema=runbook") == before


@pytest.mark.long
@pytest.mark.parametrize("case", FIRST_SHORT)
def test_the_script_of_such_a_table_runs(database: str, tmp_path: Any, case: str) -> None:
    names = CASES[case]
    prepare(database, names)
    given = [
        word
        for name, value in parameters(names).items()
        for word in ("-p", name, value if isinstance(value, str) else json.dumps(value))
    ]
    shown = CliRunner().invoke(cli.main, ["sql", "--database", database, *given])
    assert shown.exit_code == 0, shown.output
    client("psql", "--no-psqlrc", "--quiet", database, text=shown.output)


def test_names_that_differ_only_in_case_or_quotes_are_told_apart(database: str, sql: Callable[..., Any]) -> None:
    prepare(database, CASES["upper case"])
    sql('CREATE TABLE public.users (id int PRIMARY KEY, role text); CREATE TABLE public."Users" (id int PRIMARY KEY, role text)')
    draft = walk(database, "00_plan", table="users", key="role", partitions={"lower": ["a"]})["draft"]
    assert draft.plan.full_name == "public.users"
    draft = walk(database, "00_plan", table="Users", key="role", partitions={"upper": ["a"]})["draft"]
    assert draft.plan.full_name == "public.Users"
    draft = walk(database, "00_plan", table='"Schema"."Users"', key="Role", partitions={"upper": ["USER", "other"]})["draft"]
    assert draft.plan.full_name == "Schema.Users"
