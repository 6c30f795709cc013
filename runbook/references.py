"""The tables that reference the source: their names in SQL, and the hand-over of keys that they have to follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate

import psycopg
from psycopg import sql

from runbook.errors import PromiseBroken, function_of
from runbook.facts import Reference
from runbook.ledger import Action, Evidence, P, Run
from runbook.plan import equal, fit
from runbook.session import Session
from runbook.statements import spelled, statement, trusted


def understood(
    notebook: str,
) -> Callable[[Callable[Concatenate[Action, P], Evidence]], Callable[Concatenate[Action, P], Evidence]]:
    """Makes a function of an open action say what is to be done where the server refuses what it did not when all was planned: a
    name, a right or a column is another now. Raises PromiseBroken; what a function of the application raises is its own."""
    again = "again." if notebook == "90_rollback" else "again; or roll back with 90_rollback."

    def decorate(do: Callable[Concatenate[Action, P], Evidence]) -> Callable[Concatenate[Action, P], Evidence]:
        @wraps(do)
        def doing(action: Action, /, *args: P.args, **kwargs: P.kwargs) -> Evidence:
            try:
                return do(action, *args, **kwargs)
            except (psycopg.ProgrammingError, psycopg.DataError) as error:
                if not error.sqlstate or function_of(error):
                    raise
                raise PromiseBroken(
                    f"The server refused {notebook} of {action.run.plan.full_name} ({error.sqlstate}: {error.diag.message_primary}): somebody altered"
                    f" since the plan what is named there. Take that back, then run {notebook} {again}"
                ) from None

        return doing

    return decorate


def names(run: Run, reference: Reference) -> dict[str, sql.Composable]:
    """The placeholders of one reference. Aliases: r, w referencing rows; s, v source rows; k its log."""
    number = (*run.plan.references, *run.plan.selves).index(reference) + 1
    keys = [f"k{place}" for place, _ in enumerate(reference.columns, 1)]
    literal_key = sql.Literal(run.plan.frequent_value)

    def listed(alias: str, columns: tuple[str, ...] | list[str]) -> sql.Composable:
        return sql.SQL(", ").join(sql.Identifier(alias, column) for column in columns)

    def of_row(which: str) -> sql.Composable:
        return sql.SQL(", ").join(sql.SQL("{}.{}").format(trusted(which), sql.Identifier(column)) for column in reference.columns)

    columns, referenced = reference.columns, reference.referenced
    present: sql.Composable = sql.Identifier(columns[0])
    if len(columns) > 1:
        present = sql.SQL(" || ").join(sql.SQL("{}::text").format(sql.Identifier(column)) for column in columns)
    # An extension's operator by its schema: under another search_path "=" would be another one. Both sides are of its type.
    own = ["=" if each.startswith("OPERATOR(pg_catalog.") else each for each in reference.operators]
    return {
        **run.names,
        "reference": reference.identifier,
        "reference_text": sql.Literal(reference.identifier.as_string(None)),
        "table_text": sql.Literal(f"{reference.schema_name}.{reference.table}"),
        "reference_log": sql.Identifier(run.staging, run.plan.internal(f"references_{number}")),
        "reference_function": sql.Identifier(run.staging, f"log_references_{number}"),
        "fill_function": sql.Identifier(run.staging, f"fill_{number}"),
        "filled": (counts := sql.Identifier(run.staging, run.plan.internal("filled"))),
        "note": statement("foreign_keys.note_fill", filled=counts),
        "named_function": sql.Identifier(run.staging, f"role_named_{number}"),
        "named_setting": sql.Literal(f"runbook.role_named_{run.migration}_{number}".replace("-", "_")),
        "named_trigger": sql.Identifier(fill_triggers(reference)[0]),
        "fill_trigger": sql.Identifier(fill_triggers(reference)[1]),
        "places": sql.Identifier(run.staging, run.plan.internal(f"places_{number}")),
        "constraint_text": sql.Literal(reference.name),
        "insert_text": sql.Literal(f"runbook_reference_insert_{run.migration}_{number}"),
        "update_text": sql.Literal(f"runbook_reference_update_{run.migration}_{number}"),
        "insert_trigger": sql.Identifier(f"runbook_reference_insert_{run.migration}_{number}"),
        "update_trigger": sql.Identifier(f"runbook_reference_update_{run.migration}_{number}"),
        "check_name": sql.Identifier(fit(f"{reference.table}_{reference.role_column}_present")),
        "check_text": sql.Literal(fit(f"{reference.table}_{reference.role_column}_present")),
        "constraint": sql.Identifier(reference.name),
        "definition": trusted(reference.composite),
        "role_column": sql.Identifier(reference.role_column),
        "role_type": trusted(reference.role_type),
        "default": sql.SQL("DEFAULT {}").format(literal_key) if run.plan.frequent_value is not None else sql.SQL(""),
        "not_null": sql.SQL("NOT NULL" if reference.not_null and run.plan.frequent_value is not None else ""),
        "required": sql.SQL("{} IS NOT NULL").format(sql.Identifier(reference.role_column))
        if reference.not_null
        else sql.SQL("{} IS NULL OR {} IS NOT NULL").format(present, sql.Identifier(reference.role_column)),
        "unknown": _unknown(run, reference),
        "s_refers_v": equal("v", referenced, "s", columns, own),
        "frequent": literal_key,
        "reference_key_aliases": sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(sql.Identifier("r", column), sql.Identifier(key))
            for column, key in zip(columns, keys, strict=True)
        ),
        "itself": itself(run, reference, counts),
        "n_columns": listed("n", columns),
        "w_columns": listed("w", columns),
        "k_columns": listed("k", keys),
        "s_referenced": listed("s", referenced),
        "r_is_s": equal("s", referenced, "r", columns, own),
        "w_is_v": equal("v", referenced, "w", columns, own),
        "w_is_s": equal("s", referenced, "w", columns, own),
        "w_is_k": equal("w", columns, "k", keys, own),
        "s_is_rk": equal("s", referenced, "k", keys, own),
        "new_columns": of_row("NEW"),
        "old_columns": of_row("OLD"),
        "new_present": sql.SQL("({}) IS NOT NULL").format(sql.SQL("ROW({})").format(of_row("NEW"))),
        "s_is_new": sql.SQL(" AND ").join(
            sql.SQL("s.{} {} NEW.{}").format(sql.Identifier(a), equals, sql.Identifier(b))
            for a, equals, b in zip(referenced, _equals(reference), columns, strict=True)
        ),
    }


def fill_triggers(reference: Reference) -> tuple[str, str]:
    """The names of the triggers that fill the role column in for old code, in the order in which they fire: by name, with "~" after
    the application's, one of which may set what the row refers to."""
    return fit(f"~runbook_explicit_{reference.role_column}"), fit(f"~runbook_fill_{reference.role_column}")


