"""The report of `make gpu` on recorded rows: what is derived, what merges, what is held against the targets."""

import sys

import pytest

from benchmarks.case import Case
from benchmarks.gpu import report
from benchmarks.gpu.plan import CORE, Step
from benchmarks.gpu.report import OUT_OF_TIME, TARGETS, Results
from benchmarks.report import best_peer, ours

VERSIONS = {"torch": "2.11", "driver": "580", "sources": "abc"}
SOURCE = {"machine": "NVIDIA H200", "threads": 0, "date": "2026-01-31", "versions": VERSIONS}
GIB = 2**30


def cell(ms: float, error: float = 1e-3, peak: int = GIB) -> dict:
    times = {"ms": ms, "ms_10": 0.9 * ms, "ms_90": 1.1 * ms, "calls": 7}
    return times | {"error": error, "peak": peak, "note": f"peak {peak // GIB} GiB"}


def row(model: str = "b2", batch: int = 256, size: int = 224, **fields) -> dict:
    """A row in which the graph is ours, the compiled model the baseline, and a faster one wrong."""
    return SOURCE | {
        "model": f"pvt_v2_{model}",
        "batch": batch,
        "size": size,
        "dtype": "bf16",
        "gflop": 2000.0,
        "peaks": {},
        "bound": 2e-3,
        "contenders": {
            "captured": cell(8.0, peak=3 * GIB),
            "eager": cell(8.5, peak=2 * GIB),
            "again": cell(8.2),
            "timm": cell(30.0),
            "compile": cell(14.0, peak=4 * GIB),
            "compile-flash": cell(4.0, error=1.0),
            "compile-cudnn": {"failure": "RuntimeError: no | kernel"},
        },
    } | fields  # fmt: skip


def kernel_row(**fields) -> dict:
    ceilings = {"copy_gbs": 4000.0, "product_tflops": 800.0, "floor_us": 2.0, "processors": 132, "clock_ghz": 1.98,
                "clock_source": "the highest, by nvidia-smi"}  # fmt: skip
    launch = {"kernel": "small_kernel", "shape": "C=64 grid=7", "constants": {"C": 64}, "count": 2, "us": 5.0,
              "us_10": 4.0, "us_90": 6.0, "bytes": 4_000_000, "matrix_flop": 0, "lane_instructions": 1,
              "roofline_us": 1.0, "bound_by": "memory"}  # fmt: skip
    large = launch | {"kernel": "large_kernel", "count": 3, "us": 50.0, "bytes": 100_000_000, "matrix_flop": 8 * 10**9}
    case = {"model": "pvt_v2_b2", "batch": 256, "size": 224, "dtype": "bf16"}
    return SOURCE | case | {"ceilings": ceilings, "launches": [launch, large | {"roofline_us": 25.0}]} | fields


def check(outcome: str = "passed", **fields) -> dict:
    return SOURCE | {"phase": "tests", "what": "pytest", "outcome": outcome, "told": "7 passed", "lines": []} | fields


def test_what_is_derived_from_a_row():
    assert ours(row()) == "captured"
    assert best_peer(row()) == "compile"
    assert report.speedup(row()) == 1.75
    assert report.memory_ratio(row()) == 0.75


def test_ours_is_the_faster_way_and_has_to_be_right():
    assert ours(row(contenders=row()["contenders"] | {"captured": cell(9.0)})) == "eager"
    assert ours(row(contenders=row()["contenders"] | {"captured": cell(1.0, error=float("nan"))})) == "eager"


def test_without_ours_or_a_peer_nothing_is_derived():
    for gone in ({"captured", "eager"}, {"timm", "compile", "compile-flash"}):
        kept = {name: value for name, value in row()["contenders"].items() if name not in gone}
        alone = row(contenders=kept)
        assert (report.speedup(alone), report.memory_ratio(alone), report._verdict(alone)) == (None, None, "-")
        assert "| b2 bf16 bs256 224px | " in report.markdown(Results([alone]))


@pytest.mark.parametrize(("ms", "told"), [(14.0 / 1.49, "**missed**"), (14.0 / 1.5, "must met"), (7.7, "goal met")])
def test_verdicts(ms, told):
    assert report._verdict(row(contenders={"captured": cell(ms), "compile": cell(14.0)})).endswith(told)


def test_every_goal_is_above_its_must():
    assert len(TARGETS) == 7 * 5
    assert TARGETS[Case("pvt_v2_b2_li", 256, 224, "bf16")] == (1.6, 2.0)
    assert TARGETS[Case("pvt_v2_b5", 8, 1024, "bf16")] == (1.15, 1.3)
    assert all(1 < must < goal for must, goal in TARGETS.values())


