"""The record on disk: a folder and a manifest for each run, chained to the run before."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from runbook.provenance import LIBRARIES, checkout, library, os_user, statements
from runbook.redaction import known_secrets, passwords, redact, redacted

if TYPE_CHECKING:
    from runbook.engine import Executed

STATEMENTS = ".statements.jsonl"
BEGUN = ".begun.part"
PAPERS = {"evidence.json", "certificate.html", "promises.xml", "promises.md"}  # which are there before the manifest names them
HALF = {BEGUN, ".HEAD.part", ".index.html.part", ".manifest.json.part"}  # what a SIGKILL leaves of a file that was being written


def write_whole(path: Path, text: str) -> None:
    """Replaces the file in one move: a reader finds the old or the new one, and so does who comes after a crash."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class Entry(BaseModel):
    """A run, as another one names it."""

    run: str
    manifest: str


class Step(BaseModel):
    """What was done with one notebook; it says more."""

    notebook: str
    state: str


class Manifest(BaseModel):
    """What every manifest has; it says more."""

    run: str
    sealed: bool
    ended: str
    steps: list[Step]
    files: dict[str, str]
    previous: Entry | None
    broken_off: list[Entry]
    rewritten: dict[str, str] = {}


class Run:
    """One run's folder under `runs`, and its manifest, which is true on disk after every step."""

    def __init__(self, folder: Path, manifest: dict[str, Any], secrets: frozenset[str]) -> None:
        self.folder, self.manifest, self.secrets = folder, manifest, secrets
        self._held = os.open(folder, os.O_RDONLY)  # the lock dies with us, and so tells a broken run from a live one
        fcntl.flock(self._held, fcntl.LOCK_EX)

    @classmethod
    def begin(cls, runs: Path, table: str, parameters: Mapping[str, Any], *, secrets: Iterable[str] = (), **facts: Any) -> Run:
        """A new folder with its first manifest.

        `facts`, here and later, go into the manifest as they become known: plan_hash, server, database_user, result, …
        """
        hidden = frozenset([*secrets, *known_secrets(), *passwords(parameters)])
        now = datetime.now(UTC)
        plain = unicodedata.normalize("NFKD", table).encode("ascii", "ignore").decode()
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", plain)[:60].strip("._-") or "table"
        manifest = {
            "run": "", "table": redact(table, hidden), "state": "running", "sealed": False,
            "begun": now.isoformat(timespec="milliseconds"), "ended": "",
            "parameters": redacted(json.loads(json.dumps(dict(parameters), default=str)), hidden),
            "operator": os_user(), "host": socket.gethostname(),
            "plan_hash": "", "server": "", "target": "", "database_user": "", "approved_by": "", "result": "",
            "versions": {"python": platform.python_version()}
            | {name: library(name) for name in ("partition-runbook", *LIBRARIES)},
            "sql": statements(), "git": {"runbook": checkout(Path(__file__)), "working_folder": checkout(Path.cwd())},
            "steps": [], "files": {}, "previous": None, "broken_off": [],
        }  # fmt: skip
        runs.mkdir(parents=True, exist_ok=True)
        with _alone(runs):
            told = {entry["run"] for _, other, _ in manifests(runs) for entry in other["broken_off"]}
            for folder, other, digest in manifests(runs):
                if not other["sealed"] and folder.name not in told and not in_progress(folder):
                    left = {
                        file.relative_to(folder).as_posix(): "" if file.is_symlink() else sha256(file) for file in files(folder)
                    }
                    manifest["broken_off"].append({"run": folder.name, "manifest": digest, "files": left})
            for number in count(1):
                folder = runs / (f"{now:%Y%m%dT%H%M%SZ}-{plain}" + (f"-{number}" if number > 1 else ""))
                if not folder.exists():
                    break
            shutil.rmtree(runs / BEGUN, ignore_errors=True)  # of a run that was killed before it had a manifest
            (runs / BEGUN).mkdir()
            run = cls(runs / BEGUN, manifest | {"run": folder.name}, hidden)
            run._write(facts)
            run.folder = (runs / BEGUN).rename(folder)  # a folder of a run has a manifest, whatever happens
        return run

    def start(self, notebook: str, begun: str = "") -> Path:
        """Notes that this notebook runs now (by hand: is about to be saved again, the cells that it shows `begun` then); returns
        where its record belongs."""
        self._step(notebook).update({"notebook": notebook, "state": "running", "begun": begun or _now()})
        for file in of(notebook, self.folder):
            self.manifest["files"].pop(file.name, None)
        self._write()
        return self.folder / notebook

    def add(self, executed: Executed, *, state: str = "", rendered: bool = False, **facts: Any) -> None:
        """The outcome of a notebook that was started, with its HTML (`rendered` already, or now) and its statements beside it."""
        from runbook.pages import render_html

        step = self._step(executed.notebook.name)
        outcome = {
            "failed_cell": executed.failed_cell,
            "error_name": executed.error_name,
            "error": redact(executed.error, self.secrets),
        }
        before = {name: step.get(name) for name in outcome}
        if step.get("error_name") and before != outcome:  # by hand: what failed first, and was run again
            step.setdefault("earlier", []).append(before)
        step |= {
            "state": state or ("completed" if executed.failed_cell is None else "failed"),
            "seconds": round(executed.seconds, 3),
        } | outcome
        if not rendered:
            render_html(executed.notebook)
        files = of(executed.notebook.name, self.folder)
        if self.manifest.get("by_hand"):  # the kernel lives on, and with it its statements
            files = [file for file in files if not file.name.endswith(STATEMENTS)]
        self._hash(*files)
        self._write(facts)

    def keep(self, *files: Path) -> None:
        """Notes files that are in the folder, or are there anew."""
        self._hash(*files)
        self._write()

    def _step(self, notebook: str) -> dict[str, Any]:
        steps: list[dict[str, Any]] = self.manifest["steps"]
        if not (found := next((step for step in steps if step["notebook"] == notebook), None)):
            steps.append(found := {})
        return found

    def seal(self, **facts: Any) -> str:
        """Ends the run, well or not, and chains it to the run sealed before; returns its manifest's sha256, the head."""
        from runbook.pages import index, unlinked

        runs, states = self.folder.parent, {step["state"] for step in self.manifest["steps"]}
        state = "failed"
        if self.manifest.get("by_hand") and not {"failed", "running"} & states:
            state = "unfinished"
        if states == {"completed"} and (self.manifest.get("by_hand") or facts.get("result", "completed") == "completed"):
            state = "completed"
        if pages := unlinked(self.folder):  # whoever comes after a kill between two of them knows both
            self.manifest["rewritten"] = {page.name: hashlib.sha256(text.encode()).hexdigest() for page, text in pages.items()}
            self._write()
            for page, text in pages.items():
                write_whole(page, text)
            del self.manifest["rewritten"]
        self.manifest |= {"state": state, "sealed": True}
        self._hash(*files(self.folder))
        with _alone(runs):
            self.manifest |= {"previous": end(runs), "ended": _now()}
            head = self._write(facts)
            page = index(runs)
            write_whole(runs / "HEAD", f"{head}  {self.folder.name}/manifest.json\n{sha256(page)}  {page.name}\n")
            os.close(self._held)
        return head

    def _hash(self, *files: Path) -> None:
        folder = self.folder.resolve()
        self.manifest["files"] |= {file.resolve().relative_to(folder).as_posix(): sha256(file) for file in files}

    def _write(self, facts: Mapping[str, Any] | None = None) -> str:
        self.manifest |= redacted(facts or {}, self.secrets)
        write_whole(self.folder / "manifest.json", json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n")
        return sha256(self.folder / "manifest.json")


def manifests(runs: Path, said: list[str] | None = None) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Each run's folder, manifest and the manifest's sha256; what is none of these is said."""
    said = [] if said is None else said
    for entry in sorted(runs.iterdir()):
        if entry.name in HALF:
            if entry.is_symlink() or entry.is_dir() != (entry.name == BEGUN):
                said.append(f"{entry.name} was added.")
            elif left := next(os.walk(entry), None):
                more = {*left[1], *left[2]} - {"manifest.json", ".manifest.json.part"}
                said += [f"{entry.name}/{name} was added." for name in sorted(more)]
            continue
        try:
            manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
            Manifest.model_validate(manifest, strict=True)
            if linked := [path for path in (entry, entry / "manifest.json") if path.is_symlink()]:  # it may be another tomorrow
                said.append(f"{linked[0].relative_to(runs).as_posix()} was replaced by a link.")
                continue
            yield entry, manifest, sha256(entry / "manifest.json")
        except FileNotFoundError:
            said.append(f"{entry.name} has no manifest.json: it was removed, or the folder was added.")
        except NotADirectoryError:
            if entry.name not in ("HEAD", "index.html"):
                said.append(f"{entry.name} belongs to no run: it was added.")
            elif entry.is_symlink():
                said.append(f"{entry.name} was replaced by a link.")
        except (ValueError, IsADirectoryError):
            said.append(f"{entry.name}/manifest.json was changed: it cannot be read.")


def in_progress(folder: Path) -> bool:
    """Whether the process that makes this run's record still lives, on this machine."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(held)
    return False


def head_of(runs: Path) -> re.Match[str] | None:
    head = (runs / "HEAD").read_text(encoding="utf-8", errors="replace") if (runs / "HEAD").is_file() else ""
    return re.fullmatch(r"([0-9a-f]{64})  (.+)/manifest\.json\n([0-9a-f]{64})  index\.html\n", head)


def list_of_runs(runs: Path) -> str:
    """The sha256 of index.html as the run that was sealed last left it; empty where that is not known."""
    match, last = head_of(runs), end(runs)
    return match[3] if match and last and match[2] == last["run"] else ""


def end(runs: Path) -> dict[str, str] | None:
    """The run that was sealed last, as HEAD names it: its lines are what `sha256sum -c` reads."""
    match = head_of(runs)
    end = {"run": match[2], "manifest": match[1]} if match else None
    # A run that was killed after its last manifest and before HEAD: it follows the one that HEAD names.
    known = list(manifests(runs)) if match or not (runs / "HEAD").exists() else []
    alone = sum(manifest["sealed"] for _, manifest, _ in known) == 1
    for folder, manifest, digest in sorted(known, key=lambda each: str(each[1]["ended"])):
        if manifest["sealed"] and manifest["run"] == folder.name and manifest["previous"] == end and (end or alone):
            end = {"run": folder.name, "manifest": digest}
    return end


@contextlib.contextmanager
def _alone(runs: Path) -> Iterator[None]:
    held = os.open(runs, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def of(notebook: str, folder: Path) -> list[Path]:
    """What belongs to one notebook: itself, its page, its statements, and what is being written of them."""
    return [file for file in folder.iterdir() if file.name.removeprefix(".").split(".")[0] == Path(notebook).stem]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / "manifest.json")


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
