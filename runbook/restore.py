"""03: copy, settle, index, replay: the shadow becomes equal to the source while the application goes on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pandas as pd
from psycopg import sql

from runbook import changes, compare, indexes, pace, refill, repair
from runbook import unique as unique_keys
from runbook.changes import SHORT_TAIL, Rewritten, Statements
from runbook.errors import NotEqual, OutOfOrder, PromiseBroken
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.session import Session
from runbook.sheet import Sheet
from runbook.statements import spelled, statement
from runbook.words import counted
from runbook.workers import Range, gaps, most, parallel, refuse_orphan


def script(run: Run) -> Statements:
    """The whole step for a table that nobody writes to: one copy instead of ranges, no replay needed."""
    yield statement("restore.copy_all", **run.names)
    yield from _after_the_copy(run)


def _after_the_copy(run: Run) -> Statements:
    for build in indexes.builds(run):
        yield from (*build.statements, *build.adopt)
    for each in unique_keys.builds(run):
        yield from each
    yield from indexes.adopt(run)
    for together in indexes.storage(run):
        for each in together:
            yield from each


def preview(run: Run) -> Sheet:
    """The statements of this step, with real names; the copy as it looks for one range."""
    if run.plan.restore_from == "backup":
        return refill.preview_rows(run)
    return Sheet([statement("restore.copy_range", **run.names, first="(0,0)", last="(4096,0)"), *_after_the_copy(run)])


ROUNDS = 20  # of replays, where the application writes faster than one can be


@recorded("restore", "copy")
def copy(
    action: Action, workers: int = 0, range_mib: int = 32, max_replica_lag_s: int = 0, max_active_sessions: int = 0
) -> Evidence:
    """Copy every block of the source into the shadow, each range and its ledger row in one transaction.

    Goes on where a run that died stopped, and from the beginning when the source was truncated or rewritten.
    """
    if action.run.plan.restore_from == "backup":
        return refill.put_back(action)
    run, session = action.run, action.session
    while True:
        _start_again_if_rewritten(run, session)
        size = session.row("restore.blocks", **run.names)
        done = [(row["first_block"], row["last_block"]) for row in session.rows("restore.copied", **run.names)]
        pending = list(gaps(done, size["blocks"], piece(size["blocks"], size["block_size"], range_mib, workers)))
        stop = threading.Event()
        brakes = pace.Brakes(max_replica_lag_s, max_active_sessions, stop)
        holder = session.pid
        progress = pace.Progress(
            "copied",
            run.plan.table.rows,
            sum(r["rows"] for r in session.rows("restore.copied", **run.names)),
        )
        try:
            parallel(
                run,
                workers,
                pending,
                partial(_copy_range, run, holder, brakes, progress),
                stop,
            )
            break
        except Rewritten as again:
            print(f"{again} Copying starts again.", flush=True)
        finally:
            progress.close()
    rows = sum(row["rows"] for row in session.rows("restore.copied", **run.names))
    return action.finish(
        f"{counted(rows, 'row was', 'rows were')} copied; ranges: {len(done) + len(pending)}.",
        rows,
        ranges=len(done) + len(pending),
    )


def _start_again_if_rewritten(run: Run, session: Session) -> None:
    with session.transaction(lock_timeout="30s"):
        session.run("restore.wait_for_leftovers", **run.names)
        session.run("changes.hold", **{**run.names, "origin": run.names["source"]})
        filenode = session.value("catalog.filenode", oid=run.names["source_oid"])
        truncated = session.value("changes.truncated", **run.names)
        if truncated or filenode != session.row("ledger.remembered", **run.names)["filenode"]:
            session.run_all(indexes.remove(run))
            session.run("restore.start_again", **run.names)
            session.run("changes.forget_truncation", **run.names)
            session.run("ledger.remember_filenode", filenode=filenode, **run.names)


@contextmanager
def from_the_copy(run: Run) -> Iterator[None]:
    """When the source turns out to be rewritten or truncated, the steps that rest on the copy count as not done. Raises OutOfOrder before
    there is one."""
    if run.finished("restore", "copy") is None:
        raise OutOfOrder(f"{run.plan.full_name} has not been copied yet: run 03_restore from its beginning.")
    try:
        yield
    except Rewritten as rewritten:
        with run.database.session("ledger") as session:
            session.run("ledger.undo", migration=run.migration, steps=["restore", "foreign_keys", "cutover"])
        raise Rewritten(f"{rewritten} Nothing is lost: run 03_restore again, it begins anew with the copy.") from None


def piece(blocks: int, block_size: int, range_mib: int, workers: int) -> int:
    """Blocks a range: at most `range_mib`, and so few that every worker has several to do."""
    return max(64, min(range_mib * 1024 * 1024 // block_size, blocks // (most(workers) * 4) + 1))


def _copy_range(run: Run, holder: int, brakes: pace.Brakes, progress: pace.Progress, session: Session, each: Range) -> None:
    brakes.wait(session)
    session.give_way()
    first, last = (sql.Literal(f"({block},0)") for block in each)
    with session.transaction(lock_timeout="30s", synchronous_commit="off"):
        changes.hold(run, session)
        rows = session.run("restore.copy_range", **run.names, first=first, last=last).rowcount
        session.run(
            "restore.record_range",
            **run.names,
            first_block=each[0],
            last_block=each[1],
            rows=rows,
        )
        refuse_orphan(run, session, holder)
    progress.add(rows, partial(changes.length, run, session))


@recorded("restore", "settle")
def settle(action: Action) -> Evidence:
    """Replay what changed while the ranges were copied, doubles included: the shadow equals the source afterwards."""
    if action.run.plan.restore_from == "backup":
        return repair.nothing_to(action, "settle")
    run = action.run
    action.session.give_way()
    with from_the_copy(run):
        keys = changes.settle(run, action.session)
    return action.finish(f"{counted(keys, 'change')} made during the copy {'was' if keys == 1 else 'were'} settled.", keys)


@recorded("restore", "index")
def build_indexes(action: Action, workers: int = 0) -> Evidence:
    """Build the partitions' indexes in bulk, several at a time: nobody else uses the shadow, so no CONCURRENTLY."""
    if action.run.plan.restore_from == "backup":
        return repair.nothing_to(action, "index")
    run, session = action.run, action.session
    with session.transaction(lock_timeout="30s"):
        session.run("restore.wait_for_leftovers", **run.names)
    built: dict[tuple[str, str], bool] = {}  # whether it is its constraint's already
    for partition in run.plan.partitions:
        for row in session.rows("restore.built", leaf_text=spelled((run.staging, partition.name))):
            built[partition.name, row["name"]] = row["adopted"]
    builds = list(indexes.builds(run))
    for each in builds:
        each.ended = (each.leaf, each.name) in built
    guards = [indexes.Build(statements) for statements in unique_keys.pending(run, session)]
    pending, holder = [*(each for each in builds if not each.ended), *guards], session.pid
    parallel(run, workers, pending, lambda worker, each: _build(run, worker, each, holder))
    with session.transaction(lock_timeout="5s"):
        for each in builds:
            for later in each.adopt if not built.get((each.leaf, each.name)) else []:
                session.run(later)
        if not session.rows("restore.built", leaf_text=spelled(run.names["shadow"])):
            session.run_all(indexes.adopt(run))
    for together in indexes.storage(run):
        parallel(run, workers, together, _one_by_one)
    sizes = session.row("forecast.sizes", schemas=[run.staging, run.plan.guard_schema])
    sentence = f"{counted(len(pending), 'index was', 'indexes were')} built on {counted(len(run.plan.partitions), 'partition')}, and the tables analysed."
    return action.finish(sentence, **sizes)


