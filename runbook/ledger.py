"""The open run: database, frozen plan, and a ledger that says what was done; the state lives in the database."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial, wraps
from typing import Any, Concatenate, ParamSpec

import pandas as pd
import psycopg
from psycopg import sql

from runbook import asked, drift, locks, rehearsing
from runbook.database import Database, target
from runbook.errors import AlreadyRunning, ApprovalMissing, BadInput, OutOfOrder, PlanOutdated, told
from runbook.parameters import check, forget, injected, resolve
from runbook.plan import Plan, stored
from runbook.provenance import operator
from runbook.redaction import known_secrets, redact
from runbook.session import Session
from runbook.statements import Value

P = ParamSpec("P")
STEPS = ("plan", "backup", "partition", "restore", "foreign_keys", "cutover", "verify", "application")
REPAIR = ("plan", "restore", "foreign_keys", "verify", "application")
NOTEBOOKS = {
    "plan": "00_plan", "backup": "01_backup", "partition": "02_partition", "restore": "03_restore",
    "foreign_keys": "04_foreign_keys", "cutover": "05_cutover", "verify": "06_verify", "application": "07_application",
    "monitor": "08_monitor", "add": "20_add_partitions", "rollback": "90_rollback", "finish": "91_finish",
}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What an action did or saw: a sentence, and the facts behind it."""

    sentence: str
    rows: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    already: bool = False

    def __repr__(self) -> str:
        return self.sentence

    def _repr_markdown_(self) -> str:
        return f"✓ {self.sentence}"


@dataclass
class Action:
    """An action under way: holds the table's advisory lock; `finish` writes its ledger row, in the effect's own
    transaction when that runs on `session`."""

    run: Run
    session: Session
    id: int
    evidence: Evidence | None = None

    def finish(self, sentence: str, rows: int | None = None, **facts: Any) -> Evidence:
        """Record the action as done; repeated calls keep the last."""
        self.evidence = Evidence(sentence, rows, facts)
        said = self.session.plain(json.dumps(facts, default=str, ensure_ascii=False))  # an escape not every encoding takes
        kept = self.session.plain(sentence)
        self.session.run("ledger.end_action", id=self.id, state="done", sentence=kept, rows=rows, evidence=said)
        return self.evidence