def _unknown(run: Run, reference: Reference) -> sql.Composable:
    """What the fill trigger does about a row that is not there: the foreign key says so, as it did before the migration."""
    role = sql.Identifier(reference.role_column)
    refuse = sql.SQL("RAISE foreign_key_violation USING MESSAGE = {}, CONSTRAINT = {}, TABLE = {}, SCHEMA = {};").format(
        f'insert or update on table "{reference.table}" violates foreign key constraint "{reference.name}"',
        reference.name, reference.table, reference.schema_name,
    )  # fmt: skip
    if run.plan.frequent_value is not None:
        refuse = sql.SQL("NEW.{} := {};").format(role, sql.Literal(run.plan.frequent_value))
    elif " DEFERRABLE" in reference.definition:  # it may come later in the transaction
        refuse = sql.Composed([])
    return refuse


def _equals(reference: Reference) -> list[sql.SQL]:
    """The foreign key's own operators, by their schemas: a trigger's search_path has none of an extension's."""
    return [trusted(each) for each in reference.operators or ["="] * len(reference.columns)]


def itself(run: Run, reference: Reference, counts: sql.Composable | None) -> sql.Composable:
    """What the fill trigger does first: a row that refers to itself has its own partition key, before it is there and whenever
    that changes. Who needed that is counted, where there is a table for it."""
    if reference not in run.plan.selves:
        return sql.SQL("")
    pairs = zip(reference.referenced, _equals(reference), reference.columns, strict=True)
    same = sql.SQL(" AND ").join(sql.SQL("NEW.{} {} NEW.{}").format(sql.Identifier(a), e, sql.Identifier(b)) for a, e, b in pairs)
    note = statement("foreign_keys.note_fill", filled=counts) if counts else sql.SQL("NULL")
    text = """IF {0} AND (TG_OP = 'UPDATE' OR NEW.{1} IS NULL) THEN
      IF ROW(NEW.{1})::record *<> ROW(NEW.{2})::record THEN
        NEW.{1} := NEW.{2}; {3};
      END IF;
      RETURN NEW;
    END IF;"""
    return sql.SQL(text).format(same, sql.Identifier(reference.role_column), sql.Identifier(run.plan.key), note)


