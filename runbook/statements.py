"""The SQL files: named statements, composed only by psycopg."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeAlias

from psycopg import sql

from runbook.errors import RunbookError

Value: TypeAlias = sql.Composable | tuple[str, ...] | str | int | float | bool | list[str] | list[int] | list[str | None] | None
PACKAGE = Path(__file__).parent
TYPE = r"(?:\"[^\"]+\"|\w+)(?:\.(?:\"[^\"]+\"|\w+))?(?: varying)?(?:\(\d+\))?"
ELEMENT = r"(?:'(?:[^']|'')*'|NULL)::"
ARRAY = re.compile(
    rf"(?P<body>\$(?P<tag>\w*)\$.*?\$(?P=tag)\$)|(?P<open>\()?(?P<array>ARRAY\[{ELEMENT}(?P<type>{TYPE})(?:, {ELEMENT}(?P=type))*\])(?(open)\))::",
    re.DOTALL,
)
FIRST_WORD = re.compile(r"(?:\s*--.*\n)*\s*\(*(?:SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|TABLE)\b")


def folder(name: str) -> Path:
    """Where `notebooks` or `sql` lies: inside an installed package, else beside it (an editable install)."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


@cache
def _load(group: str) -> dict[str, str]:
    statements: dict[str, list[str]] = {}
    body: list[str] = []  # what stands before the first name describes the file
    for line in (folder("sql") / f"{group}.sql").read_text(encoding="utf-8").splitlines():
        if line.startswith("-- name:"):
            body = statements.setdefault(line.removeprefix("-- name:").strip(), [])
        else:
            body.append(line)
    return {name: "\n".join(body).strip().rstrip(";") for name, body in statements.items()}


def statement(name: str, /, **names: Value) -> sql.Composed:
    """The statement `group.name` of sql/group.sql with its placeholders filled in: a tuple is an identifier, anything
    else that is not composed yet is a literal.

    Raises RunbookError when the file has no such statement, and KeyError for a placeholder left empty.
    """
    group, _, short = name.partition(".")
    try:
        text = _load(group)[short]
    except KeyError:
        raise RunbookError(f"sql/{group}.sql has no statement named {short}.") from None
    return sql.SQL(text).format(**{key: composed(value) for key, value in names.items()})


def closed_schema(name: str, *, there: bool = False) -> Iterator[sql.Composed]:
    """Makes a schema that nobody but its owner may use, whatever default privileges say; it may be `there` already."""
    yield statement("ddl.create_schema_if_none" if there else "ddl.create_schema", schema=(name,))
    yield statement("ddl.close_schema", schema_name=name)


def composed(value: Value) -> sql.Composable:
    """A tuple as a quoted identifier, composed SQL as it is, anything else as a literal."""
    if isinstance(value, sql.Composable):
        return value
    return sql.Identifier(*value) if isinstance(value, tuple) else sql.Literal(value)


def spelled(value: Value) -> str:
    """As `composed`, as text."""
    return composed(value).as_string(None)


def sent(text: str) -> sql.SQL:
    """A statement as it is sent: pg_stat_statements shows it with our name, whatever it is about, and nobody takes it for one of
    the application's. Within it: of what stands before a statement or after it not every version keeps all. Of several statements
    in one text it is the first; the others say it themselves where they name one of the application's tables."""
    found = FIRST_WORD.match(text)
    return sql.SQL(f"{found[0]} /* runbook */{text[found.end() :]}" if found else text)


def trusted(text: str) -> sql.SQL:
    """SQL text that PostgreSQL itself rendered (pg_get_indexdef and the like), which it renders like that again.

    Of `varchar IN ('a', 'b')` it makes `(ARRAY['a'::character varying, …])::text[]`, and reads that as `ARRAY['a'::character varying::text, …]`,
    which is the same, but not the same text; with the array's own type between it stays what it was. Bodies of functions are left alone."""
    return sql.SQL(ARRAY.sub(lambda found: found["body"] or f"(({found['array']})::{found['type']}[])::", text))


def rendered(text: str) -> sql.Composed:
    """A whole statement that PostgreSQL itself rendered, kept as it is."""
    return sql.Composed([trusted(text)])
