"""Two tables of one database, one of which refers to the other, each partitioned in turn, and back."""

from __future__ import annotations

import pytest

import runbook
from runbook import finish, foreign_keys, rollback, verify
from runbook.errors import OutOfOrder, PlanOutdated, PromiseBroken
from runbook.ledger import Run
from tests import migration
from tests.walk import dump

BY_MONTH = {"table": "appointments", "key": "scheduled_at", "partition_by": "range", "every": "month"}


def left(url: str) -> str:
    """All but the ledger."""
    return dump(url, "--exclude-schema=runbook")


def ended(run: Run) -> None:
    verify.check(run)
    migration.walk(run, migration.END)


@pytest.mark.long
@pytest.mark.parametrize("legacy", ["fill", "strict"])
def test_the_earlier_one_goes_back_when_the_later_one_has(clinic, sql, legacy):
    before = left(clinic)
    users = migration.forward(clinic, legacy_inserts=legacy)
    appointments = migration.forward(clinic, **BY_MONTH)
    between = left(clinic)
    for back in migration.BACK.values():
        with pytest.raises((OutOfOrder, PromiseBroken), match=r"(?s)public\.appointments|has not been (swapped back|taken away)"):
            back(users)
    with pytest.raises(
        OutOfOrder,
        match=r"the original of public\.appointments has user_role.*Roll public\.appointments back first, or finish it",
    ):
        rollback.swap_back(users)
    assert left(clinic) == between, "nothing was changed"
    verify.check(users)
    verify.check(appointments)
    migration.back(appointments)
    migration.back(users)
    assert left(clinic) == before


@pytest.mark.long
def test_the_earlier_one_goes_back_when_the_later_one_is_finished(clinic, sql):
    """Before 18 a partitioned table takes no key that is NOT VALID, and when users was planned appointments was none."""
    users = migration.forward(clinic)
    ended(migration.forward(clinic, **BY_MONTH))
    seen = sql("SELECT count(*), sum(hashtext(id::text || user_id)) FROM appointments")
    migration.back(users)
    assert sql("SELECT relkind::text FROM pg_class WHERE relname = 'users'") == [("r",)]
    assert sql("SELECT convalidated, pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'appointments_user_id_fkey' AND conparentid = 0") == [
        (True, "FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE")
    ]  # fmt: skip
    assert sql("SELECT count(*), sum(hashtext(id::text || user_id)) FROM appointments") == seen


@pytest.mark.long
def test_what_refers_to_the_other_first_goes_back_last(clinic, sql):
    before = left(clinic)
    appointments = migration.forward(clinic, **BY_MONTH)
    found = runbook.draft(database=clinic, table="users", key="role").plan.findings
    assert [each.object for each in found if "is still open" in each.sentence] == ["public.appointments"]
    assert not [each for each in found if "DISABLE TRIGGER" in each.way_out], "those on appointments are our own"
    users = migration.forward(clinic)
    verify.check(appointments)  # its key to users has another form since
    verify.check(users)
    with pytest.raises(OutOfOrder, match=r"gave public\.appointments the column user_role.*Roll public\.users back first, then"):
        rollback.swap_back(appointments)
    with pytest.raises(OutOfOrder, match=r"The way back of public\.appointments would end with this one"):
        finish.require(users, "a test", unneeded_for_h=0)
    migration.back(users)
    migration.back(appointments)
    assert left(clinic) == before


@pytest.mark.long
def test_a_table_that_refers_to_it_and_is_partitioned_meanwhile_asks_for_a_new_plan(clinic):
    users = migration.forward(clinic, last="fill")
    appointments = migration.forward(clinic, **BY_MONTH)
    with pytest.raises(PlanOutdated, match=r"public\.appointments, which references it, is partitioned now.*[Rr]oll"):
        foreign_keys.check(users)
    with pytest.raises(OutOfOrder, match=r"Roll public\.appointments back first"):
        rollback.clean(users)
    migration.back(appointments)
    migration.back(users)


@pytest.mark.long
def test_a_new_partition_of_what_it_refers_to_is_no_change_of_the_table(clinic, sql):
    ended(migration.forward(clinic))
    appointments = migration.forward(clinic, last="fill", **BY_MONTH)
    sql("CREATE TABLE users_nurses PARTITION OF users FOR VALUES IN ('nurse')")
    migration.walk(appointments, migration.FORWARD, first="keys check")
    verify.check(appointments)
    assert "altered" not in migration.walk(appointments, migration.BACK)["rollback check"].sentence


def test_a_column_that_came_since_the_cut_over_is_taken_back_before_the_way_back(clinic, sql):
    users = migration.forward(clinic)
    sql("ALTER TABLE users ADD extra int")
    with pytest.raises(PromiseBroken, match=r"the original was not: extra\. Take the change back.*or keep it, and end"):
        rollback.swap_back(users)
    sql("ALTER TABLE users DROP extra")
    migration.back(users)


def test_a_part_of_06_that_failed_is_a_part_that_nobody_has_looked_at(clinic, sql):
    users = migration.forward(clinic)
    sql("ALTER TABLE users DROP phone CASCADE")
    with pytest.raises(PromiseBroken, match=r"public\.users is not what it was planned to be .*phone.*08_monitor"):
        verify.compare(users)
    assert {each.verdict for each in verify.seen(users) if each.promise == "compare"} == {"not tried"}


@pytest.mark.long
def test_a_table_that_is_gone_closes_nobodys_way_back(clinic, sql):
    users = migration.forward(clinic)
    migration.forward(clinic, **BY_MONTH)
    sql("DROP TABLE appointments, appointments_retired CASCADE")
    migration.back(users)
    assert sql("SELECT relkind::text FROM pg_class WHERE relname = 'users'") == [("r",)]
