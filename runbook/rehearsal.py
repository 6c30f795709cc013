"""A rehearsal: whom it kept waiting, what it took beside its forecast, and whether anything of it is left."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import psycopg

from runbook import catalog, forecast, ledger, rehearsing
from runbook.database import Database
from runbook.errors import PromiseBroken
from runbook.session import Session
from runbook.statements import statement, trusted
from runbook.words import counted

EVERY_S = 0.05  # between two looks at who waits


class Watch:
    """Looks, while it is open, who waits for the runbook's sessions; knows the database's objects from before. Its connection holds the
    table for the rehearsal.

    A wait that begins and ends between two looks is not seen: `resolution_s` is the longest time between two.
    """

    def __init__(self, database: Database, table: str) -> None:
        self.database, self.looks, self.resolution_s, self.ended_early = database, 0, 0.0, ""
        self.longest: dict[str, float | None] = {"waited": None, "statement": None}
        with database.session("rehearsal") as session:
            self.oid, *names = catalog.find(session, table, database.name)
            self.table = ".".join(names)
            self.sees_all = session.row("catalog.privileges", oid=self.oid)["sees_activity"]
        self.objects, self.slowest = self._objects(), self._slowest()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._connection = self.database.connect("rehearsal")
        try:
            rehearsing.begin(Session(self._connection, self.database.statements), self.oid, self.table)
        except BaseException:
            self._connection.close()
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
        rehearsing.end()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join(timeout=30)
        self._connection.close()

    def _look(self) -> None:
        query, last = statement("rehearsal.look", oid=self.oid), time.monotonic()
        try:
            while not self._stop.wait(EVERY_S):
                seen: dict[str, Any] = self._connection.execute(query).fetchone() or {}
                for name, length in seen.items():
                    if length is not None:
                        self.longest[name] = max(length, self.longest[name] or 0)
                now = time.monotonic()
                self.looks, self.resolution_s, last = self.looks + 1, max(self.resolution_s, now - last), now
        except Exception as error:  # the rehearsal goes on; that nobody looked any more is told
            self.ended_early = " ".join(str(error).split())

    def told(self) -> str:
        """All that there is to say at the end of a rehearsal, which has been rolled back."""
        self.close()
        run = ledger.of(self.database, self.table, ended=True)
        done = run.frame("forecast.done")
        compared = done[(done["step"] == "restore") & (done["action"] == "compare")]
        beside = forecast.beside(run)
        lines = [
            "\nThe forecast, and what it took:\n" + forecast.shown(beside).to_string(index=False) if len(beside) else "\nThere is no forecast.",
            f"\n{counted(int(compared['rows'].max()), 'row was', 'rows were')} compared, and all were equal.", *self.waits(),
            done.sort_values("at")["sentence"].iloc[-1], self._left(),
        ]  # fmt: skip
        return "\n".join(lines)

    def waits(self) -> list[str]:
        """Who waited, and how long writers took: what was seen, and what cannot be."""
        apart = f"looked {self.looks:,} times, at most {self.resolution_s * 1000:,.0f} ms apart"
        apart += f", until {self.ended_early}" if self.ended_early else ""
        waited, longest = self.longest["waited"], self.longest["statement"]
        said = [f"Nobody was seen waiting for it ({apart}: what is shorter may go unseen)."]
        if waited is not None:
            said = [
                f"The longest that anybody was seen waiting for it is {waited * 1000:,.0f} ms ({apart}: it may have been so much longer)."
            ]
        if not self.sees_all:
            return [*said, "How long writers' statements took, this role may not see: it needs pg_read_all_stats."]
        if longest is None:
            said.append(f"No statement that writes to {self.table} or to what references it was seen.")
        else:
            said.append(
                f"The longest statement seen that writes to {self.table} or to what references it ran for {longest * 1000:,.0f} ms."
            )
        before, after = self.slowest, self._slowest()
        if after is None or before is None:
            return [*said, "pg_stat_statements, which would know the slowest statement exactly, is not there."]
        ran = {each: row for each, row in after.items() if row["calls"] > before.get(each, {"calls": 0})["calls"]}
        records = [row["longest"] for each, row in ran.items() if row["longest"] > before.get(each, {"longest": 0})["longest"]]
        if records:
            said.append(
                f"By pg_stat_statements, the slowest of {len(ran)} kinds of writing statements took {max(records) * 1000:,.1f} ms."
            )
        elif ran:
            said.append(
                f"By pg_stat_statements, none of {len(ran)} kinds of writing statements took longer than it ever had before."
            )
        else:
            said.append("By pg_stat_statements, nobody wrote.")
        return said

    def _slowest(self) -> dict[str, dict[str, Any]] | None:
        with self.database.session("rehearsal") as session:
            view = session.value("queries.statistics")
            try:
                rows = session.rows("rehearsal.slowest", statistics=trusted(view)) if view else None
            except psycopg.errors.ObjectNotInPrerequisiteState:  # created, but not in shared_preload_libraries
                rows = None
        return None if rows is None else {row["statement"]: row for row in rows}

    def _objects(self) -> dict[str, str]:
        with self.database.session("rehearsal") as session, session.qualified():
            return {row["object"]: row["definition"] for row in session.rows("rehearsal.objects")}

    def differing(self) -> list[str]:
        """The objects of the database that are new, gone or changed since the watch began."""
        now = self._objects()
        return sorted({name for name, _ in now.items() ^ self.objects.items()})

    def _left(self) -> str:
        if differing := self.differing():
            return f"NOT as it was: {', '.join(differing)}."
        return f"Nothing of it is left but its record and the ledger's: all {len(self.objects):,} objects of the database are what they were."

    def require_nothing(self) -> None:
        """Raises PromiseBroken unless the database's objects are what they were."""
        if differing := self.differing():
            raise PromiseBroken(
                f"{', '.join(differing)} of {self.database.name} are not what they were before the rehearsal: if nobody else changed"
                " them meanwhile, see what `runbook rollback` says."
            )
