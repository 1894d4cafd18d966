"""Gates: pure functions from an observation to a finding. What cannot be evaluated is UNKNOWN, never PASS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.measures import GATE as OVERLAP_LEAST
from tpctl.verdict import Finding, Verdict

if TYPE_CHECKING:
    import numpy as np

    from tpctl.matrix.observation import Observation

Gate = Callable[["Observation"], Finding]
Arrays = "dict[str, np.ndarray[Any, Any]]"

LATENT_LIMIT = 1e-4  # |a - b| max over |b| max: float32 sums in another order
PIXEL_LIMIT = 1  # steps of 255
CHANGE_FACTOR = 10.0  # a changed prompt must move the latents this many times beyond LATENT_LIMIT

QUEUES = ("d_in", "d_out")
WARM_CHUNKS = 100  # caches, arenas and pools have their size by then
LEAST_SERIES = 200  # chunks that a slope is worth something over
LEAK_LIMIT_BYTES = 4096  # a chunk; its record, which the rank's report keeps, takes 600 to 1,200 of them

GATES: dict[str, Gate] = {}


def gate(name: str) -> Callable[[Gate], Gate]:
    def register(function: Gate) -> Gate:
        GATES[name] = function
        return function

    return register


def evaluate(name: str, seen: Observation) -> Finding:
    """One gate. An observation that a gate trips over is UNKNOWN, with what it tripped over."""
    try:
        return GATES[name](seen)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return unknown(name, f"could not be evaluated: {type(error).__name__}: {error}")


def unknown(name: str, why: str) -> Finding:
    return Finding(name, Verdict.UNKNOWN, why)


def judge(name: str, ok: bool, message: str, value: Any, limit: Any) -> Finding:
    return Finding(name, Verdict.PASS if ok else Verdict.FAIL, message, value, limit)


def _missing(seen: Observation) -> list[int]:
    return [rank for rank in range(seen.case.ranks) if rank not in seen.reports]


@gate("refused")
def refused(seen: Observation) -> Finding:
    """Turned down before launch, by the division rule, with the degrees that would do."""
    if seen.refused is None:
        return judge("refused", False, "the configuration was accepted, but must be refused", None, "TP-1103")
    valid = seen.refused.get("evidence", {}).get("valid")
    ok = seen.refused["code"] == "TP-1103" and bool(valid) and not (seen.run_dir / "ranks").exists()
    return judge("refused", ok, f"refused before launch: {seen.refused['message']}", seen.refused["code"], "TP-1103")


@gate("exit-codes")
def exit_codes(seen: Observation) -> Finding:
    """Every rank reported and drained with 0, and so did the launcher."""
    if seen.outcome is None:
        return unknown("exit-codes", "nothing was launched")
    codes = {str(rank): report.get("exit_code") for rank, report in sorted(seen.reports.items())}
    bad = {rank: code for rank, code in codes.items() if code not in (0, None)}
    unsaid = [*_missing(seen), *(int(rank) for rank, code in codes.items() if code is None)]
    if seen.outcome.timed_out:
        return judge("exit-codes", False, f"the deadline of {seen.case.deadline_s:g} s passed", codes, 0)
    if bad or seen.outcome.returncode:
        silent = f"; no final report of rank {', '.join(map(str, unsaid))}" if unsaid else ""
        return judge("exit-codes", False, f"exit codes by rank {codes}{silent}", codes, 0)
    if unsaid:
        return unknown("exit-codes", f"no final report of rank {', '.join(map(str, unsaid))}")
    return judge("exit-codes", True, f"all {len(codes)} ranks exited 0", codes, 0)


@gate("latents-equal")
def latents_equal(seen: Observation) -> Finding:
    """Largest relative error of any chunk's latents against the single-process reference."""
    pair = _pair(seen, "latents-equal", "latents")
    if isinstance(pair, Finding):
        return pair
    error = max(relative_error(pair[0][key], pair[1][key]) for key in pair[1])
    return judge("latents-equal", error <= LATENT_LIMIT, f"relative error {error:.2g}", error, LATENT_LIMIT)


@gate("pixels-equal")
def pixels_equal(seen: Observation) -> Finding:
    """Largest difference of any pixel value against the single-process reference, in steps of 255."""
    pair = _pair(seen, "pixels-equal", "pixels")
    if isinstance(pair, Finding):
        return pair
    error = max(int(abs(pair[0][key].astype("int16") - pair[1][key].astype("int16")).max()) for key in pair[1])
    return judge("pixels-equal", error <= PIXEL_LIMIT, f"largest pixel difference {error}", error, PIXEL_LIMIT)


