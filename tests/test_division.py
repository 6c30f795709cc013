"""Every way to partition, by keys of every kind: the same walk, the same judge, and back to the same dump."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from click.testing import CliRunner

import runbook
from runbook import cli, verify
from runbook.changes import Rewritten
from runbook.errors import BadInput, PlanBlocked
from runbook.statements import spelled
from tests import migration
from tests.conftest import fresh
from tests.servers import Server
from tests.walk import client, dump


class Case(NamedTuple):
    """A key's type, an expression over n = 1 … 60 that fills it, and how to divide by it."""

    type: str
    values: str
    given: dict[str, Any]
    leaves: int


def by_list(*values: Any, **more: Any) -> dict[str, Any]:
    return {"partitions": {f"p{number}": [value] for number, value in enumerate(values)} | more}


def by_range(**given: Any) -> dict[str, Any]:
    return {"partition_by": "range", **given}


def by_hash(modulus: int = 3) -> dict[str, Any]:
    return {"partition_by": "hash", "modulus": modulus}


LETTER = "chr(97 + n % 3)"
DAY = "timestamp '2024-01-30 22:00' + n * interval '9 hours'"
CASES = {
    "text by list": Case("text", LETTER, by_list("a", "b", "c"), 3),
    "text by list, several values and a default": Case("text", LETTER, by_list(rest="default") | {"partitions": {"ab": ["a", "b"], "rest": "default"}}, 2),
    "text by list, one a value": Case("text", LETTER, {}, 3),
    "varchar by list": Case("varchar(7)", LETTER, by_list("a", "b", rest="default"), 3),
    "char by list": Case("char(5)", LETTER, by_list("a", "b", "c"), 3),
    "enum by list": Case("mood", f"{LETTER}::mood", by_list("a", "b", "c"), 3),
    "domain by list": Case("letter", LETTER, by_list("a", "b", "c"), 3),
    "boolean by list": Case("boolean", "n % 3 = 0", by_list(True, False), 2),
    "integer by list": Case("integer", "n % 3 - 1", by_list(-1, 0, 1), 3),
    "bigint by list": Case("bigint", "n % 3 * 5000000000", by_list(0, 5000000000, rest="default"), 3),
    "numeric by list, equal but for its scale": Case("numeric", "(ARRAY[1, 1.0, 1.50, 2])[1 + n % 4]", by_list(1, "1.5", "2.00"), 3),
    "uuid by list": Case("uuid", "md5((n % 2)::text)::uuid", {}, 2),
    "date by list": Case("date", "date '2024-01-01' + n % 3", {}, 3),
    "text by range": Case("text", LETTER, by_range(partitions={"low": [None, "b"], "high": ["b", None]}), 2),
    "varchar by range": Case("varchar(9)", LETTER, by_range(partitions={"low": ["a", "b"], "high": ["b", "d"]}), 2),
    "domain by range": Case("letter", LETTER, by_range(partitions={"low": ["a", "b"], "rest": "default"}), 2),
    "enum by range": Case("mood", f"{LETTER}::mood", by_range(partitions={"low": ["a", "b"], "high": ["b", None]}), 2),
    "integer by steps": Case("integer", "n - 30", by_range(every=25, ahead=1), 5),
    "smallint by range": Case("smallint", "n", by_range(partitions={"low": [1, 31], "high": [31, 99]}), 2),
    "bigint by steps": Case("bigint", "n * 1000000000000", by_range(every=20000000000000, ahead=2), 6),
    "numeric by steps": Case("numeric(8,2)", "n / 7.0", by_range(every=4, ahead=0), 3),
    "date by month": Case("date", f"({DAY})::date", by_range(every="month", ahead=1), 3),
    "date by week, with a default": Case("date", f"({DAY})::date", by_range(every="week", ahead=0, partitions={"rest": "default"}), 5),
    "timestamp by day": Case("timestamp", DAY, by_range(every="day", ahead=0), 23),
    "timestamptz by month": Case("timestamptz", f"({DAY}) AT TIME ZONE 'UTC'", by_range(every="month", ahead=2), 4),
    "timestamp by hour": Case("timestamp", "timestamp '2024-02-28 21:30' + n * interval '7 minutes'", by_range(every="hour", ahead=0), 8),
    "date by quarter": Case("date", f"({DAY})::date", by_range(every="quarter", ahead=2), 3),
    "timestamptz by year": Case("timestamptz(0)", f"({DAY}) AT TIME ZONE 'UTC'", by_range(every="year"), 4),
    "uuid by range": Case("uuid", "md5(n::text)::uuid", by_range(partitions={"low": [None, "80000000-0000-0000-0000-000000000000"], "rest": "default"}), 2),
    "text by hash": Case("text", "n::text", by_hash(), 3),
    "char by hash": Case("char(5)", "n::text", by_hash(), 3),
    "enum by hash": Case("mood", f"{LETTER}::mood", by_hash(2), 2),
    "domain by hash": Case("letter", LETTER, by_hash(2), 2),
    "integer by hash, with names": Case("integer", "n", by_hash(2) | {"partitions": {"even": [0], "odd": [1]}}, 2),
    "numeric by hash": Case("numeric", "n / 7.0", by_hash(), 3),
    "uuid by hash": Case("uuid", "md5(n::text)::uuid", by_hash(5), 5),
    "timestamptz by hash": Case("timestamptz", f"({DAY}) AT TIME ZONE 'UTC'", by_hash(), 3),
    "boolean by hash": Case("boolean", "n % 3 = 0", by_hash(2), 2),
}  # fmt: skip
SHORT = {"numeric by list, equal but for its scale", "timestamptz by month", "uuid by hash"}
TABLES = """
CREATE TYPE mood AS ENUM ('a', 'b', 'c');
CREATE DOMAIN letter AS text CHECK (length(VALUE) < 9);
CREATE TABLE things (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, kind {type} NOT NULL, note text UNIQUE, CHECK (id > 0));
CREATE INDEX ON things (kind, note);
CREATE TABLE notes (id int PRIMARY KEY, thing_id bigint NOT NULL REFERENCES things ON DELETE CASCADE, maybe_id bigint REFERENCES things);
CREATE INDEX ON notes (thing_id);
CREATE INDEX ON notes (maybe_id);
INSERT INTO things (kind, note) SELECT {values}, 'note ' || n FROM generate_series(1, 60) n;
INSERT INTO notes SELECT n, n, CASE WHEN n % 2 = 0 THEN n END FROM generate_series(1, 60) n;
"""


