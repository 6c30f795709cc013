"""What 20 is to add to a partitioned table: decided from the tree as it is, tried on a copy without rows, and frozen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from psycopg import sql

from runbook import catalog, division, drift
from runbook.errors import BadInput, PromiseBroken
from runbook.facts import Column, Fact, Finding, Key, Partition
from runbook.findings import worst_first
from runbook.ledger import Run
from runbook.parameters import Parameters, PartitionValue
from runbook.plan import fit
from runbook.session import Session
from runbook.statements import spelled, trusted
from runbook.words import counted

Row = dict[str, Any]


class Addition(Fact):
    """A partition to be: its bound, the rule by which the server knows its rows, and how many of them the default one holds."""

    name: str
    bound: str
    rule: str
    waiting: int


class Growth(Fact):
    """What is to be added to a table, frozen; its hash is what an approver approves."""

    table: str
    oid: int
    existing: tuple[str, ...]
    additions: tuple[Addition, ...]
    default: tuple[str, str] | None
    sibling: int
    keys: tuple[Key, ...]
    findings: tuple[Finding, ...]

    @property
    def hash(self) -> str:
        """sha256, in hexadecimal, of what is to be added to what; what was found meanwhile does not change it."""
        told = self.model_dump(mode="json", include={"table", "oid", "default", "keys"})
        told["additions"] = [(each.name, each.bound) for each in self.additions]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def decide(run: Run, session: Session, oid: int, given: Parameters) -> Growth:
    """Read the tree and its default partition's rows; what is there already is not added again. Bad bounds are a blocker, in
    the server's own words."""
    plan, found = run.plan, list[Finding]()
    tree = require_partitions(run, session, oid)
    default = next(((row["schema"], row["name"]) for row in tree if row["bound"] == "DEFAULT"), None)
    drift.require(session, plan, [((plan.table.schema_name, plan.table.name), plan.key)])
    key = next(column for column in catalog.columns_of(session, oid) if column.name == plan.key)
    if pending := half_detached(session, oid):
        found.append(Finding.blocker(plan.full_name, pending, ""))
    asked = _as_written(run, session, _wanted(run, session, oid, given, key))
    wanted = [each for each in asked if not stands(each.name, each.bound, tree)]
    division.refuse_too_many(len(tree) + len(wanted), plan.table.name, given)
    rules, refused = _rehearse(run, session, tree, wanted)
    if refused:
        found.append(Finding.blocker(plan.full_name, refused, "Correct add."))
    for each in wanted:
        found += in_the_way(run, session, each.name)
    keys = session.rows("additions.referencing", oid=oid)
    additions = []
    for each in wanted:
        rule = rules.get(each.name, "(false)")
        rows = session.value("additions.waiting", default=default, rule=trusted(rule)) if default else 0
        additions.append(Addition(name=each.name, bound=each.bound, rule=rule, waiting=rows))
        found += _moving(each.name, rows, default, keys)
        found += _breaking(session, oid, each.name, rule, default) if rows and default else ()
    if default and additions:
        size = next(row["table_bytes"] for row in tree if row["bound"] == "DEFAULT")
        waits = (
            f"{default[1]} ({size / 1e6:,.1f} MB) is read through under ACCESS EXCLUSIVE while a partition is attached:"
            " who reads or writes it waits for so long."
        )
        found.append(Finding.warning(default[1], waits, "Attach when that is acceptable."))
        if any(row["partitioned"] for row in tree if row["bound"] == "DEFAULT"):
            found.append(Finding.blocker(default[1], f"{default[1]} is itself partitioned.", "Take its rows out by hand first."))
        for said in pointing(session, tree) if any(each.waiting for each in additions) else ():
            found.append(Finding.blocker(default[1], f"{said}, which rows that go over leave.", "Drop it first."))
    for row in session.rows("additions.published_by_name", oid=oid) if additions else ():
        found.append(Finding.warning(
            row["name"], f"The publication {row['name']} publishes partitions under their own names: its subscribers stop at the first row of a"
            " partition of which they have no table.",
            "Make the tables there first, and ALTER SUBSCRIPTION … REFRESH PUBLICATION afterwards; or"
            f" ALTER PUBLICATION {spelled((row['name'],))} SET (publish_via_partition_root = true);",
        ))  # fmt: skip
    if not additions:
        found.append(Finding.note(plan.full_name, f"{plan.full_name} has all these partitions: there is nothing to add."))
    sibling = next((row["oid"] for row in tree if not row["partitioned"] and row["bound"] != "DEFAULT"), tree[0]["oid"])
    return Growth(
        table=plan.full_name, oid=oid, existing=tuple(row["name"] for row in tree), additions=tuple(additions), default=default, sibling=sibling,
        keys=tuple(Key.model_validate(row | {"schema_name": row["schema"]}) for row in keys),
        findings=worst_first(found),
    )  # fmt: skip


