"""Gates of the pp plans: queues, their depth, what is sent ahead of a decode, and what the recompute coupling costs.

Runs that follow each other on a busy machine differ in speed by more than what is measured here. So none of these
compares milliseconds of one run with those of another, but each run's period with its own stages first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.measures import TRACKS, SendAfterDecode, send_after_decode
from engine.plan import PP_PLANS
from tpctl.matrix.gates import gate, judge, unknown
from tpctl.matrix.observation import Observation
from tpctl.verdict import Finding, Verdict

SEND_AFTER_DECODE = "overlap.send-after-decode"
NEARER = 0.75  # times how far another run is off its bound: below that, no drift of the machine explains it
QUEUED = 0.5  # periods by which a chunk's way must have grown where queues are deeper
WON = 0.95  # times decode-all-first's period is the most that anchor-first's may be


@gate("queue-bounds")
def queue_bounds(seen: Observation) -> Finding:
    """No queue ever held more than it may; each was used."""
    figures = seen.leader["generator"]
    rows = {name: (figures[f"{name}_most"], figures[name]) for name in ("d_in", "d_out")}
    words = ", ".join(f"{name} held {most} of {depth}" for name, (most, depth) in rows.items())
    ok = all(1 <= most <= depth for most, depth in rows.values())
    return judge("queue-bounds", ok, words, [most for most, _ in rows.values()], [depth for _, depth in rows.values()])


@gate("deeper-only-waits")
def deeper_only_waits(seen: Observation) -> Finding:
    """Against the run with shallower queues: no nearer to the bound, and each chunk is longer on its way."""
    name = "deeper-only-waits"
    if seen.other is None:
        return unknown(name, "needs the run that it is measured against")
    ours, theirs = _overlap(seen), _overlap(seen.other)
    ways = ours["latency_ms"] / ours["period_ms"], theirs["latency_ms"] / theirs["period_ms"]
    near = ours["period_ms"] / ours["bound_ms"], theirs["period_ms"] / theirs["bound_ms"]
    words = (
        f"a chunk takes {ways[0]:.1f} periods, in {seen.other.case.id} {ways[1]:.1f}; "
        f"a period takes {near[0]:.2f} of its bound, there {near[1]:.2f}"
    )
    nearer = near[0] / near[1]
    return judge(name, ways[0] >= ways[1] + QUEUED and nearer >= NEARER, words, nearer, NEARER)


@gate("sends-ahead")
def sends_ahead(seen: Observation) -> Finding:
    """The healthy signature: no envelope waited until the chunk before it was decoded."""
    found = _signature(seen)
    if found is None:
        return unknown(
            "sends-ahead", "the records cannot show it: too few chunks, or hardly any decode beside the anchor"
        )
    return judge("sends-ahead", not found.found, found.sentence(), found.tracks, TRACKS)


@gate("send-after-decode")
def planted_send_after_decode(seen: Observation) -> Finding:
    """The planted bug is recognised by its signature."""
    found = _signature(seen)
    if found is None:
        return unknown("send-after-decode", "the records cannot show it")
    return judge("send-after-decode", found.found, f"{SEND_AFTER_DECODE}: {found.sentence()}", found.tracks, TRACKS)


def held_back(seen: Observation) -> Finding | None:
    """A warning for a run that nobody broke on purpose, by the name of the bug whose signature it bears."""
    if seen.case.plan not in PP_PLANS or "send-after-decode" in seen.case.gates:
        return None
    found = _signature(seen)
    if found is None or not found.found:
        return None
    return Finding(SEND_AFTER_DECODE, Verdict.WARN, found.sentence(), found.tracks, TRACKS)


@gate("coupling")
def coupling(seen: Observation) -> Finding:
    """R0a anchor-first against R0, decode-all-first and R1, each measured against the next."""
    r0 = seen.other
    coupled = r0.other if r0 is not None else None
    free = coupled.other if coupled is not None else None
    if r0 is None or coupled is None or free is None:
        return unknown("coupling", "needs the runs of R0, of decode-all-first and of R1")
    runs = {"R1": free, "R0a decode-all-first": coupled, "R0a anchor-first": seen, "R0": r0}
    shares = {regime: _of_both_stages(run) for regime, run in runs.items()}
    cost = shares["R0a decode-all-first"] - shares["R1"]
    won = shares["R0a decode-all-first"] - shares["R0a anchor-first"]
    listed = ", ".join(
        f"{regime} {share:.2f} ({_overlap(runs[regime])['period_ms']:.0f} ms)" for regime, share in shares.items()
    )
    words = f"the period, of both stages one after the other: {listed}"
    if cost <= 0:
        return unknown("coupling", f"{words}: no coupling to be seen, the stages are too unlike")
    left = shares["R0a anchor-first"] / shares["R0a decode-all-first"]
    words += f"; decoding the anchor first wins back {won / cost:.0%} of what the coupling costs"
    return judge("coupling", left <= WON, words, left, WON)


def _of_both_stages(seen: Observation) -> float:
    """The period over stage0 + stage1: 1 where nothing overlaps, one half where like stages overlap in full."""
    found = _overlap(seen)
    return float(found["period_ms"] / (found["stage0_ms"] + found["stage1_ms"]))


def _overlap(seen: Observation) -> Mapping[str, Any]:
    found: Mapping[str, Any] = seen.leader["generator"]["overlap"]
    return found


def _signature(seen: Observation) -> SendAfterDecode | None:
    chunks = seen.leader.get("chunks") or []
    return send_after_decode(chunks) if all("t_anchor_ms" in chunk for chunk in chunks) else None