def prepare(sql: Any, type_: str, values: str) -> None:
    sql(TABLES.format(type=type_, values=values))
    sql("ANALYZE things")


def there_and_back(database: str, sql: Any, table: str = "things", key: str = "kind", **given: Any) -> runbook.ledger.Run:
    """Plan, migrate, verify every promise, write, roll back; the dump is what it was but for these writes."""
    before = dump(database, "--exclude-schema=runbook*")
    run = migration.forward(database, table=table, key=key, **given)
    verify.check(run)
    migration.back(run)
    assert dump(database, "--exclude-schema=runbook*") == before
    return run


@pytest.mark.parametrize("case", [pytest.param(each, marks=[] if each in SHORT else pytest.mark.long) for each in CASES])
def test_a_key_of_any_type_divides_the_table(database, sql, case):
    key_type, values, given, leaves = CASES[case]
    prepare(sql, key_type, values)
    before = dump(database, "--exclude-schema=runbook*")
    run = migration.plan(database, "things", "kind", **given)
    assert len(run.plan.partitions) == leaves
    assert run.plan.partition_by == "hash" or sum(partition.rows for partition in run.plan.partitions) == 60
    file = sql("SELECT pg_relation_filenode('notes')")
    migration.walk(run, migration.FORWARD)
    assert sql("SELECT pg_relation_filenode('notes')") == file, "a column that is added rewrites nothing"
    verify.check(run)
    counted = dict(sql("SELECT relname::text, count(*) FROM things t JOIN pg_class c ON c.oid = t.tableoid GROUP BY 1"))
    if run.plan.partition_by != "hash":
        assert counted == {each.name: each.rows for each in run.plan.partitions if each.rows}
    assert sql("SELECT count(*) FROM notes n JOIN things t ON t.id = n.thing_id AND t.kind = n.thing_kind") == [(60,)]
    assert sql("SELECT count(*) FROM notes n JOIN things t ON t.id = n.maybe_id AND t.kind = n.maybe_kind") == [(30,)]
    sql("INSERT INTO notes (id, thing_id, maybe_id) VALUES (99, 7, 8)")  # by code that does not know the new columns
    assert sql("SELECT count(*) FROM notes n JOIN things t ON (t.id, t.kind) = (n.thing_id, n.thing_kind) WHERE n.id = 99") == [
        (1,)
    ]
    for row in ("(98, 999, 8)", "(98, 7, 999)"):
        with pytest.raises(psycopg.errors.ForeignKeyViolation) as refused:
            sql(f"INSERT INTO notes (id, thing_id, maybe_id) VALUES {row}")
        assert refused.value.diag.constraint_name == ("notes_thing_id_fkey" if "(98, 999" in row else "notes_maybe_id_fkey")
    sql("DELETE FROM notes WHERE id = 99")
    migration.back(run)
    assert dump(database, "--exclude-schema=runbook*") == before


@pytest.mark.long
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(by_list("a", "b", "c"), marks=pytest.mark.long),
        by_range(every=30),
        pytest.param(by_hash(2), marks=pytest.mark.long),
    ],
    ids=["list", "range", "hash"],
)
def test_null_becomes_the_value_that_was_chosen(database, sql, given):
    by_letter = given.get("partition_by", "list") == "list"
    prepare(sql, "text" if by_letter else "integer", LETTER if by_letter else "n")
    sql("ALTER TABLE things ALTER kind DROP NOT NULL; UPDATE things SET kind = NULL WHERE id % 10 = 0")
    with pytest.raises(PlanBlocked, match="6 rows whose kind is NULL"):
        migration.plan(database, "things", "kind", **given)
    there_and_back(database, sql, null_value="a" if by_letter else 1, **given)


