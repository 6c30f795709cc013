"""The SQL files: named statements, composed only by psycopg."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from psycopg import sql

from runbook.errors import RunbookError

PACKAGE = Path(__file__).parent


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


def statement(name: str, /, **names: sql.Composable) -> sql.Composed:
    """The statement `group.name` of sql/group.sql with its placeholders filled in.

    Raises RunbookError when the file has no such statement, and KeyError for a placeholder left empty.
    """
    group, _, short = name.partition(".")
    try:
        text = _load(group)[short]
    except KeyError:
        raise RunbookError(f"sql/{group}.sql has no statement named {short}.") from None
    return sql.SQL(text).format(**names)


def trusted(text: str) -> sql.SQL:
    """SQL text that PostgreSQL itself rendered (pg_get_indexdef and the like), kept as it is."""
    return sql.SQL(text)


def rendered(text: str) -> sql.Composed:
    """A whole statement that PostgreSQL itself rendered, kept as it is."""
    return sql.Composed([trusted(text)])
