"""Materialized views that read the table: made anew after the swap, and exchanged; the old ones wait for the way back."""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import errors, sql

from runbook import locks, partition
from runbook.changes import Statements
from runbook.facts import Matview, MatviewIndex
from runbook.ledger import Run
from runbook.plan import fit
from runbook.session import Session
from runbook.statements import rendered, spelled, statement, trusted


def of(session: Session, oid: int) -> tuple[Matview, ...]:
    """Those that read the table directly. One that reads it through a view has nothing to be done for."""
    found = []
    for row in session.rows("matviews.all", oid=oid):
        indexes = [MatviewIndex.model_validate(each) for each in session.rows("catalog.indexes", oid=row["oid"])]
        views = session.rows("catalog.views", oid=row["oid"])
        found.append(
            Matview.model_validate({
                **row, "indexes": indexes, "views": [each["definition"] for each in views],
                "view_tables": [(each["schema"], each["name"]) for each in views],
            })
        )  # fmt: skip
    return tuple(found)


def _beside(name: str) -> str:
    return fit(f"{name}_runbook")


def _make(run: Run, view: Matview) -> Statements:
    """One like it in the staging schema, that reads what has the table's name now."""
    new = sql.Identifier(run.staging, _beside(view.name))
    yield statement("matviews.drop", view=new)  # of a run that died
    yield statement("matviews.create", view=new, head=trusted(view.head), query=trusted(view.query))
    for index in view.indexes:
        unique = trusted("UNIQUE" if index.unique else "")
        yield statement("restore.create_index", index=(_beside(index.name),), leaf=new, unique=unique, tail=trusted(index.tail))
    own = statement("matviews.hand_over", view=new, schema=(run.staging,), owner=(view.owner,), owner_text=view.owner)
    yield statement("matviews.own", block=spelled(own))
    if view.populated:
        yield statement("matviews.refresh", view=new)
        yield statement("matviews.analyze", view=new)


def _exchange(run: Run, view: Matview) -> Statements:
    """It takes the name, and all that the old one had; that one goes to the staging schema."""
    schema, new = view.schema_name, _beside(view.name)
    yield statement("matviews.set_schema", view=view.identifier, to=(run.staging,))
    yield statement("matviews.set_schema", view=(run.staging, new), to=(schema,))
    yield statement("matviews.rename", view=(schema, new), to=(view.name,))
    yield from partition.revoke(view.identifier, run.plan.table.strangers)
    for index in view.indexes:
        yield statement("cutover.rename_index", index=(schema, _beside(index.name)), to=(index.name,))
        if index.comment:
            yield statement("partition.comment_index", index=(schema, index.name), comment=index.comment)
        if index.clustered:
            yield statement("matviews.cluster", view=view.identifier, index=(index.name,))
    yield rendered(view.rest.replace("\1", spelled(view.identifier)))
    yield from map(rendered, view.views)


def hold(view: Matview) -> sql.Composed:
    """Locks it as an exchange does."""
    return statement("matviews.hold", view=view.identifier, owner=(view.owner,))


def script(run: Run) -> Statements:
    for view in run.plan.matviews:
        yield from _make(run, view)
        yield from _exchange(run, view)


def rebuild(run: Run, session: Session, budget_s: float) -> list[str]:
    """Make anew those that still read the retired table; whoever reads one waits for its exchange only.

    One that somebody dropped or made anew since is left alone. Raises LockNotGranted when the budget is over.
    """
    made = []
    for view in run.plan.matviews:
        if not session.value("matviews.reading", table_text=spelled(run.names["retired"]), view_text=spelled(view.identifier)):
            continue
        with session.transaction(lock_timeout="5s", row_security="on"):
            for each in _make(run, view):
                session.run(each)
        patience = locks.Patience(budget_s, 300)

        def attempt(view: Matview = view, patience: locks.Patience = patience) -> None:
            views = [sql.Identifier(*each) for each in view.view_tables]
            alone = sql.SQL("ONLY {}").format(run.plan.source)
            with locks.exclusive(session, patience, [alone], views, mode="SHARE UPDATE EXCLUSIVE", sequences=[hold(view)]):
                for each in _exchange(run, view):
                    session.run(each)

        locks.persist(run.database, session, patience, view.name, attempt)
        made.append(view.name)
    return made


def waiting(run: Run, session: Session) -> list[Matview]:
    """Those that were exchanged and still stand; their old ones wait for the way back."""

    def stands(schema: str, name: str) -> bool:
        return not session.value("cutover.gone", name=spelled((schema, name)))

    return [each for each in run.plan.matviews if stands(run.staging, each.name) and stands(each.schema_name, each.name)]


def refresh(run: Run, session: Session, views: list[Matview]) -> str:
    """The old ones show what the original holds now, while nobody reads them yet; says of which that is not so: it keeps nobody
    from the way back."""
    said = ""
    for view in views:
        if view.populated:
            try:
                with session.transaction(lock_timeout="5s", row_security="on"):
                    session.run("matviews.refresh", view=(run.staging, view.name))
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
    """The old ones take their names back, before the partitioned table goes and with it whoever reads it."""
    for view in views:
        schema, new = view.schema_name, _beside(view.name)
        yield statement("matviews.rename", view=view.identifier, to=(new,))
        for index in view.indexes:
            yield statement("cutover.rename_index", index=(schema, index.name), to=(_beside(index.name),))
        yield statement("matviews.set_schema", view=(run.staging, view.name), to=(schema,))
        yield from map(rendered, view.views)
        yield statement("matviews.drop", view=(schema, new))


def forget(run: Run) -> Statements:
    """The way back is over."""
    for view in run.plan.matviews:
        yield statement("matviews.drop", view=(run.staging, view.name))
