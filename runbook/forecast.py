"""00 and 06: what the migration will take, by a sample of the very table on the very server; and beside it what it took."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql

from runbook import changes, compare, indexes, partition, references, swapping, unique
from runbook.errors import PlanBlocked, told
from runbook.ledger import NOTEBOOKS, STEPS, Action, Evidence, Run, recorded
from runbook.plan import Plan, identifiers, with_key
from runbook.session import Session
from runbook.statements import spelled, statement, trusted
from runbook.words import counted, ended

COPY_S = 0.12  # for so long rows are copied; all that is measured takes some four times that
ANALYZED = 3000  # rows that ANALYZE reads of each table here: 300 for each unit of its target, which is a tenth of the default
BLOCKS = 32  # a piece of the sample; the pieces are from all over the table
REFERENCING = 128  # blocks of all the tables that reference it
PARTITIONS = 8  # tried; those with the most rows
GAIN = 1.5  # by how much 03's two workers are faster than one
SESSIONS = {"backup": 6, "partition": 6, "restore": 16, "foreign_keys": 6, "cutover": 12, "verify": 40}  # that a step opens
UNDER_LOCKS = 8  # statements besides the swap's own: the last replay and its checks
MB = 1e6
PAGE = 8192  # an index has one of its own and one of rows, or more


@recorded("plan", "forecast")
def measure(action: Action) -> Evidence:
    """Copy a sample for about a second and roll it back: rows, bytes, WAL and the seconds of each step follow from it.

    Takes no lock but a reader's on anything that exists, and stops nobody: where it cannot measure, it says why.
    """
    run, session = action.run, action.session
    if run.plan.restore_from == "backup":
        return action.finish("A repair has no forecast: how much is lost is what it finds out.")
    if any(row["step"] != "plan" for row in session.rows("ledger.history", migration=run.migration)):
        return action.finish("There is no forecast: the migration was under way before one was made.")
    try:
        # In one snapshot: a row that moves meanwhile would be copied twice.
        with session.transaction("REPEATABLE READ", lock_timeout="300ms", statement_timeout="5s"):
            sample = sampled(run, session)
            raise psycopg.Rollback
        begun = time.perf_counter()
        with run.database.session("forecast"):
            sample.seconds["session"] = time.perf_counter() - begun
    except psycopg.errors.IntegrityError as error:  # 03 would meet it, too
        raise PlanBlocked(
            f"The rows of {run.plan.full_name} cannot stand in the planned table. {told(error)} Change the rows or the plan, then run"
            " 00_plan again."
        ) from None
    except psycopg.Error as error:
        if named := partition.event_trigger(session, error):
            refuses = spelled(sql.Identifier(named))
            raise PlanBlocked(
                f"The event trigger {refuses} does not let {run.plan.full_name} be migrated: {ended(error.diag.message_primary or str(error))} What a step makes, alters or drops, the"
                f" way back does, too: switch it off meanwhile (ALTER EVENT TRIGGER {refuses} DISABLE), then run 00_plan again."
            ) from None
        return action.finish(f"There is no forecast, because a sample could not be copied. {told(error)}")
    facts = _project(run, sample) | {"free_bytes": free(session, run.plan.table.oid)}
    return action.finish(sentence(facts), facts.pop("rows"), **facts)


def sampled(run: Run, session: Session) -> _Sample:
    """The sample, once it is measured, within a transaction that the caller takes back."""
    sample = _Sample(replace(run, migration=-run.migration, plan=_smaller(run.plan)), session)
    sample.look()
    return sample


def _smaller(plan: Plan) -> Plan:
    """The plan with few partitions; by list and by range the sample's other rows go where unknown ones go."""
    large = sorted(plan.partitions, key=lambda each: (each.bound == "DEFAULT", each.rows))[-PARTITIONS:]
    few = tuple(each for each in plan.partitions if each in large)
    if plan.partition_by == "hash":
        bounds = (f"FOR VALUES WITH (MODULUS {len(few)}, REMAINDER {number})" for number in range(len(few)))
        few = tuple(each.model_copy(update={"bound": bound}) for each, bound in zip(few, bounds, strict=True))
    return plan.model_copy(update={"partitions": few})