@pytest.mark.long
def test_null_may_have_a_partition_of_its_own(database, sql):
    sql("CREATE TABLE things (id int PRIMARY KEY, kind text, note text)")
    sql("INSERT INTO things SELECT n, CASE WHEN n % 3 > 0 THEN 'a' END, 'note ' || n FROM generate_series(1, 60) n")
    partitions = {"p_a": ["a"], "p_none": [None, "none"]}
    draft = runbook.draft(database=database, table="things", key="kind", partitions=partitions, unique="per_partition")
    assert "the primary key becomes a unique key (id, kind)" in draft.findings().to_string()
    assert draft.values()["partition"].to_list() == ["p_a", "p_none"]
    before = dump(database, "--exclude-schema=runbook*")
    run = draft.freeze()
    migration.walk(run, migration.FORWARD)
    verify.check(run)
    assert sql("SELECT count(*) FROM p_none WHERE kind IS NULL") == [(20,)]
    sql("INSERT INTO things VALUES (61, NULL, 'new'), (62, 'none', 'new')")
    sql("UPDATE things SET note = 'changed' WHERE id = 3")
    if int(sql("SHOW server_version_num")[0][0]) >= 150000:
        with pytest.raises(psycopg.errors.UniqueViolation):
            sql("INSERT INTO things VALUES (3, NULL, 'twice')")
    migration.back(run)
    assert sql("SELECT id, kind, note FROM things WHERE note IN ('new', 'changed') ORDER BY id") == [
        (3, None, "changed"), (61, None, "new"), (62, "none", "new")]  # fmt: skip
    sql("DELETE FROM things WHERE id > 60; UPDATE things SET note = 'note 3' WHERE id = 3")
    assert dump(database, "--exclude-schema=runbook*") == before


def test_a_partition_for_null_is_refused_where_rows_are_referenced(database, sql):
    prepare(sql, "text", LETTER)
    sql("ALTER TABLE things ALTER kind DROP NOT NULL")
    with pytest.raises(PlanBlocked, match="cannot be referenced by a composite key"):
        migration.plan(database, "things", "kind", partitions={"p": ["a", "b", "c"], "q": [None]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every": "day"}, "every is for partition_by"),
        ({"modulus": 3}, "modulus is for partition_by"),
        (by_hash(1), "at least 2"),
        (by_hash(2) | {"partitions": {"a": [0], "b": [0]}}, "each remainder"),
        (by_range(), "say every"),
        (by_range(every="month"), "does not fit"),
        (by_range(partitions={"a": [1]}), "has 1 bounds"),
        (by_range(partitions={"a": ["minvalue", 40]}), r'written null, as {"a": \[null, 40\]}'),
        (by_range(partitions={"a": [1, 40], "b": [30, 90]}), "^PostgreSQL refuses.*overlap(?!.*fits no partition)"),
        (by_range(partitions={"a": [1, 90], "b": [30, 40]}), "^PostgreSQL refuses.*overlap(?!.*fits no partition)"),
        (by_range(partitions={"a": [40, 1]}), "refuses to partition|fits no partition"),
        (by_range(partitions={"a": [1, 40]}), "fits no partition"),
        (by_range(partitions={"a": ["x", 40]}), "is not a value"),
        (by_range(every=1_000_000, partitions={"rest": "default", "more": "default"}), "more than one default"),
        ({"partitions": {"a": [1], "b": [None]}, "null_value": 1}, "only one of them"),
        ({"null_value": "x"}, "correct it in null_value"),
        (by_range(every=0), "every is 0, which does not fit"),
        (by_range(every=1.5), "every is 1.5 .*must be hour, day, .* or a whole number"),
        (by_hash(2000), "more than 1,000"),
    ],
)
def test_a_division_that_cannot_be_is_refused_before_anything_is_made(database, sql, given, said):
    prepare(sql, "integer", "n")
    before = dump(database, "--exclude-schema=runbook*")
    with pytest.raises((BadInput, PlanBlocked), match=said):
        migration.plan(database, "things", "kind", **given)
    assert dump(database, "--exclude-schema=runbook*") == before


def test_bounds_of_text_are_no_words_for_the_ends(database, sql):
    prepare(sql, "text", LETTER)
    for partitions, written in (
        ({"a": ["MINVALUE", "n"]}, '{"a": [null, "n"]}'),
        ({"a": ["a", "MaxValue "]}, '{"a": ["a", null]}'),
    ):
        with pytest.raises(BadInput, match=re.escape(f"are written null, as {written}")):
            migration.plan(database, "things", "kind", **by_range(partitions=partitions))


def test_rows_that_are_null_in_the_key_are_no_empty_table(database, sql):
    sql("CREATE TABLE things (id int PRIMARY KEY, kind text)")
    with pytest.raises(BadInput, match=r"^things has no rows to take the partitions from: name them in partitions\.$"):
        migration.plan(database, "things", "kind")
    sql("INSERT INTO things SELECT generate_series(1, 50)")
    with pytest.raises(BadInput, match=r"^things has 50 rows, all with NULL in kind: set null_value"):
        migration.plan(database, "things", "kind")


