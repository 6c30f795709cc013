"""07: what the application must change: its schema, its inserts, its statements; each shown, and with what takes its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from psycopg import sql

from runbook import orm, references
from runbook.drizzle import Drizzle
from runbook.errors import OutOfOrder, PromiseBroken
from runbook.facts import Reference
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.plan import identifiers
from runbook.sheet import Listing
from runbook.statements import spelled
from runbook.words import counted


@dataclass(frozen=True)
class Schema:
    """Both ORMs' schemas, as they were and as they must be: in the final state, that of `legacy_inserts = "strict"`."""

    run: Run

    @cached_property
    def drizzle(self) -> tuple[str, str]:
        return Drizzle(orm.tables(self.run, new=False)).text(), Drizzle(orm.tables(self.run, new=True)).text()

    @cached_property
    def sqlalchemy(self) -> tuple[str, str]:
        old, new = (orm.sqlalchemy(self.run, orm.tables(self.run, new=side)) for side in (False, True))
        return old, new

    def difference(self, name: str) -> Listing:
        """Old beside new, as a diff; `name` is drizzle or sqlalchemy."""
        old, new = getattr(self, name)
        return _difference(old, new, {"drizzle": "schema.ts", "sqlalchemy": "models.py"}[name])

    def whole(self, name: str) -> Listing:
        """The new one, whole, folded away."""
        return Listing(
            getattr(self, name)[1], {"drizzle": "typescript", "sqlalchemy": "python"}[name], f"The whole {name} schema"
        )

    def inserts(self) -> Listing:
        """An insert of each referencing table in SQL, Drizzle and SQLAlchemy, before and after."""
        old, new, tables = list[str](), list[str](), Drizzle(orm.tables(self.run, new=True))
        with self.run.database.session("application") as session:
            for reference in (*references.added(self.run), *self.run.plan.own_roles):
                rows = session.rows("application.columns", relation=reference.identifier.as_string(None))
                columns = [row["name"] for row in rows if row["required"] or row["name"] in reference.columns]
                columns = [name for name in columns if name != reference.role_column]
                place = columns.index(reference.columns[-1]) + 1
                old += self._insert(reference, columns, tables)
                new += self._insert(reference, [*columns[:place], reference.role_column, *columns[place:]], tables)
        return _difference("\n".join(old), "\n".join(new), "inserts")

    def _insert(self, reference: Reference, columns: list[str], drizzle: Drizzle) -> Iterator[str]:
        def named(schema: str, name: str) -> Any:
            return next(each for each in drizzle.tables if each.name == name and each.schema in (None, schema))

        table = named(reference.schema_name, reference.table)
        source = named(self.run.plan.table.schema_name, self.run.plan.table.name)
        one = drizzle.names[source].removesuffix("Schema")
        from_row = dict(
            zip((*reference.columns, reference.role_column), (*reference.referenced, self.run.plan.key), strict=False)
        )
        script = ", ".join(
            f"{drizzle.names[table.c[each]]}: {f'{one}.{drizzle.names[source.c[from_row[each]]]}' if each in from_row else '…'}"
            for each in columns
        )
        plain = {each: re.sub(r"\W", "_", each) for each in (*columns, *from_row.values())}  # as sqlacodegen has them
        typed = ", ".join(f"{plain[each]}={f'{one}.{plain[from_row[each]]}' if each in from_row else '…'}" for each in columns)
        values = ", ".join(f":{plain[from_row[each]]}" if each in from_row else "…" for each in columns)
        found = re.search(rf"class (\w+)\(Base\):\n    __tablename__ = {re.escape(repr(table.name))}\n", self.sqlalchemy[1])
        into = reference.identifier.as_string(None)
        yield f"-- {into}"
        yield f"INSERT INTO {into} ({identifiers(columns).as_string(None)}) VALUES ({values});"
        yield f"await db.insert({drizzle.names[table]}).values({{ {script} }});"
        yield f"session.add({found[1] if found else table.name}({typed}))"


def _difference(old: str, new: str, name: str) -> Listing:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), f"{name}, before", f"{name}, after", lineterm="")
    return Listing("\n".join(lines), "diff")


def filled(run: Run) -> pd.DataFrame:
    """How many rows still needed the fill trigger since yesterday, for each referencing table."""
    wanted = [*references.added(run), *run.plan.own_roles]
    place = references.names(run, wanted[0])["filled"] if wanted else sql.Identifier(run.staging, "filled")
    with run.database.session("application") as session:
        there = session.value("catalog.there", name=spelled(place))
    if not there:
        return pd.DataFrame(columns=["table", "since yesterday", "rows", "last"])
    return run.frame("application.filled", filled=place, tables=[reference.table for reference in wanted])


@recorded("application", "check", again=True)
def check(action: Action) -> Evidence:
    """Raises OutOfOrder where the points were not looked at; PromiseBroken, naming them, where a replacement does not work."""
    seen, asked = action.run.finished("application", "points"), action.run.finished("application", "queries")
    if seen is None:
        raise OutOfOrder(f"The points of {action.run.plan.full_name} have not been shown: run 07_application from its beginning.")
    # Not a fault of the replacement: another session's lock, the application's own triggers and checks, an
    # identity that is GENERATED ALWAYS, a deferrable primary key, which no ON CONFLICT can name, and on PostgreSQL 14 the trigger that keeps a row in its partition.
    excused = (
        r"(?!55P03|55000|P0001|428C9|23|0A000: (?:.* cannot change on PostgreSQL 14|.* has INSERT or UPDATE rules))[0-9A-Z]{5}: "
    )
    broken = [each for each in seen.facts["points"] if re.match(excused, each.get("seen then", ""))]
    if broken:
        said = "; ".join(f"{each['instead']} ({each['seen then']})" for each in broken)
        raise PromiseBroken(
            f"{counted(len(broken), 'statement')} that should take others' places on {action.run.plan.full_name} {'fails' if len(broken) == 1 else 'fail'}: {said}"
        )
    needed = int(filled(action.run)["since yesterday"].sum())
    sentence = f"{counted(len(seen.facts['points']), 'point')}, each with what to do; {counted(needed, 'row')} needed the fill trigger since yesterday."
    return action.finish(f"{sentence} {asked.facts['said'] if asked else ''}".strip(), needed, filled=needed)