@dataclass
class Run:
    """An open migration: its database, its frozen plan, its number in the ledger."""

    database: Database
    migration: int
    plan: Plan
    state: str = "open"

    @property
    def staging(self) -> str:
        """The schema in which this migration keeps its shadow, its logs and their functions."""
        return f"runbook_{self.migration}"

    @cached_property
    def names(self) -> dict[str, sql.Composable]:
        """What every statement of this run may name."""
        return {**self.plan.names(self.staging), "migration": sql.Literal(self.migration)}

    @property
    def swapped(self) -> bool:
        """Whether the names were swapped: the table is the partitioned one, unless the way back was taken since."""
        return self.finished("cutover", "swap") is not None

    @property
    def partitioned(self) -> bool:
        """Whether the table itself is partitioned by now."""
        return self.plan.restore_from == "backup" or self.swapped

    def frame(self, query: str | sql.Composed, /, **names: Value) -> pd.DataFrame:
        """A named statement's rows as a DataFrame."""
        return self.database.frame(query, **{**self.names, **names})

    def finished(self, step: str, action: str) -> Evidence | None:
        """The evidence of an action that is done, else None."""
        with self.database.session("ledger") as session:
            return _finished(session, self.migration, step, action)

    def approver(self, approved_by: str, refusal: str) -> str:
        """Who approves, for the record. Raises ApprovalMissing with the `refusal` when nobody is named; the embedded example
        approves itself, and says so."""
        if not approved_by.strip() and not self.database.embedded:
            raise ApprovalMissing(refusal)
        return approved_by.strip() or "the embedded example itself"

    def overview(self) -> Any:
        """The strip of the steps: what the ledger says of each, and the plan's hash."""
        from runbook import overview

        return overview.strip(self.plan, self)

    def next(self) -> Any:
        """Which notebook comes next, and what undo costs now."""
        from runbook import overview

        return overview.ahead(self)

    def statements(self) -> pd.DataFrame:
        """Every statement that this kernel ran for this database: when, which, how long, how many rows, for whom it waited."""
        from runbook import overview

        return overview.statements(self)

    @contextmanager
    def action(self, step: str, action: str, *, again: bool = False) -> Iterator[Action]:
        """Hold the table for one action and keep the ledger true about it.

        Already done (and not `again`): the action is not repeated; `evidence` has what was seen then.
        Raises OutOfOrder before its time, AlreadyRunning when another run holds the table, PlanOutdated when its definition changed.
        """
        with self.database.session(f"{step}.{action}") as session, locks.attended(self.database):
            claim(session, self.plan)
            standing = session.row("ledger.standing", migration=self.migration)
            if standing["state"] == "replaced":
                raise PlanOutdated(
                    f"{self.plan.full_name} was planned anew since this notebook was opened: run it from its beginning."
                )
            done = frozenset(standing["done"])
            rehearsing.refuse_approved(step, done, self.plan.full_name)
            if f"{step}.{action}" in done and (not again or (step in STEPS[:5] and "cutover.swap" in done)):
                yield Action(self, session, 0, _finished(session, self.migration, step, action))
                return
            if step in STEPS and step != "application":  # that one is of use at any time
                self._refuse_out_of_order(session, step, done)
                if "cutover.swap" not in done:
                    self.refuse_outdated(session)
            who = session.plain(operator())
            number = session.value("ledger.begin_action", migration=self.migration, step=step, action=action, operator=who)
            doing = Action(self, session, number)
            try:
                yield doing
            except BaseException as error:
                self._record_failure(number, error)
                raise
            if session.locked_s:
                with suppress(psycopg.Error):  # what was done is committed, and noted
                    session.run("ledger.note_locked", id=number, seconds=session.locked_s)

    def _record_failure(self, number: int, error: BaseException) -> None:
        """On a connection of its own: the action's may be gone. Where the server is gone too, the row stays 'started'."""
        sentence = redact(told(error), known_secrets())
        try:
            with self.database.session("ledger") as session:
                session.run("ledger.fail_action", id=number, sentence=session.plain(sentence[:2000]))
        except Exception:
            return

    def _refuse_out_of_order(self, session: Session, step: str, done: frozenset[str]) -> None:
        order = REPAIR if self.plan.restore_from == "backup" else STEPS
        if step not in order:
            raise OutOfOrder(f"{NOTEBOOKS[step]} is no part of a repair: {', '.join(NOTEBOOKS[each] for each in order)} are.")
        back = _finished(session, self.migration, "rollback", "swap") if "rollback.swap" in done else None
        if back and back.facts.get("swapped") and "rollback.clean" not in done:
            raise OutOfOrder(f"The way back of {self.plan.full_name} was begun and is not completed: run 90_rollback again.")
        for earlier in order[: order.index(step)]:
            if f"{earlier}.check" not in done:
                raise OutOfOrder(
                    f"{NOTEBOOKS[step]} rests on {NOTEBOOKS[earlier]}, which has not been completed for {self.plan.full_name}:"
                    f" run {NOTEBOOKS[earlier]} first."
                )
        if step in ("backup", "partition", "restore", "foreign_keys") and order == STEPS and "cutover.swap" in done:
            raise OutOfOrder(f"{self.plan.full_name} has been cut over already: nothing is left for {NOTEBOOKS[step]} to do.")

    def refuse_outdated(self, session: Session) -> None:
        """Before the cut-over: raises PlanOutdated when the source is not what was planned."""
        if self.plan.restore_from == "backup":
            return
        with session.qualified():
            made = partial(_finished, session, self.migration, "plan", "check")
            drift.refuse(session, self.plan, lambda: done.facts.get("lines", {}) if (done := made()) else {})


