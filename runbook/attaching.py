"""The statements of 20: a partition made as its siblings are, and attached while rows of the default partition go over to it."""

from __future__ import annotations

from typing import Any

from psycopg import sql

from runbook import catalog, partition
from runbook.changes import Statements
from runbook.errors import PlanOutdated
from runbook.facts import Key
from runbook.growth import Addition, Growth, left_behind, mark, pointing
from runbook.ledger import Run
from runbook.plan import fit, identifiers
from runbook.session import Session
from runbook.statements import rendered, spelled, statement, trusted

STATES = {"O": "ENABLE", "A": "ENABLE ALWAYS", "R": "ENABLE REPLICA", "D": "DISABLE"}


def names(run: Run, addition: Addition) -> dict[str, sql.Composable]:
    """The placeholders of a partition to be."""
    schema = run.plan.table.schema_name
    return {
        "root": run.plan.source,
        "leaf": sql.Identifier(schema, addition.name),
        "bound": trusted(addition.bound),
        "rule": trusted(addition.rule),
        "check": sql.Identifier(fit(f"{addition.name}_bounds")),
    }


def make_statements(run: Run, growth: Growth, session: Session, addition: Addition) -> Statements:
    """The table, as its siblings are, with a check of the bounds; nobody knows it yet. Marked, so that a later run knows it
    again and makes it anew."""
    own, like = names(run, addition), session.row("catalog.table", oid=growth.sibling)
    if left_behind(run, session, addition.name):
        yield statement("additions.drop", **own)
    options = f"WITH ({', '.join(like['options'])})" if like["options"] else ""
    space = f"TABLESPACE {spelled((like['tablespace'],))}" if like["tablespace"] else ""
    yield statement("additions.make", **own, options=trusted(options), tablespace=trusted(space))
    yield statement("ddl.comment", table=own["leaf"], comment=f"{mark(run)}{growth.hash[:12]}")
    schema, leaf = run.plan.table.schema_name, addition.name
    # As it is now: the plan may be old, and who adds partitions another than who planned.
    root = session.row("catalog.table", oid=growth.oid)
    yield from partition.revoke(own["leaf"], root["strangers"])
    yield statement("ddl.own", table=own["leaf"], owner=(root["owner"],))
    for row in session.rows("additions.grants", oid=growth.oid):
        yield statement("additions.grant", **own, privileges=trusted(row["privileges"]), who=trusted(row["who"]))
    yield from partition.tune(own["leaf"], catalog.columns_of(session, growth.sibling))
    used = set[str]()
    for row in session.rows("additions.statistics", oid=growth.oid):
        used.add(name := fit(f"{leaf}_{row['name']}", used))
        statistics = sql.Identifier(schema, name)
        yield statement("additions.create_statistics", **own, statistics=statistics, tail=trusted(row["tail"]))
        yield statement("additions.own_statistics", statistics=statistics, owner=(row["owner"],))
        if row["target"]:
            yield statement("additions.target", statistics=statistics, target=trusted(row["target"]))
    if kind := {"f": "FULL", "n": "NOTHING"}.get(like["replica_identity"]):  # a publication refuses updates and deletes without
        yield statement("additions.identity", **own, kind=trusted(kind))
    mine = {row["name"] for row in session.rows("additions.own_indexes", oid=growth.sibling)}
    for row in session.rows("catalog.indexes", oid=growth.sibling):
        if row["name"] not in mine:
            continue
        name = fit(leaf + (row["name"].removeprefix(like["name"]) if row["name"].startswith(like["name"]) else f"_{row['name']}"))
        if row["constraint_type"]:
            yield statement(
                "ddl.add_constraint", table=own["leaf"], constraint=(name,), definition=trusted(row["constraint_definition"])
            )
        else:
            unique = trusted("UNIQUE" if row["unique"] else "")
            yield statement("restore.create_index", index=(name,), leaf=own["leaf"], unique=unique, tail=trusted(row["tail"]))
        yield from as_its_sibling(own["leaf"], schema, name, row)
    leaf_text = spelled((schema, leaf))
    for row in session.rows("additions.truncate_triggers", oid=growth.sibling, leaf_text=leaf_text):
        yield rendered(row["definition"])
        if row["always"]:
            yield statement("additions.set_trigger", table=own["leaf"], state=trusted("ENABLE ALWAYS"), trigger=(row["name"],))


def as_its_sibling(leaf: sql.Composable, schema: str, index: str, sibling: dict[str, Any]) -> Statements:
    """What an index is to a partition beside being its index."""
    if sibling["replica_identity"]:
        yield statement("additions.identity", leaf=leaf, kind=sql.SQL("USING INDEX {}").format(sql.Identifier(index)))
    if sibling["clustered"]:
        yield statement("additions.cluster", leaf=leaf, index=(index,))
    for number, target in (sibling["statistics"] or {}).items():
        yield statement("additions.index_statistics", index=(schema, index), number=trusted(number), target=trusted(str(target)))


