"""06: every promise asked of the database itself; what was seen is kept, and one broken promise fails the step."""

from __future__ import annotations

import html
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import psycopg

from runbook import backup, changes, postgres, references, unique
from runbook import compare as comparing
from runbook.errors import BadInput, NotEqual, PromiseBroken
from runbook.growth import require_partitions
from runbook.ledger import Evidence, Run
from runbook.session import Session
from runbook.statements import Value, spelled, statement, trusted
from runbook.words import counted

PASS, FAIL, NOT_TRIED = "pass", "fail", "not tried"
COLOURS = {PASS: "#007a55", FAIL: "#c2410c", NOT_TRIED: "#56606a"}
CATALOG = ("columns", "checks", "outgoing", "incoming", "carried", "views")


@dataclass(frozen=True)
class Promise:
    """What was promised, the SQL that asked, what was seen, and whether it holds: pass, fail or not tried."""

    promise: str
    sql: str
    seen: str
    verdict: str
    tried: bool = False  # on real rows, and rolled back


@dataclass
class Look:
    """A part of the verification under way, and the promises that it has judged."""

    session: Session
    names: dict[str, Value]
    tries: bool = False
    promises: list[Promise] = field(default_factory=list)

    def ask(self, query: str, /, **names: Value) -> list[dict[str, Any]]:
        """The rows of a statement; those that answer for a promise (`ok`, NULL for not tried) are noted."""
        cursor = self.session.run(query, **{**self.names, **names})
        rows = cursor.fetchall() if cursor.description else []
        for row in rows:
            if row.get("promise"):
                self.judge(row["promise"], row["sql"] if "sql" in row else self.text(query, **names), row["seen"], row["ok"])
        return rows

    def text(self, query: str, /, **names: Value) -> str:
        """The statement with its names filled in."""
        return statement(query, **{**self.names, **names}).as_string(self.session.connection)

    def judge(self, promise: str, asked: str | None, seen: str, ok: bool | None) -> None:
        """Note what became of a promise; None is "not tried"."""
        self.promises.append(Promise(promise, asked or "", seen, NOT_TRIED if ok is None else PASS if ok else FAIL, self.tries))

    def judge_by(self, promise: str, asked: str, prove: Callable[[], str]) -> None:
        """Note what `prove` says, or the sentence with which it fails."""
        try:
            self.judge(promise, asked, prove(), True)
        except (changes.Rewritten, FileNotFoundError) as reason:  # truncated since; or an archive on another machine
            self.judge(promise, asked, str(reason), None)
        except (NotEqual, psycopg.errors.UndefinedTable) as broken:
            self.judge(promise, asked, str(broken).splitlines()[0], False)

    @property
    def frame(self) -> pd.DataFrame:
        return pd.DataFrame([asdict(each) for each in self.promises], columns=["promise", "seen", "verdict"])


# What the server says of a column, a table or a value that is not what the plan has.
CHANGED = (
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.InvalidTextRepresentation,
)


@contextmanager
def _look(run: Run, part: str) -> Iterator[Look]:
    with run.action("verify", part, again=True) as action:
        names: dict[str, Value] = {**run.names, "root": spelled(run.plan.source), "d_hash": run.plan.hashed("d")}
        names |= {each: statement(f"verify.{each}", **run.names) for each in ("unique_keys", "added")}
        names["known"] = statement("verify.known", **names)
        names["grown"] = statement("verify.grown", **names)
        require_partitions(run, action.session, action.session.value("verify.oid", **names))
        look = Look(action.session, names, part == "crud")
        try:
            yield look
        except CHANGED as missing:
            raise PromiseBroken(
                f"{run.plan.full_name} is not what it was planned to be ({missing.diag.message_primary}): somebody altered it, or what belongs"
                " to it, after the cut-over; take that back, or go by 08_monitor from now on."
            ) from None
        broken = sum(each.verdict == FAIL for each in look.promises)
        count = counted(len(look.promises), "promise")
        sentence = f"{count} of {part} looked at, {broken} broken." if look.promises else f"The {part} was measured."
        action.finish(sentence, len(look.promises), promises=[asdict(each) for each in look.promises])


class Transcript(str):
    """What psql was told and what it answered, as a terminal shows it."""

    __repr__ = str.__str__