@pytest.mark.parametrize("key_type", ["json", "point", "pair"])
def test_a_key_that_cannot_be_compared_is_refused(database, sql, key_type):
    """A composite type's values can be only with a cast: WHERE kind = '(1,2)' is an error (0A000)."""
    sql("CREATE TYPE pair AS (a int, b numeric)")
    sql(f"CREATE TABLE things (id int PRIMARY KEY, kind {key_type} NOT NULL)")
    for given in ({"partitions": {"rest": "default"}}, by_hash(2), by_range(partitions={"rest": "default"})):
        with pytest.raises((BadInput, PlanBlocked), match=r"cannot be divided|refuses to partition"):
            migration.plan(database, "things", "kind", **given)


def test_what_old_rows_break_and_what_will_be_refused_is_said_with_its_cause(database, sql):
    sql("CREATE DOMAIN letters AS text; CREATE TABLE kinds (kind letters PRIMARY KEY); CREATE FUNCTION fine(int) RETURNS bool IMMUTABLE LANGUAGE sql AS"
        " 'SELECT true'; CREATE TABLE things (id int PRIMARY KEY, kind letters REFERENCES kinds ON DELETE SET NULL, CONSTRAINT ck CHECK (fine(id)));"
        " INSERT INTO kinds VALUES ('a'), ('b'); INSERT INTO things SELECT n, 'a' FROM generate_series(1, 9) n")  # fmt: skip

    def found(**given: Any) -> str:
        return " ".join(
            f"{each.sentence} {each.way_out}" for each in runbook.draft(database=database, table="things", **given).plan.findings
        )

    assert "a row of public.kinds that is deleted or changed sets kind to NULL by things_kind_fkey, which is refused" in found(
        key="kind"
    )
    assert "one that comes before stops the cut-over" in found(key="id", **by_range(every=5))
    sql("CREATE OR REPLACE FUNCTION fine(int) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT false'")
    assert 'violates check constraint "ck". Correct what it names, the rows' in found(key="kind")
    sql("ALTER DOMAIN letters ADD CONSTRAINT b_only CHECK (VALUE = 'b') NOT VALID")
    with pytest.raises(
        BadInput, match=r'\'a\' is not a value that kind \(public.letters\) can have \(.* "b_only"\): .* the rows that hold it'
    ):
        found(key="kind")


def test_a_day_has_no_hours(database, sql):
    prepare(sql, "date", f"({DAY})::date")
    with pytest.raises(BadInput, match=r"every is 'hour', which does not fit kind \(date\)"):
        migration.plan(database, "things", "kind", **by_range(every="hour"))


KEYS = {
    "part of the primary key": "CREATE TABLE things (kind int, id int, note text, PRIMARY KEY (kind, id));"
    " CREATE TABLE notes (id int PRIMARY KEY, k int NOT NULL, i int NOT NULL, FOREIGN KEY (k, i) REFERENCES things ON UPDATE CASCADE)",
    "all of the primary key": "CREATE TABLE things (id int, kind int PRIMARY KEY, note text);"
    " CREATE TABLE notes (id int PRIMARY KEY, k int REFERENCES things)",
    "beside a primary key of several columns": "CREATE TABLE things (a text, b timestamptz, c numeric(6,2), d uuid, kind int NOT NULL, id int,"
    " note text, PRIMARY KEY (c, a, d, b)); CREATE TABLE notes (id int PRIMARY KEY, x numeric(6,2), a text, y uuid, z timestamptz, why text,"
    " FOREIGN KEY (x, a, y, z) REFERENCES things (c, a, d, b) ON DELETE CASCADE)",
    "of a table that nobody references": "CREATE TABLE things (id int PRIMARY KEY, kind int NOT NULL, note text)",
    "and a deferrable key": "CREATE TABLE things (id int PRIMARY KEY, kind int NOT NULL, note text);"
    " CREATE TABLE notes (id int PRIMARY KEY, i int NOT NULL REFERENCES things DEFERRABLE INITIALLY DEFERRED)",
    "and a key that matches fully": "CREATE TABLE things (id int PRIMARY KEY, kind int NOT NULL, note text);"
    " CREATE TABLE notes (id int PRIMARY KEY, i int REFERENCES things MATCH FULL ON UPDATE CASCADE)",
    "and two keys over one column": "CREATE TABLE things (id int PRIMARY KEY, kind int NOT NULL, note text); CREATE TABLE notes (id int PRIMARY KEY,"
    " i int NOT NULL CONSTRAINT one REFERENCES things CONSTRAINT two REFERENCES things ON DELETE CASCADE)",
}  # fmt: skip
FILL = {
    "part of the primary key": ("n % 3, n, 'x'", "n, n % 3, n"),
    "all of the primary key": ("n, n, 'x'", "n, n"),
    "beside a primary key of several columns": (
        "'a', '2024-01-01', n, md5(n::text)::uuid, n % 3, n, 'x'", "n, n, 'a', md5(n::text)::uuid, '2024-01-01'"),
    "of a table that nobody references": ("n, n % 3, 'x'", ""),
}  # fmt: skip
KINDS = {"list": {"partitions": {"p": [0, 1, 2], "rest": "default"}}, "range": by_range(every=2, ahead=30), "hash": by_hash(2)}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["range", *(pytest.param(each, marks=pytest.mark.long) for each in ("list", "hash"))])
@pytest.mark.parametrize(
    "keys", [each if each in list(KEYS)[:3:2] else pytest.param(each, marks=pytest.mark.long) for each in KEYS]
)
def test_primary_and_foreign_keys_of_any_form(database, sql, keys, kind):
    sql(KEYS[keys])
    things, notes = FILL.get(keys, ("n, n % 3, 'x'", "n, n"))
    sql(f"INSERT INTO things SELECT {things} FROM generate_series(1, 40) n")
    if notes:
        sql(f"INSERT INTO notes SELECT {notes} FROM generate_series(1, 40) n")
    there_and_back(database, sql, **KINDS[kind])


