"""The draft of a plan: reads the table, decides, says what it found; `freeze` makes it the plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import psycopg
from psycopg import sql

from runbook import advice, asked, catalog, drift, findings, ledger, locks, matviews, partition, repair
from runbook.database import Database, target
from runbook.division import MOST, divide
from runbook.errors import BadInput, PlanBlocked, PlanOutdated
from runbook.facts import Finding, Named
from runbook.overview import strip
from runbook.parameters import Parameters, forget, resolve
from runbook.plan import Plan, fit, stored
from runbook.possible import as_key
from runbook.provenance import operator
from runbook.session import Session
from runbook.statements import closed_schema, statement, trusted


@dataclass(frozen=True)
class Draft:
    """A plan that is not frozen yet, and the database that it was read from; `already` has the plan that is in force."""

    database: Database
    plan: Plan
    already: str = ""
    counted: tuple[dict[str, Any], ...] = ()  # the values of the key, as they were counted for the plan
    given: Parameters = field(default_factory=Parameters)

    def overview(self) -> Any:
        """The strip of the steps, before the first of them or where the migration in force stands."""
        return ledger.of(self.database, self.plan.full_name).overview() if self.already else strip(self.plan)

    def columns(self) -> pd.DataFrame:
        """The columns as they are."""
        kept = {"name", "type", "not_null", "default"}
        return pd.DataFrame([column.model_dump(include=kept) for column in self.plan.columns]).fillna("")

    def keys(self) -> pd.DataFrame:
        """Keys and indexes as they are, and where each will stand."""
        return pd.DataFrame(
            {"index": index.name, "definition": index.tail, "kind": "primary key" if index.primary else "unique" if index.unique else "",
             "will stand": "on the root and every partition" if index.everywhere else "on every partition only"}
            for index in self.plan.indexes
        )  # fmt: skip

    def references(self) -> pd.DataFrame:
        """Who references the table, and the composite key that each will have."""
        return pd.DataFrame(
            [{"table": f"{r.schema_name}.{r.table}", "key": r.name, "is": r.definition, "becomes": r.composite, "new column": r.role_column if r.adds_column else ""}
             for r in (*self.plan.references, *self.plan.selves)], columns=["table", "key", "is", "becomes", "new column"],
        )  # fmt: skip

    def size(self) -> pd.DataFrame:
        """Rows, as they were counted, and megabytes."""
        table = self.plan.table
        return pd.DataFrame([{"table": self.plan.full_name, "rows": sum(p.rows for p in self.plan.partitions), "table MB": round(table.table_bytes / 1e6, 1),
                              "indexes MB": round(table.index_bytes / 1e6, 1)}])  # fmt: skip

    def partitions(self) -> pd.DataFrame:
        """Each partition with its bound and the rows that it would take now."""
        return pd.DataFrame([partition.model_dump(include={"name", "bound", "rows"}) for partition in self.plan.partitions])

    def values(self) -> pd.DataFrame:
        """The values of the key, how often each occurs, and the partition that takes it; by list, else the partitions."""
        plan = self.plan
        if plan.partition_by != "list":
            return self.partitions()
        homes = {value: partition.name for partition in plan.partitions for value in partition.values}
        default = next((partition.name for partition in plan.partitions if partition.bound == "DEFAULT"), "none")
        names, values = plan.names(""), [value for value in homes if value is not None]
        frame = pd.DataFrame(self.counted, columns=["value", "given", "rows"])
        if self.already:
            frame = self.database.frame("draft.placed", key=names["key"], table=names["source"], type=trusted(plan.key_type),
                                        values=values, filled=plan.null_value, most=MOST)  # fmt: skip
        frame["partition"] = [homes.get(None if pd.isna(value) else given, default)
                              for value, given in zip(frame["value"], frame.pop("given"), strict=True)]  # fmt: skip
        return frame

    def uniqueness(self) -> pd.DataFrame:
        """What either choice for keys without the partition key costs, measured with a sample on this server: microseconds for
        a row that is inserted, and megabytes more for all rows. In temporary tables: nothing of it stays."""
        columns, costs = ["unique", "µs a row", "MB more"], []
        if not self.already and not self.plan.blockers and self.plan.restore_from == "source":
            with self.database.session("plan.measure") as session, session.transaction("REPEATABLE READ"):
                guards = catalog.guards_of(session, self.plan.table.oid, self.plan.key)
                try:
                    costs = partition.measure(session, self.plan.model_copy(update={"guards": guards}))
                except psycopg.Error as error:
                    costs = [(f"not measured: {error.diag.message_primary}", float("nan"), float("nan"))]
        return pd.DataFrame(costs, columns=columns)

    def findings(self) -> pd.DataFrame:
        """Blockers first, then warnings and notes."""
        return pd.DataFrame(
            [finding.model_dump() for finding in self.plan.findings],
            columns=["level", "object", "sentence", "way_out"],
        ).rename(columns={"way_out": "way out"})

    def require_passable(self, fail_on: str = "blocker") -> None:
        """Raises PlanBlocked with all findings of the level `fail_on` and worse ones."""
        worst = findings.LEVELS[: findings.LEVELS.index(fail_on) + 1]
        stopping = [finding for finding in self.plan.findings if finding.level in worst]
        if stopping and not self.already:
            raise PlanBlocked(" ".join(f"{finding.sentence} {finding.way_out}".strip() for finding in stopping))

    def freeze(self, fail_on: str = "blocker") -> ledger.Run:
        """Store the plan with its hash; from here on every notebook works by it.

        Raises PlanBlocked as `require_passable` does; an open plan that nothing was done for is replaced, one that is
        under way with another hash refuses.
        """
        if self.already:
            print(self.already)
            return ledger.of(self.database, self.plan.full_name)
        self.require_passable(fail_on)
        source = sql.Literal(self.plan.full_name)
        with self.database.session("plan.freeze") as session:
            session.run_all([*closed_schema("runbook", there=True), statement("ledger.create")])
            ledger.claim(session, self.plan)  # nobody begins anything meanwhile
            row = session.run("ledger.last_migration", source=source).fetchone()
            since = row is not None and (row["state"] == "open" or row["source_oid"] == self.plan.table.oid)
            if row is not None and since and row["state"] in ("open", "finished") and _under_way(session, row["id"]):
                raise PlanOutdated(
                    f"Since this was read, the migration of {self.plan.full_name} by the plan {row['plan_hash'][:12]} was begun:"
                    " nothing was frozen. Run 00_plan again; it goes on with that one."
                )
            return self._insert(session, source)

    def _insert(self, session: Session, source: sql.Literal) -> ledger.Run:
        with session.transaction():
            session.run("ledger.replace_open", source=source)
            number = session.value(
                "ledger.insert_migration", source=source, oid=self.plan.table.oid,
                plan=self.plan.model_dump_json(), hash=self.plan.hash,
            )  # fmt: skip
            run = ledger.Run(self.database, number, self.plan)
            if any(row["name"] == run.staging for row in session.rows("catalog.schemas")):
                raise BadInput(
                    f"The schema {run.staging}, which the migration would make, is somebody else's: run 00_plan again, for the next number."
                )
            action = session.value(
                "ledger.begin_action", migration=number, step="plan", action="check",
                operator=session.plain(operator()),
            )  # fmt: skip
            ledger.Action(run, session, action).finish(
                f"Plan {self.plan.hash[:12]} for {self.plan.full_name} by {self.plan.key} is frozen.",
                findings=len(self.plan.findings),
                lines=catalog.lines(session, self.plan.source),
                given=asked.remembered(self.given),
            )
        return run


def draft(**given: Any) -> Draft:
    """Read the table and decide; nothing is changed, no lock beyond a reader's is taken.

    Raises BadInput for parameters that name what is not there, or values that contradict each other.
    """
    forget()
    parameters = resolve(**given)
    database = target(parameters.database, parameters.users)
    if not parameters.key:
        raise BadInput(f"key is not named: say by which column of {parameters.table} to partition, with -p key … or in the file.")
    with database.session("plan") as session, locks.attended(database):
        found, schema, name = drift.find(session, parameters.table, database.name)
        if ledger.kept(session):
            row = session.run("ledger.last_migration", source=f"{schema}.{name}").fetchone()
            over = row is not None and row["state"] == "finished" and not session.row("catalog.table", oid=found)["partitioned"]
            if row is not None and row["state"] in ("open", "finished") and not over and _under_way(session, row["id"]):
                return _in_force(ledger.Run(database, row["id"], stored(row), row["state"]), parameters)
        try:
            with session.transaction("REPEATABLE READ"), session.qualified():
                made = _decide(session, found, parameters, database)
                return replace(made, plan=_storable(session, made.plan))
        except psycopg.errors.InsufficientPrivilege as error:
            who = session.row("catalog.reader", oid=found)
            me, table = who["me"], who["table"]
            if who["bound"]:
                raise PlanBlocked(
                    f"Row-level security is forced on {table}, so that {me} may not copy it: ALTER ROLE {me} BYPASSRLS;"
                ) from None
            if who["dormant"]:
                raise PlanBlocked(
                    f"{me} is a member of {who['owner']}, which owns {table}, and does not inherit its rights: ALTER ROLE {me} SET role ="
                    f" {who['owner']}; or let it inherit them (ALTER ROLE {me} INHERIT; from 16 on GRANT {who['owner']} TO {me} WITH INHERIT TRUE)."
                ) from None
            raise PlanBlocked(
                f"{me} may not read all that the plan rests on ({error.diag.message_primary}): GRANT SELECT ON {table} TO {me}; or,"
                f" as every later step needs it, make {me} a member of the table's owner."
            ) from None


def _storable(session: Session, plan: Plan) -> Plan:
    """The plan with its findings as the ledger can keep them: what has a hash must come back as it was."""
    kept = [
        Finding.model_validate({name: session.plain(text) for name, text in each.model_dump().items()}) for each in plan.findings
    ]
    return plan.model_copy(update={"findings": tuple(kept)})


def _under_way(session: Session, migration: int) -> bool:
    return any(row["step"] != "plan" for row in session.rows("ledger.history", migration=migration))


def _in_force(run: ledger.Run, given: Parameters) -> Draft:
    default = Parameters()
    named = {name for name in asked.PLANNED if getattr(given, name) != getattr(default, name)}
    asked.refuse_another(run, given, named.union(asked.DECISIVE))
    return Draft(
        run.database,
        run.plan,
        f"Already done: the plan {run.plan.hash[:12]} of {run.plan.full_name} is frozen and in force; nothing is planned anew.",
    )


def _decide(session: Session, found: int, parameters: Parameters, database: Database) -> Draft:
    row = session.row("catalog.table", oid=found)
    table = catalog.table_of(row)
    if row["partitioned"] and parameters.restore_from == "source":  # of what else it is nothing would be to the point
        raise PlanBlocked(
            f'{table.schema_name}.{table.name} is partitioned already. To refill it from a backup, set restore_from = "backup".'
        )
    columns = catalog.columns_of(session, found)
    by_name = {column.name: column for column in columns}
    if parameters.key not in by_name:
        raise BadInput(f"{parameters.key} is not a column of {table.schema_name}.{table.name}: it has {', '.join(by_name)}.")
    key = by_name[parameters.key]
    if parameters.restore_from == "backup":
        return Draft(database, repair.decide(session, found, parameters, row, table, key, database.name), given=parameters)
    if parameters.references:
        raise BadInput('references is for a repair, where keys are lost: leave it out, or set restore_from = "backup".')
    division = divide(session, parameters, table, key)
    version = session.connection.info.server_version // 10000
    leaves = [partition.name for partition in division.partitions]
    indexes = catalog.indexes_of(session, table, key.name, leaves, version)
    primary = next((index for index in indexes if index.primary), None)
    views = session.rows("catalog.views", oid=found)
    outgoing = session.rows("catalog.outgoing", oid=found)
    references = catalog.references_of(session, table, key.name)
    to_itself = (table.schema_name, table.name)
    carried = catalog.carried_of(session, table, indexes)
    held = {(r["referenced_schema"], r["referenced_table"]) for r in outgoing} | {each.holder for each in carried if each.holder}
    backup = parameters.backup or fit(f"{table.name}_backup")
    if len(backup.encode()) > 63:
        raise BadInput(f"{backup!r} cannot be the backup's name: give it 1 to 63 bytes.")
    plan = Plan(
        server_version=version, table=table, fingerprint=catalog.fingerprint(session, found),
        key=key.name, key_type=key.type, key_nullable=not key.not_null, partition_by=parameters.partition_by,
        partitions=division.partitions, columns=columns,
        takes_any_value=parameters.partition_by == "hash" or any(each.bound == "DEFAULT" for each in division.partitions),
        primary_key=primary.columns if primary else (),
        key_equals=tuple(row["equals"] for row in session.rows("catalog.key_equals", oid=found)),
        key_types=tuple(str(session.value("catalog.base_type", oid=found, key=each)) for each in (primary.columns if primary else ())),
        indexes=indexes, checks=catalog.checks_of(session, found),
        outgoing=tuple(map(_named, outgoing)), referenced_tables=tuple(sorted(held - {to_itself})),
        references=tuple(each for each in references if (each.schema_name, each.table) != to_itself),
        selves=tuple(each for each in references if (each.schema_name, each.table) == to_itself),
        views=tuple(Named(name=f"{v['schema']}.{v['name']}", definition=v["definition"].rstrip(";")) for v in views if not v["materialized"]),
        view_tables=tuple((v["schema"], v["name"]) for v in views if not v["materialized"]),
        matviews=matviews.of(session, found), carried=carried, frequent_value=division.frequent,
        null_value=None if parameters.null_value is None else as_key(session, key, parameters.null_value), unique=parameters.unique,
        guards=catalog.guards_of(session, found, key.name) if parameters.unique == "global" else (),
        guard_schema=catalog.guard_schema(session, table),
        legacy_inserts=parameters.legacy_inserts, backup=backup, backup_method=parameters.backup_method,
        restore_from=parameters.restore_from, findings=(),
    )  # fmt: skip
    judged = findings.worst_first([*findings.judge(session, plan, row, division), *advice.given(session, plan)])
    where = f"{plan.full_name}.{plan.key}"  # a value without a partition may come of bounds that cannot be
    if all(each.level != "blocker" or each.object == where for each in judged):
        judged = findings.worst_first([*partition.rehearse(session, plan), *judged])
    return Draft(database, plan.model_copy(update={"findings": judged}), counted=division.counted, given=parameters)


def _named(row: dict[str, Any]) -> Named:
    return Named.model_validate({name: row[name] for name in ("name", "definition", "validated", "comment")})