def commands(run: Run) -> Transcript:
    """The four commands by which the migration was verified when it was done by hand, run by psql."""
    promise = "psql shows the table, its rows, its plan and its keys"
    with _look(run, "commands") as look:
        text = look.ask("verify.commands")[0]["text"] + "\n"
        try:
            path = backup.client("psql", run.database)
        except BadInput as missing:
            look.judge(promise, text, str(missing), None)
            return Transcript(text)
        environment = (postgres.environment() if run.database.embedded else dict(os.environ)) | {
            "PGCLIENTENCODING": "UTF8",
            "PGTZ": "UTC",
        }
        options = ["-X", "--echo-all", "--set=ON_ERROR_STOP=1", "--pset=pager=off", f"--dbname={run.database.conninfo}"]
        done = subprocess.run([path, *options], input=text, env=environment, capture_output=True, encoding="utf-8", check=False)
        said = " ".join(done.stderr.split()) or f"they ran, and printed {counted(len(done.stdout.splitlines()), 'line')}"
        look.judge(promise, text, said, done.returncode == 0)
    return Transcript(done.stdout + done.stderr)


def tree(run: Run) -> pd.DataFrame:
    """The root and its partitions, with bounds and sizes in bytes."""
    return run.frame("verify.tree", root=spelled(run.plan.source))


def structure(run: Run) -> pd.DataFrame:
    """Partitions, columns, constraints, indexes and all that was carried over, against the plan."""
    with _look(run, "structure") as look, look.session.transaction(), look.session.qualified():
        oid, dropped = look.ask("verify.oid")[0]["oid"], references.dropped(run, look.session)
        look.names |= {f"{name}_now": statement(f"catalog.{name}", oid=oid, key=run.plan.key) for name in CATALOG}
        look.names["tree"] = statement("verify.tree", **look.names)
        look.names["dropped"] = [f"{each.schema_name}.{each.table}" for each in dropped]
        for part in ("partitions", "columns", "indexes", "references", "constraints", "carried"):
            look.ask(f"verify.{part}")
        for reference in [*references.added(run), *run.plan.own_roles] if run.plan.restore_from == "source" else []:
            if reference in dropped:
                continue
            kept = run.plan.legacy_inserts == "fill" and run.state != "finished"
            triggers = list(references.fill_triggers(reference)) if kept else []
            look.ask("verify.filled", **references.names(run, reference), role_text=reference.role_column, triggers=triggers)
        for guard in run.plan.guards:
            look.ask("verify.guard", **{**look.names, **unique.names(run.plan, guard, run.staging), "name_text": guard.index})
        reason = _no_way_back(run)
        if run.plan.restore_from == "source":
            look.ask("verify.storage")
            look.ask("verify.positions", reason=reason, retired_text=spelled(run.names["retired"]))
        look.ask("verify.logged", reason=reason)
    return look.frame


def _no_way_back(run: Run) -> str | None:
    if run.plan.restore_from == "backup":
        return "there is no retired table: this plan repairs a table that was partitioned elsewhere"
    return "91_finish ended the way back and dropped the retired table" if run.state == "finished" else None


def distribution(run: Run) -> pd.DataFrame:
    """Rows per partition, now and when the plan was made; every row must lie where its key belongs."""
    with _look(run, "distribution") as look:
        rows = []
        with look.session.qualified():  # a bound's operators may be an extension's
            bounds = look.session.rows("verify.bounds", **look.names)
        for each in bounds:
            leaf, condition = (run.plan.table.schema_name, each["name"]), trusted(each["bound"])
            rows += look.ask("verify.bounded", leaf_name=each["name"], leaf=leaf, condition=condition)
    return pd.DataFrame(rows, columns=["name", "bound", "rows", "before"])


def pruning(run: Run) -> pd.DataFrame:
    """Which partitions a query by the key reads, one or the promise is broken; and the look-ups that cannot prune."""
    with _look(run, "pruning") as look, look.session.transaction():
        look.ask("verify.create_plans")
        found, leaves = look.ask("verify.plans"), look.session.value("verify.leaves", **look.names)
    return pd.DataFrame(
        {
            "look_up": [row["look_up"] for row in found],
            "reads": ["not tried" if row["reads"] is None else ", ".join(row["reads"]) for row in found],
            "partitions": ["" if row["reads"] is None else len(row["reads"]) for row in found],
            "of": leaves,
        }
    )


def compare(run: Run) -> pd.DataFrame:
    """The result against the retired table, every row; the backup against its own evidence, and the writes since."""
    with _look(run, "compare") as look:
        look.session.give_way()
        promise, seen = "Every row equals the retired table's, to the byte", []

        def rows() -> str:
            seen.append(comparing.exactly(run, look.session, changes.BACK, apart))
            kept = ", ".join(each.as_string().replace('"', "") for each in apart)
            return seen[0].sentence + (f" What {kept} took along, detached since, is left out." if apart else "")

        if reason := _no_way_back(run):
            look.judge(promise, "", reason, None)
        else:
            apart = comparing.detached(run, look.session)
            look.judge_by(promise, comparing.question(run, look.session, apart).as_string(look.session.connection), rows)
        if run.plan.restore_from == "backup":
            look.ask("verify.missing_of_backup")
        else:
            proof = backup.as_proved(run).as_string(look.session.connection)
            query = proof if run.plan.backup_method == "table" else ""
            look.judge_by("The backup is what was proved when it was made", query, lambda: _against_backup(run, look, seen))
    return look.frame


