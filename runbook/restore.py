"""03: copy, settle, index, replay: the shadow becomes equal to the source while the application goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql
from psycopg.errors import QueryCanceled

from runbook import changes, compare, pace, repair
from runbook import unique as unique_keys
from runbook.changes import Rewritten
from runbook.database import Session
from runbook.errors import AlreadyRunning, NotEqual, PromiseBroken
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.plan import Index
from runbook.sheet import Sheet
from runbook.statements import spelled, statement, trusted

Statements = changes.Statements
Range = tuple[int, int]
SHORT_TAIL = changes.SHORT_TAIL


def script(run: Run) -> Statements:
    """The whole step for a table that nobody writes to: one copy instead of ranges, no replay needed."""
    yield statement("restore.copy_all", **run.names)
    yield from _after_the_copy(run)


def _after_the_copy(run: Run) -> Statements:
    for _, _, each in index_builds(run):
        yield from each
    for each in unique_keys.builds(run):
        yield from each
    yield from adopt(run)
    for together in finish_storage(run):
        for each in together:
            yield from each


def preview(run: Run) -> Sheet:
    """The statements of this step, with real names; the copy as it looks for one range."""
    if run.plan.restore_from == "backup":
        return repair.preview_rows(run)
    return Sheet([statement("restore.copy_range", **run.names, first="(0,0)", last="(4096,0)"), *_after_the_copy(run)])


@recorded("restore", "copy")
def copy(
    action: Action, workers: int = 2, range_mib: int = 32, max_replica_lag_s: int = 0, max_active_sessions: int = 0
) -> Evidence:
    """Copy every block of the source into the shadow, each range and its ledger row in one transaction.

    Goes on where a run that died stopped, and from the beginning when the source was truncated or rewritten.
    """
    if action.run.plan.restore_from == "backup":
        return repair.put_back(action)
    run, session = action.run, action.session
    while True:
        _start_again_if_rewritten(run, session)
        size = session.row("restore.blocks", **run.names)
        done = [(row["first_block"], row["last_block"]) for row in session.rows("restore.copied", **run.names)]
        pending = list(gaps(done, size["blocks"], piece(size["blocks"], size["block_size"], range_mib, workers)))
        stop = threading.Event()
        brakes = pace.Brakes(max_replica_lag_s, max_active_sessions, stop)
        holder = session.connection.info.backend_pid
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
        f"{rows:,} rows were copied; ranges: {len(done) + len(pending)}.",
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
            for each in drop_indexes(run):
                session.run(each)
            session.run("restore.start_again", **run.names)
            session.run("changes.forget_truncation", **run.names)
            session.run("ledger.remember_filenode", filenode=filenode, **run.names)


@contextmanager
def from_the_copy(run: Run) -> Iterator[None]:
    """When the source turns out to be rewritten or truncated, the steps that rest on the copy count as not done."""
    try:
        yield
    except Rewritten as rewritten:
        with run.database.session("ledger") as session:
            session.run("ledger.undo", migration=run.migration, steps=["restore", "foreign_keys", "cutover"])
        raise Rewritten(f"{rewritten} Nothing is lost: run 03_restore again, it begins anew with the copy.") from None


def piece(blocks: int, block_size: int, range_mib: int, workers: int) -> int:
    """Blocks a range: at most `range_mib`, and so few that every worker has several to do."""
    return max(64, min(range_mib * 1024 * 1024 // block_size, blocks // (workers * 4) + 1))


def gaps(done: Iterable[Range], blocks: int, step: int) -> Iterator[Range]:
    """What is left of blocks [0, `blocks`) when the ranges in `done` are copied, in pieces of at most `step` blocks."""
    position = 0
    for first, last in [*sorted(done), (blocks, blocks)]:
        for begin in range(position, first, step):
            yield begin, min(begin + step, first)
        position = max(position, last)


def _copy_range(run: Run, holder: int, brakes: pace.Brakes, progress: pace.Progress, session: Session, each: Range) -> None:
    brakes.wait(session)
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


def refuse_orphan(run: Run, session: Session, holder: int) -> None:
    """Raises AlreadyRunning in a worker whose run has lost the table: another one may be doing the same by now."""
    if all(row["pid"] != holder for row in session.rows("ledger.claimant", source_oid=run.plan.table.oid)):
        raise AlreadyRunning(f"The connection that holds {run.plan.full_name} for this run was lost: run this step again.")


def parallel(
    run: Run, workers: int, work: Sequence[Any], do: Callable[[Session, Any], None], stop: threading.Event | None = None
) -> None:
    """Do all of `work` with several sessions; the first error, or an interrupt, cancels what the others run and sets `stop`."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for each in work:
        waiting.put(each)
    sessions: list[Session] = []
    stopped = stop or threading.Event()

    def loop() -> None:
        with run.database.session("worker") as session:
            if len(work) > 1:  # so many processes as was said, and no more: the application needs the rest
                session.connection.execute("SET max_parallel_maintenance_workers = 0; SET max_parallel_workers_per_gather = 0")
            sessions.append(session)
            while not stopped.is_set():
                try:
                    each = waiting.get_nowait()
                except queue.Empty:
                    return
                do(session, each)

    with ThreadPoolExecutor(min(workers, len(work)) or 1) as pool:
        futures = [pool.submit(loop) for _ in range(min(workers, len(work)))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            while not all(future.done() for future in futures):  # again: one may have been between two statements
                for session in sessions:
                    if not session.connection.closed:
                        with suppress(psycopg.Error):
                            session.connection.cancel_safe(timeout=5)
                wait(futures, timeout=0.5)
    errors = [error for future in futures if (error := future.exception())]
    # What was cancelled is not the cause; a rewritten source is, whatever else came of it.
    for error in sorted(errors, key=lambda error: (isinstance(error, QueryCanceled), not isinstance(error, Rewritten))):
        raise error


@recorded("restore", "settle")
def settle(action: Action) -> Evidence:
    """Replay what changed while the ranges were copied, doubles included: the shadow equals the source afterwards."""
    if action.run.plan.restore_from == "backup":
        return repair.nothing_to(action, "settle")
    run = action.run
    with from_the_copy(run):
        keys = changes.settle(run, action.session)
    return action.finish(f"{keys:,} changes made during the copy were settled.", keys)


def index_builds(run: Run) -> Iterator[tuple[str, str, list[sql.Composed]]]:
    """(partition, index name, statements) for every index of every partition; the largest partitions first."""
    plan = run.plan
    for partition in sorted(plan.partitions, key=lambda partition: -partition.rows):
        leaf = sql.Identifier(run.staging, partition.name)
        for index in plan.indexes:
            name = index.leaf_names[partition.name]
            yield partition.name, name, list(_leaf_index(run, index, leaf, name))


def _leaf_index(run: Run, index: Index, leaf: sql.Identifier, name: str) -> Statements:
    if index.primary:
        nulls = trusted("NULLS NOT DISTINCT" if "NULLS" in run.plan.new_primary_constraint.partition("(")[0] else "")
        rest = trusted(index.options + index.index_space.removeprefix(" USING INDEX"))
        yield statement(
            "restore.create_unique",
            index=(name,),
            leaf=leaf,
            columns=run.names["new_pk"],
            include=trusted(index.include),
            nulls=nulls,
            rest=rest,
        )
        kind = "UNIQUE" if run.plan.takes_null else "PRIMARY KEY"
        yield statement("restore.adopt", index=(name,), leaf=leaf, kind=trusted(kind), timing=trusted(index.timing))
    elif index.constraint_type == "x":
        yield statement(
            "restore.add_constraint",
            table=leaf,
            constraint=(name,),
            definition=trusted(index.constraint_definition or ""),
        )
    else:
        unique = sql.SQL("UNIQUE" if index.unique else "")
        yield statement("restore.create_index", index=(name,), leaf=leaf, unique=unique, tail=trusted(index.tail))
        if index.constraint_type == "u":
            yield statement("restore.adopt", index=(name,), leaf=leaf, kind=trusted("UNIQUE"), timing=trusted(index.timing))
    if not index.everywhere:
        yield from _comments(index, leaf, (run.staging, name))


def _comments(index: Index, table: sql.Composable, name: tuple[str, str]) -> Statements:
    if index.comment:
        yield statement("partition.comment_index", index=name, comment=index.comment)
    if index.constraint_comment:
        yield statement("partition.comment_constraint", table=table, constraint=name[1:], comment=index.constraint_comment)


def adopt(run: Run) -> Statements:
    """The root's primary key and indexes, which adopt those of the partitions; then the guards' triggers."""
    names = run.names
    for index in run.plan.indexes:
        name = sql.Identifier(index.name)
        if index.primary:
            definition = trusted(run.plan.new_primary_constraint)
            yield statement("restore.add_constraint", table=names["shadow"], constraint=name, definition=definition)
        elif index.everywhere and index.constraint:
            definition = trusted(index.constraint_definition or "")
            yield statement("restore.add_constraint", table=names["shadow"], constraint=name, definition=definition)
        elif index.everywhere:
            unique = sql.SQL("UNIQUE" if index.unique else "")
            yield statement("restore.index_root", **names, index=name, unique=unique, tail=trusted(index.tail))
        else:
            continue
        yield from _comments(index, names["shadow"], (run.staging, index.name))
    yield from unique_keys.attach(run)


def finish_storage(run: Run) -> Iterator[list[list[sql.Composed]]]:
    """The source's storage options on every partition, VACUUM and ANALYZE: a list a table; the lists of one group go side by side."""
    options = list(run.plan.table.options)
    alone = run.plan.server_version >= 18  # before, ANALYZE of the root is of all partitions as well
    root = [statement("restore.analyze_root", **run.names, only=trusted("ONLY" if alone else ""))]
    leaves = [
        [
            statement("restore.storage", leaf=leaf),
            *([statement("restore.storage_options", leaf=leaf, options=trusted(", ".join(options)))] if options else []),
            statement("restore.vacuum", leaf=leaf, analyze=trusted("ANALYZE, " if alone else "")),
        ]
        for leaf in changes.leaves(run, run.staging)
    ]
    yield from [[root, *leaves]] if alone else [leaves, [root]]


@recorded("restore", "index")
def build_indexes(action: Action, workers: int = 2) -> Evidence:
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
    builds = list(index_builds(run))
    pending = [each[:1] for leaf, name, each in builds if (leaf, name) not in built] + unique_keys.pending(run, session)
    holder = session.connection.info.backend_pid
    parallel(run, workers, pending, lambda worker, each: _build(run, worker, each, holder))
    with session.transaction(lock_timeout="5s"):
        for leaf, name, each in builds:
            for later in each[1:] if not built.get((leaf, name)) else []:
                session.run(later)
        if not session.rows("restore.built", leaf_text=spelled(run.names["shadow"])):
            for each_ in adopt(run):
                session.run(each_)
    for together in finish_storage(run):
        parallel(run, workers, together, _one_by_one)
    sizes = session.row("forecast.sizes", schemas=[run.staging, run.plan.guard_schema])
    sentence = f"{len(pending)} indexes were built on {len(run.plan.partitions)} partitions, and the tables analysed."
    return action.finish(sentence, **sizes)


def _build(run: Run, session: Session, statements: list[sql.Composed], holder: int) -> None:
    with session.transaction(lock_timeout="30s", synchronous_commit="off"):
        for each in statements:
            session.run(each)
        refuse_orphan(run, session, holder)


def _one_by_one(session: Session, statements: list[sql.Composed]) -> None:
    for each in statements:  # in no transaction: VACUUM wants none
        session.run(each)


def drop_indexes(run: Run) -> Statements:
    """The inverse: a copy that begins again wants none."""
    yield from unique_keys.remove(run)
    yield from unique_keys.prepare(run)
    tables = [(run.names["shadow"], None), *((sql.Identifier(run.staging, each.name), each.name) for each in run.plan.partitions)]
    for table, leaf in tables:
        for index in run.plan.indexes:
            name = index.leaf_names[leaf] if leaf else index.name
            if index.constraint:
                yield statement("restore.drop_constraint", table=table, constraint=(name,))
            yield statement("restore.drop_index", index=(run.staging, name))


@recorded("restore", "replay", again=True)
def replay(action: Action, rounds: int = 20) -> Evidence:
    """Replay the log until its tail is short; what stays is replayed under the cut-over's locks."""
    if action.run.plan.restore_from == "backup":
        return repair.nothing_to(action, "replay")
    run, session = action.run, action.session
    total = 0
    for _ in range(rounds):
        with from_the_copy(run):
            keys, _horizon = changes.replay(run, session)
        total += keys
        if keys <= SHORT_TAIL:
            break
    return action.finish(
        f"{total:,} changes were replayed; {changes.length(run, session):,} wait in the log.",
        total,
    )


@recorded("restore", "compare", again=True)
def compare_all(action: Action) -> Evidence:
    """Compare every row of source and shadow in one snapshot; raises NotEqual, naming partitions and keys."""
    if action.run.plan.restore_from == "backup":
        return repair.compare(action)
    run = action.run
    with from_the_copy(run):
        seen = compare.exactly(run, action.session, changes.FORWARD)
    return action.finish(seen.sentence, seen.rows, sums=seen.sums)


def rows(run: Run) -> pd.DataFrame:
    """Rows per partition, as the comparison counted them: it has none of a partition that is empty."""
    seen = run.finished("restore", "compare")
    sums = seen.facts["sums"] if seen else {}
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
    return action.finish(f"The shadow equals {run.plan.full_name}: {seen.rows:,} rows.", seen.rows)


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
