"""What must never be written down, and how it is taken out of a text, a notebook or a tree of parameters."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from psycopg.conninfo import conninfo_to_dict

HIDDEN = "***"
PICTURES = ("image/png", "image/jpeg")
NAMED = r"(?:pg|ssl)?(?:password|passwd|passphrase)|(?:access_|auth_|api_?)?token|secret|api_?key|signature"
KEYS = r" (?:already exists|is duplicated|is not present|is still referenced|conflicts with)|\.?(?:$|\n|\\n|<|\")"  # what follows one
# Where a secret stands, whoever's it is.
PLACES = [
    (re.compile(pattern, re.IGNORECASE), hidden)
    for pattern, hidden in (
        (r"(https?://)[^\s/@'\"<>]+@", rf"\1{HIDDEN}@"),
        (r"([a-z][a-z0-9+.-]*://[^\s:/@'\"<>]*:)[^\s'\"<>]*@", rf"\1{HIDDEN}@"),
        (r"(SCRAM-SHA-\d+\$)\d[^\s'\"<>]*", rf"\1{HIDDEN}"),
        (r"\bmd5[0-9a-f]{32}\b", f"md5{HIDDEN}"),
        (rf"(?<![a-z0-9])((?:{NAMED})\\?[\"']?\s*[:=]\s*)(\\?[\"'])(?:(?!\2)(?:\\.|.))+\2", rf"\1\2{HIDDEN}\2"),
        (rf"(?<![a-z0-9])((?:{NAMED})=)[^\s&\"'\\,;)<>]+", rf"\1{HIDDEN}"),
        (r"\b(password\s+)E?'(?:[^']|'')*'", rf"\1'{HIDDEN}'"),
        (r"(Failing row contains \()(?s:.*?)\)\.?(?=\s*(?:$|\n|\\n|<|\"))", rf"\1{HIDDEN})"),  # a person's data
        (rf"\b(Key \((?s:.*?)\)=\()(?s:.*?)\)(?={KEYS})", rf"\1{HIDDEN})"),
        (r"\b(bearer\s+)[\w.~+/-]{12,}=*", rf"\1{HIDDEN}"),
    )
]


LITERAL = re.compile(
    r"""(?P<comment>--[^\n]*|/\*(?:(?:(?!/\*).)*?\*/|.*))|\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?(?:\$(?P=tag)\$|$)|(?P<text>'(?:[^']|'')*(?:'|$))"""
    r"""|(?P<name>"(?:[^"]|"")*(?:"|$))|(?<![\w$.])(?P<number>\d[\w.]*)""",
    re.DOTALL,
)


def valueless(statement: str, known: Iterable[str] = ()) -> str:
    """An SQL statement of somebody's in one line, without comments and without the values in it, but for those `known` anyway:
    any other may be a person's data. Where a backslash could mean two things all from the first quote on is left out, and all from a
    comment in a comment on."""
    kept = {form for value in known for form in (value, "'" + value.replace("'", "''") + "'")}
    if "\\" in statement and "'" in statement:
        statement = statement[: statement.index("'")] + "'"

    def hide(found: re.Match[str]) -> str:
        if found["comment"]:
            return " "
        whole = found[0]
        return whole if found["name"] or whole in kept else "..." if found["number"] else "'...'"

    return " ".join(LITERAL.sub(hide, statement).split())


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without the secrets, in any of their written forms, and without what stands where a secret stands.

    A secret of fewer than four characters is hidden in such places only: elsewhere it would take numbers with it.
    """
    return _redact(text, frozenset(secrets))


@lru_cache(maxsize=10_000)
def _redact(text: str, secrets: frozenset[str]) -> str:
    """Remembered: a notebook is written after every cell, and most of it was there before."""
    if given := _given(secrets):
        text = given.sub(HIDDEN, text)
    for place, hidden in PLACES:
        text = place.sub(hidden, text)
    return text


@lru_cache(maxsize=64)
def _given(secrets: frozenset[str]) -> re.Pattern[str] | None:
    forms: set[str] = set()
    for secret in secrets:
        escaped = json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]
        forms |= {secret, *escaped, html.escape(secret), quote(secret, safe=""), secret.replace("'", "''")}
    exact = [
        # An ordinary word is hidden where it stands alone: the password "user" leaves "users" readable.
        rf"(?<![^\W_]){re.escape(form)}(?![^\W_])" if len(form) < 8 or form.isalpha() else re.escape(form)
        for form in sorted(forms, key=len, reverse=True)
        if len(form) >= 4
    ]
    return re.compile("|".join(exact)) if exact else None


def redacted(value: Any, secrets: Iterable[str]) -> Any:
    """A tree of dicts, lists and strings, redacted; the bytes of a picture are left alone."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, list | tuple):
        return [redacted(item, secrets) for item in value]
    if not isinstance(value, Mapping):
        return value
    named = {key: HIDDEN for key, item in value.items() if isinstance(item, str) and item and _is_named(key)}
    return {key: item if key in PICTURES else redacted(item, secrets) for key, item in value.items()} | named


def redacted_notebook(text: str, secrets: Iterable[str]) -> str:
    """A notebook's JSON with every string in it redacted."""
    return json.dumps(redacted(json.loads(text), frozenset(secrets)), indent=1, ensure_ascii=False) + "\n"


def passwords(value: object) -> list[str]:
    """The passwords in URLs, in conninfo strings and under telling names anywhere in `value`."""
    if isinstance(value, Mapping):
        named = [item for key, item in value.items() if isinstance(item, str) and _is_named(key)]
        return named + [found for item in value.values() for found in passwords(item)]
    if isinstance(value, list | tuple):
        return [found for item in value for found in passwords(item)]
    if not isinstance(value, str):
        return []
    found = re.findall(r"://[^\s:/@]*:(\S*)@", value)
    with contextlib.suppress(Exception):  # raised by what is not conninfo
        parts = conninfo_to_dict(value)
        found += [str(parts[key]) for key in ("password", "sslpassword") if parts.get(key)]
    return [form for text in found for form in {text, unquote(text)} if text != HIDDEN]


def _is_named(key: object) -> bool:
    return re.fullmatch(NAMED, str(key), re.IGNORECASE) is not None


def known_secrets() -> list[str]:
    """Every password that libpq could use here: from the environment, the password file, the service files."""
    found = [os.environ.get("PGPASSWORD", "")]
    for name, value in os.environ.items():
        if re.search(r"(PASSWORD|PASSWD|TOKEN|SECRET|API_?KEY)$", name) and len(value) >= 8:
            found.append(value)
        found += passwords(value) if "://" in value else []
    home = Path(os.path.expanduser("~"))
    files = [os.environ.get("PGPASSFILE") or str(home / ".pgpass")]
    system = Path(os.environ.get("PGSYSCONFDIR") or "/etc/postgresql-common", "pg_service.conf")
    for service in (os.environ.get("PGSERVICEFILE") or home / ".pg_service.conf", system):
        for line in _lines(service):
            name, _, value = line.strip().partition("=")
            if name in ("password", "sslpassword"):
                found.append(value)
            elif name == "passfile":
                files.append(value)
    for line in (line for file in files for line in _lines(file)):
        if entry := re.match(r"(?!#)(?:(?:[^\\:]|\\.)*:){4}(.+)", line):
            found += [entry[1], re.sub(r"\\(.)", r"\1", entry[1])]
    return sorted({secret for secret in found if secret})


def _lines(file: str | Path) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
