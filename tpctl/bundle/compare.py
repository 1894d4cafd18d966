"""Two bundles side by side: what was configured, installed, in effect, judged, and what each rank was."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tpctl.bundle.archive import Bundle
from tpctl.verdict import Coverage, Verdict

TOPICS = ("config", "versions", "host", "environment", "effective", "verdict", "ranks")
# Sections of a snapshot by topic. What differs between any two bundles is left out: names, times, process ids.
SNAPSHOT = {
    "versions": "versions",
    "python": "versions",
    "code": "versions",
    "host": "host",
    "gpu": "host",
    "threads": "environment",
    "environment": "environment",
}
INCIDENTAL = frozenset({"host.name", "code.commit"})
OF_TRIAGE = ("verdict", "kind", "fm", "code", "blame", "triggers", "victims")
OF_RECEIPT = ("ending", "balanced", "abandoned_chunks", "leftovers")
OF_REPORT = ("role", "mesh_rank", "tp_plan", "state", "exit_code", "warnings")
OF_GENERATOR = (
    "weights_fingerprint",
    "replicated_fingerprint",
    "shard_bytes",
    "kv_cache_bytes",
    "collectives_per_call",
)
# Of /proc: what a rank computes with. Where a library lies and how many threads run just now say nothing.
OF_PROC = ("library.", "limit.", "environment.", "process.memory_limit_bytes", "process.cpus_usable", "process.life")
ABSENT, UNKNOWN = "(none)", "(not in the bundle)"

Facts = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Row:
    """One fact of both. `differs` is None where one bundle cannot tell."""

    topic: str
    key: str
    a: str
    b: str

    @property
    def differs(self) -> bool | None:
        return None if UNKNOWN in (self.a, self.b) else self.a != self.b

    def to_dict(self) -> dict[str, Any]:
        return {"topic": self.topic, "key": self.key, "a": self.a, "b": self.b, "differs": self.differs}


def compare(first: Bundle, second: Bundle) -> list[Row]:
    """Every fact that either bundle has, topic by topic."""
    a, b = facts(first), facts(second)
    rows = []
    for topic in TOPICS:
        left, right = a[topic], b[topic]
        for key in dict.fromkeys([*(left or {}), *(right or {})]):
            rows.append(Row(topic, key, _text(left, key), _text(right, key)))
    return rows


def judge(rows: list[Row]) -> tuple[Verdict, Coverage]:
    """FAIL where they differ, UNKNOWN where one cannot tell, PASS where all is the same."""
    told = [row for row in rows if row.differs is not None]
    coverage = Coverage(len(told), len(rows))
    if any(row.differs for row in told):
        return Verdict.FAIL, coverage
    return Verdict.PASS if told and len(told) == len(rows) else Verdict.UNKNOWN, coverage


def facts(bundle: Bundle) -> Facts:
    """Facts by topic; None for a topic that the bundle has nothing of."""
    host = _toml(bundle, "host.toml")
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(TOPICS)
    for section, topic in SNAPSHOT.items():
        if host is not None:
            values = host.get(section)
            told = {f"{section}.{key}": value for key, value in values.items()} if isinstance(values, dict) else {}
            known = {key: value for key, value in told.items() if key not in INCIDENTAL}
            found[topic] = (found[topic] or {}) | known
    run = next((f"runs/{one['label']}" for one in bundle.manifest["runs"]), "runs/-")
    config = _toml(bundle, f"{run}/config.toml") or _toml(bundle, "job/config.toml")
    if config is not None:
        found["config"] = {f"{s}.{key}": v for s, values in config.items() for key, v in _items(values)}
    found["verdict"] = dict(_verdicts(bundle)) or None
    reports = dict(_reports(bundle, run))
    found["effective"] = dict(_effective(reports)) or None
    found["ranks"] = dict(_ranks(bundle, run, reports)) or None
    return found


def _verdicts(bundle: Bundle) -> Iterator[tuple[str, Any]]:
    triage = _json(bundle, "triage.json")
    runs = triage.get("runs") if triage else None
    if isinstance(runs, list) and runs and isinstance(runs[0], dict):
        yield from ((f"triage.{key}", runs[0].get(key)) for key in OF_TRIAGE)
    status, receipt = _json(bundle, "job/status.json"), _json(bundle, "job/receipt.json")
    if status is not None:
        yield from ((f"status.{key}", status.get(key)) for key in ("state", "verdict"))
    if receipt is not None:
        yield from ((f"receipt.{key}", receipt.get(key)) for key in OF_RECEIPT)


def _reports(bundle: Bundle, run: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for name in bundle.files:
        number = name.removeprefix(f"{run}/ranks/rank").removesuffix(".json")
        if number.isdecimal() and (report := _json(bundle, name)) is not None:
            yield int(number), report


def _effective(reports: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What all ranks agree on once; what they do not, by rank."""
    tables = {rank: dict(_items(report.get("effective"))) for rank, report in sorted(reports.items())}
    for key in dict.fromkeys(key for table in tables.values() for key in table):
        values = {rank: table.get(key) for rank, table in tables.items()}
        if len({str(value) for value in values.values()}) == 1:
            yield key, next(iter(values.values()))
        else:
            yield from ((f"rank{rank}.{key}", value) for rank, value in values.items())


def _ranks(bundle: Bundle, run: str, reports: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for rank, report in sorted(reports.items()):
        yield from ((f"rank{rank}.{key}", report.get(key)) for key in OF_REPORT)
        generator = dict(_items(report.get("generator")))
        yield from ((f"rank{rank}.generator.{key}", generator[key]) for key in OF_GENERATOR if key in generator)
        yield f"rank{rank}.error", dict(_items(report.get("error"))).get("code")
    for name in sorted(bundle.files):
        label, _, rank_name = name.removeprefix("proc/").removesuffix(".json").partition("/")
        if name.startswith("proc/") and run == f"runs/{label}" and (table := _json(bundle, name)) is not None:
            yield from ((f"{rank_name}.{key}", value) for key, value in table.items() if key.startswith(OF_PROC))


def _json(bundle: Bundle, name: str) -> dict[str, Any] | None:
    try:
        data = json.loads(bundle.files[name])
    except (KeyError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _toml(bundle: Bundle, name: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(bundle.files[name].decode())
    except (KeyError, ValueError, RecursionError):
        return None


def _items(values: object) -> Iterator[tuple[str, Any]]:
    return iter(values.items()) if isinstance(values, dict) else iter(())


def _text(table: Mapping[str, Any] | None, key: str) -> str:
    if table is None:
        return UNKNOWN
    if table.get(key) is None:
        return ABSENT
    value = table[key]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
