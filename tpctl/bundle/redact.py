"""What must not leave the host: secrets always, prompts where they are not wanted. Home paths are shortened.

The environment is taken by allow-list alone. This is the net below it, for what others wrote into logs and files.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SECRET, PROMPT = "[secret]", "[prompt]"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|(API|ACCESS|PRIVATE)_?KEY|CREDENTIAL|(^|_)AUTH(_|$)", re.IGNORECASE)
# A value that is shorter may be an ordinary word, which would be replaced everywhere.
LEAST_SECRET, LEAST_PROMPT = 8, 8
# Each starts at a fixed word and has bounded parts: time grows with the text alone, whatever somebody wrote into it.
PATTERNS = (
    # name = value, in logs, shells, JSON and TOML; numbers and words of those languages are no secrets
    re.compile(
        r"(?P<keep>(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?)[\"']?\s{0,4}[=:]\s{0,4}[\"']?)"
        r"(?!(?:true|false|null|none|[\d.]{1,40})(?:[\s,;}\]]|\Z))(?P<secret>[^\s\"',;&\\]{4,400})",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<keep>\b(?:Bearer|Basic)\s+)(?P<secret>[A-Za-z0-9._~+/=-]{8,4000})"),
    re.compile(r"(?P<keep>\w://)(?P<secret>[^\s/:@\"']{1,200}:[^\s/@\"']{1,200})(?=@)"),
    re.compile(r"(?P<keep>)(?P<secret>\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b)"),
    re.compile(r"(?P<keep>)(?P<secret>-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z))", re.DOTALL),
)


class UnclearError(Exception):
    """A file in which prompts cannot be told from the rest."""


class Redactor:
    """Replaces in texts and in plain data.

    Args:
        environments: of this process and of the ranks; the values of variables that are named like secrets are ones.
        prompts: to be taken out, with every value under the key `prompt`; None keeps prompts.
    """

    def __init__(
        self, environments: Iterable[Mapping[str, str]] = (), prompts: Iterable[str] | None = None, home: str = ""
    ) -> None:
        home = home or str(Path.home())
        self.prompts = prompts is not None
        words: dict[str, str] = {}
        for environ in environments:
            for name, value in environ.items():
                if SECRET_NAME.search(name) and len(value) >= LEAST_SECRET and not os.path.exists(value):
                    words |= dict.fromkeys(_spellings(value), SECRET)
        for prompt in prompts or ():
            if len(prompt) >= LEAST_PROMPT:
                words |= dict.fromkeys(_spellings(prompt), PROMPT)
        self._words = words
        longest_first = sorted(words, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if words else None
        # The root directory as a home would shorten every path.
        self._home = re.compile(re.escape(home) + r"(?![\w.-])") if len(home) > 1 else None

    def text(self, text: str, count: Counter[str]) -> str:
        """The text without what must not leave; `count` gets how often, by kind."""
        if self._known is not None:
            text = self._known.sub(lambda match: self._counted(self._words[match.group()], count), text)
        for pattern in PATTERNS:
            text = pattern.sub(lambda match: _keep(match, count), text)
        if self._home is not None:
            text, found = self._home.subn("~", text)
            count["home"] += found
        return text

    def value(self, value: Any, count: Counter[str], key: str = "") -> Any:
        """Plain data, every text in it redacted."""
        if isinstance(value, Mapping):
            return {
                self.text(name, count) if isinstance(name, str) else name: self.value(item, count, str(name))
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.value(item, count, key) for item in value]
        if not isinstance(value, str):
            return value
        if self.prompts and value and (key.rpartition(".")[2] == "prompt" or key.endswith("_PROMPT")):
            return self._counted(PROMPT, count)
        return self.text(value, count)

    def file(self, name: str, raw: bytes, count: Counter[str]) -> bytes:
        """A file's bytes. Where prompts are taken out, files with fields are read as such.

        Raises:
            UnclearError: such a file cannot be read, and prompts are not wanted.
        """
        text = raw.decode("utf-8", errors="replace")
        if not self.prompts:
            return self.text(text, count).encode()
        try:
            if name.endswith(".json"):
                return (json.dumps(self.value(json.loads(text), count), indent=1) + "\n").encode()
            if name.endswith(".jsonl"):
                rows = (json.loads(line) for line in text.splitlines() if line.strip())
                return "".join(json.dumps(self.value(row, count)) + "\n" for row in rows).encode()
            if name.endswith(".toml"):
                import tomli_w

                return tomli_w.dumps(self.value(tomllib.loads(text), count)).encode()
        except (ValueError, RecursionError) as error:
            raise UnclearError("damaged: prompts in it cannot be told from the rest") from error
        return self.text(text, count).encode()

    @staticmethod
    def _counted(word: str, count: Counter[str]) -> str:
        count[word.strip("[]")] += 1
        return word


def _keep(match: re.Match[str], count: Counter[str]) -> str:
    if match["secret"].startswith("["):
        return match.group()  # replaced already
    count["secret"] += 1
    return match["keep"] + SECRET


def _spellings(word: str) -> set[str]:
    """As it stands, and as JSON and Python write it."""
    return {word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1], repr(word)[1:-1]}


def prompts_of(raw: bytes) -> set[str]:
    """Every prompt of a configuration or a timeline; none of a text that is neither."""
    try:
        data = tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return set()
    found, todo = set(), [data]
    while todo:
        one = todo.pop()
        for key, value in one.items():
            if key == "prompt" and isinstance(value, str):
                found.add(value)
            todo += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    return found