@pytest.mark.long
def test_on_delete_set_null_leaves_the_key_column_alone(database, sql):
    prepare(sql, "integer", "n")
    sql("ALTER TABLE notes DROP CONSTRAINT notes_maybe_id_fkey, ADD FOREIGN KEY (maybe_id) REFERENCES things ON DELETE SET NULL")
    run = migration.forward(database, table="things", key="kind", **by_range(every=20))
    sql(
        "DELETE FROM notes WHERE thing_id = 4; UPDATE notes SET maybe_id = 4, maybe_kind = NULL WHERE id = 6; DELETE FROM things WHERE id = 4"
    )
    assert sql("SELECT maybe_id FROM notes WHERE id = 6") == [(None,)]
    verify.check(run)
    migration.back(run)
    assert sql("SELECT maybe_id FROM notes WHERE id = 6") == [(None,)]


def test_what_a_type_can_be_and_no_partition_takes_is_named(database, sql):
    sql(
        "CREATE TYPE mood AS ENUM ('ok', 'bad', 'odd'); CREATE TABLE things (id int PRIMARY KEY, kind mood NOT NULL, flag bool NOT NULL)"
    )
    sql("INSERT INTO things VALUES (1, 'bad', true)")
    for given, left in (
        ({"key": "kind"}, "'ok', 'odd', which kind"), ({"key": "flag"}, "'false', which flag"),
        ({"key": "kind", "partitions": {"rest": "default"}}, ""), ({"key": "flag", **by_list(True, False)}, ""),
    ):  # fmt: skip
        said = [each.sentence for each in runbook.draft(database=database, table="things", **given).plan.findings]
        assert [left in each for each in said if each.startswith("No partition takes")] == [True] * bool(left)


@pytest.mark.parametrize(("domain", "left"), [
    ("DOMAIN of_things AS text DEFAULT 'done' CHECK (VALUE IN ('new', 'done'))", "takes 'done', which state (of_things_check)"),
    ("DOMAIN inner_of AS varchar(9) DEFAULT 'done' CHECK (VALUE IN ('new', 'done')); CREATE DOMAIN of_things AS inner_of CHECK (VALUE <> 'odd')",
     "takes 'done', which state (inner_of_check)"),
    ("TYPE mood AS ENUM ('new', 'gone', 'odd'); CREATE DOMAIN of_things AS mood DEFAULT 'gone' CHECK (VALUE <> 'odd')", "takes 'gone', which state"),
])  # fmt: skip
def test_what_a_domain_allows_and_takes_by_default_is_named(database, sql, domain, left):
    sql(
        f"CREATE {domain}; CREATE TABLE things (id int PRIMARY KEY, state of_things NOT NULL); INSERT INTO things VALUES (1, 'new')"
    )
    said = [each.sentence for each in runbook.draft(database=database, table="things", key="state").plan.findings]
    assert [left in each for each in said if each.startswith("No partition takes")] == [True]
    assert len([each for each in said if "(23514)" in each and each.startswith("The default of state ('")]) == 1


@pytest.mark.parametrize(("column", "left"), [
    ("state text NOT NULL CHECK (state IN ('new', 'it''s', 'done'))", "\"it's\", 'done', which state (things_state_check)"),
    ("state varchar(50) NOT NULL CHECK (state = 'new' OR state = 'gone')", "'gone', which state"),
    ("state text NOT NULL CHECK (state = 'new' OR state LIKE 'of %')", ""),
    ("state text NOT NULL CHECK (state IN ('new', 'done', 'odd')), CHECK (state <> 'odd')", "takes 'done', which"),
    ("state bigint NOT NULL CHECK (state IN (0, 1, 2))", "takes '1', '2', which state (things_state_check)"),
    ("state numeric NOT NULL CHECK (state = 0 OR state = 7)", "takes '7', which"),
    ("state boolean NOT NULL CHECK (NOT state)", ""),
    ("state text NOT NULL CHECK (length(state) = 3)", ""),
    ("state int NOT NULL CHECK (state % 2 = 0)", ""),
    ("state text NOT NULL CHECK (state <> 'odd' AND length(state) < 50)", ""),
    ("state text NOT NULL CHECK (state IN ('new', 'done') AND id > 0)", ""),  # not the key's alone
])  # fmt: skip
def test_what_a_check_allows_and_no_partition_takes_is_named(database, sql, column, left):
    sql(
        f"CREATE TABLE things (id int PRIMARY KEY, {column}); INSERT INTO things VALUES (1, '{'new' if 'text' in column or 'char' in column else 0}')"
    )
    said = [each.sentence for each in runbook.draft(database=database, table="things", key="state").plan.findings]
    assert [left in each for each in said if each.startswith("No partition takes")] == [True] * bool(left)


