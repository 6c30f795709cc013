"""A session: named statements run on one connection, and each is in the record, with its time and who kept it waiting."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from runbook.redaction import known_secrets, redact
from runbook.statements import Value, sent, statement
from runbook.words import plain


@dataclass(frozen=True)
class Statement:
    """One statement as it ran; part of the record. `error` is its SQLSTATE where it failed, else empty; `waited_for` has the
    locks that it was seen to wait for, with those who held them; `text` is the whole of it, unless it only reads."""

    at: datetime
    name: str
    seconds: float
    rows: int
    error: str = ""
    waited_for: tuple[str, ...] = ()
    text: str = field(default="", repr=False)


NICE = 10  # a tenth of the processor where everybody wants it, the whole where nobody does
READS = re.compile(r"(?:\s*--.*\n)*\s*(?:SELECT|EXPLAIN|SHOW|PREPARE|EXECUTE)\b")


class Connection(psycopg.Connection[dict[str, Any]]):
    """A connection that knows the server's process behind it: whatever stands in between may give it a number of its own."""

    pid: int = 0


def write_down(statements: Sequence[Statement]) -> None:
    """Adds them to the record of the notebook that this kernel runs, if it runs one: what failed later is there, too."""
    folder, notebook = os.environ.get("RUNBOOK_RECORD"), os.environ.get("JPY_SESSION_NAME")
    if folder and notebook:
        facts = [{**vars(each), "at": each.at.isoformat(), "seconds": round(each.seconds, 6)} for each in statements]
        lines = "".join(redact(json.dumps(each, ensure_ascii=False), _secrets()) + "\n" for each in facts)
        with suppress(OSError), Path(folder, f"{Path(notebook).stem}.statements.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)


@cache
def _secrets() -> frozenset[str]:
    return frozenset(known_secrets())


@dataclass
class Session:
    """One connection that runs named statements and keeps a record of each."""

    connection: Connection
    statements: list[Statement]
    gave_way: bool = False
    locked_s: float = 0.0  # for how long, in all, it kept everybody else from what it locked
    waits: dict[int, str] = field(default_factory=dict)  # the locks that the present statement waits for, by who holds them

    @property
    def pid(self) -> int:
        """The server's process."""
        return self.connection.pid

    @property
    def target(self) -> str:
        """Which database this is, for the record."""
        there = self.connection.info
        return f"{there.dbname} at {there.host}, port {there.port}"

    def plain(self, text: str) -> str:
        """A text of our own as this database's encoding can keep it."""
        return plain(text, self.connection.info.parameter_status("server_encoding") or "UTF8")

    @property
    def alone(self) -> bool:
        """Whether nobody but the runbook is at work on the server. If somebody is, one process of ours is enough: with a second
        one on two processors the slowest hundredth of the application's writes took twice as long."""
        found = self.connection.execute(statement("pace.alone")).fetchone()  # not for the record: it is asked all the time
        return bool(found and found["alone"])

    def give_way(self) -> None:
        """From now on the application's processes have the processor first, if it is at work and the server's are on this machine and
        ours to tell: on two processors the slowest hundredth of its writes took half as long. Not for what holds locks that others
        wait for.

        The connection is not used for anything else afterwards, since only a superuser of the machine could take it back; and the
        next one has to learn the catalog anew.
        """
        ours, known = Path(f"/proc/{self.pid}/cmdline"), self.connection.info
        direct = known.host.startswith("/") and known.backend_pid == self.pid  # a pool's goes on to the application
        with suppress(OSError):
            if direct and not self.gave_way and not self.alone and ours.read_bytes().startswith(b"postgres:"):
                os.setpriority(os.PRIO_PROCESS, self.pid, NICE)
                self.gave_way = True
                if os.getsid(self.pid) == self.pid:  # what Linux shares out by sessions, it weighs by sessions
                    Path(f"/proc/{self.pid}/autogroup").write_text(str(NICE))

    def run(self, query: str | sql.Composed, /, **names: Value) -> psycopg.Cursor[dict[str, Any]]:
        """Run `group.name`, or a composed statement; the cursor has its rows."""
        composed = statement(query, **names) if isinstance(query, str) else query
        text = composed.as_string(None)
        with noted(self.statements, query if isinstance(query, str) else first_line(text), self.waits, text=text) as rows:
            cursor = self.connection.execute(sent(text))
            rows.append(cursor.rowcount)
        return cursor

    def run_all(self, statements: Iterable[sql.Composed]) -> None:
        """Run one after the other."""
        for each in statements:
            self.run(each)

    def at_once(self, statements: Iterable[sql.Composable]) -> None:
        """Run them in one round trip: under locks everybody would wait for each one's way. Each is in the record, with its time by
        the server's clock; when one fails, all of them as one."""
        texts, began = [each.as_string(None) for each in statements], datetime.now(UTC)
        clock = "SELECT clock_timestamp() AS runbook_clock"
        label = f"{len(texts)} statements in one round trip, the first: {first_line(texts[0])}"
        with noted(self.statements, label, self.waits, parts := list[Statement]()):
            cursor = self.connection.execute(
                sql.SQL("\n;\n".join([clock, *(f"{sent(each).as_string(None)}\n;\n{clock}" for each in texts)]))
            )
            times, rows = [], list[int]()
            while True:
                if cursor.description and cursor.description[0].name == "runbook_clock":
                    times.append((cursor.fetchone() or {})["runbook_clock"])
                    rows.append(-1)
                else:
                    rows[-1] = cursor.rowcount
                if not cursor.nextset():
                    break
            for text, number, start, end in zip(texts, rows, times, times[1:], strict=False):
                parts.append(
                    Statement(
                        began + (start - times[0]), first_line(text), (end - start).total_seconds(), number, text=changing(text)
                    )
                )

    def rows(self, query: str | sql.Composed, /, **names: Value) -> list[dict[str, Any]]:
        """All rows."""
        return self.run(query, **names).fetchall()

    def row(self, query: str | sql.Composed, /, **names: Value) -> dict[str, Any]:
        """The only row; KeyError-free code may rely on its being there."""
        found = self.run(query, **names).fetchone()
        if found is None:
            raise LookupError(f"{query!r} found no row")
        return found

    def value(self, query: str | sql.Composed, /, **names: Value) -> Any:
        """The first column of the first row, None where there is none."""
        found = self.run(query, **names).fetchone()
        return next(iter(found.values())) if found else None

    @contextmanager
    def qualified(self) -> Iterator[None]:
        """While it lasts, every name that the server renders is qualified, and every time is in UTC, wherever the operator
        sits. An error leaves that to the rollback."""
        setting = (
            "SELECT current_setting('search_path') AS path, current_setting('TimeZone') AS zone,"
            " set_config('search_path', {}, false), set_config('TimeZone', {}, false)"
        )
        before = self.connection.execute(sql.SQL(setting).format("pg_catalog", "UTC")).fetchone() or {}
        yield
        self.connection.execute(sql.SQL(setting).format(before["path"], before["zone"]))

    @contextmanager
    def transaction(self, isolation: str = "READ COMMITTED", **settings: str | int) -> Iterator[None]:
        """A transaction whose isolation never depends on an inherited default; settings are SET LOCAL."""
        self.connection.isolation_level = psycopg.IsolationLevel[isolation.replace(" ", "_")]
        with self.connection.transaction():
            for name, setting in settings.items():
                self.connection.execute(
                    sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(*name.split("__")), sql.Literal(str(setting)))
                )
            yield
        if self.connection.closed:  # psycopg leaves the block as if all were well when the connection broke after the last answer
            raise psycopg.OperationalError("The connection was lost before the commit was acknowledged.")


@contextmanager
def noted(
    statements: list[Statement], name: str, waits: dict[int, str] | None = None, parts: Sequence[Statement] = (), text: str = ""
) -> Iterator[list[int]]:
    """Notes the statement that runs inside, also when it fails; whoever runs it appends its number of rows. When it was several
    that went well, its `parts`."""
    at, started, rows, error = datetime.now(UTC), time.perf_counter(), list[int](), ""
    try:
        yield rows
    except BaseException as failed:
        error = getattr(failed, "sqlstate", None) or type(failed).__name__
        raise
    finally:
        seconds, waited = time.perf_counter() - started, tuple((waits or {}).values())
        whole = Statement(at, name, seconds, rows[0] if rows else -1, error, waited, changing(text))
        new = list(parts) if parts and not error else [whole]
        statements.extend(new)
        if waits:
            waits.clear()
        write_down(new)


def changing(text: str) -> str:
    """The text of a statement that is not merely a query; else nothing."""
    return "" if READS.match(text) else text


def first_line(text: str) -> str:
    """A statement as the record names it: without the comments over it, in one line."""
    line = " ".join(" ".join(line for line in text.splitlines() if not line.startswith("--")).split())
    return line if len(line) <= 120 else f"{line[:119]}…"
