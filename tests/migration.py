"""The whole migration as a list of actions, as the notebooks call them; for tests that stop anywhere in it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import runbook
from runbook import backup, cutover, finish, foreign_keys, partition, restore, rollback
from runbook.ledger import Run

PARTITIONS = {"users_patients": ["user"], "users_doctors": ["doctor"], "users_admins": ["admin"]}
Action = Callable[[Run], Any]

FORWARD: dict[str, Action] = {
    "backup": backup.make,
    "backup check": backup.check,
    "shadow": partition.create_shadow,
    "log": partition.start_log,
    "partition check": partition.check,
    "copy": restore.copy,
    "settle": restore.settle,
    "index": restore.build_indexes,
    "replay": restore.replay,
    "compare": restore.compare_all,
    "restore check": restore.check,
    "columns": foreign_keys.add_columns,
    "fill": foreign_keys.fill,
    "keys check": foreign_keys.check,
    "approval": lambda run: cutover.require_approval(run, "a test"),
    "swap": lambda run: cutover.swap(run, lock_timeout_ms=300, budget_s=60),
    "validate": cutover.validate_foreign_keys,
    "cutover check": cutover.check,
}
BACK: dict[str, Action] = {"swap back": rollback.swap_back, "clean": rollback.clean, "rollback check": rollback.check}
END: dict[str, Action] = {
    "approval": lambda run: finish.require(run, "a test", unneeded_for_h=0, force_strict=True),
    "drop": finish.drop,
}


def plan(url: str, table: str = "users", key: str = "role", **given: Any) -> Run:
    """A frozen plan; the clinic's, unless told otherwise."""
    chosen = {"partitions": PARTITIONS, "unique": "per_partition", "backup": "users_backup"} if table == "users" else {}
    return runbook.draft(database=url, table=table, key=key, **{**chosen, **given}).freeze()


def walk(run: Run, actions: dict[str, Action], *, first: str = "", last: str = "") -> dict[str, Any]:
    """Run the actions in their order, from `first` to `last`, without their output; returns what each returned."""
    names = list(actions)
    names = names[names.index(first) if first else 0 : names.index(last) + 1 if last else None]
    with contextlib.redirect_stdout(io.StringIO()):
        return {name: actions[name](run) for name in names}


def forward(url: str, last: str = "", **given: Any) -> Run:
    """Plan and migrate, to the end or to the action named."""
    run = plan(url, **given)
    walk(run, FORWARD, last=last)
    return run


def back(run: Run) -> None:
    walk(run, BACK)
