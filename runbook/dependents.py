"""What the plan finds of everything that depends on the table: objects that hang on it, references to it, its unique keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from psycopg import sql

from runbook import catalog, ledger, matviews
from runbook.facts import Finding, Index, Reference
from runbook.plan import Plan, fit
from runbook.session import Session

MOST_COLUMNS = 1600  # of a table, those that were dropped included


def objects(session: Session, plan: Plan) -> Iterator[Finding]:
    """What hangs on the table: triggers, rules, views, publications, and whatever else goes with it or cannot."""
    oid = sql.Literal(plan.table.oid)
    anew = {f"function {each.name}" for each in plan.carried if each.kind == "function of its rows"}
    for row in session.rows("catalog.others", oid=oid):
        if row["object"] in anew:
            continue
        yield Finding.blocker(
            row["object"],
            f"{row['object']} depends on {plan.full_name} in a way that is not carried over.",
            "Drop it before, and make it anew after the cut-over.",
        )
    yield from matviews.judged(session, oid)
    obstacles = session.rows("catalog.obstacles", oid=oid, key=plan.key, backup=plan.backup_method, retired=plan.retired)
    yield from map(Finding.model_validate, obstacles)
    for row in session.rows("catalog.subscribed", oid=oid):
        yield Finding.blocker(
            row["name"],
            f"{plan.full_name} is fed by the subscription {row['name']}, whose changes no trigger sees.",
            "Migrate the publisher's table, or make the subscription anew after it.",
        )
    for check in plan.checks:
        if check.definition.endswith("NO INHERIT"):
            yield Finding.blocker(
                check.name,
                f"The check {check.name} is NO INHERIT, which a partitioned table cannot have.",
                "Make it an ordinary check first.",
            )
    for carried in plan.carried:
        if carried.kind == "function of its rows":
            yield Finding.note(
                carried.name,
                f"The function {carried.name} is dropped and made anew with the swap, and with the way back: a call that waits for that can fail once,"
                " and a prepared SELECT of its result as one value fails (0A000) until it is prepared anew.",
                "Renew the application's pools after 05.",
            )
        elif carried.kind == "trigger" and " REFERENCING " in carried.definition and " FOR EACH ROW " in carried.definition:
            yield Finding.blocker(
                carried.name,
                f"The trigger {carried.name} is a row trigger with transition tables, which a partition cannot have.",
                "Make it a statement trigger.",
            )
        elif carried.kind == "grant of another" and not session.row("catalog.privileges", oid=oid)["superuser"]:
            yield Finding.blocker(
                carried.name, f"The grant {carried.name} was not made by the owner of {plan.full_name}, and only a superuser can make it anew.",
                f"Let {plan.table.owner} grant it instead.",
            )  # fmt: skip
        elif carried.kind == "trigger" and re.search(
            r" (?:BEFORE|AFTER) (?:\S+ OR )*(?:INSERT|DELETE) .*FOR EACH ROW ", carried.definition
        ):
            before = " BEFORE " in carried.definition and " INSERT " in carried.definition
            what = f"; were it to change {plan.key}, an insert would be refused" if before else ""
            if " AFTER " in carried.definition and " OR UPDATE " in carried.definition:
                what = "; to its function that is no UPDATE, and has no OLD beside NEW"
            yield Finding.warning(
                carried.name,
                f"The trigger {carried.name} fires for an update of {plan.key}, too, by which a row is deleted and inserted: what it assigns, writes or"
                f" refuses, it assigns, writes or refuses again{what}.",
                "Where that would be wrong, let its function tell the two apart (what it would assign is there already), or partition by a column that does not change.",
            )
        elif carried.kind == "trigger" and (only := re.search(r" AFTER UPDATE( OF .*)? ON .*FOR EACH ROW ", carried.definition)):
            yield Finding.warning(
                carried.name,
                f"The trigger {carried.name} (AFTER UPDATE{only[1] or ''}) does not fire for an update of {plan.key} that moves the row to another"
                " partition, by which it is deleted and inserted: what it writes or refuses is then left out, without an error.",
                "Make it AFTER INSERT OR DELETE, too, and let its function tell the two apart; or partition by a column that does not change.",
            )


def references(session: Session, plan: Plan) -> Iterator[Finding]:
    """Who refers to the table, and whether a composite key can take the place of theirs."""
    rows = {(row["schema"], row["table"], row["name"]): row for row in session.rows("catalog.incoming", oid=plan.table.oid)}
    for reference in (*plan.references, *plan.selves):
        name = f"{reference.schema_name}.{reference.table}"
        if reference.adds_column and {*reference.referenced, plan.key} != set(plan.new_primary_key):
            yield Finding.blocker(
                name, f"{name} references {', '.join(reference.referenced)} of {plan.full_name}, which is not its primary key and lacks {plan.key}.",
                "Drop that foreign key first, or partition by a column that it references.",
            )  # fmt: skip
        if (
            "MATCH FULL" in reference.definition
            and len(reference.columns) > 1
            and reference.adds_column
            and not reference.not_null
        ):
            yield Finding.blocker(
                name, f"{reference.name} of {name} is MATCH FULL over columns that may be NULL, which a composite key with {reference.role_column} cannot be.",
                "Make it MATCH SIMPLE with CHECK (num_nulls(…) IN (0, …)) first, or its columns NOT NULL.",
            )  # fmt: skip
        if "DEFERRABLE" in reference.definition and reference.adds_column and plan.legacy_inserts == "fill":
            yield Finding.warning(
                name, f"{reference.name} is deferrable: a row of {name} that is written before the row it refers to must name {reference.role_column} from the cut-over"
                " on; and one that refers to no row at all is refused for want of it (23502, 23514) instead of by the key (23503).",
                "Let it name the column, or be written after that row; look at both codes where the application tells errors apart.",
            )  # fmt: skip
        if " ON UPDATE SET " in reference.definition and reference.adds_column:
            yield Finding.warning(
                name, f"{reference.name} of {name} is ON UPDATE SET and becomes ON UPDATE CASCADE, by which {reference.role_column} follows.",
                "Check for it in the application, or drop that action first.",
            )  # fmt: skip
        if not reference.indexed:
            yield Finding.warning(
                name, f"{name} has no index that begins with {reference.columns[0]}: every correction and every delete of a referenced row scans it.",
                f"CREATE INDEX CONCURRENTLY ON {name} ({reference.columns[0]});",
            )  # fmt: skip
        if plan.server_version == 14 and "ON DELETE CASCADE" in reference.definition:
            yield Finding.warning(
                name, f"On PostgreSQL 14 a changed {plan.key} is a delete and an insert: ON DELETE CASCADE would delete the rows of {name}, so such updates are refused.",
                "Upgrade to 15 or later before values of the key change.",
            )  # fmt: skip
        elif plan.server_version == 14 and " ON UPDATE CASCADE" in reference.composite:
            yield Finding.warning(
                name, f"On PostgreSQL 14 a changed {plan.key} is a delete and an insert, which {reference.name} refuses while rows of {name} refer to the row.",
                "Upgrade to 15 or later before values of the key change.",
            )  # fmt: skip
        if "ON DELETE SET DEFAULT" in reference.composite and plan.server_version == 14 and reference.adds_column:
            yield Finding.blocker(
                name,
                f"{reference.name} is ON DELETE SET DEFAULT, and PostgreSQL 14 would set {reference.role_column} to its own default.",
                "Upgrade to 15, or change the foreign key's action first.",
            )
        if reference in plan.selves and reference.adds_column:
            yield Finding.warning(
                name, f"{name} references itself: an UPDATE that changes the {plan.key} of a row and of rows that refer to it in one statement can be"
                " refused (23503), for a row that moves is checked before what it refers to has moved"
                + ("; a row that an INSERT of several has before the one it refers to can be, too." if plan.legacy_inserts == "fill" else "."),
                f"Change the row that is referred to first, the others in a statement of their own; insert it first, or name {reference.role_column}.",
            )  # fmt: skip
        row = rows.get(reference.place, {})
        if row.get("is_partition") and reference.adds_column:
            yield Finding.blocker(
                name, f"{name} is a partition with a foreign key {reference.name} of its own, and cannot gain the column {reference.role_column} alone.",
                "Give the whole of its table that foreign key, or drop it first.",
            )  # fmt: skip
        if row.get("inherited") and reference.adds_column:
            yield Finding.blocker(
                name, f"{name} is inherited from: {reference.role_column} would be required of its children too, which {reference.name} does not reach.",
                "ALTER TABLE … NO INHERIT; for the children first.",
            )  # fmt: skip
        yield from _gaining(plan, reference, row) if reference.adds_column else ()
        for trigger in [] if reference in plan.selves else row.get("update_triggers") or []:
            yield Finding.warning(
                name,
                f"The trigger {trigger} of {name} fires when {reference.role_column} is filled in, and from the cut-over on whenever the {plan.key} of"
                " the row referred to changes: what it writes, such as the time or an audit row, is written for each of these rows and stays, after the way"
                " back, too; one that refuses or undoes updates stops 04.",
                f"Where that would be wrong, ALTER TABLE {name} DISABLE TRIGGER {trigger}; until the cut-over, or let it return where current_setting('runbook.correcting', true) = 'on', as it is while 04 and 05 fill in; from then on only the trigger itself can tell.",
            )
    yield from _together(plan)
    others = {f"{each.schema_name}.{each.table}" for each in plan.references if each.adds_column}
    for row in session.rows("ledger.swapped", tables=sorted(others)) if others and ledger.kept(session) else []:
        yield Finding.warning(
            row["source"],
            f"The migration of {row['source']} is still open: while this one is, its way back waits, and where this one is finished it ends.",
            "Finish that first, or take both back in turn, this one before it.",
        )


def _gaining(plan: Plan, reference: Reference, row: dict[str, Any]) -> Iterator[Finding]:
    """What hangs on a table, and does not bear that it gains a column."""
    name, role = f"{reference.schema_name}.{reference.table}", reference.role_column
    own = reference in plan.selves
    when = "from the cut-over on" if own else "from 04 on"
    if row.get("typed") and not own:
        yield Finding.blocker(
            name, f"{name} is made of a type, and cannot gain the column {role} alone.", f"ALTER TABLE {name} NOT OF; first."
        )
    if row.get("computed"):
        yield Finding.blocker(
            name, f"{reference.name} of {name} is over a generated column, which cannot follow a changed {plan.key} as a composite key does.",
            "Make it an ordinary column first (ALTER TABLE … ALTER … DROP EXPRESSION), or drop that key.",
        )  # fmt: skip
    if row.get("last_column", 0) >= MOST_COLUMNS:
        yield Finding.blocker(
            name, f"{name} has had {MOST_COLUMNS:,} columns, as many as PostgreSQL allows, and cannot gain {role}.", "Make it anew with fewer columns first."
        )  # fmt: skip
    if row.get("unidentified"):
        yield Finding.blocker(
            name, f"{name} is published and has no replica identity, so that {role} could not be filled in.", f"ALTER TABLE {name} REPLICA IDENTITY FULL; first."
        )  # fmt: skip
    if (held := row.get("held_in")) and not own:
        yield Finding.blocker(
            name, f"{', '.join(held)} has the type of {name}'s rows, which then cannot gain the column {role}.",
            "Store it as jsonb, or drop that column, first.",
        )  # fmt: skip
    check = fit(f"{reference.table}_{role}_present")
    if check in (row.get("constraint_names") or []):
        yield Finding.blocker(
            name, f"{name} has a constraint {check}, whose name the check of {role} needs.", f"ALTER TABLE {name} RENAME CONSTRAINT … TO …; first."
        )  # fmt: skip
    for trigger in row.get("whole_rows") or []:
        yield Finding.warning(
            name, f"The trigger {trigger} of {name} inserts rows as a whole (OLD.* or NEW.*), and {when} they end with {role}: where its statement names no"
            " columns, each of the application's writes that fires it fails (42601).",
            "Name the columns in its function first, or give the table that it writes to that column, at its place.",
        )  # fmt: skip
    if functions := row.get("row_functions"):
        yield Finding.warning(
            name, f"{', '.join(functions)} returns rows of {name} and lists their columns: {when}, with {role}, it fails (42804, 42P13).",
            "Let it select all columns (SELECT *), or return a TABLE of its own.",
        )  # fmt: skip


def _together(plan: Plan) -> Iterator[Finding]:
    """What is so of every table that references it, said once."""
    adding = [reference for reference in (*plan.references, *plan.selves) if reference.adds_column]
    if adding:
        gained = dict.fromkeys(f"{each.schema_name}.{each.table} gains the column {each.role_column}" for each in adding)
        yield Finding.warning(
            plan.full_name, f"{'; '.join(gained)}: a prepared SELECT * of it fails (0A000) until it is prepared anew, an INSERT … SELECT * of it elsewhere and a COPY"
            f" into it without a list of columns fail from 04 on (42601, 22P04), a logical subscriber needs the column first, with the same default, and from {'91' if plan.legacy_inserts == 'fill' else 'the cut-over'} on an insert must name it.",
            "Name the columns there; renew the connections after 04; keep_fill lets 91 leave the trigger that fills it in.",
        )  # fmt: skip
    if plan.legacy_inserts == "fill" and any(each not in plan.selves and "DEFERRABLE" not in each.definition for each in adding):
        yield Finding.note(
            plan.full_name, "From the cut-over on a referencing row that one statement, as WITH … INSERT, writes before the row it refers to can be refused (23503).",
            "Let it come after that row, or name the role column.",
        )  # fmt: skip
    refusing = [
        each for each in adding if " ON UPDATE CASCADE" not in each.definition and " ON UPDATE SET " not in each.definition
    ]
    if refusing:
        named = "; ".join(
            f"{each.name} of {each.schema_name}.{each.table} becomes ON UPDATE CASCADE, by which {each.role_column} follows"
            for each in refusing
        )
        columns = ", ".join(dict.fromkeys(column for each in refusing for column in each.referenced))
        yield Finding.note(
            plan.full_name, f"{named}: a change of {columns}, which it refused, goes on to the rows that refer to it."
        )


def instead(plan: Plan, index: Index) -> str:
    """What takes the place of ON CONFLICT on a key without the partition key; a deferrable one it never could name."""
    if index.primary and not index.timing:
        return f"ON CONFLICT ({', '.join((*index.columns, plan.key))}) takes its place."
    return "" if index.timing else "In its place, UPDATE first, and INSERT where that changed no row; after a 23505 once more."


def uniqueness(plan: Plan) -> Iterator[Finding]:
    """Which unique keys a partitioned table can keep, and how."""
    guards = {guard.index: guard.table for guard in plan.guards}
    for index in plan.indexes:
        if index.constraint_type == "x" and not catalog.within_key(index.constraint_definition or "", plan.key):
            yield Finding.warning(
                index.name, f"{index.name} excluded rows of the whole of {plan.full_name} and will exclude those of the same partition only,"
                f" with unique = {plan.unique}, too; the way back closes once rows stand there that it excluded.",
                "Check for it in the application, or partition by a column that it compares with =.",
            )  # fmt: skip
        if not index.unique or plan.key in index.columns:
            continue
        plain = index.tail.replace('"', "") == f"btree ({', '.join(index.columns)})"
        keys, where, predicate = index.tail.removeprefix("btree ").partition(" WHERE ")
        keys = re.sub(r" (INCLUDE \(|NULLS NOT |WITH \().*", "", keys)  # of which ON CONFLICT says nothing
        target = f"({', '.join(index.columns)})" if plain else keys + where + predicate
        what = target[1:-1] if plain else target
        way_out = instead(plan, index)
        if index.timing and not index.primary:
            yield Finding.warning(
                index.name, f"{index.name} is deferrable, and no constraint of {plan.full_name} by that name any more: SET CONSTRAINTS {index.name} fails (42704)"
                + (", and a duplicate in another partition is found at the commit, whatever is set." if index.name in guards else "."),
                "SET CONSTRAINTS ALL names it, too.",
            )  # fmt: skip
        if index.name in guards:
            yield Finding.warning(
                index.name, f"{what} stays unique in the whole of {plan.full_name}: triggers keep {plan.guard_schema}.{guards[index.name]}, one small"
                f" write more for every row. ON CONFLICT {target} stops working, and ON CONFLICT DO NOTHING skips a duplicate in the row's own"
                " partition only; elsewhere it is an error (23505).", way_out,
            )  # fmt: skip
        else:
            yield Finding.warning(
                index.name, f"{what} was unique in {plan.full_name} and becomes unique per partition: the same {what} may stand once in each;"
                f" the way back closes once that happens, and ON CONFLICT {target} stops working.",
                f'unique = "global" keeps it unique. {way_out}'.rstrip(),
            )  # fmt: skip
    yield Finding.note(plan.full_name, f"Look-ups that do not name {plan.key} visit every partition.")
    yield Finding.note(
        plan.full_name,
        f"An update of {plan.key} moves the row: row triggers AFTER UPDATE do not fire for it, those on DELETE and INSERT do, and a concurrent one can get 40001.",
    )
