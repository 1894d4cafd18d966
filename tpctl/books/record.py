"""The record of a checklist that was run: a TOML file, sealed by a chain of digests.

"Signed" means: it names who ran it, where, when and on which commit, and each item's digest covers the item before it,
up to one digest of the whole that is printed when the record is made. Whoever kept that digest sees any later change,
addition or omission. It is no cryptographic signature: who can write the file can write another one and seal it.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpctl import __version__, snapshot
from tpctl.books.place import BookError

SCHEMA, SCHEMA_VERSION = "tpctl.checklist-record", 1


def who() -> dict[str, Any]:
    """The user that runs this."""
    try:
        name = getpass.getuser()
    except OSError:  # a user id without a name, as in containers
        name = str(os.geteuid())
    return {"user": name, "uid": os.geteuid()}


def where() -> dict[str, Any]:
    return {"host": socket.gethostname(), "commit": snapshot.commit(), "tool_version": __version__}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seal(head: Mapping[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
    """The record: `head`, then the items, each with its link of the chain, and the digest of it all."""
    record: dict[str, Any] = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **head}
    link, chained = _link("", record), []
    for item in items:
        link = _link(link, item)
        chained.append({**item, "link": link})
    return {**record, "sha256": link, "item": chained}


def broken(record: Mapping[str, Any]) -> str | None:
    """What does not fit in a sealed record; None if everything does."""
    head = {key: value for key, value in record.items() if key not in ("item", "sha256")}
    link = _link("", head)
    for item in record.get("item", ()):
        link = _link(link, {key: value for key, value in item.items() if key != "link"})
        if item.get("link") != link:
            return f"item '{item.get('id')}', or what stands before it, is not what was sealed"
    return None if record.get("sha256") == link else "the digest of the record is not that of its content"


def _link(before: str, content: Mapping[str, Any]) -> str:
    return digest(f"{before}\n{json.dumps(content, sort_keys=True, separators=(',', ':'))}".encode())


def write(record: Mapping[str, Any], path: Path) -> None:
    import tomli_w

    path.write_text(tomli_w.dumps(record), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A record from its file, unjudged.

    Raises:
        BookError: no TOML, another schema, or a newer one.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BookError(f"{path} is no record: {error}", code="TP-8107") from None
    if (data.get("schema"), data.get("schema_version")) != (SCHEMA, SCHEMA_VERSION):
        said = f"{data.get('schema')} {data.get('schema_version')}"
        raise BookError(f"{path} is {said}, not {SCHEMA} {SCHEMA_VERSION}", code="TP-8107")
    return data
