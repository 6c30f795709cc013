"""While a rehearsal is under way nobody else works at its table: at its end it takes back whatever is open."""

from __future__ import annotations

import os
import time
from collections.abc import Set as AbstractSet

from runbook.errors import AlreadyRunning, OutOfOrder
from runbook.session import Session
from runbook.statements import Value

REHEARSAL = "runbook rehearsal"
RUNS_IN = "RUNBOOK_REHEARSAL"  # tells a rehearsal's own kernels which of the server's processes holds its lock


def lock(oid: int, purpose: str = "runbook") -> dict[str, Value]:
    """What names a table's advisory lock, whose number is a signed one: that of a run, or of a rehearsal."""
    return {"purpose": purpose, "source_oid": oid - (oid >> 31 << 32)}


def begin(session: Session, oid: int, table: str) -> None:
    """Hold the table for a rehearsal, as long as this connection lives; raises AlreadyRunning beside another one."""
    while not session.value("ledger.claim", **lock(oid, REHEARSAL)):
        refuse(session, oid, table)
    os.environ[RUNS_IN] = str(session.pid)


def end() -> None:
    """What is done from now on is no part of a rehearsal."""
    os.environ.pop(RUNS_IN, None)


def refuse(session: Session, oid: int, table: str) -> None:
    """Raises AlreadyRunning while a rehearsal of the table is under way that this process is no part of; one that died a moment ago
    is given the time in which the server notices."""
    end = time.monotonic() + 3
    while holders := [
        row for row in session.rows("ledger.claimant", **lock(oid, REHEARSAL)) if str(row["pid"]) != os.environ.get(RUNS_IN)
    ]:
        if time.monotonic() > end:
            raise AlreadyRunning(
                f"A rehearsal of {table} is under way: a session of {holders[0]['user']} (pid {holders[0]['pid']}, since {holders[0]['since']})."
                " At its end it takes back whatever is open. Wait for it; if its machine is gone, end that session."
            )
        time.sleep(0.05)


def refuse_approved(step: str, done: AbstractSet[str], table: str) -> None:
    """Raises OutOfOrder where a rehearsal would take back what somebody approved meanwhile."""
    if step == "rollback" and RUNS_IN in os.environ and done & {"cutover.approval", "cutover.swap"}:
        raise OutOfOrder(
            f"The cut-over of {table} was approved, which is no part of a rehearsal: somebody migrates it, and the rehearsal does not take it"
            " back."
        )
