"""01: a backup that is proved: a table copied in one snapshot, or a pg_dump archive restored and compared."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook import changes, embedded, partition, postgres
from runbook.archive import sha256
from runbook.database import Database
from runbook.errors import BadInput, NotEqual, PromiseBroken, ServerUnavailable
from runbook.ledger import Action, Evidence, Run, recorded
from runbook.session import Session
from runbook.sheet import Sheet
from runbook.statements import spelled, statement
from runbook.words import counted

Sums = list[dict[str, Any]]
HEAD_LINES = 40  # of a script: its settings are among them


def script(run: Run) -> changes.Statements:
    """The backup table, which nobody but its owner may read."""
    yield statement("backup.copy", **_names(run, "backup"))
    yield from partition.revoke(run.names["backup"], run.plan.table.strangers)
    yield statement("ddl.own", table=run.names["backup"], owner=run.names["owner"])
    yield statement("ddl.comment", table=run.names["backup"], comment=_comment(run))


def _comment(run: Run) -> str:
    return f"Backup of {run.plan.full_name}, made before it was partitioned"


def sums(run: Run) -> sql.Composed:
    """The query of what the backup holds."""
    return statement("backup.sums", **_names(run, "backup"))


def preview(run: Run) -> Sheet:
    """The statements that make the backup, and those that prove it."""
    return Sheet([*script(run), *(statement("backup.sums", **_names(run, table)) for table in ("source", "backup"))])


@recorded("backup", "make")
def make(action: Action) -> Evidence:
    """Back the table up in one snapshot and prove the backup equal to it, value by value of the key.

    An existing backup is never overwritten: BadInput. Raises NotEqual when the proof fails; nothing is kept then.
    """
    run = action.run
    method = _as_table if run.plan.backup_method == "table" else _as_dump
    return method(run, action)


def _as_table(run: Run, action: Any) -> Evidence:
    session = action.session
    if session.value("catalog.there", name=spelled(run.names["backup"])):
        raise BadInput(f"A backup {run.plan.backup} exists, and is never overwritten: rename or drop it, or plan another name.")
    alone = session.alone
    session.give_way()
    with session.transaction("REPEATABLE READ", lock_timeout="5s"):
        session.run("changes.hold", origin=run.names["source"])
        snapshot = session.value("restore.export_snapshot")
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(_sums_at, run, snapshot) if alone else None
            session.connection.execute("SET LOCAL default_tablespace TO DEFAULT")  # a backup may well lie elsewhere
            session.run_all(script(run))
            there = beside.result() if beside else session.rows("backup.sums", **_names(run, "source"))
        here = session.rows("backup.sums", **_names(run, "backup"))
        _require_equal(run.plan.backup, there, here)
        rows = sum(row["rows"] for row in here)
        each_value = f", for every {run.plan.key}" if run.plan.partition_by == "list" else ""
        return action.finish(  # type: ignore[no-any-return]
            f"{run.plan.backup} holds the same {counted(rows, 'row')} as {run.plan.full_name}, by count and hash{each_value}.",
            rows,
            sums=here,
            **session.row("backup.measure", backup_text=spelled(run.names["backup"])),
        )


def _as_dump(run: Run, action: Any) -> Evidence:
    session: Session = action.session
    folder = postgres.home() / "dumps"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", run.plan.full_name)
    archive = folder / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.dump"
    with session.transaction("REPEATABLE READ", lock_timeout="5s"):
        session.run("changes.hold", origin=run.names["source"])
        snapshot = session.value("restore.export_snapshot")
        table = run.plan.source.as_string(None)
        _dump(run.database, "--format=custom", f"--snapshot={snapshot}", f"--table={table}", f"--file={archive}")
        there = session.rows("backup.sums", **_names(run, "source"))
    digest = sha256(archive)
    here = _restored(run, session, archive)
    _require_equal(archive.name, there, here)
    rows = sum(row["rows"] for row in here)
    return action.finish(  # type: ignore[no-any-return]
        f"{archive} (sha256 {digest[:16]}…) was restored into a scratch database and holds {counted(rows, 'row')}, the same as {run.plan.full_name}.",
        rows, sums=here, archive=str(archive), sha256=digest, bytes=archive.stat().st_size,
    )  # fmt: skip


def _restored(run: Run, session: Session, archive: Path) -> Sums:
    """What the archive holds once it is restored: beside the original, or on the embedded server without the right to that."""
    allowed = session.value(sql.SQL("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user").format())
    scratch = sql.Identifier(f"runbook_scratch_{run.migration}")
    host = run.database if allowed else Database("embedded", embedded.serve(), embedded=True)
    with host.session("scratch") as other:
        other.run("backup.drop_scratch", scratch=scratch)
        other.run("backup.create_scratch", scratch=scratch)
        try:
            target = Database("scratch", make_conninfo(host.conninfo, dbname=scratch.as_string(None).strip('"')), host.embedded)
            definitions = archive.with_suffix(".schema")
            _dump(
                run.database,
                "--format=custom",
                "--schema-only",
                "--section=pre-data",
                "--no-owner",
                "--no-privileges",
                f"--file={definitions}",
            )
            for source, only in ((definitions, "--schema-only"), (archive, "--data-only")):
                _restore(target, only, source)
            definitions.unlink()
            with target.session("scratch") as restored:
                return restored.rows("backup.sums", **_names(run, "source"))
        finally:
            other.run("backup.drop_scratch", scratch=scratch)


def _restore(target: Database, only: str, archive: Path) -> None:
    """As a script that psql runs: pg_restore itself begins with a setting (transaction_timeout, from its version 17 on) that an
    older server refuses."""
    path = client("pg_restore", target)
    written = [str(path), only, "--no-owner", "--no-privileges", "--file=-", str(archive)]
    read = [
        str(path.with_name("psql")),
        "--no-psqlrc",
        "--quiet",
        "--set=ON_ERROR_STOP=1",
        f"--dbname={make_conninfo(target.conninfo)}",
    ]
    environment = postgres.environment() if target.embedded else dict(os.environ)
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(written, stdout=subprocess.PIPE, stderr=said) as restore,
        subprocess.Popen(read, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, env=environment) as psql,
    ):
        assert restore.stdout and psql.stdin
        with suppress(BrokenPipeError), psql.stdin:
            psql.stdin.write(b"SET default_transaction_read_only = off; SET array_nulls = on;\n")  # whatever the role's are
            for line in itertools.islice(restore.stdout, HEAD_LINES):
                psql.stdin.write(b"" if line.startswith(b"SET transaction_timeout") else line)
            shutil.copyfileobj(restore.stdout, psql.stdin, 1 << 20)
        restore.stdout.close()
        if psql.wait() or restore.wait():
            said.seek(0)
            raise ServerUnavailable(
                f"pg_restore failed on {target.name}: {' '.join(said.read().decode(errors='replace').split())[-600:]}"
            )


def _dump(database: Database, *arguments: str) -> None:
    """Run pg_dump against the database; the password stays in libpq's own places."""
    environment = postgres.environment() if database.embedded else dict(os.environ)
    conninfo = make_conninfo(database.conninfo)
    path = client("pg_dump", database)
    done = subprocess.run(
        [str(path), *arguments, f"--dbname={conninfo}"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ServerUnavailable(f"pg_dump failed on {database.name}: {' '.join(done.stderr.split())[-600:]}")


def client(program: str, database: Database) -> Path:
    """The newest `program` on PATH that fits the server, else the one that comes with the package.

    That one has no SSL: a database that is reached by it, or asks for it, is refused with a sentence.
    """
    with database.connect("version") as connection:
        server, secured = connection.info.server_version // 10000, connection.pgconn.ssl_in_use
    found = shutil.which(program)
    if found:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"(\d+)(\.|\s|$)", said)
        if version and int(version[1]) >= server:
            return Path(found)
    if secured:
        raise BadInput(
            f"{program} {server} or newer is not on PATH, and the one that comes with the runbook has no SSL: install PostgreSQL's client."
        )
    return postgres.binaries(program)


def _sums_at(run: Run, snapshot: str) -> Sums:
    with run.database.session("backup") as session, session.transaction("REPEATABLE READ"):
        session.run(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        return session.rows("backup.sums", **_names(run, "source"))


def _names(run: Run, table: str) -> dict[str, sql.Composable]:
    # Generated columns too: what is kept is the row as it was seen.
    plain = run.plan.model_copy(update={"null_value": None})
    every = sql.SQL(", ").join(sql.Identifier("s", column.name) for column in run.plan.columns)
    return {
        **run.names,
        "table": run.names[table],
        "all_columns": every,
        "s_plain_hash": plain.hashed("s"),
        # By range or by hash nearly every row has a value of its own.
        "value": sql.SQL("s.{}::text" if plain.partition_by == "list" else "'all'").format(sql.Identifier(plain.key)),
    }


def _require_equal(backup: str, there: Sums, here: Sums) -> None:
    if there != here:
        ours, theirs = ({each["value"]: (each["rows"], each["hash"]) for each in sums} for sums in (here, there))
        differing = [value for value in {**theirs, **ours} if ours.get(value) != theirs.get(value)]
        said = ", ".join(
            f"{value} ({counted(ours.get(value, (0,))[0], 'row')}, not {theirs.get(value, (0,))[0]:,})"
            for value in differing[:10]
        )
        more = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
        raise NotEqual(f"{backup} is not what the table was in {said}{more}. It was not kept; run 01_backup again.")


def counts(run: Run) -> pd.DataFrame:
    """Rows and hash sum for every value of the key, as they were proved."""
    evidence = run.finished("backup", "make")
    return pd.DataFrame(evidence.facts["sums"] if evidence else [], columns=["value", "rows", "hash"])


def check(run: Run) -> Evidence:
    """Raises unless the backup was proved and is there; 06 computes its sums again."""
    with run.action("backup", "check") as action:
        made = run.finished("backup", "make")
        if made is None or (gone(run, action.session) and not run.swapped):
            for done in ("make", "check"):
                action.session.run("ledger.withdraw", migration=run.migration, step="backup", action=done)
            raise PromiseBroken(f"There is no proved backup of {run.plan.full_name}: run 01_backup again, and it is made anew.")
        return action.evidence or action.finish(
            f"The backup of {run.plan.full_name} is there, and proved: {counted(made.rows or 0, 'row')}.", made.rows
        )


def gone(run: Run, session: Session) -> bool:
    """Whether the backup's table was made, and is there no more, whoever's has its name now; whether an archive is, only the machine
    that has it can tell. In a restored database its comment tells that it is the one."""
    made = run.finished("backup", "make")
    if made is None or "archive" in made.facts:
        return False
    names = {"backup_text": spelled(run.names["backup"]), "oid": made.facts.get("oid"), "comment": _comment(run)}
    return not session.value("backup.ours", **names)


def as_proved(run: Run) -> sql.Composed:
    """Asks whether the backup's rows and their hash sum are those of its evidence."""
    return statement("backup.as_proved", **_names(run, "backup"))


def still(run: Run, session: Session, made: Evidence) -> None:
    """Raises NotEqual when the backup is no longer what its evidence says."""
    if "archive" in made.facts:
        if sha256(Path(made.facts["archive"])) != made.facts["sha256"]:
            raise NotEqual(f"{made.facts['archive']} is not the archive that was proved: its sha256 differs.")
    elif session.rows("backup.sums", **_names(run, "backup")) != made.facts["sums"]:
        raise NotEqual(f"{run.plan.backup} is no longer what was proved: its rows differ from the evidence in the ledger.")
