"""08: how the partitions fare, day by day: what is seen stays in the ledger, and a threshold that is passed fails the look."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import takewhile
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql

from runbook import queries
from runbook.application import filled
from runbook.errors import OutOfOrder, PromiseBroken
from runbook.growth import half_detached, ranges_of, require_partitions
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.points import stage
from runbook.session import Session
from runbook.statements import spelled, trusted
from runbook.words import counted

MIB = 1024 * 1024
FEW_DEAD = 1000  # below it a share says nothing: of a small partition the trials of 06 and 07 leave more than half


@recorded("monitor", "look", again=True)
def look(action: Action, file: str = "") -> Evidence:
    """See how the partitions fare: sizes, rows, scans, pruning, what has no partition of its own, what the way back costs.

    Only reads, after 91_finish too. Raises OutOfOrder before the cut-over, and PromiseBroken when there are no partitions any more.
    """
    run, session = action.run, action.session
    if not run.partitioned:
        raise OutOfOrder(f"{run.plan.full_name} is not partitioned yet: 08_monitor is for the time after 05_cutover.")
    root = spelled(run.plan.source)
    require_partitions(run, session, session.value("verify.oid", root=root))
    with session.qualified():
        leaves = session.rows("monitor.partitions", root=root)
    rest = [(leaf["schema"], leaf["name"]) for leaf in leaves if leaf["bound"] == "DEFAULT"]
    of_values = run.plan.partition_by == "list"  # by range each row may have one of its own
    counts = "monitor.default_values" if of_values else "monitor.default_rows"
    values = [row for leaf in rest for row in session.rows(counts, **run.names, leaf=leaf)]
    before = session.run("monitor.first_values", **run.names).fetchone()
    names = [row["value"] for row in values] if of_values else []
    known = names if before is None else before["values"]
    share, asked = _pruning(run, session, {leaf["name"] for leaf in leaves}, file)
    facts: dict[str, Any] = {
        "half_detached": half_detached(session, session.value("verify.oid", root=root)), "missing": _missing(run, session), "ahead": None if rest else _ahead(run, session), "partitions": leaves, "indexes": session.rows("monitor.indexes", root=root), "values": [*known],
        "default_rows": sum(row["rows"] for row in values), "new_values": [each for each in names if each not in known],
        "pruning_percent": share, "statements": asked, "filled_rows": int(filled(run)["since yesterday"].sum()),
        "log_bytes": session.value("monitor.log", back=spelled(run.names["back"])),
    }  # fmt: skip
    size, rows = sum(leaf["bytes"] for leaf in leaves), sum(leaf["rows"] for leaf in leaves)
    told = f"{counted(len(leaves), 'partition')} of {run.plan.full_name} hold {counted(rows, 'row')} in {size / 1e6:,.1f} MB; {_told(facts)}."
    return action.finish(told, rows, **facts)


def _told(facts: dict[str, Any]) -> str:
    log, share = facts["log_bytes"], facts["pruning_percent"]
    return (
        f"{facts['default_rows']:,} in a DEFAULT one, {len(facts['new_values'])} new values; "
        + (f"{counted(facts['ahead'], 'partition is', 'partitions are')} still to come; " if facts["ahead"] is not None else "")
        + (f"{share:.0f} % of {facts['statements']:,} calls prune" if share is not None else "what prunes is not known")
        + f"; {counted(facts['filled_rows'], 'row')} needed the fill trigger since yesterday; "
        + (f"the log of the way back has {log / MIB:,.1f} MiB" if log is not None else "there is no way back any more")
    )


def _missing(run: Run, session: Session) -> list[str]:
    """The plan's partitions of which no partition of today takes the rows: by list their values, by hash their remainders, by range
    now; and a DEFAULT one that is there no more. By range old ones may go."""
    plan, root = run.plan, spelled(run.plan.source)
    with session.qualified():
        rules = session.rows("restore.partition_rules", parent=root)
        if any(row["is_default"] for row in rules):
            return []
        if plan.partition_by == "hash":
            bounds = [row["bound"] for row in session.rows("additions.tree", oid=session.value("verify.oid", root=root))]
            return [each.name for each in plan.partitions if not _covered(each.bound, bounds)]
        taken = sql.SQL(" OR ").join(trusted(row["rule"]) for row in rules)
        found = session.rows("monitor.untaken", **run.names, taken=taken, **_samples(run, session))
    untaken = {row["name"] for row in found}
    return [each.name for each in plan.partitions if each.name in untaken or each.bound == "DEFAULT"]


def _samples(run: Run, session: Session) -> dict[str, Any]:
    """Values of which the plan's partitions took each: by list all, by range, of a time, now."""
    plan = run.plan
    if plan.partition_by == "list":
        pairs = [(each.name, value) for each in plan.partitions for value in each.values]
    else:
        key = next(column for column in plan.columns if column.name == plan.key)
        named = {"names": [each.name for each in plan.partitions], "bounds": [each.bound for each in plan.partitions]}
        rows = session.rows("monitor.current", **ranges_of(session, key, []), **named)
        pairs = [(row["name"], row["value"]) for row in rows]
    return {"names": [name for name, _ in pairs], "values": [value for _, value in pairs]}