def require_partitions(run: Run, session: Session, oid: int) -> list[Row]:
    """The table's partitions; raises PromiseBroken when somebody took the last one away, or made a plain table of its name."""
    name, tree = run.plan.full_name, session.rows("additions.tree", oid=oid)
    if not session.value("foreign_keys.partitioned", reference_text=spelled(run.plan.source)):
        raise PromiseBroken(
            f"{name} is not partitioned any more, so it is another table than was cut over: plan it anew with 00_plan."
        )
    if not tree:
        raise PromiseBroken(
            f"{name} has no partition any more, and every row is refused: attach one that was detached, or make one by CREATE TABLE …"
            f" PARTITION OF {spelled(run.plan.source)}; then run this again."
        )
    return tree


def half_detached(session: Session, oid: int) -> str:
    """Names each partition whose DETACH was broken off, and what completes it; empty where there is none."""
    with session.qualified():
        return " ".join(
            f"DETACH of {row['name']} was broken off, and nobody sees its rows in the table: let it run on if it is still at work,"
            f" else complete it by {row['finalize']}."
            for row in session.rows("additions.half_detached", oid=oid)
        )


def mark(run: Run) -> str:
    """How the comment begins of a table that was made to be attached: by it a later run knows it again."""
    return f"Made by the partition runbook, to be attached to {run.plan.full_name}: plan "


def left_behind(run: Run, session: Session, name: str) -> bool | None:
    """Whether what has this name is a table that an earlier run made and did not come to attach; None where nothing has it."""
    own: bool | None = session.value("additions.left_behind", schema=run.plan.table.schema_name, name=name, mark=mark(run))
    return own


def in_the_way(run: Run, session: Session, name: str) -> Iterator[Finding]:
    """Blockers, when the name belongs to what is not ours to make anew. What an earlier run left behind is, while it is empty."""
    schema, own = run.plan.table.schema_name, left_behind(run, session, name)
    if own is False:
        yield Finding.blocker(
            name, f"The name {schema}.{name} is taken.", "Choose another name for the partition, or rename what has it."
        )
    elif own and session.value("additions.has_rows", leaf=(schema, name)):
        yield Finding.blocker(
            name,
            f"{schema}.{name}, which an earlier run made and could not attach, has rows by now.",
            "Take them out, or rename it.",
        )


def _breaking(session: Session, oid: int, name: str, rule: str, default: tuple[str, str]) -> Iterator[Finding]:
    """Blockers, for rows of the default partition that break a check which is NOT VALID: the new table has it from its first row on."""
    for check in catalog.checks_of(session, oid):
        breaks = trusted(check.definition.removeprefix("CHECK ").removesuffix(" NOT VALID"))
        rows = 0 if check.validated else session.value("additions.breaking", default=default, rule=trusted(rule), check=breaks)
        if rows:
            yield Finding.blocker(
                name,
                f"{counted(rows, 'row')} of {default[1]} that would go over to {name} {'breaks' if rows == 1 else 'break'} {check.name}, which is NOT VALID.",
                "Correct them, or drop the check, first.",
            )


def _moving(name: str, rows: int, default: tuple[str, str] | None, keys: list[Row]) -> Iterator[Finding]:
    if not rows or default is None:
        return
    yield Finding.warning(
        name,
        f"{counted(rows, 'row')} of {default[1]} {'goes' if rows == 1 else 'go'} over to {name} while they are locked; no trigger fires, nothing is lost.",
        "Correct the rows first if they were not meant for it.",
    )
    for row in keys:
        table = f"{row['schema']}.{row['table']}"
        if row["partitioned"]:
            # Adding it again would read the whole table under its lock, or PostgreSQL takes no NOT VALID key there.
            key = sql.Identifier(row["name"]).as_string(None)
            yield Finding.blocker(
                table,
                f"{row['name']} of {table}, which is itself partitioned, refers to rows that would move, and cannot step aside for a moment.",
                f"ALTER TABLE {spelled((row['schema'], row['table']))} DROP CONSTRAINT {key}; first, and add it again afterwards:"
                f" {row['definition']}.",
            )
        else:
            yield Finding.warning(
                table,
                f"{table} is locked, too, while its key {row['name']} steps aside; it is validated again afterwards.",
            )


def pointing(session: Session, tree: list[Row]) -> list[str]:
    """The foreign keys that point at the default partition itself, in words."""
    return [
        f"{key['name']} of {key['schema']}.{key['table']} points at {row['schema']}.{row['name']} itself"
        for row in tree
        if row["bound"] == "DEFAULT"
        for key in session.rows("additions.referencing", oid=row["oid"])
    ]


def stands(name: str, bound: str, tree: list[Row]) -> bool:
    """Whether this very partition is there already; the bound as the server writes it."""
    return any((row["name"], row["bound"]) == (name, bound) for row in tree)