def refuse_outdated(run: Run, growth: Growth, session: Session, *, moving: bool) -> list[Key]:
    """Under the locks: raises PlanOutdated, with what is another, unless table, default partition and, where rows move, the keys
    are those of the plan; returns the keys that stand aside and are valid."""
    with session.qualified():
        tree = session.rows("additions.tree", oid=growth.oid)
        found = session.rows("additions.referencing", oid=growth.oid) if moving else []
    said = []
    if session.value("verify.oid", root=spelled(run.plan.source)) != growth.oid:
        said.append("another table has its name")
    default = next(((row["schema"], row["name"]) for row in tree if row["bound"] == "DEFAULT"), None)
    if growth.default != default:
        said += [f"{'.'.join(growth.default)} is not its default partition any more"] if growth.default else []
        said += [f"{'.'.join(default)} is its default partition now"] if default else []
    if moving:
        keys = {(row["schema"], row["table"], row["name"]): row["definition"].removesuffix(" NOT VALID") for row in found}
        known = {key.place: key.definition.removesuffix(" NOT VALID") for key in growth.keys}
        said += [f"{name} of {schema}.{table} points at it since" for schema, table, name in sorted(keys.keys() - known.keys())]
        another = sorted(place for place in known if keys.get(place) != known[place])
        said += [f"{name} of {schema}.{table} is another now, or gone" for schema, table, name in another]
        said += pointing(session, tree)
    if said:
        raise PlanOutdated(
            f"{growth.table} is not what 20_add_partitions was planned for: {'; '.join(said)}. Run 20_add_partitions again: it plans anew."
        )
    valid = {(row["schema"], row["table"], row["name"]) for row in found if row["validated"]}
    return [key for key in growth.keys if key.place in valid]


def attach_statements(run: Run, growth: Growth, session: Session, addition: Addition, *, moving: bool) -> Statements:
    """Attach it; before that its rows leave the default partition, while triggers and foreign keys stand aside."""
    own = names(run, addition)
    published, columns = False, identifiers(())
    if moving and growth.default:
        default = sql.Identifier(*growth.default)
        places = {"root_text": spelled(run.plan.source), "default_text": spelled(growth.default)}
        published = session.value("additions.published", **places)
        columns = identifiers(column.name for column in catalog.columns_of(session, growth.oid) if not column.generated)
        fired = session.rows("additions.trigger_states", table_text=spelled(growth.default))
        for key in growth.keys:
            yield statement("cutover.drop_key", table=key.identifier, constraint=(key.name,))
        for row in fired:
            yield statement("additions.set_trigger", table=default, state=trusted("DISABLE"), trigger=(row["name"],))
        yield statement("additions.move_out" if published else "additions.move", **own, default=default, columns=columns)
        for row in fired:
            yield statement("additions.set_trigger", table=default, state=trusted(STATES[row["state"]]), trigger=(row["name"],))
    yield statement("additions.attach", **own)
    # The root's row triggers come along, but on 14 and 15 not whether they fire always.
    of_rows = {row["name"] for row in session.rows("additions.row_triggers", oid=growth.oid)}
    come = [
        row for row in session.rows("additions.trigger_states", table_text=spelled(run.plan.source)) if row["name"] in of_rows
    ]
    if published:
        for row in come:
            yield statement("additions.set_trigger", table=own["leaf"], state=trusted("DISABLE"), trigger=(row["name"],))
        yield statement("additions.move_in", **own, columns=columns)
    for row in come:
        if published or row["state"] != "O":
            yield statement(
                "additions.set_trigger", table=own["leaf"], state=trusted(STATES[row["state"]]), trigger=(row["name"],)
            )
    for key in growth.keys if moving else []:
        definition = key.definition.removesuffix(" NOT VALID")
        yield statement("additions.add_key", table=key.identifier, constraint=(key.name,), definition=trusted(definition))
        if key.comment:
            yield statement("partition.comment_constraint", table=key.identifier, constraint=(key.name,), comment=key.comment)


def forget(run: Run, session: Session) -> Statements:
    """What 20 made and did not come to attach goes with the migration, while it is empty."""
    schema = run.plan.table.schema_name
    for row in session.rows("additions.made", schema=schema, mark=mark(run)):
        if not session.value("additions.has_rows", leaf=(schema, row["name"])):
            yield statement("additions.drop", leaf=(schema, row["name"]))