def _covered(bound: str, bounds: list[str]) -> bool:
    """Whether partitions by hash take a whole remainder: one may have been divided by hand, by a multiple of the modulus."""
    modulus, remainder = map(int, re.findall(r"\d+", bound))
    shares = Fraction(0)
    for other, rest in (map(int, re.findall(r"\d+", each)) for each in bounds):
        if (rest - remainder) % min(modulus, other) == 0:
            shares += Fraction(modulus, max(modulus, other))
    return shares >= 1


def _ahead(run: Run, session: Session) -> int | None:
    """How many partitions without a row come after now and the last row, without a gap; None where they do not end, or the key
    is none that grows by itself."""
    key = next(column for column in run.plan.columns if column.name == run.plan.key)
    there = session.rows("additions.ranges", oid=session.value("verify.oid", root=spelled(run.plan.source)))
    grows = key.identity or key.sequence or session.value("draft.category", type=key.type) == "D"
    if run.plan.partition_by != "range" or not there or not grows:
        return None
    ranges = ranges_of(session, key, [(row["low"], row["high"]) for row in there])
    ends = session.row("additions.front", **ranges)["ends"]
    if ends is None:
        return None
    names = {"schemas": [row["schema"] for row in there], "names": [row["name"] for row in there]}
    later = session.rows("monitor.later", **ranges, **names, ends=ends)
    return len(list(takewhile(lambda row: not session.value("additions.has_rows", leaf=(row["schema"], row["name"])), later)))


def _pruning(run: Run, session: Session, partitions: set[str], file: str) -> tuple[float | None, int]:
    """How many of 100 calls prune, of those that read the table, and how many calls these are."""
    pruned = calls = 0
    found, _ = queries.statements(run.plan, session, file)
    with stage(run, session):
        for times, text in found:
            try:
                prunes = queries.explained(session, text, partitions)["prunes"]
            except psycopg.Error:  # not a statement that can be planned alone, or not any more
                continue
            calls, pruned = calls + times * (prunes is not None), pruned + times * bool(prunes)
    return (100 * pruned / calls if calls else None), calls


def partitions(run: Run) -> pd.DataFrame:
    """Each partition as it was seen last."""
    seen = pd.DataFrame(_seen(run)["partitions"])
    times = {name: seen[name].map(_moment) for name in ("vacuumed", "analyzed")}
    frame = seen.assign(MiB=(seen["bytes"] / MIB).round(2), **times)
    shown = ["name", "bound", "rows", "dead", "MiB", "index_scans", "whole_scans", "vacuumed", "analyzed"]
    return frame[shown].rename(columns=lambda name: name.replace("_", " "))


def _moment(stored: object) -> str:
    return f"{pd.Timestamp(stored).tz_convert('UTC'):%Y-%m-%d %H:%M} UTC" if isinstance(stored, str) else "never"