def test_rows_measured_again_replace_theirs_and_no_other():
    results = Results()
    for model, batch in (("b2", 256), ("b0", 1), ("b2", 1)):
        results.add("models", row(model, batch))
    again = row("b2", 256, date="2026-02-01")
    results.add("models", again)
    results.add("models", row("b2", 256, machine="NVIDIA H100"))
    assert [(r["machine"], r["model"], r["batch"], r["date"]) for r in results.models] == [
        ("NVIDIA H100", "pvt_v2_b2", 256, "2026-01-31"),
        ("NVIDIA H200", "pvt_v2_b0", 1, "2026-01-31"),
        ("NVIDIA H200", "pvt_v2_b2", 1, "2026-01-31"),
        ("NVIDIA H200", "pvt_v2_b2", 256, "2026-02-01"),
    ]
    results.add("checks", check("failed"))
    results.add("checks", check())
    assert [c["outcome"] for c in results.checks] == ["passed"]


def test_a_step_measured_at_last_is_no_failure_any_more():
    results = Results(checks=[check("failed", phase="models", what="a case"), check()])
    results.forget("NVIDIA H200", Step("models", "a case", 1.0))
    assert results.checks == [check()]


def test_a_step_is_held_by_results_of_the_same_sources():
    case = Case("pvt_v2_b2", 256, 224, "bf16")
    core, whole = (Step("models", "", 1.0, case, names) for names in (CORE, (*CORE, "compile-flash", "compile-cudnn")))
    results = Results(models=[row()], kernels=[kernel_row()], checks=[check()])
    assert results.hold(core, "abc")
    assert results.hold(whole, "abc"), "a contender that failed was measured"
    assert not results.hold(core, "other")
    late = Results(models=[row(contenders=row()["contenders"] | {"compile-flash": {"failure": OUT_OF_TIME}})])
    assert not late.hold(whole, "abc")
    assert late.hold(core, "abc")
    kernels, tests = Step("kernels", "", 1.0, case), Step("tests", "pytest", 1.0)
    assert results.hold(kernels, "abc")
    assert not late.hold(kernels, "abc")
    assert results.hold(tests, "abc")
    assert not Results(checks=[check("failed")]).hold(tests, "abc")


def test_markdown_has_every_figure():
    results = Results([row(), row("b0", 1, contenders={"captured": cell(0.1)})], [kernel_row()], [
        check(),
        check("failed", what="memcheck", phase="sanitize", told="error summary: 1 error", lines=["=== Invalid read"]),
    ], ["models b5 bf16 bs1 224px"])  # fmt: skip
    lines = report.markdown(results).splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        "## Checks",
        "## NVIDIA H200",
        "## NVIDIA H200: kernels of b2 bf16 bs256 224px",
        "## Not measured: out of time",
    ]
    for line in (
        "| sanitize | memcheck | failed | error summary: 1 error | NVIDIA H200 | 2026-01-31 |",
        "=== Invalid read",
        "- 2026-01-31: torch 2.11, driver 580, sources abc",
        "| case | captured | eager | again | timm | compile | compile-flash | compile-cudnn | best peer | must/goal "
        "| memory | images/s | % of peak | measured |",
        "| b2 bf16 bs256 224px | 8.0 | 8.5 (1.06) | 8.2 (1.02) | 30.0 (3.75) | 14.0 (1.75) | **wrong**: error 1e+00 "
        "| - | compile 1.75 | 1.5/1.8 must met | 0.75 **missed** | 32,000 | - | 2026-01-31 |",
        "| b0 bf16 bs1 224px | 0.100 | - | - | - | - | - | - | - | - | - | 10,000 | - | 2026-01-31 |",
        "| b2 bf16 bs256 224px | compile | 14.00 | 12.60-15.40 | 1.75 | 142857 | - | 1.0e-03 | peak 4 GiB |",
        "| b2 bf16 bs256 224px | compile-cudnn | - | - | - | - | - | - | did not run: RuntimeError: no \\| kernel |",
        "| large_kernel | C=64 grid=7 | 3 | 50.0 | 150 | 100.00 | 2000 | 50 | 8.00 | 25.0 (memory) | 2.00 |",
        "| small_kernel | C=64 grid=7 | 2 | 5.0 | 10 | 4.00 | 800 | 20 | 0.00 | 1.0 (memory) | 5.00 |",
        "- models b5 bf16 bs1 224px",
    ):
        assert line in lines
    kernels = [line.split()[1] for line in lines if "_kernel |" in line]
    assert kernels == ["large_kernel", "small_kernel"], "what takes most of a forward comes first"


def test_a_folder_is_added_to(tmp_path):
    assert report.load(tmp_path / "new") == Results()
    results = Results([row()], [kernel_row()], [check()], ["models b5"])
    report.save(results, tmp_path / "new")
    assert report.load(tmp_path / "new") == results
    assert (tmp_path / "new" / "gpu.md").read_text() == report.markdown(results)
    assert (tmp_path / "new" / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_nothing(tmp_path):
    report.save(Results([row(contenders={"captured": cell(1.0)})]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_without_matplotlib_the_report_is_written_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told: list[str] = []
    report.save(Results([row()]), tmp_path, told.append)
    assert told[0].startswith("gpu.png was not drawn: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
