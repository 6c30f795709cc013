"""The audit of the record: whatever was changed, removed, added or re-ordered in it is said."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from runbook.archive import HALF, PAPERS, STATEMENTS, end, files, head_of, list_of_runs, manifests, of, sha256
from runbook.database import target
from runbook.errors import BadInput
from runbook.ledger import kept
from runbook.provenance import library


def audit(runs: Path, heads: Iterable[str] = (), plans: Iterable[str] = (), sealing: Iterable[str] = ()) -> list[str]:
    """A sentence for whatever was changed, removed, added or re-ordered under `runs`; empty when all is as recorded.

    `heads` are the sha256 of manifests that someone else keeps (the ledger): they vouch for the last run too. Of its `plans`, by
    their hashes, it has every run that completed, but for those that were `sealing` when they were killed.
    """
    if not runs.is_dir():
        return [f"{runs} does not exist."]
    said: list[str] = []
    found = list(manifests(runs, said))
    for folder, manifest, _ in found:
        said += _audit_files(folder, manifest)
    digests = {manifest["run"]: digest for _, manifest, digest in found}
    left = {manifest["run"]: manifest for _, manifest, _ in found if manifest["sealed"]}
    entry, after = end(runs), "HEAD"
    if left and not entry:
        said.append("HEAD, which names the last run, is missing or cannot be read.")
        entry = _latest(left, digests)
    while entry or left:  # from the last run back to the first, each named by the one sealed after it
        if entry is None:
            run = _latest(left, digests)["run"]
            said.append(f"{run} is not in the chain that ends in HEAD: it was added, or runs were re-ordered.")
            left.pop(run)
            continue
        said += _differs(runs, entry, digests, after)
        if entry["run"] not in left:  # a gap: go on with what lies before it
            entry = _latest(left, digests) if left else None
            continue
        manifest = left.pop(entry["run"])
        for broken in manifest["broken_off"]:
            said += _differs(runs, broken, digests, manifest["run"])
            said += _audit_left(runs / broken["run"], broken.get("files"), manifest["run"])
        after, entry = manifest["run"], manifest["previous"]
    known, heads, plans, sealing = set(digests.values()), list(heads), set(plans), set(sealing)
    there, page = runs / "index.html", list_of_runs(runs)
    if page and not (there.is_file() and sha256(there) == page):
        said.append(f"index.html was {'changed' if there.exists() else 'removed'}: it is not the one that HEAD names.")
    elif not said:
        said += _audit_list(runs, found, set(heads))
    for _, manifest, digest in found:
        if (
            manifest["sealed"]
            and manifest.get("state") == "completed"
            and manifest.get("plan_hash") in plans
            and digest not in heads
            and manifest["run"] not in sealing
        ):
            said.append(
                f"{manifest['run']} completed by a plan of the ledger, which does not name it: it was added, or altered with all that names it; or the database was restored to before it."
            )
    return said + [f"No run here has the manifest {head}, which the ledger names." for head in heads if head not in known]


def vouched_for(database: str) -> dict[str, list[str]]:
    """What the ledger of a database has for `audit`: its heads, its plans, and the runs that it saw begin to be sealed.

    Raises BadInput where there is no ledger.
    """
    with target(database).session("audit") as session:
        if not kept(session):
            raise BadInput(f"{database} has no ledger to compare with: name the database that was migrated.")
        rows, plans = session.rows("ledger.heads"), [row["plan_hash"] for row in session.rows("ledger.plans")]
    heads = [row["head"] for row in rows if row["head"]]
    return {"heads": heads, "plans": plans if heads else [], "sealing": [row["folder"] for row in rows if not row["head"]]}


def _latest(left: dict[str, dict[str, Any]], digests: dict[str, str]) -> dict[str, str]:
    run = max(left, key=lambda name: str(left[name]["ended"]))
    return {"run": run, "manifest": digests[run]}


def _differs(runs: Path, entry: dict[str, str], digests: dict[str, str], after: str) -> list[str]:
    if entry["run"] not in digests and (runs / entry["run"]).is_dir():
        return []  # its manifest cannot be read, which is said already
    if entry["run"] not in digests:
        return [f"{entry['run']} is missing: it was removed, though {after} names it."]
    if digests[entry["run"]] != entry["manifest"]:
        return [f"{entry['run']}/manifest.json was changed: it is not the one that {after} names."]
    return []


def _audit_list(runs: Path, found: list[tuple[Path, dict[str, Any], str]], heads: set[str]) -> Iterator[str]:
    """Whether the list of the runs says what their manifests do: HEAD vouches for these, and nothing for HEAD's own line of the list.

    What a kill left is no alarm: of a run that was sealed after the one that HEAD names, the list may still lack the end.
    """
    from runbook import pages  # takes a while

    page, match, entry = runs / "index.html", head_of(runs), end(runs)
    sealed = {manifest["run"]: (manifest, digest) for _, manifest, digest in found if manifest["sealed"]}
    if match and match[2] not in sealed:
        yield f"HEAD was changed: it names {match[2]}, which did not end."
        return
    late: set[str] = set()
    while match and entry and entry["run"] != match[2]:
        late.add(entry["run"])
        entry = sealed[entry["run"]][0]["previous"]
    written = {run for run, (_, digest) in sealed.items() if digest in heads}  # the ledger is told after the list is
    for name in ("HEAD", "index.html"):
        if not (runs / name).exists() and (match or written):
            yield f"{name} was removed, though {'HEAD' if match else 'the ledger'} names a run that wrote it."
    if not page.is_file():
        return
    if not sealed:
        yield "index.html was added: no run here came to its end, which writes it."
        return
    text = page.read_bytes().decode("utf-8", "replace")
    rows = {
        unquote(listed[1]): row
        for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
        if (listed := re.search(r'href="([^"/]*)/manifest\.json"', row))
    }
    gone = sorted(rows.keys() - {manifest["run"] for _, manifest, _ in found})
    for run in gone:
        yield f"index.html lists {run}, which has no manifest here: it was removed."
    firm = sealed.keys() - (late - written)
    firm |= {broken["run"] for run in firm for broken in sealed[run][0]["broken_off"]}
    expected, wrong = [], bool(gone)
    by = {sealed[run][0].get("versions", {}).get("partition-runbook") for run in (late | {match[2]} if match else sealed)}
    ours, anew = by == {library("partition-runbook")}, ", and HEAD with it" * bool(match)
    for folder, manifest, _ in found:
        said, should = rows.get(manifest["run"], ""), pages.row(folder, manifest)
        if manifest["run"] not in firm and (not said or _earlier(said, should, manifest["run"])):
            should = said
        elif said != should if ours else not _repeats(said, manifest):
            wrong = True
            yield f"index.html says another thing of {manifest['run']} than its manifest: it was changed{anew}."
        expected += [(manifest, should)] if should else []
    if ours and not wrong and text != pages.listing(expected):
        yield f"index.html says more than the manifests do: it was changed{anew}."


def _earlier(said: str, should: str, run: str) -> bool:
    """Whether the list may have said this of a run that was not at its end: the same run, and links into its folder only."""
    tag = rf'</?(?:tr|td|a|span|td data-is="[ \w]*"|span class="(?:running|broken)"|a href="{re.escape(quote(run))}/[^"/]*")>'
    return said.split("</td>")[:2] == should.split("</td>")[:2] and "<" not in re.sub(tag, "", said)


def _repeats(said: str, manifest: dict[str, Any]) -> bool:
    """Whether the list says what this manifest does, in whatever form another version of the runbook gave it."""
    facts = [manifest.get(name, "") for name in ("table", "operator", "host", "database_user", "approved_by")]
    facts = [*map(html.escape, [*map(str, facts), manifest.get("plan_hash", "")[:12]]), f">{manifest.get('state', '')}</span>"]
    return all(fact in re.sub(r'href="[^"]*"', "", said) for fact in facts)


def _audit_left(folder: Path, left: dict[str, str] | None, after: str) -> Iterator[str]:
    """What a run that broke off had left, against what is there now. Its kernel may have written down a statement or two more."""
    if left is None or not folder.is_dir():
        return
    there = {file.relative_to(folder).as_posix(): file for file in files(folder)}
    for name, digest in left.items():
        if name not in there:
            yield f"{folder.name}/{name} was removed, though {after} found it there."
        elif not name.endswith(STATEMENTS) and not there[name].is_symlink() and sha256(there[name]) != digest:
            yield f"{folder.name}/{name} was changed since {after} found the run broken off."
    for name in sorted(there.keys() - left.keys()):
        yield f"{folder.name}/{name} was added since {after} found the run broken off."


def _audit_files(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    if manifest["run"] != folder.name:
        yield f"{folder.name} holds the record of {manifest['run']}: it was renamed, or exchanged with another."
    there = {file.relative_to(folder).as_posix(): file for file in files(folder)}
    anew = {} if manifest["sealed"] else manifest.get("rewritten", {})  # pages that were about to lose their dead links
    for name, digest in manifest["files"].items():
        if name not in there:
            yield f"{folder.name}/{name} was removed."
        elif there[name].is_symlink():
            yield f"{folder.name}/{name} was replaced by a link."
        elif sha256(there[name]) not in (digest, anew.get(name)):
            yield f"{folder.name}/{name} was changed."
    # A run that still works, or broke off, has a notebook that is not hashed yet; by hand there may be several.
    known = set(manifest["files"])
    if not manifest["sealed"]:
        known |= {file.name for step in manifest["steps"] if step["state"] == "running" for file in of(step["notebook"], folder)}
        known |= {
            name for name in there if name.endswith(STATEMENTS) or name in HALF | PAPERS | {f".{each}.part" for each in PAPERS}
        }
    known |= {parent.as_posix() for name in known for parent in Path(name).parents}
    known |= {f".{name}.part" for name in anew}
    for name in (there.keys() | {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir()}) - known:
        yield f"{folder.name}/{name} was added."