def _as_written(run: Run, session: Session, wanted: list[Partition]) -> list[Partition]:
    """With each bound as the server writes it. What it refuses stays as it is: `_rehearse` says why."""
    try:
        with session.connection.transaction(force_rollback=True):
            session.run("additions.create_twin", root=run.plan.source, partition_by=run.names["partition_by"])
            found = []
            for each in wanted:
                session.run("additions.create_twin_partition", leaf=("runbook_twin_0",), bound=trusted(each.bound))
                found.append(each.model_copy(update={"bound": session.value("additions.bound", leaf="pg_temp.runbook_twin_0")}))
                session.run("ddl.drop", table=("pg_temp", "runbook_twin_0"))
            return found
    except psycopg.Error:
        return wanted


def _wanted(run: Run, session: Session, oid: int, given: Parameters, key: Column) -> list[Partition]:
    """The partitions that are asked for; by steps: from where the present ones end to `ahead` beyond the last row, or now."""
    plan = run.plan
    asked: division.Wanted = dict(given.add or {})
    if given.every and plan.partition_by != "range":
        raise BadInput(
            f"every is for a table that is partitioned by range, and {plan.full_name} is by {plan.partition_by}: name what to add."
        )
    if plan.partition_by == "list" and key.not_null and (null := [name for name, values in asked.items() if None in values]):
        raise BadInput(f"{null[0]} is to take NULL, which {plan.key} of {plan.full_name} cannot be: leave it out.")
    if plan.partition_by == "range" and given.every:
        with division.refused(plan.table.name, key, "range"):
            asked = {**_steps(run, session, oid, given, key, division.range_bounds(session, asked, key)), **asked}
    if not asked and not given.every:
        raise BadInput('add is empty: name the partitions to add, as {"users_nurses": ["nurse"]}, or by range say every.')
    maker = division.list_bounds if plan.partition_by == "list" else division.range_bounds
    return maker(session, asked, key)


def ranges_of(session: Session, key: Column, taken: Sequence[tuple[str | None, str | None]]) -> dict[str, Any]:
    """Bounds, with the key's type and what now is to it, as statements take them."""
    lows, highs = zip(*taken, strict=True) if taken else ((), ())
    now = "localtimestamp::{}" if session.value("draft.category", type=key.type) == "D" else "NULL"
    type_ = trusted(key.type)
    return {"type": type_, "now": sql.SQL(now).format(type_), "lows": [*lows], "highs": [*highs]}


def _steps(
    run: Run, session: Session, oid: int, given: Parameters, key: Column, named: list[Partition]
) -> dict[str, list[PartitionValue]]:
    """What steps add to the partitions that are there and those that are `named`, up to the next of these."""
    column, there = sql.Identifier(key.name), session.rows("additions.ranges", oid=oid)
    taken = [(row["low"], row["high"]) for row in there]
    taken += [(each.values[0], each.values[1]) for each in named if each.values]
    ranges = ranges_of(session, key, taken)
    front = session.row("additions.front", **ranges) if taken else {"ends": None, "next": None}
    kind = session.value("draft.category", type=key.type)
    finite: sql.Composable = trusted(division.FINITE.get(kind, "true").format(spelled(column)))
    if front["next"] is not None:
        finite = sql.SQL("{} AND {} < {}::{}").format(finite, column, sql.Literal(front["next"]), ranges["type"])
    high = session.value("additions.highest", root=run.plan.source, key=column, finite=finite, now=ranges["now"])
    steps = division.steps(session, given, run.plan.table.name, key, front["ends"], high)
    if taken and front["ends"] is None:
        return {}
    froms, tos = ([None if bounds[side] is None else str(bounds[side]) for bounds in steps.values()] for side in (0, 1))
    rows = session.rows("additions.uncovered", **ranges, ends=front["ends"], names=list(steps), froms=froms, tos=tos)
    names, found = {row["name"] for row in there}, dict[str, list[PartitionValue]]()  # of a part of this step, it may be
    for row in rows:
        found[fit(row["name"], names | found.keys())] = [row["low"], row["high"]]
    return found


def _rehearse(run: Run, session: Session, tree: list[Row], wanted: list[Partition]) -> tuple[dict[str, str], str]:
    """What each new partition takes, as the server writes it; or its refusal as a sentence."""
    rules = {}
    bounds = [(row["name"], row["bound"]) for row in tree] + [(each.name, each.bound) for each in wanted]
    try:
        with session.connection.transaction(force_rollback=True):
            session.run("additions.create_twin", root=run.plan.source, partition_by=run.names["partition_by"])
            for number, (name, bound) in enumerate(bounds):
                leaf = f"runbook_twin_{number}"
                session.run("additions.create_twin_partition", leaf=(leaf,), bound=trusted(bound))
                if number >= len(tree):
                    rules[name] = session.value("additions.rule", leaf=f"pg_temp.{leaf}")
    except psycopg.Error as error:
        said = re.sub(r"runbook_twin_(\d+)", lambda twin: bounds[int(twin[1])][0], error.diag.message_primary or str(error))
        return {}, f"PostgreSQL refuses to add that to {run.plan.full_name}: {said}."
    return rules, ""
