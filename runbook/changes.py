"""The change log and its replay: from keys and present state, so that it can be repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from psycopg import sql

from runbook import references
from runbook.errors import PlanOutdated, RunbookError
from runbook.ledger import Run
from runbook.locks import NotYet, Patience
from runbook.session import Session
from runbook.statements import closed_schema, spelled, statement, trusted

Statements = Iterator[sql.Composed]
SHORT_TAIL = 1000  # log entries
UNDER_LOCKS = 3 * SHORT_TAIL  # so many are replayed there, at most
SCANNED_PER_LOOK_UP = 5  # so many rows are read in passing while one is looked up by an index, when both are in memory
LONG_FILE = 1000  # blocks of a log, which are read in some milliseconds though nothing is in them


class Rewritten(RunbookError):
    """The source was truncated or rewritten (VACUUM FULL, CLUSTER, ALTER TYPE) since the copy began."""


@dataclass(frozen=True)
class Way:
    """A direction of replay: from which table, into which, by which log."""

    origin: str
    copy: str
    log: str


FORWARD = Way("source", "shadow", "log")
BACK = Way("source", "retired", "back")


def create(run: Run) -> Statements:
    """The logs and the functions that write them."""
    yield from closed_schema(run.staging)
    yield statement("changes.create", **run.names)
    yield statement("changes.create_functions", **run.names)


def switch_on(run: Run) -> Statements:
    """From the commit of these on, every change of the source is logged."""
    yield statement("changes.switch_on", **run.names)


def switch_off(run: Run) -> Statements:
    """The inverse of switch_on."""
    yield statement("changes.switch_off", **run.names)


def turn_round(run: Run) -> Statements:
    """The log in the other direction: on the partitioned table, for the retired one."""
    yield statement("changes.switch_on_back", **run.names)
    yield statement("changes.switch_on_back_truncate", table=run.names["source"], **run.names)
    for leaf in leaves(run):
        yield statement("changes.switch_on_back_leaf", leaf=leaf)
        yield statement("changes.switch_on_back_truncate", table=leaf, **run.names)


def leaves(run: Run, schema: str | None = None) -> list[sql.Identifier]:
    """The plan's partitions, in the table's own schema unless another is named."""
    return [sql.Identifier(schema or run.plan.table.schema_name, partition.name) for partition in run.plan.partitions]


def _names(run: Run, way: Way) -> dict[str, sql.Composable]:
    return {
        **run.names,
        **(run.plan.listed() if way is BACK else {}),
        "origin": run.names[way.origin],
        "copy": run.names[way.copy],
        "log": run.names[way.log],
    }


def hold(run: Run, session: Session, way: Way = FORWARD) -> None:
    """Take ACCESS SHARE before the snapshot and make sure that the origin is still the table that was copied.

    Raises Rewritten when it is not; only the forward copy reads by block and can be harmed.
    """
    names = _names(run, way)
    session.run("changes.hold", **names)
    if way is FORWARD:
        known = session.row("ledger.remembered", **names)["filenode"]
        if known != session.value("catalog.filenode", oid=names["source_oid"]):
            raise Rewritten(f"{run.plan.full_name} was rewritten or truncated while it was being copied.")
    if session.value("changes.truncated", **names):
        raise Rewritten(f"{run.plan.full_name} was truncated while it was being copied.")


def length(run: Run, session: Session, way: Way = FORWARD) -> int:
    """How many changes wait in the log."""
    return int(session.value("changes.length", **_names(run, way)))


def replay(run: Run, session: Session, way: Way = FORWARD) -> tuple[int, str]:
    """Bring the copy to the origin's state for every key in the log that one snapshot sees.

    Returns how many log entries that were, and the transaction's id. Idempotent; all keys at once, because an
    email that went from one user to another is unique in the whole snapshot but not in a part of it. The log is vacuumed
    first: planned for as long as it once was, each replay would read the whole tables, and never come to an end under writers.
    """
    vacuum(session, run.names[way.log])
    with session.transaction("REPEATABLE READ"):
        hold(run, session, way)
        return apply(run, session, way), str(session.value("locks.horizon"))


def vacuum(session: Session, log: sql.Composable, last: bool = False) -> None:
    """Clear a log of what is dead in it and count the rest, without waiting for its writers; the `last` one before the locks
    shortens a long file, too."""
    session.run("changes.vacuum", log=log, shorten=trusted("on" if last and is_long(session, log) else "off"))


def is_long(session: Session, log: sql.Composable) -> bool:
    """Whether the log's file takes its time to read, whatever is in it."""
    return bool(session.value("foreign_keys.blocks", reference_text=spelled(log)) > LONG_FILE)


