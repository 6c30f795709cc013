"""Any table: made at random, migrated, verified, rolled back; judged by pg_dump as in test_carried.

RUNBOOK_EXAMPLES says how many tables (unless told 20 on each version, always the same ones: forty in CI, which has them on two versions); thousands: RUNBOOK_EXAMPLES=5000 pytest -m long tests/test_any_table.py.
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from psycopg import sql

from runbook import verify
from runbook.errors import PlanBlocked
from runbook.statements import trusted
from tests.dumps import differences, schema
from tests.migration import FORWARD, back, plan, walk
from tests.servers import Server
from tests.walk import dump, restored

numbers = itertools.count(1)
# type → a value of row n
TYPES = {
    "integer": "n", "bigint": "-n", "smallint": "n % 7", "numeric(12, 3)": "n / 7.0", "text": "'t' || n", "varchar(30)": "md5(n::text)::varchar(30)",
    "char(5)": "n::text", "boolean": "n % 2 = 0", "date": "date '2024-02-28' + n", "timestamptz": "timestamptz '2026-03-28 23:00+00' + n * interval '1 hour'",
    "uuid": "md5(n::text)::uuid", "jsonb": "jsonb_build_object('n', n)", "json": "json_build_object('n', n)", "bytea": "decode(md5(n::text), 'hex')",
    "text[]": "ARRAY['x', n::text]", "int4range": "int4range(n, n + 2)", "inet": "inet '10.0.0.0' + n", "double precision": "n / 3.0",
    "interval": "n * interval '1 minute'", "time": "time '00:00' + n * interval '1 minute'", "mood": "(ARRAY['ok', 'bad'])[1 + n % 2]::mood",
    "positive": "n + 1", "bit(4)": "n::bit(4)", "xid8": "n::text::xid8", "point": "point(n, -n)", "tsvector": "to_tsvector('simple', 'w' || n)",
    "pair": "ROW(n, 'x')::pair", "oid": "n::oid", "money": "n::money", "varbit": "n::bit(8)",
}  # fmt: skip
KEYS = {
    "text": ["a", "b", "c"], "varchar(10)": ["a", "b"], "char(3)": ["x", "yy"], "integer": ["1", "2", "-3"], "bigint": ["1", "9000000000"],
    "boolean": ["true", "false"], "mood": ["ok", "bad"], "positive": ["1", "2"], "date": ["2026-01-01", "2026-02-01"], "numeric(5, 2)": ["1.50", "2.00"],
    "uuid": ["00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"],
}  # fmt: skip
SORTABLE = {
    "integer",
    "bigint",
    "smallint",
    "numeric(12, 3)",
    "text",
    "varchar(30)",
    "date",
    "timestamptz",
    "uuid",
    "boolean",
    "mood",
    "positive",
    "char(5)",
}
NAMES = ["a", "Camel Case", "user", "ünï", "x" * 55, 'quo"te', "order", "b", "c d", "select"]
FIRST = """
CREATE TYPE mood AS ENUM ('ok', 'bad'); CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE TYPE pair AS (a int, b text);
CREATE TABLE elsewhere (id int PRIMARY KEY); INSERT INTO elsewhere SELECT generate_series(0, 100);
CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN CASE TG_OP WHEN ''DELETE'' THEN OLD ELSE NEW END; END';
"""


# Conditions on the id that the server prints in other words than it was told, some of them in others than it reads.
CONDITIONS = (
    "id::text::varchar NOT IN ('x', 'y')", "id::text::char(9) NOT IN ('x', 'y')", "id::text::varchar = ANY (ARRAY['1', NULL]) IS NOT FALSE OR id > 0",
    "id NOT IN (-1, -2.5)", "id::text::varchar NOT LIKE ALL (ARRAY['x%', 'y_']) OR true", "CASE id::text::varchar WHEN 'x' THEN false ELSE true END",
    "COALESCE(NULLIF(id::text::varchar, ''), 'x') <> 'y'", "(id, id::text::varchar) >= (-1, 'a') OR NOT id BETWEEN -2 AND -1", "id::smallint IN (1, 2) OR id > -1",
    "GREATEST(id::text::varchar, 'a') IS DISTINCT FROM 'x'", "trim(id::text::varchar) || 'x' ~ '[0-9]'", "ARRAY[id::text::varchar] <@ ARRAY['x']::varchar[] OR id > -1",
    "(DATE '2026-01-01', interval '1 day') OVERLAPS (DATE '2026-01-01', DATE '2026-01-02') OR id > 0", "array_position(ARRAY['x', 'y']::varchar[], id::text::varchar) IS NULL",
    "substring(id::text::varchar from 1 for 1) COLLATE \"C\" <> 'x'", "id::text::varchar <> ALL (ARRAY['x', 'y']::varchar[]::text[])",
    "id::text::varchar(20) = ANY (ARRAY['1', 'it''s, ]']::varchar(9)[]) OR id > -1",
)  # fmt: skip


def q(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def test_a_condition_is_printed_as_it_was_when_the_server_reads_what_it_printed(database: str) -> None:
    """Of `varchar IN (…)` it is not, without help: a check, a view or a policy would be another after the swap and after the way back."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id bigint)")
        for condition in CONDITIONS:
            text, seen = sql.SQL(condition), []
            for _ in range(2):
                connection.execute("ALTER TABLE t DROP CONSTRAINT IF EXISTS c")
                connection.execute(sql.SQL("ALTER TABLE t ADD CONSTRAINT c CHECK ({})").format(text))
                [(printed,)] = connection.execute("SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint WHERE conname = 'c'")
                text, seen = trusted(printed), [*seen, printed]
            assert seen[0] == seen[1]


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], str, str, dict[str, object]]:
    """Statements, the table, its key, and the plan's parameters."""
    some, pick = lambda *of: draw(st.sampled_from(of)), lambda: draw(st.booleans())
    names = draw(st.permutations(NAMES))
    table, key, *rest = names
    key_type = some(*KEYS)
    values = KEYS[key_type]
    columns = draw(st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=6))
    own = dict(zip(rest, columns, strict=False))
    t, k = q(table), q(key)
    parts = [
        "id bigint" + some("", "", " GENERATED ALWAYS AS IDENTITY", " GENERATED BY DEFAULT AS IDENTITY"),
        f"{k} {key_type} NOT NULL",
    ]
    parts += [f"gone{number} int" for number in range(draw(st.integers(0, 2)))]
    dropped = [part.split()[0] for part in parts if part.startswith("gone")]
    for name, kind in own.items():
        parts.append(f"{q(name)} {kind}{some('', ' NOT NULL')}{some('', f' DEFAULT NULL::{kind}') if pick() else ''}")
    generated = pick()
    if generated:
        parts.append("twice bigint GENERATED ALWAYS AS (id * 2) STORED")
    primary = some("id", "id", f"id, {k}", f"{k}, id")
    statements = [f"CREATE TABLE {t} ({', '.join(draw(st.permutations(parts)))}, PRIMARY KEY ({primary}))"]
    statements += [f"ALTER TABLE {t} DROP {name}" for name in dropped]
    listed = ", ".join(f"'{value}'" for value in values)
    filled = ", ".join(["id", k, *map(q, own)])
    chosen = ", ".join(["n", f"((ARRAY[{listed}])[1 + n % {len(values)}])::{key_type}", *(TYPES[kind] for kind in own.values())])
    rows = draw(st.sampled_from([0, 1, 40]))
    statements.append(f"INSERT INTO {t} ({filled}) OVERRIDING SYSTEM VALUE SELECT {chosen} FROM generate_series(1, {rows}) n")
    sortable = [name for name, kind in own.items() if kind in SORTABLE]
    for number in range(draw(st.integers(0, 4)) if sortable else 0):
        on = ", ".join(
            q(name) + some("", " DESC", " NULLS FIRST")
            for name in draw(st.lists(st.sampled_from(sortable), min_size=1, max_size=2, unique=True))
        )
        extra = some("", "", " INCLUDE (id)", f" WHERE {k} IS NOT NULL", " WITH (fillfactor = 60)")
        statements.append(
            f"CREATE {some('', '', 'UNIQUE ') if pick() and 'INCLUDE' not in extra else ''}INDEX index{number} ON {t} ({on}, id){extra}"
        )
    if pick():
        statements.append(
            f"CREATE INDEX {q(some('expression', 'odd Name'))} ON {t} ((id % 10), ({k}::text))"
            if key_type not in ("mood", "date")
            else "SELECT 1"
        )
    if pick():
        timing = some("", " DEFERRABLE", " DEFERRABLE INITIALLY DEFERRED")
        statements.append(
            f"ALTER TABLE {t} ADD CONSTRAINT {q(some('once', 'Once Only'))} UNIQUE ({some(f'id, {k}', 'id')}){timing}"
        )
    if pick():
        statements.append(f"ALTER TABLE {t} ADD CHECK (id > 0), ADD CONSTRAINT late CHECK (id > {some('0', '10')}) NOT VALID")
    for number in range(draw(st.integers(0, 3))):
        row = pick()
        when = some("", " WHEN (NEW.id > 3)") if row else ""
        event = (
            some("INSERT", "INSERT OR UPDATE", "UPDATE OF id") if when else some("INSERT", "DELETE", "UPDATE", "INSERT OR DELETE")
        )
        timing = some("BEFORE", "AFTER")
        statements.append(
            f"CREATE TRIGGER trigger{number} {timing} {event} ON {t} FOR EACH {'ROW' if row else 'STATEMENT'}{when} EXECUTE FUNCTION noted({number})"
        )
        statements.append(
            f"ALTER TABLE {t} {some('ENABLE', 'DISABLE', 'ENABLE ALWAYS', 'ENABLE REPLICA')} TRIGGER trigger{number}"
        )
    if pick():
        statements.append(f"ALTER TABLE {t} ENABLE ROW LEVEL SECURITY{some('', ', FORCE ROW LEVEL SECURITY')}")
    if pick():
        statements.append(
            f"CREATE POLICY own ON {t} FOR {some('ALL', 'SELECT')} TO {some('PUBLIC', 'pg_monitor')} USING (id > 0 AND {k} IS NOT NULL)"
        )
    if pick():
        statements.append(f"GRANT {some('SELECT', 'ALL', 'INSERT, UPDATE')} ON {t} TO {some('PUBLIC', 'pg_monitor')}")
        statements.append(f"GRANT SELECT (id) ON {t} TO pg_monitor WITH GRANT OPTION")
    if pick():
        statements.append(f"CREATE VIEW seen AS SELECT * FROM {t}{some('', ' WHERE id > 2 WITH CHECK OPTION')}")
        statements.append("CREATE VIEW of_view AS SELECT count(*) FROM seen")
    if pick():
        statements.append(
            f"ALTER TABLE {t} ADD away int{some('', ' DEFAULT 5')} REFERENCES elsewhere {some('', 'ON DELETE SET NULL', 'DEFERRABLE')}"
        )
    for number in range(draw(st.integers(0, 2))):
        columns_ = primary.split(", ")
        types = ["bigint" if column == "id" else key_type for column in columns_]
        nullable = some("", " NOT NULL")
        declared = ", ".join(f"r{place} {kind}{nullable}" for place, kind in enumerate(types))
        held = ", ".join(f"r{place}" for place, _ in enumerate(types))
        action = some(
            "",
            " ON DELETE CASCADE",
            " ON UPDATE CASCADE",
            " DEFERRABLE INITIALLY DEFERRED",
            " ON DELETE SET NULL" if not nullable else "",
        )
        statements.append(
            f"CREATE TABLE refers{number} (no int PRIMARY KEY, {declared}, FOREIGN KEY ({held}) REFERENCES {t} ({primary}){action})"
        )
        statements.append(f"INSERT INTO refers{number} SELECT row_number() OVER (), {primary} FROM {t} LIMIT 20")
        if not nullable:
            statements.append(f"INSERT INTO refers{number} (no) VALUES (1000)")
    if pick():
        statements.append(f"CREATE STATISTICS together ON id, {k} FROM {t}")
    if pick():
        statements.append(
            f"COMMENT ON TABLE {t} IS 'it''s'; COMMENT ON COLUMN {t}.{k} IS 'the key'; ALTER TABLE {t} SET (fillfactor = 80)"
        )
    if pick():
        statements.append(f"ALTER TABLE {t} REPLICA IDENTITY {some('FULL', 'NOTHING')}")
    given: dict[str, object] = {"unique": some("global", "per_partition")}
    way = some("list", "list", "default", "hash")
    if way == "hash":
        given |= {"partition_by": "hash", "modulus": 3}
    elif way == "default":
        given["partitions"] = {"first": [values[0]], "rest": "default"}
    else:
        given["partitions"] = {f"part{number}": [value] for number, value in enumerate(values)}
    return statements, table, key, given