@pytest.mark.parametrize(("state", "given", "warned"), [
    ("text DEFAULT 'new'", {}, True), ("text DEFAULT 'done'", {}, False), ("text DEFAULT NULL", {}, False),
    ("text DEFAULT 'new'", {"partitions": {"done": ["done"], "rest": "default"}}, False),
    ("text DEFAULT current_setting('app.state')", {}, False),
    ("text DEFAULT current_setting('app.state', true)", {}, False),
    ("date DEFAULT current_date", by_range(partitions={"old": ["2020-01-01", "2021-01-01"]}), True),
    ("date DEFAULT current_date", by_range(partitions={"old": ["2020-01-01", None]}), False),
    ("serial", by_range(every=10), False),
])  # fmt: skip
def test_a_default_that_no_partition_takes_is_named(database, sql, state, given, warned):
    """Else every INSERT that leaves the key out fails after the cut-over."""
    sql(f"CREATE TABLE things (id serial PRIMARY KEY, state {state})")
    value = {"text": "done", "date": "2020-06-01"}.get(state.split()[0], 1)
    sql(f"INSERT INTO things (state) VALUES ('{value}')")
    found = runbook.draft(database=database, table="things", key="state", **given).plan.findings
    assert [each.level for each in found if "fits no partition" in each.sentence] == ["warning"] * warned
    assert sql("SELECT last_value FROM things_id_seq") == [(1,)], "no sequence counts because somebody looks"


def test_what_the_plan_says_of_a_default_fails_no_verification(database, sql):
    sql("CREATE TABLE things (id int PRIMARY KEY, state text DEFAULT 'new'); INSERT INTO things VALUES (1, 'done')")
    run = migration.forward(database, table="things", key="state")
    verify.check(run)
    seen = {each.promise: each for each in verify.seen(run)}["A row that leaves state out gets its default"]
    assert (seen.verdict, seen.seen) == ("not tried", "no partition takes it, as the plan says")


@pytest.mark.long
def test_the_plan_says_that_a_referenced_row_cannot_move_on_14(database, sql):
    sql("CREATE TABLE things (id int PRIMARY KEY, kind int NOT NULL); INSERT INTO things VALUES (1, 1), (2, 2)")
    sql("CREATE TABLE notes (thing_id int REFERENCES things); INSERT INTO notes VALUES (1)")
    run = migration.forward(database, table="things", key="kind")
    old = sql("SHOW server_version_num")[0][0].startswith("14")
    assert any("which notes_thing_id_fkey refuses" in finding.sentence for finding in run.plan.findings) == old
    verify.check(run)
    if old:
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            sql("UPDATE things SET kind = 2 WHERE id = 1")
    else:
        sql("UPDATE things SET kind = 2 WHERE id = 1")
        assert sql("SELECT thing_kind FROM notes") == [(2,)]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["list", "range"])
def test_thirty_tables_reference_it(database, sql, kind):
    sql(
        "CREATE TABLE things (id int PRIMARY KEY, kind int NOT NULL, note text); INSERT INTO things SELECT n, n % 3 FROM generate_series(1, 40) n"
    )
    for number in range(30):
        sql(f"CREATE TABLE notes_{number} (id int PRIMARY KEY, thing_id int {'NOT NULL' if number % 2 else ''} REFERENCES things);"
            f" CREATE INDEX ON notes_{number} (thing_id); INSERT INTO notes_{number} SELECT n, n FROM generate_series(1, 40) n")  # fmt: skip
    run = there_and_back(database, sql, **KINDS[kind])
    assert len(run.plan.references) == 30


@pytest.mark.long
def test_tables_of_one_name_in_two_schemas_do_not_meet(database, sql):
    for schema in ("public", "other"):
        sql(f"CREATE SCHEMA IF NOT EXISTS {schema}; CREATE TABLE {schema}.things (id int PRIMARY KEY, kind int NOT NULL, note text);"
            f" CREATE TABLE {schema}.notes (id int PRIMARY KEY, thing_id int NOT NULL REFERENCES {schema}.things);"
            f" INSERT INTO {schema}.things SELECT n, n % 3, '{schema}' FROM generate_series(1, 40) n;"
            f" INSERT INTO {schema}.notes SELECT n, n FROM generate_series(1, 40) n")  # fmt: skip
    before = dump(database, "--exclude-schema=runbook*")
    runs = [migration.forward(database, table=name, key="kind", **KINDS["range"]) for name in ("other.things", "public.things")]
    for run in runs:
        verify.check(run)
    assert sql("SELECT DISTINCT note FROM other.things") == [("other",)]
    for run in runs:
        migration.back(run)
    assert dump(database, "--exclude-schema=runbook*") == before


@pytest.mark.long
def test_partitions_may_have_the_names_that_the_runbook_uses_itself(database, sql):
    prepare(sql, "integer", "n % 3")
    there_and_back(database, sql, partitions={"changes": [0], "changes_back": [1], "references_1": [2]})


