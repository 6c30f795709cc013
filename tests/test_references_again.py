"""A table that references one that was partitioned is partitioned itself, afterwards."""

from __future__ import annotations

from tests import migration


def test_a_table_that_gained_a_composite_key_can_be_partitioned_too(clinic, sql):
    """Before 18 its key has a child for every partition it points at, each NOT VALID by itself."""
    run = migration.forward(clinic)
    given = {"partition_by": "hash", "modulus": 3, "unique": "per_partition"}
    second = migration.plan(clinic, "appointments", "user_id", **given)
    migration.walk(second, migration.FORWARD)
    migration.back(second)
    migration.back(run)
    assert sql("SELECT count(*) FROM appointments") == [(2000,)]
