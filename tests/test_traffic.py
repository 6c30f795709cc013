"""Under an application that nobody tuned: no acknowledged write is lost, no refused one is there, in either direction."""

from __future__ import annotations

from tests import migration as walk
from tests import traffic


def test_no_acknowledged_write_is_lost_from_the_first_step_to_the_rollback(server, clinic, sql):
    before = sql("SELECT count(*) FROM users")[0][0]
    with traffic.pool(clinic, server.version) as pool:
        pool.go_on()
        run = walk.plan(clinic)
        for name in walk.FORWARD:
            walk.walk(run, walk.FORWARD, first=name, last=name)
            pool.go_on(5)
        pool.go_on(100)
        walk.walk(run, walk.BACK, last="swap back")
        pool.go_on(100)
        walk.walk(run, walk.BACK, first="clean")
        pool.go_on(20)
    written = sum(len(writer.model.users) for writer in pool.writers)
    assert sql("SELECT count(*) FROM users")[0][0] == before + written
    assert sql("SELECT relkind::text FROM pg_class WHERE oid = 'users'::regclass") == [("r",)]