def _against_backup(run: Run, look: Look, seen: list[comparing.Comparison]) -> str:
    made = run.finished("backup", "make")
    if made is None:
        raise NotEqual(f"There is no backup of {run.plan.full_name}.")
    if backup.gone(run, look.session):
        if run.state == "finished":
            raise FileNotFoundError(f"{run.plan.backup} was dropped, by 91_finish or after it")
        raise NotEqual(f"{run.plan.backup} is gone: somebody dropped it")
    backup.still(run, look.session, made)
    if "archive" in made.facts:
        return f"{made.facts['archive']} has the sha256 {made.facts['sha256']}; an archive is not compared with the result"
    if seen and not seen[0].waiting and run.plan.null_value is None:  # all rows of the result were summed a moment ago
        same = comparing.total(seen[0].sums.values()) == comparing.total(made.facts["sums"])
    else:
        same = look.ask("verify.same_as_backup")[0]["same"]
    since = "no row differs from the result" if same else look.ask("verify.writes_since")[0]["since"]
    return f"{counted(made.rows or 0, 'row')}, as its evidence says; {since}"


def crud(run: Run) -> pd.DataFrame:
    """Insert, change, delete and what must be refused, tried on real rows in one transaction that is rolled back."""
    with _look(run, "crud") as look, look.session.transaction(lock_timeout="300ms", row_security="on"):
        for query in ("verify.all_immediate", "verify.create_trials", "verify.trials"):
            look.ask(query)
        raise psycopg.Rollback
    return look.frame


def latency(run: Run) -> pd.DataFrame:
    """Median milliseconds of look-ups by the key and by each unique key, retired table and result in turns."""
    percent = min(100.0, 800_000 / max(1, sum(partition.rows for partition in run.plan.partitions)))
    with _look(run, "latency") as look, look.session.transaction():
        look.ask("verify.create_latencies", percent=percent, retired=None if _no_way_back(run) else spelled(run.names["retired"]))
        return pd.DataFrame(look.ask("verify.latencies"), columns=["look_up", "retired_ms", "result_ms", "times"])


PARTS = {each.__name__: each for each in (commands, structure, distribution, pruning, compare, crud)}


def seen(run: Run) -> list[Promise]:
    """Every promise as it was last seen, in whatever kernel; a part that nobody looked at is not tried."""
    nobody = {"promises": [{"sql": "", "seen": "nobody has looked yet: run 06_verify", "verdict": NOT_TRIED}]}
    looks = {row["part"]: row["evidence"] for row in run.frame("verify.looks").to_dict("records")}
    return [Promise(**{"promise": part, **each}) for part in PARTS for each in {**nobody, **looks.get(part, {})}["promises"]]


def promises(run: Run) -> Any:
    """The table at the end: every promise, the SQL that proved it, what was seen, pass, fail or not tried."""
    found = pd.DataFrame([asdict(each) for each in seen(run)], columns=["promise", "sql", "seen", "verdict"])
    styled = found.style.hide(axis="index").format(escape="html")
    styled = styled.map(lambda _: "text-align: left; vertical-align: top; white-space: pre-wrap")
    styled = styled.map(lambda verdict: f"color: {COLOURS[verdict]}; font-weight: bold", subset=["verdict"])
    box = "<details><summary style='white-space: nowrap'>SQL</summary><pre>{}</pre></details>"
    return styled.format(lambda text: box.format(html.escape(str(text))) if text else "", subset=["sql"])


def check(run: Run) -> Evidence:
    """Raises PromiseBroken, naming them, unless every promise holds; looks itself where nobody looked since the last check."""
    fresh = {row["part"] for row in run.frame("verify.looks").to_dict("records") if row["fresh"]}
    for part, look in PARTS.items():
        if part not in fresh:
            look(run)
    with run.action("verify", "check", again=True) as action:
        found = seen(run)
        broken = [f"{each.promise} ({each.seen})" for each in found if each.verdict == FAIL]
        if broken:
            action.session.run("ledger.withdraw", migration=run.migration, step="verify", action="check")
            raise PromiseBroken(f"{run.plan.full_name} breaks {len(broken)} of {len(found)} promises: {'; '.join(broken)}")
        held = sum(each.verdict == PASS for each in found)
        return action.finish(
            f"{counted(held, 'promise was', 'promises were')} put to the test and {'holds' if held == 1 else 'hold'}; {len(found) - held} could not be tried.",
            held,
        )
