"""Holds every kernel of every published variant, for every target and dtype, to the gates.

    python -m benchmarks.gates             compile what the committed table lacks, and an hourly part of the rest
    python -m benchmarks.gates --update    compile what the table lacks, and write it
    python -m benchmarks.gates --all       compile everything; with --update write it

Fails where a kernel is beyond a gate, and where the table is not what compiling gives.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from .compilations import CHIPS, DTYPES, VARIANTS, Compilation, compilations
from .limits import GATES, Row
from .resources import compile_resources
from .table import SUMMARY, TABLE, Place, Resources, Table, parse, summary_text, table_text

# The rest is recompiled in so many parts, by the hour. A prime, so that runs at the same hour of each day get to all.
PARTS = 31
# Of what another commit's table has not, at most so many: after an update of Triton that is everything.
MOST_CHANGED = 100
WRITE_EVERY_SECONDS = 30.0

Listed = dict[Place, Compilation]

_to_compile: Listed = {}  # for the processes, which are forked and find it filled: kernels cannot be sent to them


def list_compilations(targets: Iterable[str], dtypes: Iterable[str]) -> Listed:
    return {
        Place(target, dtype, made.kernel.__name__, made.key()): made
        for target in targets
        for dtype in dtypes
        for made in compilations(VARIANTS, DTYPES[dtype], CHIPS[target])
    }


def _compile(place: Place) -> tuple[Place, Resources]:
    return place, compile_resources(_to_compile[place])


def compiled(listed: Listed) -> Iterator[tuple[Place, Resources]]:
    """Results as they get ready, a process per processor; Triton's cache of earlier runs is not used."""
    _to_compile.update(listed)
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as pool,
    ):
        os.environ["TRITON_CACHE_DIR"] = cache
        for done in as_completed([pool.submit(_compile, place) for place in listed]):
            yield done.result()


def part_of(place: Place) -> int:
    return int(place.key, 16) % PARTS


def changed_since(revision: str, table: Table) -> list[Place]:
    """Places that the table of an earlier commit has not, or has with other results; none where there was no table."""
    root = TABLE.parents[2]
    show = ["git", "show", f"{revision}:{TABLE.relative_to(root)}"]
    done = subprocess.run(show, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{revision} has no table to compare with: {done.stderr.strip()}")
        return []
    before = parse(done.stdout)
    changed = sorted((place for place in table if before.get(place) != table[place]), key=lambda place: place.key)
    if len(changed) > MOST_CHANGED:
        print(f"{len(changed)} rows changed since {revision}, of which {MOST_CHANGED} are compiled")
    return changed[:MOST_CHANGED]


def row(place: Place, made: Compilation, resources: Resources) -> Row:
    """What the gates look at."""
    constants = {name: value for name, value in made.constants.items() if name.isupper()}
    return {**place._asdict(), "constants": constants, **made.options, **resources}


def beyond_gates(listed: Listed, table: Table, gates: Iterable = GATES) -> list[str]:
    rows = [row(place, listed[place], resources) for place, resources in table.items() if place in listed]
    return [f"{gate.__name__}: {json.dumps(row)}" for gate in gates for row in rows if gate(row)]


def differences(listed: Listed, table: Table, fresh: Table) -> list[str]:
    """What is wrong with the table, beside what was compiled now."""
    refresh = "`make gpu-gates-update` writes the table anew"
    missing = [f"not in the table, {refresh}: {' '.join(place)}" for place in listed if place not in table]
    unused = [f"of no kernel any more, {refresh}: {' '.join(place)}" for place in table if place not in listed]
    wrong = [
        f"compiles to something else: {json.dumps(row(place, listed[place], resources))}, in the table {table[place]}"
        for place, resources in fresh.items()
        if place in table and table[place] != resources
    ]
    return missing + unused + wrong


def update(listed: Listed, wanted: Listed, table: Table, others: Table) -> Table:
    """The table with the wanted compiled, in the order of what is listed; written on the way, too."""
    found = dict(table)
    written = time.monotonic()

    def whole() -> Table:
        return others | {place: found[place] for place in listed if place in found}

    for place, resources in compiled(wanted):
        found[place] = resources
        if time.monotonic() - written > WRITE_EVERY_SECONDS:
            print(f"{len(whole())} kernels", file=sys.stderr, flush=True)
            TABLE.write_text(table_text(whole()))
            written = time.monotonic()
    TABLE.write_text(table_text(whole()))
    SUMMARY.write_text(summary_text(whole()))
    return whole()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(CHIPS), help="comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--all", action="store_true", help="compile everything")
    parser.add_argument("--part", type=int, default=int(time.time()) // 3600 % PARTS, help=f"0 to {PARTS - 1}")
    parser.add_argument("--since", metavar="COMMIT", help="compile what changed in the table since then, too")
    options = parser.parse_args()
    targets, dtypes = options.targets.split(","), options.dtypes.split(",")
    listed = list_compilations(targets, dtypes)

    committed = parse(TABLE.read_text()) if TABLE.exists() else {}
    table = {place: found for place, found in committed.items() if place.target in targets and place.dtype in dtypes}
    new = {place: made for place, made in listed.items() if options.all or place not in table}
    if options.update:
        others = {place: resources for place, resources in committed.items() if place not in table}
        table = update(listed, new, table, others)
        finish(f"{len(table)} kernels, {len(new)} compiled", beyond_gates(listed, table))

    part = [place for place in listed if part_of(place) == options.part]
    changed = changed_since(options.since, table) if options.since else []
    wanted = {**new, **{place: listed[place] for place in [*part, *changed] if place in listed}}
    print(f"new: {len(new)}; --part {options.part} of {PARTS}: {len(part)}; changed: {len(changed)}", flush=True)
    fresh = dict(compiled(wanted))
    faults = beyond_gates(listed, {**table, **fresh}) + differences(listed, table, fresh)
    finish(f"{len(listed)} kernels, {len(fresh)} compiled", faults)


def finish(what: str, faults: list[str]) -> None:
    print("\n".join([*faults, f"{what}, {len(faults)} faults"]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    if "TRITON_INTERPRET" in os.environ:
        sys.exit("gates: TRITON_INTERPRET must be unset: nothing would be compiled")
    main()