def added(run: Run) -> list[Reference]:
    """The references that gain a role column; two keys over the same columns share one."""
    seen: dict[tuple[str, str, str], Reference] = {}
    for reference in run.plan.references:
        if reference.adds_column:
            seen.setdefault((reference.schema_name, reference.table, reference.role_column), reference)
    return list(seen.values())


def dropped(run: Run, session: Session) -> list[Reference]:
    """The references whose table somebody dropped: it stands by no other name either."""
    planned, own = (
        {each.place[:2] for each in run.plan.references},
        {"staging_name": run.staging, "source_text": spelled(run.plan.source)},
    )
    return [
        each
        for each in run.plan.references
        if not session.value("catalog.there", name=spelled(each.identifier))
        and {(row["schema"], row["name"]) for row in session.rows("rollback.elsewhere", **own, key_name=each.name)} <= planned
    ]


def tables(run: Run, reference: Reference, session: Session | None = None) -> list[tuple[sql.Identifier, bool | None]]:
    """The tables that hold its rows now, each with whether the key on it is validated; None where there is no such key."""
    own = names(run, reference)
    rows: Any = session.rows("foreign_keys.tables", **own) if session else None
    if rows is None:
        rows = run.frame("foreign_keys.tables", **own).astype(object).to_dict("records")
    return [(sql.Identifier(row["schema"], row["name"]), row["validated"]) for row in rows]


def logged(run: Run, session: Session, reference: Reference) -> bool:
    """Whether 04 has been here: the column, its triggers and this log come in one transaction, so where the log is, they are."""
    return bool(session.value("catalog.there", name=spelled(names(run, reference)["reference_log"])))


def gained(run: Run, session: Session, reference: Reference) -> bool:
    """Whether 04 gave it its role column, also where somebody dropped the log since: then the ledger knows, and only of what was
    done, for a column of that name that was there before made 04 fail."""
    there = logged(run, session, reference)
    return there or (run.plan.restore_from == "source" and bool(session.value("foreign_keys.gained", **names(run, reference))))


def require_intact(run: Run, session: Session) -> None:
    """Raises PromiseBroken, naming them, where logs or role columns are there no more, or a table inherits from a
    referencing one since 00 looked: what is required of the role column would be required of its rows, which no trigger fills in."""
    logs = [names(run, each)["reference_log"] for each in added(run) if gained(run, session, each)]
    lost = [each for each in map(spelled, [run.names["log"], *logs]) if not session.value("catalog.there", name=each)]
    if lost:
        raise PromiseBroken(
            f"{', '.join(lost)}, which the migration of {run.plan.full_name} needs, {'is' if len(lost) == 1 else 'are'} there no more: somebody"
            " dropped or renamed it. Roll back with 90_rollback, then plan again with 00_plan."
        )
    for reference in added(run):
        gone = {"schemas": [reference.schema_name], "tables": [reference.table], "columns": [reference.role_column]}
        for row in session.rows("catalog.gone", **gone) if gained(run, session, reference) else ():
            raise PromiseBroken(
                f"{row['what']}, which 04_foreign_keys added, is there no more: rename it back and run this notebook again; where it was dropped,"
                " add a column of that name and roll back with 90_rollback."
            )
        for row in session.rows("foreign_keys.heirs", **names(run, reference)):
            raise PromiseBroken(
                f"{row['name']} inherits from {row['parent']} since the plan: {reference.role_column} would be required of its rows too, which"
                f" {reference.name} does not reach. ALTER TABLE {row['name']} NO INHERIT {row['parent']}; then run this notebook again."
            )


def hand_over(run: Run, session: Session) -> None:
    """Within a replay: pass on the keys whose partition key changed to the logs of the tables that reference them."""
    for reference in added(run):
        if logged(run, session, reference):
            session.run("foreign_keys.hand_over", **names(run, reference))


def pass_on(run: Run, session: Session) -> None:
    """Within a replay: the rows of the table whose own role column follows a row that changed are to be copied again."""
    for reference in run.plan.own_roles:
        keys = [f"k{run.plan.primary_key.index(column) + 1}" for column in reference.referenced]
        session.run("foreign_keys.pass_on", **{**names(run, reference), "s_is_rk": equal("s", reference.columns, "k", keys)})