def indexes(run: Run) -> pd.DataFrame:
    """Each partition's indexes, and how often each was used."""
    return pd.DataFrame(_seen(run)["indexes"], columns=["partition", "index", "scans", "bytes"])


def history(run: Run) -> pd.DataFrame:
    """Every look of this migration so far, a line for each partition."""
    return run.frame("monitor.history")


def _seen(run: Run) -> dict[str, Any]:
    seen = run.finished("monitor", "look")
    if seen is None:
        raise OutOfOrder(f"Nobody has looked at {run.plan.full_name} yet: run 08_monitor from its beginning.")
    return seen.facts


@recorded("monitor", "check", again=True)
def check(
    action: Action, max_default_rows: int = 0, max_new_values: int = 0, max_dead_percent: int = 50, min_pruning_percent: int = 0,
    max_filled_rows: int | None = None, max_log_mib: int = 1024, min_ahead: int = 1,
) -> Evidence:  # fmt: skip
    """Raises PromiseBroken, with a sentence for each, where the last look passed a threshold."""
    run, seen = action.run, _seen(action.run)
    dead = [f"{leaf['name']} ({leaf['dead']:,} of {leaf['dead'] + leaf['rows']:,})" for leaf in seen["partitions"]
            if leaf["dead"] > FEW_DEAD and 100 * leaf["dead"] > max_dead_percent * (leaf["dead"] + leaf["rows"])]  # fmt: skip
    share, log, new = seen["pruning_percent"], (seen["log_bytes"] or 0) / MIB, seen["new_values"]
    ahead, missing = seen.get("ahead"), seen.get("missing") or []
    addable = run.plan.partition_by != "hash" and not any(
        each.bound == "DEFAULT" for each in run.plan.partitions if each.name in missing
    )
    passed = [
        (bool(seen.get("half_detached")), seen.get("half_detached", "")),
        (
            bool(missing),
            f"{', '.join(missing)} of the plan {'is' if len(missing) == 1 else 'are'} there no more, and such a row is refused: attach it, or"
            f" make it again{' with 20_add_partitions' if addable else ''}.",
        ),
        (
            ahead is not None and ahead < min_ahead,
            f"{counted(ahead or 0, 'partition is', 'partitions are')} still to come (min_ahead is {min_ahead}): add the next ones with"
            " 20_add_partitions, for a row beyond them is refused.",
        ),
        (
            seen["default_rows"] > max_default_rows,
            f"{counted(seen['default_rows'], 'row lies', 'rows lie')} in the DEFAULT partition (max_default_rows is {max_default_rows:,}):"
            " give their values a partition.",
        ),
        (
            len(new) > max_new_values,
            f"New values of {run.plan.key} came that have no partition: {', '.join(new[:10])} (max_new_values is {max_new_values}).",
        ),
        (
            bool(dead),
            f"More than {max_dead_percent} % of the rows are dead in {', '.join(dead)}: VACUUM it, and see what holds autovacuum up.",
        ),
        (
            share is not None and share < min_pruning_percent,
            f"Only {share or 0:.0f} % of the calls prune (min_pruning_percent is {min_pruning_percent}): 07_application says which do not.",
        ),
        (
            share is None and min_pruning_percent > 0,
            f"What prunes is not known (min_pruning_percent is {min_pruning_percent}): name a file of statements in queries, or CREATE"
            " EXTENSION pg_stat_statements.",
        ),
        (
            max_filled_rows is not None and seen["filled_rows"] > max_filled_rows,
            f"{counted(seen['filled_rows'], 'row')} needed the fill trigger since yesterday (max_filled_rows is {max_filled_rows}):"
            " 07_application says what to change.",
        ),
        (
            log > max_log_mib,
            f"The log of the way back has {log:,.1f} MiB (max_log_mib is {max_log_mib:,}): end it with 91_finish, or take it with"
            " 90_rollback.",
        ),
    ]
    if said := [sentence for is_so, sentence in passed if is_so]:
        raise PromiseBroken(f"{run.plan.full_name}: {' '.join(said)}")
    return action.finish(f"No threshold is passed on {run.plan.full_name}.", thresholds=len(passed))