@gate("identical")
def identical(seen: Observation) -> Finding:
    """Latents and pixels of every chunk are the reference's, bit for bit."""
    different = 0
    for kind in ("latents", "pixels"):
        pair = _pair(seen, "identical", kind)
        if isinstance(pair, Finding):
            return pair
        different += sum(not bool((pair[0][key] == pair[1][key]).all()) for key in pair[1])
    words = f"{different} arrays differ" if different else "latents and pixels are the reference's, bit for bit"
    return judge("identical", not different, words, different, 0)


def relative_error(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """max |a - b| over max |b|; NaN anywhere, or a zero reference, is infinitely wrong."""
    import numpy as np

    scale = float(np.abs(b).max())
    worst = float(np.abs(a - b).max())
    return worst / scale if np.isfinite(worst) and np.isfinite(scale) and scale > 0 else float("inf")


def _pair(seen: Observation, name: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]] | Finding:
    """This case's arrays and the reference's, of equal chunks and shapes; or the finding that says why not."""
    if seen.case.reference is None:
        return Finding(name, Verdict.SKIP, "this case is its own reference")
    ours = getattr(seen, kind)
    theirs = getattr(seen.reference, kind) if seen.reference is not None else None
    if ours is None or theirs is None:
        lacking = f"this case has no {kind}" if ours is None else f"the reference {seen.case.reference} has no {kind}"
        return unknown(name, lacking)
    shapes = [{key: value.shape for key, value in arrays.items()} for arrays in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return judge(name, False, f"chunks or shapes differ from {seen.case.reference}", str(shapes[0]), str(shapes[1]))
    if len(ours) != seen.case.chunks:
        return judge(name, False, f"{len(ours)} chunks recorded", len(ours), seen.case.chunks)
    return ours, theirs


@gate("frames")
def frames(seen: Observation) -> Finding:
    """1 + 4 (F - 1) pixel frames for the first chunk of each cache epoch (9 for F = 3), 4 F (12) for the others."""
    chunks, pixels, latents = seen.leader.get("chunks"), seen.pixels, seen.latents
    if not chunks or pixels is None or latents is None:
        return unknown("frames", "no recorded pixels, or no report of rank 0")
    per_chunk = next(iter(latents.values())).shape[1]
    epochs = [chunk["cache_epoch"] for chunk in chunks]
    expected = [4 * per_chunk - (3 if i == 0 or epochs[i] != epochs[i - 1] else 0) for i in range(len(epochs))]
    counted = [int(pixels[key].shape[0]) for key in sorted(pixels)]
    ok = counted == expected and len(counted) == seen.case.chunks
    return judge("frames", ok, f"{sum(counted)} frames, by chunk {counted}", sum(counted), sum(expected))


@gate("calls")
def calls(seen: Observation) -> Finding:
    """Observed generator calls equal the expected ones, in every chunk of every rank, and all ranks agree."""
    if _missing(seen) or not seen.reports:
        return unknown("calls", f"no report of rank {', '.join(map(str, _missing(seen)))}")
    wrong = []
    totals = {}
    for rank, report in sorted(seen.reports.items()):
        chunks = report["chunks"]
        if len(chunks) != seen.case.chunks:
            wrong.append(f"rank {rank} ran {len(chunks)} of {seen.case.chunks} chunks")
        for chunk in chunks:
            if chunk["observed_generator_calls"] != chunk["expected_generator_calls"]:
                wrong.append(
                    f"rank {rank} chunk {chunk['chunk_index']}: {chunk['observed_generator_calls']} of "
                    f"{chunk['expected_generator_calls']}"
                )
        totals[rank] = sum(chunk["observed_generator_calls"] for chunk in chunks)
    expected = sum(chunk["expected_generator_calls"] for chunk in seen.leader["chunks"])
    if len(set(totals.values())) > 1:
        wrong.append(f"totals by rank differ: {totals}")
    message = "; ".join(wrong[:3]) if wrong else f"{expected} calls on each of {len(totals)} ranks"
    return judge("calls", not wrong, message, totals.get(0), expected)


@gate("digests")
def digests(seen: Observation) -> Finding:
    """Input and output digests of every chunk are the same number on every mesh rank."""
    if seen.case.tp == 1:
        return Finding("digests", Verdict.SKIP, "one rank: nothing to compare")
    if _missing(seen):
        return unknown("digests", f"no report of rank {', '.join(map(str, _missing(seen)))}")
    compared, absent = 0, 0
    mesh = {rank: report for rank, report in seen.reports.items() if report.get("mesh_rank", 0) >= 0}
    for index in range(seen.case.chunks):
        for name in ("input_digest_i64", "output_digest_i64"):
            values = {rank: report["chunks"][index][name] for rank, report in mesh.items()}
            if any(value is None for value in values.values()):
                absent += 1
            elif len(set(values.values())) > 1:
                return judge("digests", False, f"chunk {index}: {name} differs by rank: {values}", str(values), "equal")
            else:
                compared += 1
    if absent:
        return unknown("digests", f"{absent} of {absent + compared} digests were not taken")
    return judge("digests", True, f"{compared} digests equal on {seen.case.tp} ranks", compared, compared)


@gate("imports")
def imports(seen: Observation) -> Finding:
    """Generator-only workers hold neither transformers nor diffusers."""
    workers = {rank: report for rank, report in seen.reports.items() if rank != 0}
    if _missing(seen) or not workers:
        return unknown("imports", "no worker reported")
    heavy = {rank: [name for name, held in report["imported"].items() if held] for rank, report in workers.items()}
    bad = {rank: names for rank, names in heavy.items() if names}
    message = f"imported: {bad}" if bad else f"{len(workers)} worker(s) hold neither transformers nor diffusers"
    return judge("imports", not bad, message, str(bad) if bad else "none", "none")


@gate("outputs")
def outputs(seen: Observation) -> Finding:
    """Every file that rank 0 says it made exists and is not empty."""
    made = seen.leader.get("outputs")
    if not made:
        return unknown("outputs", "rank 0 reported no outputs")
    sizes = {kind: Path(path).stat().st_size if Path(path).is_file() else None for kind, path in made.items() if path}
    bad = [kind for kind, size in sizes.items() if not size]
    message = f"missing or empty: {', '.join(bad)}" if bad else f"{', '.join(sizes)} written"
    return judge("outputs", not bad and bool(sizes), message, sizes, "not empty")


@gate("account")
def account(seen: Observation) -> Finding:
    """accepted = emitted + dropped + abandoned, and a drained run emitted every chunk."""
    found = seen.leader.get("account")
    if not found:
        return unknown("account", "rank 0 reported no account")
    balanced = found["accepted"] == found["emitted"] + found["dropped"] + found["abandoned"]
    ok = balanced and found["emitted"] == seen.case.chunks
    words = ", ".join(f"{found[key]} {key}" for key in ("accepted", "emitted", "dropped", "abandoned"))
    return judge("account", ok, words, found["emitted"], seen.case.chunks)


@gate("account-with-drops")
def account_with_drops(seen: Observation) -> Finding:
    """accepted = emitted + dropped + abandoned with work dropped as stale by a hard cut, and nothing abandoned."""
    found = seen.leader.get("account")
    if not found:
        return unknown("account-with-drops", "rank 0 reported no account")
    balanced = found["accepted"] == found["emitted"] + found["dropped"] + found["abandoned"]
    ok = balanced and found["dropped"] > 0 and found["emitted"] > 0 and not found["abandoned"]
    words = ", ".join(f"{found[key]} {key}" for key in ("accepted", "emitted", "dropped", "abandoned"))
    return judge("account-with-drops", ok, words, found["dropped"], "at least 1")


@gate("overlap")
def overlap(seen: Observation) -> Finding:
    """The score of contract section 11 is high enough, and no queue ever held more than it may."""
    figures, chunks = seen.leader.get("generator", {}), seen.leader.get("chunks") or []
    found = figures.get("overlap")
    if not found:
        return unknown("overlap", "rank 0 reported no overlap: too few chunks after the warm-up, or not a pp plan")
    over = [f"at chunk {c['chunk_index']}" for c in chunks if any(c[name] > figures[name] for name in QUEUES)]
    over += [f"once: {name} held {most}" for name in QUEUES if (most := figures[f"{name}_most"]) > figures[name]]
    score = float(found["score"])
    words = (
        f"score {score:.2f}, stage 0 {found['stage0_ms']:.0f} ms, stage 1 {found['stage1_ms']:.0f} ms, "
        f"period {found['period_ms']:.0f} ms"
    )
    words += f"; a queue was too long {', '.join(over)}" if over else ""
    return judge("overlap", score >= OVERLAP_LEAST and not over, words, score, OVERLAP_LEAST)


@gate("graphs")
def graphs(seen: Observation) -> Finding:
    """The blocks of every mesh rank are compiled, without a graph break, and nothing was compiled after the warm-up."""
    made = {rank: report["generator"] for rank, report in seen.reports.items() if report.get("mesh_rank", 0) >= 0}
    if _missing(seen) or not made:
        return unknown("graphs", f"no report of rank {', '.join(map(str, _missing(seen)))}")
    counts = {rank: generator["graphs"] for rank, generator in made.items()}
    wrong = []
    for rank, generator in sorted(made.items()):
        if not generator["graphs"]:
            wrong.append(f"rank {rank} compiled nothing")
        if generator["graph_breaks"]:
            wrong.append(f"rank {rank} has {generator['graph_breaks']} graph breaks")
        if late := generator.get("graphs_in_stream", 0):
            wrong.append(f"rank {rank} compiled {late} graphs while the stream ran")
    if len(set(counts.values())) > 1:
        wrong.append(f"graphs by rank differ: {counts}")
    most = max(counts.values())
    words = "; ".join(wrong) or f"{most} graph{'s' if most > 1 else ''} on each of {len(made)} ranks, 0 breaks"
    return judge("graphs", not wrong, words, most, "0 breaks, none in the stream")


@gate("memory-flat")
def memory_flat(seen: Observation) -> Finding:
    """Resident memory of no rank grows from chunk to chunk, once the run is warm."""
    name = "memory-flat"
    if _missing(seen) or not seen.reports:
        return unknown(name, f"no report of rank {', '.join(map(str, _missing(seen)))}")
    slopes = {}
    for rank, report in sorted(seen.reports.items()):
        series = [(int(chunk["chunk_index"]), int(chunk["rss_bytes"])) for chunk in report["chunks"]]
        warm = [point for point in series if point[0] >= WARM_CHUNKS]
        if len(warm) < LEAST_SERIES:
            return unknown(name, f"rank {rank} has {len(warm)} chunks after the warm-up; {LEAST_SERIES} are needed")
        slopes[rank] = slope(warm)
    worst = max(slopes, key=lambda rank: slopes[rank])
    words = f"rank {worst} grows fastest, by {slopes[worst]:.0f} bytes a chunk"
    return judge(name, slopes[worst] <= LEAK_LIMIT_BYTES, words, round(slopes[worst]), LEAK_LIMIT_BYTES)


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Rise of the line through these points: the median over all pairs (Theil and Sen), which single jumps leave
    alone and a leak, however it comes in steps, does not."""
    import numpy as np

    x, y = np.asarray(points, dtype=np.float64).T
    one, other = np.triu_indices(len(x), 1)
    return float(np.median((y[other] - y[one]) / (x[other] - x[one])))


@gate("leftovers")
def leftovers(seen: Observation) -> Finding:
    """No process of the case outlived its launcher."""
    if seen.outcome is None:
        return unknown("leftovers", "nothing was launched")
    found = [*seen.outcome.leftovers, *seen.outcome.immortal]
    return judge("leftovers", not found, f"left behind: {'; '.join(found)}" if found else "none", len(found), 0)


@gate("cut-repeats")
def cut_repeats(seen: Observation) -> Finding:
    """After a hard cut with the same prompt and seed, the first chunk comes again, bit for bit."""
    chunks = seen.leader.get("chunks")
    if not chunks or seen.latents is None or seen.pixels is None:
        return unknown("cut-repeats", "no recorded latents or pixels, or no report of rank 0")
    cuts = [chunk["chunk_index"] for chunk in chunks if chunk["init_cache"] and chunk["chunk_index"] > 0]
    if not cuts:
        return unknown("cut-repeats", "the run has no hard cut")
    first, again = "chunk_00000", f"chunk_{cuts[0]:05d}"
    ok = all((arrays[first] == arrays[again]).all() for arrays in (seen.latents, seen.pixels))
    message = f"chunk {cuts[0]} {'repeats' if ok else 'does not repeat'} chunk 0"
    return judge("cut-repeats", ok, message, ok, True)


@gate("prompt-changes-output")
def prompt_changes_output(seen: Observation) -> Finding:
    """Equal to the run without the change before it, and clearly different from it at the change."""
    name = "prompt-changes-output"
    if seen.other is None or seen.latents is None or seen.other.latents is None:
        return unknown(name, "needs the latents of this case and of the case it must differ from")
    at = next((event["at_chunk"] for event in seen.case.events if event["at_chunk"] > 0 and "prompt" in event), None)
    key = f"chunk_{at:05d}" if at is not None else None
    if key is None or key not in seen.latents or key not in seen.other.latents:
        return unknown(name, "no chunk at which the prompt changes is recorded by both")
    before = [k for k in seen.latents if k < key]
    drift = max(relative_error(seen.latents[k], seen.other.latents[k]) for k in before)
    change = relative_error(seen.latents[key], seen.other.latents[key])
    limit = LATENT_LIMIT * CHANGE_FACTOR
    message = f"before the change {drift:.2g}, at chunk {at} {change:.2g}"
    return judge(name, drift <= LATENT_LIMIT and change > limit, message, change, limit)
