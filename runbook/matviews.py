"""Materialized views that read the table: made anew after the swap, and exchanged; the old ones wait for the way back.

Each has two schemas of its own, where it and its indexes keep their names: one in which the new one is made, one in which the
old one waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from psycopg import errors, sql

from runbook import locks, partition
from runbook.changes import Statements
from runbook.facts import Finding, Matview, MatviewIndex
from runbook.ledger import Run
from runbook.session import Session
from runbook.statements import closed_schema, rendered, spelled, statement, trusted


def of(session: Session, oid: int) -> tuple[Matview, ...]:
    """Those that read the table directly. One that reads it through a view has nothing to be done for."""
    found = []
    for row in session.rows("matviews.all", oid=oid):
        indexes = [MatviewIndex.model_validate(each) for each in session.rows("catalog.indexes", oid=row["oid"])]
        found.append(Matview.model_validate({**row, "indexes": indexes, **_readers(session, row["oid"])}))
    return tuple(found)


def judged(session: Session, oid: sql.Literal) -> Iterator[Finding]:
    """What making each anew means, or what keeps it from being made."""
    for row in session.rows("matviews.all", oid=oid):
        name = f"{row['schema_name']}.{row['name']}"
        why = ""
        if row["others"]:
            why = f"and {', '.join(row['others'])} with it"
        elif not row["ours"]:
            why = f"which its owner {row['owner']}, who may CREATE in its schema, may do, and whoever owns the views that read it"
        elif row["granted_by_others"] and not session.row("catalog.privileges", oid=oid)["superuser"]:
            why = f"with the rights on it that another than its owner {row['owner']} granted, which only a superuser can"
        elif refused := refusal(session, row["owner"], row["query"]):
            why = f"and its owner {row['owner']} could not refresh it ({refused})"
        if why:
            yield Finding.blocker(
                row["name"],
                f"The materialized view {name} would have to be made anew, {why}.",
                "Drop it before, and make it anew after the cut-over.",
            )
        else:
            yield Finding.note(
                row["name"],
                f"The materialized view {name} ({row['bytes'] / 1e6:.1f} MB) is made anew after the swap, of what the table holds then;"
                " until that is done it shows what it showed, and a refresh reads the retired table.",
            )


def _readers(session: Session, oid: int) -> dict[str, list[object]]:
    views = session.rows("catalog.views", oid=oid)
    return {"views": [each["definition"] for each in views], "view_tables": [(each["schema"], each["name"]) for each in views]}


def _place(run: Run, view: Matview, what: str) -> str:
    number = next(number for number, each in enumerate(run.plan.matviews) if each.place == view.place)
    return f"{run.staging}_{what}_{number}"


def _make(run: Run, view: Matview) -> Statements:
    """One like it, that reads what has the table's name now."""
    place = _place(run, view, "new")
    new = sql.Identifier(place, view.name)
    yield _forget(place, view)  # of a run that died
    yield from closed_schema(place)
    yield statement("matviews.create", view=new, head=trusted(view.head), query=trusted(view.query))
    for index in view.indexes:
        unique = trusted("UNIQUE" if index.unique else "")
        yield statement("restore.create_index", index=(index.name,), leaf=new, unique=unique, tail=trusted(index.tail))
        if index.comment:
            yield statement("partition.comment_index", index=(place, index.name), comment=index.comment)
        if index.clustered:
            yield statement("matviews.cluster", view=new, index=(index.name,))
    own = statement("matviews.hand_over", view=new, schema=(place,), owner=(view.owner,), owner_text=view.owner)
    yield statement("matviews.own", block=spelled(own))
    if view.populated:
        yield statement("matviews.refresh", view=new)
        yield statement("ddl.analyze", table=new)


def _exchange(run: Run, view: Matview) -> Statements:
    """It takes the place, and all that the old one had."""
    new, old = _place(run, view, "new"), _place(run, view, "old")
    yield from closed_schema(old)
    yield statement("matviews.set_schema", view=view.identifier, to=(old,))
    yield statement("matviews.set_schema", view=(new, view.name), to=(view.schema_name,))
    yield from partition.revoke(view.identifier, run.plan.table.strangers)
    yield rendered(view.rest.replace("\1", spelled(view.identifier)))
    yield from map(rendered, view.views)
    yield _forget(new, view)


def hold(view: Matview) -> sql.Composed:
    """Locks it as an exchange does."""
    return statement("matviews.hold", view=view.identifier, owner=(view.owner,))


