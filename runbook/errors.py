"""What the runbook refuses, and why: one sentence with the object, the cause and the way out."""

from __future__ import annotations

import re

import psycopg

from runbook.words import ended


class RunbookError(Exception):
    """A refusal or a failure that the reader can act on; its text is the whole message."""

    def _render_traceback_(self) -> list[str]:
        # IPython prints these lines instead of a traceback: in a notebook the sentence is the error.
        return [f"{type(self).__name__}: {self}"]


class BadInput(RunbookError):
    """A parameter, a name or a file that cannot be meant."""


class PlanBlocked(RunbookError):
    """The plan has blockers; nothing was changed."""


class OutOfOrder(RunbookError):
    """A step was asked for before the one that it rests on, or after its time."""


class PlanOutdated(RunbookError):
    """The table is no longer the one that the plan was made for."""


class AlreadyRunning(RunbookError):
    """Another run holds this table."""


class LockNotGranted(RunbookError):
    """A lock could not be had within the budget; the message names who holds it."""


class ApprovalMissing(RunbookError):
    """A gate that a person must open was closed."""


class NotEqual(RunbookError):
    """Source and copy differ; the message names partitions and keys."""


class PromiseBroken(RunbookError):
    """A check of a step failed."""


class ServerUnavailable(RunbookError):
    """The database cannot be reached, or the embedded server cannot be started."""


FUNCTION = re.compile(r"^PL/pgSQL function (\S.*?) line \d+ at ((?:RAISE|ASSERT)$)?", re.MULTILINE)
OURS = re.compile(r'"?(?:runbook|pg_temp)')


def function_of(error: BaseException) -> str:
    """The application's function in which the server met the error; empty where it was none."""
    found = FUNCTION.search(error.diag.context or "") if isinstance(error, psycopg.Error) else None
    return found[1] if found and not OURS.match(found[1]) else ""


def raised(error: BaseException) -> bool:
    """Whether the error is one that a function of the application's RAISEd."""
    found = FUNCTION.match(error.diag.context or "") if isinstance(error, psycopg.Error) else None
    return found is not None and found[2] is not None and not OURS.match(found[1])


def said_by(error: BaseException) -> str:
    """What an error says; of one that a function of the application's RAISEd only that, for the text may repeat somebody's data."""
    if raised(error):
        return f"{function_of(error)} raised an error, whose text may repeat somebody's data: the server's log has it"
    return str(error)


def told(error: BaseException) -> str:
    """The error as one sentence. The server's own: without the detail that repeats a whole row."""
    if isinstance(error, RunbookError):
        return str(error)
    diag = error.diag if isinstance(error, psycopg.Error) else None
    if type(error) in (psycopg.OperationalError, psycopg.InterfaceError) and not (diag and diag.message_primary):
        return "The connection to the server was lost."
    if isinstance(error, psycopg.errors.IdleInTransactionSessionTimeout):
        return "The server ended the session, for this machine fell silent while others waited for its locks; nothing of that transaction was kept."
    if diag is None or not diag.message_primary:
        return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    detail, hint = diag.message_detail or "", diag.message_hint or ""
    if diag.sqlstate == "42501" and "runbook" in diag.message_primary:
        hint = "Schema runbook is the ledger, and belongs to whoever planned first: work as that role, or as a member of it"
    if raised(error):
        return f"The server refused it ({diag.sqlstate}): {said_by(error)}."
    parts = [diag.message_primary, "" if detail.startswith("Failing row contains") else detail, hint]
    return f"The server refused it ({diag.sqlstate}): {' '.join(ended(part) for part in parts if part)}"
