"""A rehearsal takes every step but the cut-over on the real table, and leaves nothing but its record."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from runbook import cli
from runbook.archive import audit
from tests.migration import forward
from tests.walk import CLINIC_FILE, dump

pytestmark = pytest.mark.long


def test_a_rehearsal_compares_every_row_and_leaves_nothing_of_itself(clinic: str, tmp_path: Path) -> None:
    before = dump(clinic, "--exclude-schema=runbook")
    done = CliRunner().invoke(cli.main, ["rehearse", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert "1,000 rows were compared, and all were equal. public.users is what it was." in done.stdout
    assert "05_cutover" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Head:")
    assert dump(clinic, "--exclude-schema=runbook") == before
    assert audit(tmp_path / "runs") == []


def test_a_rehearsal_does_not_take_a_migration_away_that_is_under_way(clinic: str, tmp_path: Path) -> None:
    forward(clinic, "shadow")
    before = dump(clinic)
    done = CliRunner().invoke(cli.main, ["rehearse", "-f", CLINIC_FILE, "--database", clinic, "--out", str(tmp_path / "runs")])
    assert done.exit_code == 1
    assert "is under way" in done.stderr
    assert dump(clinic) == before
