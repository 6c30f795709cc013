"""20: more partitions for a table that this runbook partitioned: planned, approved, made as tables and attached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql

from runbook import attaching, catalog, cutover, locks, unique
from runbook.errors import ApprovalMissing, BadInput, OutOfOrder, PlanBlocked, PlanOutdated, PromiseBroken, function_of
from runbook.facts import Finding
from runbook.growth import Addition, Growth, decide, in_the_way, left_behind, require_partitions, stands
from runbook.ledger import Action, Evidence, Run
from runbook.parameters import resolve
from runbook.sheet import Sheet
from runbook.statements import spelled, statement, trusted
from runbook.words import counted

Row = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """The plan of an addition, for a run whose table is partitioned."""

    run: Run
    growth: Growth

    def partitions(self) -> pd.DataFrame:
        """What is to be added, and how many rows of the default partition go over."""
        columns = ["name", "bound", "waiting"]
        return pd.DataFrame([each.model_dump(include=set(columns)) for each in self.growth.additions], columns=columns)

    def findings(self) -> pd.DataFrame:
        """Blockers first, then warnings and notes."""
        rows = [each.model_dump() for each in self.growth.findings]
        return pd.DataFrame(rows, columns=["level", "object", "sentence", "way_out"])

    def preview(self) -> Sheet:
        """The statements, with real names, as they run when nothing has changed since."""
        with self.run.database.session("add.preview") as session, session.qualified():
            return Sheet([each for addition in self.growth.additions for each in (
                *attaching.make_statements(self.run, self.growth, session, addition),
                *attaching.attach_statements(self.run, self.growth, session, addition, moving=addition.waiting > 0))])  # fmt: skip

    def upkeep(self) -> Sheet:
        """How one partition is emptied, vacuumed, re-indexed, detached and attached, and what that locks."""
        plan = self.run.plan
        with self.run.database.session("add.upkeep") as session, session.qualified():
            there = require_partitions(self.run, session, self.growth.oid)  # of the plan's the first may have gone
        one = next((row for row in there if row["oid"] == self.growth.sibling), there[0])
        leaf = sql.Identifier(one["schema"], one["name"])
        guards = [unique.names(plan, guard, self.run.staging) for guard in plan.guards]
        return Sheet([statement("additions.upkeep", root=plan.source, leaf=leaf, bound=trusted(one["bound"])),
                      *(statement("unique.forget_detached", **each) for each in guards),
                      *(statement("unique.take_attached", **each, attached=leaf) for each in guards)])  # fmt: skip

    def freeze(self) -> Evidence:
        """Store the plan in the ledger. Raises PlanBlocked with all blockers."""
        _refuse(each for each in self.growth.findings if each.level == "blocker")
        with self.run.action("add", f"plan {self.growth.hash[:12]}") as action:
            names = ", ".join(each.name for each in self.growth.additions) or "nothing"
            said = f"Plan {self.growth.hash[:12]}: {self.growth.table} gets {names}."
            return action.evidence or action.finish(said, growth=self.growth.model_dump(mode="json"))


def _refuse(blockers: Iterable[Finding]) -> None:
    if told := " ".join(f"{each.sentence} {each.way_out}".strip() for each in blockers):
        raise PlanBlocked(told)


def draft(run: Run, **given: Any) -> Draft:
    """Read the table as it is and decide what is to be added; nothing is changed.

    Raises OutOfOrder before the cut-over, and BadInput for partitions that cannot be added: by hash there are none.
    """
    parameters = resolve(**given, table=run.plan.full_name, database=run.database.name)
    plan = run.plan
    if plan.restore_from == "source" and not run.swapped and run.state != "finished":
        raise OutOfOrder(f"{plan.full_name} is not partitioned yet: 05_cutover comes first.")
    if plan.partition_by == "hash":
        raise BadInput(
            f"{plan.full_name} is partitioned by hash, which has every partition that it can have: plan it anew with another modulus."
        )
    with run.database.session("add.plan") as session, session.transaction("REPEATABLE READ"), session.qualified():
        oid, _, _ = catalog.find(session, plan.full_name, run.database.name)
        return Draft(run, decide(run, session, oid, parameters))


def require_approval(draft: Draft, approved_by: str = "") -> Evidence:
    """Raises ApprovalMissing without a name; the embedded example approves itself, and says so."""
    who = draft.run.approver(
        approved_by,
        f"Adding partitions to {draft.growth.table} needs an approval: set approved_by to the name of who approves.",
    )
    with draft.run.action("add", f"approval {draft.growth.hash[:12]}", again=True) as action:
        return action.finish(f"Approved by {who}, for the plan {draft.growth.hash[:12]}.", approved_by=who)


def add(draft: Draft, lock_timeout_ms: int = 300, budget_s: float = 120) -> Evidence:
    """Make and attach each partition, in a short transaction each; what stands already is left alone.

    Nobody queues behind it longer than `lock_timeout_ms` an attempt. Raises LockNotGranted, naming who is in the way, and
    PlanBlocked when somebody else has made a table of such a name since, PlanOutdated when the table was altered.
    """
    run, growth = draft.run, draft.growth
    if run.finished("add", f"approval {growth.hash[:12]}") is None:
        raise ApprovalMissing(
            f"Adding partitions to {growth.table} has not been approved: run 20_add_partitions from its beginning."
        )
    moved, locked, aside = 0, 0.0, set[tuple[str, str, str]]()
    with run.action("add", f"attach {growth.hash[:12]}", again=True) as action, _understood(run):
        session = action.session
        names = [each.name for each in growth.additions]
        for addition in growth.additions:
            if any(row["name"] == addition.name for row in session.rows("additions.tree", oid=growth.oid)):
                continue
            with session.transaction(lock_timeout="5s"):
                if left_behind(run, session, addition.name):  # under the lock it keeps its name and mark, and stays empty
                    session.run("additions.hold", **attaching.names(run, addition))
                _refuse(in_the_way(run, session, addition.name))
                with session.qualified():
                    made = list(attaching.make_statements(run, growth, session, addition))
                session.run_all(made)
            rows, seconds = _attach(action, growth, addition, locks.Patience(budget_s, lock_timeout_ms), aside)
            session.run("ddl.analyze", table=attaching.names(run, addition)["leaf"])
            moved, locked = moved + rows, max(locked, seconds)
        said = f"{growth.table} has {counted(len(names), 'more partition')}: {', '.join(names) or 'none was lacking'}. {counted(moved, 'row')} moved into them"
        return action.finish(
            f"{said}; locks were held for {locked * 1000:.0f} ms at most.",
            moved,
            partitions=names,
            locked_s=locked,
            aside=sorted(aside),
        )


@contextmanager
def _understood(run: Run) -> Iterator[None]:
    """As `references.understood`; what 20 was planned for it plans anew."""
    try:
        yield
    except (psycopg.ProgrammingError, psycopg.DataError) as error:
        if not error.sqlstate or function_of(error) or isinstance(error, psycopg.errors.InsufficientPrivilege):
            raise
        raise PlanOutdated(
            f"The server refused 20_add_partitions of {run.plan.full_name} ({error.sqlstate}: {error.diag.message_primary}): somebody altered since"
            " it was planned what is named there. Run 20_add_partitions again: it plans anew."
        ) from None


def _attach(
    action: Action, growth: Growth, addition: Addition, patience: locks.Patience, aside: set[tuple[str, str, str]]
) -> tuple[int, float]:
    """Returns how many rows moved, and for how many seconds the locks were held. The ledger's row commits with it, and in that
    which keys stood `aside` and are to be valid again."""
    run, session = action.run, action.session
    default = sql.Identifier(*growth.default) if growth.default else None
    rule, clock = trusted(addition.rule), locks.Clock()

    def waiting() -> int:
        return int(session.value("additions.waiting", default=default, rule=rule)) if default else 0

    def attempt() -> int:
        # Whoever has looked at the list of partitions, and waits for the default one, would not find the rows that left it.
        moving = waiting() > 0
        tables: list[sql.Composable] = (
            [*(key.identifier for key in growth.keys), run.plan.source] if moving else [default] if default else []
        )
        mode = "ACCESS EXCLUSIVE" if tables else "SHARE UPDATE EXCLUSIVE"
        if moving:
            with session.transaction():
                horizon = str(session.value("locks.horizon"))
            locks.wait_for_snapshots(session, horizon, patience, f"the move to {addition.name}")
        with locks.exclusive(session, patience, tables or [sql.SQL("ONLY {}").format(run.plan.source)], mode=mode, clock=clock):
            rows = waiting()
            stood = aside | {key.place for key in attaching.refuse_outdated(run, growth, session, moving=rows > 0)}
            if rows and not moving:
                raise locks.NotYet(f"rows that came into {growth.default and growth.default[1]} meanwhile")
            if rows:
                locks.refuse_late_snapshots(session, patience)
            session.run_all(list(attaching.attach_statements(run, growth, session, addition, moving=rows > 0)))
            leaf = attaching.names(run, addition)["leaf"]
            for row in session.rows("additions.attached_indexes", sibling=growth.sibling, leaf_text=spelled(leaf)):
                session.run_all(attaching.as_its_sibling(leaf, run.plan.table.schema_name, row["name"], row))
            done = f"{addition.name} is a partition of {growth.table}."
            action.finish(done, rows, partitions=[addition.name], aside=sorted(stood))
            if rows:  # again: one may have begun since the first look
                locks.refuse_late_snapshots(session, patience)
        aside.update(stood)
        return rows

    rows = locks.persist(run.database, session, patience, run.plan.full_name, attempt)
    return rows, clock.locked


def validate(draft: Draft, budget_s: float = 120) -> Evidence:
    """Validate the keys that stood aside: SHARE UPDATE EXCLUSIVE, readers and writers go on."""
    run = draft.run
    with run.action("add", f"validate {draft.growth.hash[:12]}", again=True) as action, _understood(run):
        session, done = action.session, cutover.loose(run, action.session)
        for schema, table, name in done:
            each = statement("ddl.validate", table=(schema, table), constraint=(name,))
            cutover.validate(run, session, locks.Patience(budget_s), name, each)
        said = ", ".join(name for _, _, name in done)
        return action.finish(f"Foreign keys that were validated again: {said or 'none had to step aside'}.")


def tree(run: Run) -> pd.DataFrame:
    """The partitions with their bounds, as the catalog has them."""
    return run.frame("partition.staged", shadow_text=spelled(run.plan.source))


def check(draft: Draft) -> Evidence:
    """Raises PromiseBroken unless every new partition stands with its bound, and the keys are valid."""
    run, growth = draft.run, draft.growth
    with run.action("add", f"check {growth.hash[:12]}", again=True) as action:
        with action.session.qualified():
            there = action.session.rows("additions.tree", oid=growth.oid)
        lacking = [each.name for each in growth.additions if not stands(each.name, each.bound, there)]
        lacking += [f"{name} of {schema}.{table}" for schema, table, name in cutover.loose(run, action.session)]
        if lacking:
            raise PromiseBroken(f"{growth.table} lacks {', '.join(lacking)}: run 20_add_partitions again.")
        return action.finish(
            f"{counted(len(growth.additions), 'partition')} of {growth.table} {'was added and stands' if len(growth.additions) == 1 else 'were added and stand'}, {len(there)} in all."
        )