@pytest.mark.long
def test_any_table_is_migrated_verified_and_rolled_back(server: Server) -> None:
    @settings(
        max_examples=int(os.environ.get("RUNBOOK_EXAMPLES", "20")),
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if os.environ.get("CI") != "true" else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(tables())
    def holds(made: tuple[list[str], str, str, dict[str, object]]) -> None:
        statements, table, key, given = made
        name = f"any_{next(numbers)}"
        note(";\n".join(statements) + f"\n{given}")
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            try:
                goes_and_comes_back(server, server.url(name), statements, table, key, given)
            finally:
                connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    # The same ones each time, so that a failure is the change's.
    (holds if "RUNBOOK_EXAMPLES" in os.environ else seed(server.version)(holds))()


def goes_and_comes_back(
    server: Server, database: str, statements: list[str], table: str, key: str, given: dict[str, object]
) -> None:
    """What 00 refuses is untouched; anything else is carried over, verified, dumped and restored, and comes back as it was."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(FIRST)
        for statement in statements:
            connection.execute(statement.encode())
    before, everything = schema(database), dump(database, "--exclude-schema=runbook")
    with suppress(PlanBlocked):
        run = plan(database, table, key, **given)
        walk(run, FORWARD)
        assert differences(before, schema(database), run) == []
        verify.check(run)
        assert restored(server, database) == dump(database)
        back(run)
    assert dump(database, "--exclude-schema=runbook") == everything