def test_a_day_begins_at_midnight_utc_wherever_the_operator_sits(database, sql):
    prepare(sql, "timestamptz", f"({DAY}) AT TIME ZONE 'UTC'")
    sql("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET TimeZone = ''Asia/Tokyo''', current_database()); END $$")
    sql("ALTER TABLE things ALTER kind SET DEFAULT '2024-02-01 00:00+00'")
    run = there_and_back(database, sql, **by_range(every="month", ahead=0))
    assert [each.name for each in run.plan.partitions] == ["things_2024_01", "things_2024_02"]
    assert run.plan.partitions[0].bound == "FOR VALUES FROM ('2024-01-01 00:00:00+00') TO ('2024-02-01 00:00:00+00')"


SELF = """
CREATE TABLE people (id int PRIMARY KEY, kind text NOT NULL, boss int REFERENCES people ON DELETE CASCADE, friend int NOT NULL REFERENCES people);
CREATE INDEX ON people (boss); CREATE INDEX ON people (friend);
INSERT INTO people SELECT n, CASE WHEN n % 4 = 0 THEN 'b' ELSE 'a' END, nullif(n / 2, 0), 1 + n % 60 FROM generate_series(1, 60) n;
"""
IN_STEP = "SELECT count(*) FROM people p JOIN people b ON (b.id, b.kind) = (p.boss, p.boss_kind) JOIN people f ON (f.id, f.kind) = (p.friend, p.friend_kind)"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["list", pytest.param("hash", marks=pytest.mark.long)])
def test_a_table_that_references_itself(database, sql, kind):
    sql(SELF)
    before = dump(database, "--exclude-schema=runbook*")
    run = migration.plan(database, "people", "kind", **({} if kind == "list" else by_hash()))
    migration.walk(run, migration.FORWARD, last="replay")
    # A row whose children were copied with what it was; one that refers to itself; one that changed and was changed back.
    sql(
        "UPDATE people SET kind = 'b' WHERE id = 3; UPDATE people SET kind = 'a' WHERE id = 8; INSERT INTO people VALUES (61, 'b', 61, 61)"
    )
    migration.walk(run, migration.FORWARD, first="replay", last="compare")
    sql("UPDATE people SET kind = 'a' WHERE id = 3; UPDATE people SET boss = 8, friend = 61 WHERE id IN (3, 50)")
    migration.walk(run, migration.FORWARD, first="compare")
    assert sql(IN_STEP) == [(60,)]  # the first has no boss
    verify.check(run)
    sql("INSERT INTO people (id, kind, boss, friend) VALUES (62, 'a', 62, 62), (63, 'b', 4, 62)")  # by code that does not know
    if int(sql("SHOW server_version_num")[0][0]) >= 150000:
        sql("UPDATE people SET kind = 'b' WHERE id = 62; UPDATE people SET kind = 'a' WHERE id = 4")
    assert sql(IN_STEP) == [(62,)]
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        sql("INSERT INTO people (id, kind, boss, friend) VALUES (64, 'a', 999, 1)")
    migration.back(run)
    assert sql("SELECT count(*), count(boss) FROM people") == [(63, 62)]
    sql("TRUNCATE people; DELETE FROM people")
    sql(
        "INSERT INTO people SELECT n, CASE WHEN n % 4 = 0 THEN 'b' ELSE 'a' END, nullif(n / 2, 0), 1 + n % 60 FROM generate_series(1, 60) n"
    )
    assert dump(database, "--exclude-schema=runbook*") == before


@pytest.mark.long
def test_rows_of_a_table_that_references_itself_are_settled_with_the_row_they_follow(database, sql):
    sql(SELF)
    run = migration.plan(database, "people", "kind")
    migration.walk(run, migration.FORWARD, last="copy")
    sql("UPDATE people SET kind = 'b' WHERE id IN (1, 5, 7); UPDATE people SET kind = 'a' WHERE id = 12")
    migration.walk(run, migration.FORWARD, first="settle")
    assert sql(IN_STEP) == [(59,)]
    verify.check(run)
    migration.back(run)


@pytest.fixture
def quiet(server: Server) -> Iterator[str]:
    """A second database, to which nobody writes."""
    yield from fresh(server, "template1")


@pytest.mark.long
def test_the_script_of_any_division_ends_where_the_notebooks_end(database, sql, quiet):
    tables = {"people": (SELF, {"partition_by": "hash", "modulus": 2}),
              "things": (TABLES.format(type="date", values=f"({DAY})::date"), {"partition_by": "range", "every": "month"})}  # fmt: skip
    for table, (text, given) in tables.items():
        client("psql", "--no-psqlrc", "--quiet", quiet, text=text)
        client("psql", "--no-psqlrc", "--quiet", database, text=text)
        words = [word for name, value in {"table": table, "key": "kind", **given}.items() for word in ("-p", name, str(value))]
        script = CliRunner().invoke(cli.main, ["sql", "--database", quiet, *words])
        assert script.exit_code == 0, script.output
        client("psql", "--no-psqlrc", "--quiet", quiet, text=script.output)
        migration.forward(database, table=table, key="kind", **given)
    hidden = ("--exclude-schema=runbook*",)
    assert dump(quiet, *hidden) == dump(database, *hidden)