def catch_up(run: Run, session: Session, patience: Patience, way: Way = FORWARD) -> tuple[int, str]:
    """Replay until the log's tail is short; returns how many entries that were, and the last replay's transaction id. Raises
    NotYet when it is not at the patience's end. The log is vacuumed then, too: what is replayed under locks must not read what
    it held before."""
    total = 0
    while True:
        keys, horizon = replay(run, session, way)
        total += keys
        if keys <= SHORT_TAIL or (patience.spent() and keys <= UNDER_LOCKS):
            vacuum(session, run.names[way.log], last=True)
            return total, horizon
        if patience.spent():
            raise NotYet(f"{keys:,} changes that came while those before them were replayed: they come faster than that")


def apply_last(run: Run, session: Session, way: Way = FORWARD) -> int:
    """The last replay, under locks that keep everybody else out; raises NotYet when its tail is too long for that."""
    hold(run, session, way)
    if (waiting := length(run, session, way)) > UNDER_LOCKS:
        raise NotYet(f"{waiting:,} changes that came since the last replay, more than can be replayed under the locks")
    return apply(run, session, way)


def apply(run: Run, session: Session, way: Way = FORWARD) -> int:
    """Replay within the transaction at hand; for the cut-over, whose locks make every snapshot the same."""
    names, keys = _names(run, way), length(run, session, way)
    few = keys * (len(run.plan.partitions) + 2) * SCANNED_PER_LOOK_UP < run.plan.table.rows
    if way is FORWARD:
        with _looked_up(session, few and all(reference.indexed for reference in references.added(run))):
            references.hand_over(run, session)
        references.pass_on(run, session)
    filled = way is BACK and run.plan.key_nullable and run.plan.null_value is not None
    with _looked_up(session, few):
        if filled:
            session.run("changes.remember_nulls", **names)
        session.run("changes.forget_changed", **names)
        session.run("changes.take_changed", **names)
        if filled:
            session.run("changes.restore_nulls", **names, null_value=run.plan.null_value)
        return session.run("changes.clear", **names).rowcount


@contextmanager
def _looked_up(session: Session, few: bool) -> Iterator[None]:
    """While it lasts, `few` keys are looked up one by one. The planner counts with a disk, and would read both tables whole for a
    fiftieth of their rows; but what changed lately is in memory, and the rest of it has to be fetched for the change itself."""
    if few:
        session.connection.execute("SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off")
    yield
    if few:  # an error leaves that to the rollback
        session.connection.execute("SET LOCAL enable_hashjoin TO DEFAULT; SET LOCAL enable_mergejoin TO DEFAULT")


def settle(run: Run, session: Session) -> int:
    """As replay, for a copy that was made range by range and has no index yet: after it the shadow equals the source."""
    with session.transaction("REPEATABLE READ"):
        hold(run, session)
        names = _names(run, FORWARD)
        references.pass_on(run, session)
        session.run("changes.note_unplaced", **names)
        session.run("changes.forget_all_changed", **names)
        session.run("changes.take_all_changed", **names)
        return session.run("changes.clear", **names).rowcount


def refuse_gaps(run: Run, session: Session) -> None:
    """Raises PlanOutdated when someone disabled, dropped or re-created the log's triggers: changes went unseen."""
    known = session.row("ledger.remembered", **run.names)["triggers"]
    now = session.value("changes.trigger_states", oid=run.names["source_oid"])
    if now != known:
        raise PlanOutdated(
            f"The change log's triggers on {run.plan.full_name} were switched off or made anew since they were created"
            f" ({now or 'none is there'}), so changes went unseen: roll back with 90_rollback and begin again."
        )