def _build(run: Run, session: Session, build: indexes.Build, holder: int) -> None:
    before = build.after
    while before and not before.ended and not (before.pid and session.value("restore.building", pid=before.pid)):
        time.sleep(0.01)
    build.pid = session.pid
    session.give_way()
    try:
        with session.transaction(lock_timeout="30s", synchronous_commit="off"):
            with indexes.explained(run, build, PromiseBroken):
                session.run_all(build.statements)
            refuse_orphan(run, session, holder)
    finally:
        build.ended = True


def _one_by_one(session: Session, statements: list[sql.Composed]) -> None:
    session.give_way()
    for each in statements:  # in no transaction: VACUUM wants none
        session.run(each)


@recorded("restore", "replay", again=True)
def replay(action: Action) -> Evidence:
    """Replay the log until its tail is short; what stays is replayed under the cut-over's locks."""
    if action.run.plan.restore_from == "backup":
        return repair.nothing_to(action, "replay")
    run, session = action.run, action.session
    session.give_way()  # 05 does not, so that it comes to an end
    total, before = 0, sys.maxsize
    for _ in range(ROUNDS):
        with from_the_copy(run):
            keys, _horizon = changes.replay(run, session)
        total += keys
        if keys <= SHORT_TAIL or keys >= before:
            break
        before = keys
    outrun = " They come as fast as they are replayed: while that is so, 05_cutover cannot begin." if keys > SHORT_TAIL else ""
    return action.finish(
        f"{counted(total, 'change was', 'changes were')} replayed; {counted(changes.length(run, session), 'waits', 'wait')} in the log.{outrun}",
        total,
    )


