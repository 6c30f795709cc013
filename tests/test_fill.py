"""04: rows are filled in by their addresses, and nothing but the role column seems to change."""

from __future__ import annotations

from typing import Any

import pytest

from runbook import foreign_keys
from tests import migration

WRONG = "SELECT count(*) FROM appointments a JOIN users u ON u.id = a.user_id WHERE a.user_role <> u.role"
FILLED = "SELECT count(*) > 0 FROM appointments WHERE user_role <> 'user'"


def test_rows_that_moved_since_they_were_listed_are_filled_all_the_same(clinic, sql, monkeypatch):
    """A VACUUM FULL in between gives every row another address."""
    run, parallel = migration.forward(clinic, last="columns"), foreign_keys.parallel

    def moved_before(*given: Any) -> None:
        sql("DELETE FROM appointments WHERE ctid < '(3,0)'")
        sql("VACUUM FULL appointments")
        parallel(*given)

    monkeypatch.setattr(foreign_keys, "parallel", moved_before)
    migration.walk(run, {"fill": migration.FORWARD["fill"]})
    assert (sql(WRONG), sql(FILLED)) == ([(0,)], [(True,)])


@pytest.mark.parametrize("own", [False, True])
def test_no_trigger_notices_the_indexed_columns(clinic, sql, own):
    """They are set to what they are, which is quicker, unless a trigger is for one of them."""
    sql("CREATE TABLE noticed (id uuid); CREATE FUNCTION notice() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN INSERT INTO noticed VALUES (NEW.id); RETURN NEW; END $$")  # fmt: skip
    columns = "user_id, doc_id, id" if own else "status, user_role"
    run = migration.forward(clinic, last="columns")
    sql(f"CREATE TRIGGER notice BEFORE UPDATE OF {columns} ON appointments FOR EACH ROW EXECUTE FUNCTION notice()")
    migration.walk(run, {"fill": migration.FORWARD["fill"]})
    assert (sql(WRONG), sql(FILLED)) == ([(0,)], [(True,)])
    seen, filled = sql("SELECT (SELECT count(*) FROM noticed), (SELECT count(*) FROM appointments WHERE user_role <> 'user')")[0]
    assert seen == (0 if own else filled)