class _Sample:
    """The sample under way, in a transaction that will be rolled back: seconds of each part, rows and bytes."""

    def __init__(self, run: Run, session: Session) -> None:
        self.run, self.session = run, session
        self.leaves = changes.leaves(run, run.staging)
        self.seconds = dict[str, float](session=0, create=0, empty=0, copy=0, index=0, hash=0, analyze=0, keys=0, move=0)
        self.copied = self.placed = self.wal_bytes = 0  # rows; of them those in the partitions that are tried; bytes
        self.sizes: dict[str, int] = {}
        self.references: list[dict[str, float]] = []

    def time(self, part: str, statements: Iterable[sql.Composed]) -> float:
        """Run these; the seconds that they took, which are added to the part's."""
        begun = time.perf_counter()
        self.session.run_all(statements)
        length = time.perf_counter() - begun
        self.seconds[part] = self.seconds.get(part, 0) + length
        return length

    def look(self) -> None:
        run, session = self.run, self.session
        self.time("create", partition.create(run))
        self.build("empty")
        self.time("drop", indexes.remove(run))
        self.copy()
        self.build("index")
        # Before the root has its indexes, for with them the partition of unknown values has some, too.
        self.sizes = session.row("forecast.sizes", schemas=[run.staging, run.plan.guard_schema])
        self.sizes["backup_bytes"] = session.row("forecast.sizes", schemas=[run.staging])["table_bytes"]
        self.time("adopt", indexes.adopt(run))
        self.time("hash", compare.queries(run, session, changes.FORWARD)[:1])
        session.run("forecast.analyze_few")
        self.time("analyze", [statement("restore.analyze_root", **run.names, only=trusted(""))])
        for reference in run.plan.references:
            self.reference(reference)
        self.time("move", (statement("cutover.set_schema", table=leaf, to=run.names["schema"]) for leaf in self.leaves))
        self.time("drop", [statement("forecast.drop", **run.names)])  # which an event trigger may refuse

    def build(self, part: str) -> None:
        for each in indexes.builds(self.run):
            with indexes.explained(self.run, each, PlanBlocked):
                self.time(part, [*each.statements, *each.adopt])
        for guard in unique.builds(self.run):
            self.time(part, guard)

    def copy(self) -> None:
        run, blocks = self.run, self.session.row("restore.blocks", **self.run.names)["blocks"]
        pieces = Random(0).sample(range(0, blocks, BLOCKS), min(1000, -(-blocks // BLOCKS)))
        begun = time.perf_counter()
        for first in pieces:
            copied = statement("restore.copy_range", **run.names, first=f"({first},0)", last=f"({first + BLOCKS},0)")
            done = self.session.value("forecast.measured", query=copied)[0]["Plan"]
            self.wal_bytes += done.get("WAL Bytes", 0)
            self.copied += int(done["Plans"][0]["Actual Rows"])
            if time.perf_counter() - begun > COPY_S:
                break
        self.seconds["copy"] = time.perf_counter() - begun
        self.placed = self.copied - (
            0 if run.plan.takes_any_value else int(self.session.value("cutover.unplaced_rows", **run.names))
        )

    def reference(self, reference: Any) -> None:
        """A referencing table's first rows: what filling them in, looking them up and adding their key takes."""
        run, session = self.run, self.session
        sizes = [int(session.value("foreign_keys.blocks", reference_text=spelled(table))) for table in reference.tables]
        blocks, taken = sum(sizes), min(max(sizes), max(8, REFERENCING // len(run.plan.references)))
        own = references.names(run, reference) | {
            "reference": reference.tables[sizes.index(max(sizes))],
            "sample": sql.Identifier(run.staging, run.plan.internal(f"sample_{run.plan.references.index(reference)}")),
            "key_columns": identifiers(with_key(reference.columns, reference.role_column)),
            "key_referenced": identifiers(with_key(reference.referenced, run.plan.key)),
        }
        session.run("forecast.create_referencing", **own, last=f"({taken},0)")
        rows, size = session.row("forecast.referencing", **own, sample_text=spelled(own["sample"])).values()
        if reference.adds_column:
            session.run("forecast.add_column", **own)
        fill = self.time("fill", [statement("forecast.fill", **own)])
        look_up = self.time("look up", [statement("forecast.look_up", **own)])
        for _ in sizes:  # on each leaf where it is partitioned
            self.time("keys", [statement("forecast.add_key", **own)])
        self.references.append({"rows": rows * blocks / max(1, taken), "bytes": size / max(1, rows), "adds": reference.adds_column,
                                "fill": fill / max(1, rows), "look up": look_up / max(1, rows + self.copied)})  # fmt: skip


def _project(run: Run, sample: _Sample) -> dict[str, Any]:
    """From the sample to the whole: what grows with rows, with partitions, with partitions times references."""
    plan, took = run.plan, sample.seconds
    rows, wider = sum(each.rows for each in plan.partitions), len(plan.partitions) / max(1, len(sample.leaves))
    times = rows / max(1, sample.copied)
    copy, hashing, empty = times * took["copy"], times * took["hash"], wider * took["empty"]
    indexed = rows / max(1, sample.placed)  # the others went where there is no index
    index = empty + indexed * max(0.0, took["index"] - took["empty"])
    read = max(1, min(sample.copied, ANALYZED * len(sample.leaves)))
    analyze = took["analyze"] * min(rows, 10 * ANALYZED * len(plan.partitions)) / read
    frequent = max((each.rows for each in plan.partitions if plan.frequent_value in each.values), default=0)
    minority = 1 - frequent / max(1, rows)
    filled = [each for each in sample.references if each["adds"]]
    for each in sample.references:
        each["look up"] *= each["rows"] + rows
    fill = sum(each["rows"] * minority * each["fill"] + each["look up"] for each in filled)
    guarded = 2 * index * len(plan.guards) / max(1, len(plan.indexes))  # 06 compares each guard with all rows
    catalog = sum(1 for _ in swapping.swap_statements(run)) + UNDER_LOCKS + 4 * len(plan.references)
    locked = catalog * took["move"] / max(1, len(sample.leaves)) + wider * took["keys"]
    seconds = {
        "backup": copy / 2 + 2 * hashing, "partition": wider * took["create"],
        "restore": (copy + index) / GAIN + wider * took["adopt"] + analyze + 2 * hashing,
        "foreign_keys": fill, "cutover": locked + sum(each["look up"] for each in sample.references), "verify": 4 * hashing + guarded,
    }  # fmt: skip
    least = min(2 * PAGE * len(plan.indexes) * len(sample.leaves), sample.sizes["index_bytes"])  # however few the rows
    table, indexes = times * sample.sizes["table_bytes"], wider * least + indexed * (sample.sizes["index_bytes"] - least)
    # A pg_dump archive is compressed, but lies on the machine that the notebooks run on, and is restored once on the server.
    backup = times * sample.sizes["backup_bytes"]
    updates = 2 * sum(each["rows"] * minority * each["bytes"] for each in filled)
    return {
        "rows": rows, "copied": sample.copied, "sample": {part: round(each, 4) for part, each in took.items()},
        "seconds": {step: round(each + SESSIONS[step] * took["session"], 4) for step, each in seconds.items()},
        "locked_s": round(locked, 4), "table_bytes": int(table), "index_bytes": int(indexes), "backup_bytes": int(backup),
        "disk_bytes": int(table + indexes + backup + updates),
        "wal_bytes": int(times * sample.wal_bytes + table + indexes + updates),
    }  # fmt: skip


def free(session: Session, oid: int) -> int | None:
    """Bytes free where the server keeps the table, if it is on this machine; of another, only its own machine can tell."""
    folder = session.value("forecast.folder", oid=oid) if session.connection.info.host.startswith("/") else None
    with suppress(OSError):
        return os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize if folder else None
    return None


def sentence(facts: dict[str, Any]) -> str:
    """What a forecast's facts say."""
    free_bytes, needed = facts["free_bytes"], facts["disk_bytes"] + facts["wal_bytes"]
    room = "how much is free, only the server's machine can tell"
    if free_bytes is not None:
        room = f"{free_bytes / MB:,.0f} MB are free" + (", which is NOT ENOUGH" if free_bytes < needed else "")
    return (
        f"{counted(facts['rows'], 'row')} will take about {sum(facts['seconds'].values()):,.1f} s of work, {facts['disk_bytes'] / MB:,.1f} MB of disk"
        f" and {facts['wal_bytes'] / MB:,.1f} MB of WAL ({room}); names will be locked for about {facts['locked_s'] * 1000:,.0f} ms."
        f" Measured on {counted(facts['copied'], 'row, which was', 'rows, which were')} copied and rolled back."
    )


def beside(run: Run) -> pd.DataFrame:
    """The forecast and, as soon as something is done, what it took, with the forecast's error; of WAL, everybody's is counted."""
    done = {(each["step"], each["action"]): each for each in run.frame("forecast.done").to_dict("records")}
    foretold = done.get(("plan", "forecast"))
    made = foretold["evidence"] if foretold else {}
    if not foretold or "seconds" not in made:
        return pd.DataFrame(columns=["what", "unit", "forecast", "actual", "error"])
    took = {
        step: sum(each["seconds"] for (of, _), each in done.items() if of == step) for step in STEPS if (step, "check") in done
    }

    def fact(step: str, action: str, name: str, by: float = MB) -> float | None:
        value = (done.get((step, action)) or {"evidence": {}})["evidence"].get(name)
        return None if value is None else float(value) / by

    wal = [fact(step, action, "wal_written", 1) or 0 for step, action in done if step in STEPS[1:6]]
    compared = done.get(("restore", "compare"))
    lines = [(NOTEBOOKS[step], "s", made["seconds"][step], took.get(step)) for step in STEPS if step in made["seconds"]] + [
        ("names locked", "ms", made["locked_s"] * 1000, fact("cutover", "swap", "locked_s", 0.001)),
        ("rows", "rows", foretold["rows"], compared and compared["rows"]),
        ("the partitions", "MB", made["table_bytes"] / MB, fact("restore", "index", "table_bytes")),
        ("their indexes", "MB", made["index_bytes"] / MB, fact("restore", "index", "index_bytes")),
        ("the backup", "MB", made["backup_bytes"] / MB, fact("backup", "make", "bytes")),
        *([] if took else [("disk needed", "MB", made["disk_bytes"] / MB, None)]),
        ("WAL", "MB", made["wal_bytes"] / MB, sum(wal) / MB if "foreign_keys" in took else None),
    ]  # fmt: skip
    frame = pd.DataFrame(lines, columns=["what", "unit", "forecast", "actual"]).astype({"forecast": float, "actual": float})
    if frame["actual"].isna().all():
        return frame[["what", "unit", "forecast"]].round(3)
    error = frame["forecast"] / frame["actual"].where(frame["actual"] > 0) - 1
    return frame.round(3).assign(error=["" if pd.isna(each) else f"{each:+.0%}" for each in error])


def shown(beside: pd.DataFrame) -> pd.DataFrame:
    """The same for people: 10,000 rows and 29.9 ms, and nothing where nothing is known."""
    numbers = beside.select_dtypes("number").map(lambda each: "" if pd.isna(each) else f"{each:,.3f}".rstrip("0").rstrip("."))
    return beside.assign(**numbers)