def compare_all(run: Run) -> Evidence:
    """Compare every row of source and shadow in one snapshot; raises NotEqual, naming partitions and keys. What a repair put back is
    compared once: what the application deleted since is not missing."""
    seen = run.finished("restore", "compare") if run.plan.restore_from == "backup" else None
    return seen or _compare_all(run)


@recorded("restore", "compare", again=True)
def _compare_all(action: Action) -> Evidence:
    if action.run.plan.restore_from == "backup":
        return refill.compare(action)
    run = action.run
    action.session.give_way()
    with from_the_copy(run):
        seen = compare.exactly(run, action.session, changes.FORWARD)
    return action.finish(seen.sentence, seen.rows, sums=seen.sums)


def rows(run: Run) -> pd.DataFrame:
    """Rows per partition, as the comparison counted them: it has none of a partition that is empty."""
    seen = run.finished("restore", "compare")
    sums = seen.facts.get("sums", {}) if seen else {}
    names = dict.fromkeys([*(partition.name for partition in run.plan.partitions), *sums])
    return pd.DataFrame([{"name": name, "rows": sums[name]["rows"] if name in sums else 0} for name in names])


@recorded("restore", "check")
def check(action: Action) -> Evidence:
    """Raises unless the last comparison found source and shadow equal and every row has its partition."""
    run = action.run
    seen = run.finished("restore", "compare")
    if seen is None:
        raise NotEqual(f"{run.plan.full_name} and its shadow have not been found equal: run 03_restore again.")
    if run.plan.restore_from == "backup":
        return action.finish(seen.sentence, seen.rows)
    refuse_homeless(run, action.session)
    return action.finish(f"The shadow equals {run.plan.full_name}: {counted(seen.rows or 0, 'row')}.", seen.rows)


def refuse_homeless(run: Run, session: Session) -> None:
    """Raises PromiseBroken when rows came that no partition takes, with their values and counts."""
    if run.plan.takes_any_value:
        return
    rows = session.rows("restore.homeless", **run.names)
    if rows:
        listed = ", ".join(f"{row['value']!r} ({row['rows']:,})" for row in rows)
        raise PromiseBroken(
            f"{run.plan.full_name} has rows whose {run.plan.key} fits no partition: {listed}. The application is not disturbed;"
            " correct these rows, or roll back with 90_rollback and plan a partition for them."
        )
