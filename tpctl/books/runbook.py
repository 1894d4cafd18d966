"""A runbook: one page for one failure, whose blocks are named and run. A card is a page of background, which runs too.

Pure: Markdown in, data out. A block is a fence ```` ```sh name=who expect=3 shows=/data/verdict=FAIL ````: one command,
run without a shell. `changes` marks a block that changes something; `expect` lists the exit codes that pass, 0 if not
given, `any` for those of programs that may not be installed; `shows` is a value in the JSON that `-o json` prints; `of`
is the cause that the block is about, where the page knows more than one.
The first fence of a page is TOML: which failure modes and error codes lead here, and which drill causes the failure,
one of the table of drills or of `tpctl.books.cause`.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpctl.books.expect import Expect
from tpctl.books.place import RUNBOOKS, BookError, ids, pick

SECTIONS = ("Meaning", "Impact", "Diagnosis", "Mitigation", "Verification", "Escalation")
CARD_SECTIONS = ("What holds", "What goes wrong", "Here", "Sources")
CARDS = "cards/"
ANY = tuple(range(256))
LINK = re.compile(r"tpctl (runbook|checklist) (?:show|run) ([a-z0-9][a-z0-9/-]*)")
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KEYS = {"failure_modes", "codes", "drill"}


@dataclass(frozen=True)
class Block:
    """`command` may hold {job}, {run}, and {config}: the configuration file of that run. `of` is "" for the page's."""

    name: str
    section: str
    command: str
    changes: bool
    expect: Expect
    of: str = ""

    @property
    def about_engine(self) -> bool:
        return self.command.startswith("tpctl ")


@dataclass(frozen=True)
class Runbook:
    """`failure_modes` and `codes` lead here. `drill` causes the failure; "" if none can, and the page says so."""

    id: str
    title: str
    failure_modes: tuple[str, ...]
    codes: tuple[str, ...]
    drill: str
    sections: Mapping[str, str]
    blocks: tuple[Block, ...]
    links: tuple[str, ...]
    text: str

    @property
    def is_card(self) -> bool:
        return self.id.startswith(CARDS)

    def cause(self, block: Block) -> str:
        """What causes the failure that this block of the page is about; "" if nothing does."""
        return block.of or self.drill

    @property
    def causes(self) -> set[str]:
        return {name for name in (self.drill, *(block.of for block in self.blocks)) if name}


def all_ids() -> list[str]:
    """Runbooks first, then cards."""
    return [*ids(RUNBOOKS, ".md"), *(CARDS + name for name in ids(RUNBOOKS / "cards", ".md"))]


def load(name: str) -> Runbook:
    """The runbook or card of that id.

    Raises:
        BookError: there is none, or its page is wrong.
    """
    pick("runbook", all_ids(), name)
    return parse(name, (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8"))


def load_all() -> tuple[Runbook, ...]:
    return tuple(load(name) for name in all_ids())


def parse(name: str, text: str) -> Runbook:
    """A runbook from its Markdown.

    Raises:
        BookError: sections that are not the six in their order, a fence that is no block, a name twice.
    """
    from markdown_it import MarkdownIt

    title, section, head = "", "", {}
    spans: list[tuple[str, int]] = []
    blocks: list[Block] = []
    links: list[str] = []
    tokens = MarkdownIt("commonmark").parse(text)
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            words = tokens[index + 1].content
            if token.tag == "h1" and not title:
                title = words
            elif token.tag == "h2":
                section = words
                spans.append((words, token.map[1] if token.map else 0))
        elif token.type == "fence" and token.info == "toml" and not section:
            head = _head(name, token.content)
        elif token.type == "fence":
            blocks.append(_block(name, section, token.info, token.content))
        elif token.type == "inline":
            links += [str(child.attrs["href"]) for child in token.children or () if child.type == "link_open"]
    wanted = CARD_SECTIONS if name.startswith(CARDS) else SECTIONS
    if tuple(words for words, _ in spans) != wanted:
        raise _wrong(
            name, f"its sections are {', '.join(words for words, _ in spans)}; they must be {', '.join(wanted)}"
        )
    names = [block.name for block in blocks]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise _wrong(name, f"two blocks are named '{twice[0]}'")
    lines = text.splitlines()
    ends = [line - 1 for _, line in spans[1:]] + [len(lines)]
    sections = {words: "\n".join(lines[start:end]).strip() for (words, start), end in zip(spans, ends, strict=True)}
    if empty := [words for words, body in sections.items() if not body]:
        raise _wrong(name, f"its section {empty[0]} is empty")
    return Runbook(
        name,
        title,
        tuple(head.get("failure_modes", ())),
        tuple(head.get("codes", ())),
        str(head.get("drill", "")),
        sections,
        tuple(blocks),
        tuple(links),
        text,
    )


def _head(name: str, text: str) -> dict[str, Any]:
    try:
        head = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _wrong(name, f"its first fence is no TOML: {error}") from None
    if unknown := sorted(head.keys() - KEYS):
        raise _wrong(name, f"unknown key '{unknown[0]}'")
    return head


def _block(page: str, section: str, info: str, content: str) -> Block:
    words = shlex.split(info)
    values = dict(word.partition("=")[::2] for word in words[1:])
    name = values.pop("name", "")
    where = f"the block '{name or info}'"
    if words[:1] != ["sh"] or not NAME.fullmatch(name):
        raise _wrong(page, f"{where} must begin with: sh name=NAME")
    changes = values.pop("changes", None) is not None
    codes, shows, of = values.pop("expect", "0"), values.pop("shows", ""), values.pop("of", "")
    if values:
        raise _wrong(page, f"{where} has the unknown word '{sorted(values)[0]}'")
    path, equals, value = shows.rpartition("=")
    if shows and not equals:
        raise _wrong(page, f"{where}: shows needs PATH=VALUE")
    try:
        exits = ANY if codes == "any" else tuple(int(code) for code in codes.split(","))
    except ValueError:
        raise _wrong(page, f"{where}: expect={codes} is no list of exit codes") from None
    lines = content.replace("\\\n", " ").strip().splitlines()
    if len(lines) != 1:
        raise _wrong(page, f"{where} holds {len(lines)} commands; blocks are run one at a time, one command each")
    if words := [word for word in shlex.split(lines[0]) if word in ("|", ">", ">>", "<", "&&", "||", ";", "&")]:
        raise _wrong(page, f"{where} needs a shell for '{words[0]}', and there is none")
    return Block(name, section, " ".join(lines[0].split()), changes, Expect(exits, path or None, _value(value)), of)


def _value(word: str) -> Any:
    """A number or a truth value as JSON writes it; anything else is text."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def _wrong(name: str, what: str) -> BookError:
    return BookError(f"runbook {name}: {what}", code="TP-8110", next_step="tpctl runbook list")


def dead_links(one: Runbook, runbooks: set[str], checklists: set[str], folder: Path) -> list[str]:
    """Links of a page to pages that are not there."""
    found = [
        f"{kind} {name}"
        for kind, name in LINK.findall(one.text)
        if name not in (runbooks if kind == "runbook" else checklists)
    ]
    here = (folder / f"{one.id}.md").parent
    return found + [link for link in one.links if "://" not in link and not (here / link.partition("#")[0]).is_file()]
