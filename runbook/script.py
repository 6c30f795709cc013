"""The whole migration of a plan as one script that psql takes: for reading, and for a quiet copy of the database."""

from __future__ import annotations

from psycopg import sql

from runbook import backup, changes, cutover, foreign_keys, partition, restore
from runbook.changes import Statements
from runbook.ledger import Run
from runbook.sheet import Sheet
from runbook.statements import statement


def whole(run: Run) -> Sheet:
    """Every statement of the steps 01 to 05, loops written out; ends where the notebooks end, given that nobody writes."""
    return Sheet(_statements(run))


def _statements(run: Run) -> Statements:
    yield sql.Composed([sql.SQL("\\set ON_ERROR_STOP on\n")])
    yield statement("ledger.create")
    yield from backup.script(run)
    yield from partition.create(run)
    yield from changes.switch_on(run)
    yield from restore.script(run)
    yield from foreign_keys.script(run)
    yield from cutover.script(run)