def test_a_key_of_a_domain_that_forbids_null_may_be_truncated_at_any_time(database, sql):
    """The log notes a TRUNCATE by NULLs, also where a replica's triggers fire."""
    replica = "SET session_replication_role = replica"
    sql("CREATE DOMAIN number AS int NOT NULL; CREATE TABLE things (id number PRIMARY KEY, kind text NOT NULL);"
        " INSERT INTO things SELECT n, 'x' FROM generate_series(1, 9) n")  # fmt: skip
    run = migration.plan(database, "things", "kind")
    migration.walk(run, migration.FORWARD, last="keys check")
    noted = "SELECT EXISTS (SELECT FROM {} l WHERE l IS NULL)"
    sql(f"{replica}; TRUNCATE things; INSERT INTO things VALUES (77, 'x')")
    assert sql(noted.format(spelled(run.names["log"]))) == [(True,)]
    with pytest.raises(Rewritten):
        migration.walk(run, migration.FORWARD, first="approval")
    migration.walk(run, migration.FORWARD, first="copy")
    sql(f"{replica}; TRUNCATE things; INSERT INTO things VALUES (78, 'x')")
    assert sql(noted.format(spelled(run.names["back"]))) == [(True,)]
    migration.back(run)
    assert sql("SELECT id FROM things") == [(78,)]


def test_rows_that_become_doubles_when_null_is_filled_in_stop_the_plan(database: str, sql: Any) -> None:
    """Of NULL a unique key takes any number."""
    sql("CREATE TABLE t (id int PRIMARY KEY, k text, email text); INSERT INTO t SELECT n, CASE WHEN n % 2 = 0 THEN 'x' END, 'e' || n"
        " FROM generate_series(1, 100) n; INSERT INTO t VALUES (200, NULL, 'dup'), (201, NULL, 'dup'), (202, NULL, NULL); ALTER TABLE t ADD UNIQUE (k, email)")  # fmt: skip
    given = {"partitions": {"t_x": ["x"], "t_rest": "default"}, "unique": "per_partition"}
    with pytest.raises(
        PlanBlocked, match=r"1 row of public\.t would be doubles in t_k_email_key \(k, email\) once NULL in k is 'none'"
    ) as refused:
        runbook.draft(database=database, table="t", key="k", null_value="none", **given).freeze()
    assert "dup" not in str(refused.value).replace("duplicate", "").replace("doubles", "")
    sql("UPDATE t SET email = 'other' WHERE id = 201; CREATE UNIQUE INDEX ON t (k, lower(email))")
    migration.walk(migration.plan(database, "t", "k", null_value="none", **given), migration.FORWARD)


def test_years_before_christ_have_names_of_their_own(database: str, sql: Any) -> None:
    sql(
        "CREATE TABLE t (id int PRIMARY KEY, at date NOT NULL); INSERT INTO t VALUES (1, '0003-03-15 BC'), (2, '0001-01-01 BC'), (3, '0002-12-31')"
    )
    run = migration.plan(database, "t", "at", partition_by="range", every="year", ahead=0)
    assert [each.name for each in run.plan.partitions] == ["t_0003_bc", "t_0002_bc", "t_0001_bc", "t_0001", "t_0002"]
    migration.walk(run, migration.FORWARD)
    assert sql("SELECT tableoid::regclass::text FROM t ORDER BY id") == [("t_0003_bc",), ("t_0001_bc",), ("t_0002",)]


def test_a_step_far_too_small_fills_nobodys_disk(database, sql):
    sql("CREATE TABLE events (id bigint PRIMARY KEY); INSERT INTO events VALUES (1), (1099511627776000)")
    sql("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET temp_file_limit = ''10MB''', current_database()); END $$")
    with pytest.raises(BadInput, match="more than 1,000 partitions of events"):
        migration.plan(database, "events", "id", partition_by="range", every=1000)


def test_what_null_becomes_has_a_partition_too_where_none_is_named(database, sql):
    sql("CREATE TABLE things (id int PRIMARY KEY, kind text); INSERT INTO things VALUES (1, 'a'), (2, NULL)")
    run = migration.forward(database, table="things", key="kind", null_value="none")
    assert sql("SELECT tableoid::regclass::text, id FROM things ORDER BY id") == [("things_a", 1), ("things_none", 2)]
    verify.check(run)


def test_bounds_of_one_number_in_two_forms_meet(database, sql):
    sql(
        "CREATE TABLE k (id int PRIMARY KEY, d numeric NOT NULL); INSERT INTO k SELECT n, n / 100.0 FROM generate_series(1, 300) n"
    )
    run = migration.plan(database, "k", "d", **by_range(partitions={"k1": [0, "1.00"], "k2": ["1.0", "5"]}))
    assert [(each.name, each.rows) for each in run.plan.partitions] == [("k1", 99), ("k2", 201)]
    with pytest.raises(PlanBlocked, match=r"'from 1\.00?' \(201\)"):
        migration.plan(database, "k", "d", **by_range(partitions={"k1": [0, "1.00"], "k2": [4, 5]}))