def recorded(
    step: str, action: str, *, again: bool = False
) -> Callable[[Callable[Concatenate[Action, P], Evidence]], Callable[Concatenate[Run, P], Evidence]]:
    """Make a function of an open action one of a run: it holds the table while it works, leaves its ledger row, and what is
    done already is not repeated (unless `again`): the evidence of then is returned."""

    def decorate(do: Callable[Concatenate[Action, P], Evidence]) -> Callable[Concatenate[Run, P], Evidence]:
        @wraps(do)
        def acting(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> Evidence:
            with run.action(step, action, again=again) as under_way:
                return under_way.evidence or do(under_way, *args, **kwargs)

        return acting

    return decorate


def claim(session: Session, plan: Plan) -> None:
    """Hold the table for this session; raises AlreadyRunning, naming who does, when another run has it, or a
    rehearsal is under way that this is no part of."""
    lock = rehearsing.lock(plan.table.oid)
    # The server notices within a second or so that a client is gone, and only then lets go of its lock.
    end = time.monotonic() + 3
    while True:
        claimed = session.value("ledger.claim", **lock)
        if claimed or time.monotonic() > end:
            break
        time.sleep(0.05)
    rehearsing.refuse(session, plan.table.oid, plan.full_name)
    if claimed:
        return
    holder = session.run("ledger.claimant", **lock).fetchone() or {}
    raise AlreadyRunning(
        f"{plan.full_name} is being migrated by another run: {holder.get('application', 'a session')} of {holder.get('user')}"
        f" (pid {holder.get('pid')}, since {holder.get('since')}). Wait for it, or end that session."
    )


def _finished(session: Session, migration: int, step: str, action: str) -> Evidence | None:
    row = session.run("ledger.finished_action", migration=migration, step=step, action=action).fetchone()
    if row is None:
        return None
    when: datetime = row["finished_at"]
    sentence = f"Already done on {when:%Y-%m-%d %H:%M:%S %Z} by {row['operator']}: {row['sentence']}"
    return Evidence(sentence, row["rows"], row["evidence"] or {}, already=True)


def kept(session: Session) -> bool:
    """Whether there is a ledger; raises BadInput where its name belongs to somebody else's table."""
    there: bool | None = session.value("ledger.exists")
    if there is None:
        raise BadInput(
            f"runbook.migration or runbook.action of {session.connection.info.dbname} is somebody else's table, and the ledger needs its name: rename the"
            " schema runbook first."
        )
    return there


def open(database: str = "embedded", table: str = "", plan: str = "", *, ended: bool = False) -> Run:
    """The open run of a table, with its frozen plan from the ledger.

    Raises OutOfOrder without a plan (or, but for `ended`, with one that was rolled back), PlanOutdated with another, and BadInput.
    """
    forget()
    given = resolve(database=database, table=table, plan=plan)
    run = of(target(given.database, given.users), given.table, ended=ended)
    if not run.plan.hash.startswith(given.plan):
        raise PlanOutdated(
            f"{run.plan.full_name} has the plan {run.plan.hash[:12]}, not {given.plan[:12]}: look at it with 00_plan, and name its"
            " hash (or none) if that is the one to go on with."
        )
    if not ended:  # the way back is the answer to another plan
        asked.refuse_another(run, check(told := injected()), set(told))
    return run


def open_last(database: str = "embedded", table: str = "", plan: str = "") -> Run:
    """As `open`, for the last migration of the table even when it has been rolled back."""
    return open(database, table, plan, ended=True)


def of(database: Database, table: str, *, ended: bool = False) -> Run:
    """The run of a table in a database that is already at hand."""
    with database.session("open") as session, locks.attended(database):
        if not kept(session):
            raise OutOfOrder(f"{table} has no plan on {database.name}: run 00_plan first.")
        found, schema, name = drift.find(session, table, database.name)
        row = session.run("ledger.last_migration", source=f"{schema}.{name}").fetchone()
        former = session.value("ledger.moved", oid=found, source=f"{schema}.{name}") if row is None else None
    if former:
        raise OutOfOrder(
            f"{schema}.{name} was {former} when it was partitioned, and its plan is known by that name only: move or rename it back."
        )
    if row is None or (row["state"] == "rolled back" and not ended):
        raise OutOfOrder(f"{schema}.{name} has no open plan on {database.name}: run 00_plan first.")
    return Run(database, row["id"], stored(row), row["state"])