def script(run: Run) -> Statements:
    for view in run.plan.matviews:
        yield from _make(run, view)
        yield rendered("BEGIN")
        yield from _exchange(run, view)
        yield rendered("COMMIT")


def rebuild(run: Run, session: Session, lock_timeout_ms: int, budget_s: float) -> list[str]:
    """Make anew those that still read the retired table, as they are now; whoever reads one waits for its exchange only.

    One that somebody dropped or made anew since is left alone. Raises LockNotGranted when the budget is over.
    """
    made, planned = [], {each.place: each for each in run.plan.matviews}
    retired = session.value("verify.oid", root=spelled(run.names["retired"]))
    for place in [each.place for each in _now(session, retired) if each.place in planned] if planned else []:
        patience, done = locks.Patience(budget_s, lock_timeout_ms), list[Matview]()

        def attempt(place: tuple[str, str] = place, patience: locks.Patience = patience, done: list[Matview] = done) -> None:
            view = next((each for each in _now(session, retired) if each.place == place), None)
            if view is None:
                return
            view = view.model_copy(update={"query": planned[place].query})  # its own names the retired table by now
            if done[-1:] != [view]:
                with session.transaction(lock_timeout="5s", row_security="on"):
                    session.run_all(_make(run, view))
                done.append(view)
            views = [sql.Identifier(*each) for each in view.view_tables]
            alone = sql.SQL("ONLY {}").format(run.plan.source)
            with locks.exclusive(session, patience, [alone], views, mode="SHARE UPDATE EXCLUSIVE", sequences=[hold(view)]):
                session.run_all(_exchange(run, view))

        locks.persist(run.database, session, patience, ".".join(place), attempt)
        made.append(".".join(place))
    return made


def _now(session: Session, oid: int) -> tuple[Matview, ...]:
    with session.qualified():
        return of(session, oid)


def waiting(run: Run, session: Session) -> list[Matview]:
    """Those that were exchanged and still stand, with the views that read them now; their old ones wait for the way back."""
    found = []
    for view in run.plan.matviews:
        old = session.value("verify.oid", root=spelled((_place(run, view, "old"), view.name)))
        now = session.value("verify.oid", root=spelled(view.identifier))
        if old and now:
            with session.qualified():
                readers = _readers(session, now)
            found.append(Matview.model_validate(view.model_dump() | readers | session.row("matviews.standing", oid=now)))
    return found


def refresh(run: Run, session: Session, views: list[Matview]) -> str:
    """The old ones show what the original holds now, while nobody reads them yet; says of which that is not so: it keeps nobody
    from the way back."""
    said = ""
    for view in views:
        if view.populated:
            try:
                with session.transaction(lock_timeout="5s", row_security="on"):
                    session.run("matviews.refresh", view=(_place(run, view, "old"), view.name))
            except (errors.ProgrammingError, errors.DataError) as error:
                said += f" {view.name} shows what it showed at the cut-over ({error.diag.message_primary})."
    return said


def refusal(session: Session, owner: str, query: str) -> str:
    """Why the owner could not refresh it now; empty when it could."""
    try:
        with session.connection.transaction(force_rollback=True):
            session.connection.execute("SET LOCAL row_security = on")
            session.run("matviews.try", owner=(owner,), query=trusted(query))
    except (errors.ProgrammingError, errors.DataError) as error:
        return error.diag.message_primary or str(error)
    return ""


def give_back(run: Run, views: Iterable[Matview]) -> Statements:
    """The old ones take their places back; the new ones go, and whatever a run that died had made of them."""
    for view in run.plan.matviews:
        yield _forget(_place(run, view, "new"), view)
    for view in views:
        new, old = _place(run, view, "new"), _place(run, view, "old")
        yield from closed_schema(new)
        yield statement("matviews.set_schema", view=view.identifier, to=(new,))
        yield statement("matviews.set_schema", view=(old, view.name), to=(view.schema_name,))
        yield from map(rendered, view.views)
        yield _forget(new, view)
        yield _forget(old, view)


def forget(run: Run) -> Statements:
    """The way back is over: the old ones go, and what was begun."""
    for view in run.plan.matviews:
        for what in ("old", "new"):
            yield _forget(_place(run, view, what), view)


def _forget(place: str, view: Matview) -> sql.Composed:
    return statement("matviews.forget", view=(place, view.name), schema=(place,))
