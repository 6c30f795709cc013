"""Where one is in the whole, what comes next and what undo costs now, as the ledger knows it at that moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import runbook
from runbook import finish, rollback
from tests import migration
from tests.walk import CLINIC, EVERY, cells, walk

Sql = Callable[..., list[tuple[Any, ...]]]


def test_every_notebook_opens_with_the_strip_and_ends_with_what_comes_next() -> None:
    for name in EVERY:
        code = [cell.source for cell in cells(name) if cell.cell_type == "code"]
        assert code[1].endswith(".overview()"), name
        assert code[-1] == "run.next()", name


def test_every_notebook_is_linked_from_another() -> None:
    heads = {name: cells(name)[0].source for name in EVERY}
    for name in EVERY:
        assert any(f"]({name}.ipynb)" in head for other, head in heads.items() if other != name), name


def test_before_the_plan_the_strip_is_empty(clinic: str) -> None:
    given = {name: value for name, value in CLINIC.items() if name != "approved_by"}
    shown = runbook.draft(database=clinic, **given).overview()
    assert "no plan is frozen yet" in shown.to_html()
    assert list(shown.data["step"]) == [name.partition("_")[2] for name in (*EVERY[:8], "08_monitor")]
    assert set(shown.data["state"]) == {""}


def test_the_strip_says_what_is_done_and_links_each_step(clinic: str, monkeypatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "02_partition.ipynb")
    run = migration.forward(clinic, last="shadow")
    shown = run.overview()
    assert list(shown.data["state"])[:3] == ["done", "done", "shadow: done"]
    page = shown.to_html()
    assert '▸&nbsp;<a href="02_partition.ipynb">02_partition</a>' in page and page.count("▸") == 1
    for name in EVERY[:9]:
        assert f'<a href="{name}.ipynb">' in page


@pytest.mark.long
def test_what_comes_next_and_what_undo_costs_follow_the_ledger(clinic: str, sql: Sql) -> None:
    run = migration.plan(clinic)
    assert repr(run.next()) == "Next: 01_backup. Undo now (90_rollback): nothing; only the ledger was written."
    migration.walk(run, migration.FORWARD, last="backup check")
    assert (
        "**Next:** [02_partition](02_partition.ipynb). **Undo now** ([90_rollback](90_rollback.ipynb)): the backup, "
        in run.next()
    )
    migration.walk(run, migration.FORWARD, last="restore check")
    assert "MB of shadow, logs and backup are dropped under locks" in run.next()
    migration.walk(run, migration.FORWARD, last="keys check")
    assert repr(run.next()).startswith("Next: 05_cutover. Undo now (90_rollback): ")
    assert "MB of shadow, logs and backup, and the columns that 04 added, are dropped under locks" in run.next()
    migration.walk(run, migration.FORWARD)
    sql("UPDATE users SET is_active = NOT is_active WHERE id IN (SELECT id FROM users LIMIT 7)")
    (waiting,) = sql(f"SELECT count(*) FROM runbook_{run.migration}.changes_back")[0]
    assert waiting == 7
    assert repr(run.next()).startswith(
        "Next: 06_verify. Undo now (90_rollback): 7 rows that changed since the cut-over are replayed"
    )
    walk(clinic, "06_verify", "07_application")
    assert repr(run.next()).startswith("Next: 08_monitor, every day; 91_finish when the way back is no longer needed. ")
    migration.back(run)
    assert repr(run.next()) == "Next: the migration can be started again with 00_plan. Undo now: nothing is left to undo."
    ended = runbook.open_last(clinic, "users")
    assert repr(rollback.preview(ended)) == "-- The migration of public.users was rolled back: nothing is left to run."


def test_without_the_log_no_notebook_fails_and_the_way_back_is_closed(forward: Callable[..., Any], sql: Sql) -> None:
    run = forward()
    sql("DROP SCHEMA runbook_1 CASCADE")
    assert "closed, for the log of the changes since the cut-over is there no more" in str(run.next())


@pytest.mark.long
def test_after_the_end_the_backup_is_what_is_left(clinic: str) -> None:
    run = migration.forward(clinic)
    walk(clinic, "06_verify")
    migration.walk(run, migration.END)
    ended = runbook.open_last(clinic, "users")
    assert repr(ended.next()) == "Next: 08_monitor, every day. Undo now: the backup users_backup is what is left."
    assert repr(finish.preview(ended)) == "-- The migration of public.users was finished: nothing is left to run."
