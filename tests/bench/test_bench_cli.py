"""`fastattn bench`: what it prints, what its last line holds, how it ends."""

import json
import re
from dataclasses import replace

import pytest
import torch

import fastattn
from fastattn import allocator, backends, ceilings, machine, testing
from fastattn.bench import cases, contenders, measure, report, runner
from fastattn.bench.contenders import OURS, TORCH, Contender
from fastattn.cli import main

OPS = tuple(cases.suites())
TINY = ("--shape", "1,2,24,8", "--contenders", "eager", "--min-time", "0")


def error_line(capsys, *arguments):
    try:
        code = main(["bench", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert re.fullmatch(r"fastattn: error: [^\n]+\n", captured.err), captured.err
    return captured.err


def test_attention(bench, tmp_path):
    out = tmp_path / "results.json"
    threads = torch.get_num_threads()
    code, lines, found = bench("attention", *TINY, "--threads", "1", "--out", str(out))
    assert code == 0
    assert torch.get_num_threads() == threads
    assert json.loads(out.read_text()) == found
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]

    assert found["schema"] == "fastattn-bench-1"
    assert found["op"] == "attention"
    assert found["clock"] == "thread_cpu"
    assert found["machine"]["threads"] == 1
    assert len(found["machine"]["load_average"]) == 3
    assert found["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "allocator", "environment", "ceilings", "summary"} <= set(found)
    rows = found["rows"]
    assert [(r["workload"], r["dtype"], r["direction"]) for r in rows] == [
        (workload, dtype, direction)
        for workload in ("1x2x24x8 causal", "1x2x24x8")
        for dtype in ("fp32", "bf16")
        for direction in ("forward", "forward+backward")
    ]
    for row in rows:
        assert row["violations"] == []
        assert set(row["contenders"]) == {"fastattn", "torch", "eager"}
        assert row["best_peer"] in ("torch", "eager")
        times = {name: entry["median_s"] for name, entry in row["contenders"].items()}
        assert row["speedup"] == pytest.approx(times[row["best_peer"]] / times["fastattn"], rel=1e-4)
        assert row["ahead"] == (row["speedup"] > 1)
        fastest = min(entry["min_s"] for entry in row["contenders"].values())
        for entry in row["contenders"].values():
            assert 0 < entry["min_s"] <= entry["p20_s"] <= entry["median_s"] <= entry["p80_s"]
            hopeless = entry["min_s"] > measure.HOPELESS * fastest
            assert entry["n"] >= (measure.HOPELESS_SAMPLES if hopeless else 7)
            expected = {"output"} | (
                {"grad_query", "grad_key", "grad_value"} if "backward" in row["direction"] else set()
            )
            assert set(entry["errors"]) == expected
    assert found["summary"]["rows"] == 8
    assert found["summary"]["ahead"] + len(found["summary"]["behind"]) == 8
    text = "\n".join(lines)
    assert "attention 1x2x24x8 causal bf16 forward+backward" in text
    assert "8 of 8 rows within the law" in text


def test_shares_of_the_ceiling(bench, skip_without_native):
    _, _, found = bench("attention", *TINY, "--dtype", "fp32", "--threads", "1")
    assert found["ceilings"]["isa"] == backends.cpu_isa()
    for row in found["rows"]:
        roof, ours = row["roof"], row["contenders"]["fastattn"]
        assert roof["bound"] in ("compute", "memory")
        assert ours["ceiling_share"] == pytest.approx(roof["seconds"] / ours["median_s"], rel=1e-4)
        assert 0 < ours["ceiling_share"] < 1


ROWS_AND_COLUMNS = ("layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy")


@pytest.mark.parametrize("op", ROWS_AND_COLUMNS)
def test_other_ops(bench, op):
    arguments = (op, "--shape", "6,40", "--contenders", "torch", "--min-time", "0", "--dtype", "bf16")
    code, _, found = bench(*arguments)
    assert code == 0
    assert [row["direction"] for row in found["rows"]] == ["forward", "forward+backward"]
    assert all(set(row["contenders"]) == {"fastattn", "torch"} for row in found["rows"])


def test_ops_are_found_by_existing():
    assert set(OPS) == {name for name, suite in testing.suites().items() if suite.workloads} >= set(ROWS_AND_COLUMNS)


def test_all_ops_make_one_document(bench, monkeypatch):
    monkeypatch.setattr(cases, "select", lambda op, **_: [cases.BenchCase(cases.suite_of(op), first(op), "fp32")])

    def first(op):
        return cases.parse_shape(op, {"attention": "1,2,24,8"}.get(op, "6,40"))[0]

    monkeypatch.setattr(cases, "suites", lambda: {op: cases.suite_of(op) for op in ("attention", *ROWS_AND_COLUMNS)})
    monkeypatch.setattr(cases, "suite_of", testing.suites().__getitem__)
    code, _, found = bench("all", "--min-time", "0", "--quick", "--contenders", "torch")
    assert code == 0
    assert found["op"] == "all"
    assert [row["op"] for row in found["rows"][::2]] == ["attention", *ROWS_AND_COLUMNS]


def test_more_peers_are_contenders(bench, monkeypatch):
    peers = (("formula", lambda input, dim: input.exp() / input.exp().sum(dim, keepdim=True)),)
    suite = replace(cases.suite_of("softmax"), peers=peers)
    monkeypatch.setattr(cases, "suite_of", lambda op: suite)
    arguments = ("softmax", "--shape", "6,40", "--contenders", "formula", "--min-time", "0", "--dtype", "fp32")
    code, _, found = bench(*arguments)
    assert code == 0
    assert all(set(row["contenders"]) == {"fastattn", "torch", "formula"} for row in found["rows"])


def test_an_op_without_gradients_runs_forward_only(bench, monkeypatch):
    suite = replace(cases.suite_of("softmax"), differentiable=())
    monkeypatch.setattr(cases, "suite_of", lambda op: suite)
    arguments = ("softmax", "--shape", "6,40", "--contenders", "torch", "--min-time", "0", "--dtype", "fp32")
    _, _, found = bench(*arguments)
    assert [row["direction"] for row in found["rows"]] == ["forward"]


def test_quick_selects_the_shapes_of_the_contract():
    selected = cases.select("attention", quick=True, shapes=(), dtypes=None)
    shapes = ("8x12x128x64", "1x12x1024x64", "1x8x4096x64", "1x8x4096x128")
    assert {(case.workload.name, case.dtype_name) for case in selected} == {
        (shape + mask, dtype) for shape in shapes for mask in ("", " causal") for dtype in ("fp32", "bf16")
    }


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_workloads(op):
    quick = cases.select(op, quick=True, shapes=(), dtypes=None)
    full = cases.select(op, quick=False, shapes=(), dtypes=["fp16"])
    assert quick
    assert {case.workload.name for case in quick} <= {case.workload.name for case in full}


def wrong(monkeypatch, function):
    choices = contenders.choices
    monkeypatch.setattr(contenders, "choices", lambda suite: choices(suite) | {OURS: lambda: Contender(OURS, function)})


def test_both_allocators(bench, capsys, monkeypatch):
    """The default first: malloc cannot be untuned."""
    monkeypatch.setitem(allocator._last, "tuning", None)
    monkeypatch.setattr(fastattn._C, "tune_allocator", lambda: (True, "as asked"))
    arguments = ("softmax", "--shape", "6,40", "--contenders", "torch", "--min-time", "0", "--dtype", "fp32")
    code, lines, found = bench(*arguments, "--allocator", "both")
    assert code == 0
    assert [row["allocator"] for row in found["rows"]] == ["default", "default", "tuned", "tuned"]
    assert found["allocator"]["tuned"]
    assert "allocator: as asked" in lines
    assert main(["bench", *arguments, "--allocator", "both"]) == 2
    assert "this process's allocator is tuned already" in capsys.readouterr().err


def test_an_allocator_that_cannot_be_tuned_is_not_called_tuned(bench, monkeypatch):
    monkeypatch.setitem(allocator._last, "tuning", None)
    monkeypatch.setattr(fastattn._C, "tune_allocator", lambda: (False, "malloc is somebody's"))
    arguments = ("softmax", "--shape", "6,40", "--contenders", "torch", "--min-time", "0", "--dtype", "fp32")
    _, lines, found = bench(*arguments, "--allocator", "tuned")
    assert {row["allocator"] for row in found["rows"]} == {"default"}
    assert "allocator: malloc is somebody's" in lines


def test_scaling_over_one_thread(bench):
    arguments = ("softmax", "--shape", "6,40", "--contenders", "compile", "--min-time", "0", "--dtype", "fp32")
    _, lines, found = bench(*arguments, "--threads", "2", "--scaling")
    for row in found["rows"]:
        for name in ("fastattn", "torch"):
            entry = row["contenders"][name]
            assert entry["scaling"] == pytest.approx(entry["one_thread_s"] / entry["median_s"], rel=1e-4)
        assert "scaling" not in row["contenders"]["compile"]
    assert sum("2 threads over one: fastattn" in line for line in lines) == 2


def test_a_slow_machine_makes_an_invalid_run(bench, monkeypatch, skip_without_native):
    isa = backends.cpu_isa()
    vendor, family, model = machine.cpu_identity()
    this = (vendor, family, range(model, model + 1))
    for rate, valid in ((1e15, False), (1e3, True)):
        known = ceilings.KnownCpu("This one", *this, {isa: (rate, None)})
        monkeypatch.setattr(ceilings, "KNOWN_CPUS", (known,))
        arguments = ("softmax", "--shape", "6,40", "--contenders", "torch", "--min-time", "0", "--dtype", "fp32")
        _, lines, found = bench(*arguments)
        assert found["validity"]["valid"] is valid
        assert any(("INVALID run" in line) is not valid for line in lines)
    monkeypatch.setattr(ceilings, "KNOWN_CPUS", ())
    assert ceilings.validity(1).valid is None


def test_results_into_a_folder_are_named_by_machine_op_threads_and_date(bench, tmp_path):
    arguments = ("log_softmax", "--shape", "6,40", "--contenders", "torch", "--min-time", "0", "--dtype", "fp32")
    _, _, found = bench(*arguments, "--threads", "1", "--out", str(tmp_path))
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(rf"[a-z0-9.-]+-log-softmax-1-thread-{found['date'][:10]}\.json", path.name), path.name
    assert json.loads(path.read_text()) == found


@pytest.mark.parametrize(
    ("identity", "cpu"),
    [
        (("AuthenticAMD", 25, 17), "amd-epyc-zen4"),
        (("AuthenticAMD", 25, 1), "amd-epyc-zen3"),
        (("AuthenticAMD", 26, 2), "amd-epyc-zen5"),
        (("AuthenticAMD", 23, 49), "amd-epyc-authenticamd-23.49"),
        (("", 0, 0), "amd-epyc"),
    ],
)
def test_results_are_named_by_the_design_where_it_is_known(monkeypatch, identity, cpu):
    monkeypatch.setattr(machine, "cpu_identity", lambda: identity)
    monkeypatch.setattr(machine, "cpu_name", lambda: "AMD EPYC")
    assert report.file_name("softmax", 1).startswith(f"{cpu}-softmax-1-thread-")


def test_a_wrong_kernel_is_not_timed(bench, monkeypatch):
    wrong(monkeypatch, lambda **call: torch.nn.functional.scaled_dot_product_attention(**call) * 1.001)
    code, lines, found = bench("attention", *TINY, "--dtype", "fp32")
    assert code == 1
    assert len(found["summary"]["failed"]) == found["summary"]["rows"] == 4
    assert found["summary"]["ahead"] == 0
    for row in found["rows"]:
        assert "output: norm error" in row["violations"][0]
        assert row["speedup"] is None
        assert not row["ahead"]
        assert "median_s" not in row["contenders"]["fastattn"]
        assert row["contenders"]["fastattn"]["errors"]["output"]["norm"] > 1e-4
    assert sum("FAILED output: norm error" in line for line in lines) == 4


def test_a_kernel_that_raises_fails_its_row(bench, monkeypatch):
    def broken(**call):
        raise RuntimeError("no such luck\nand more")

    wrong(monkeypatch, broken)
    code, _, found = bench("attention", *TINY, "--dtype", "fp32")
    assert code == 1
    assert all(row["violations"] == ["raised: no such luck"] for row in found["rows"])


def test_a_kernel_that_is_right_without_gradients_only(bench, monkeypatch):
    def half_right(**call):
        output = torch.nn.functional.scaled_dot_product_attention(**call)
        return output * 1.001 if torch.is_grad_enabled() else output

    wrong(monkeypatch, half_right)
    code, _, found = bench("attention", *TINY, "--dtype", "fp32")
    assert code == 1
    assert [bool(row["violations"]) for row in found["rows"]] == [False, True] * 2


def test_a_peer_that_cannot_is_said_to(bench, monkeypatch):
    monkeypatch.setattr(runner, "_physical_memory", lambda: 100_000)
    code, lines, found = bench("attention", "--shape", "1,1,200,2", *TINY[2:], "--dtype", "fp32")
    assert code == 0
    assert found["rows"][0]["contenders"]["eager"] == {"unavailable": "needs about 0 GiB"}
    assert found["rows"][0]["best_peer"] == TORCH
    assert any(re.fullmatch(r"  eager +needs about 0 GiB", line) for line in lines)


@pytest.mark.slow
def test_compiled_contenders(bench):
    arguments = ("attention", "--shape", "1,2,64,32", "--contenders", "compile,flex", "--min-time", "0")
    code, _, found = bench(*arguments)
    assert code == 0
    for row in found["rows"]:
        assert "median_s" in row["contenders"]["compile"]
        backward = "backward" in row["direction"]
        assert row["contenders"]["flex"].get("unavailable") == ("has no backward" if backward else None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("conv",), "invalid choice: 'conv'"),
        ((), "required: op"),
        (("attention", "--shape", "1,2,3"), "of attention is BATCH,HEADS,LENGTH,DIM in whole numbers, got '1,2,3'"),
        (("attention", "--shape", "1,2,x,4"), "got '1,2,x,4'"),
        (("attention", "--shape", "1,2,0,4"), "sizes are 1 or more"),
        (("softmax", "--shape", "1,2,3,4"), "--shape of softmax is ROWS,COLUMNS"),
        (("attention", "--shape", "1000000,1000,100000,64"), "their product at most 2**40"),
        (("attention", "--shape", "1024,1024,1024,1024"), "GiB, the machine has"),
        (("attention", "--dtype", "fp8"), "--dtype fp8: there are fp32, bf16, fp16"),
        (("all", "--shape", "2,3"), "--shape and --workload are for one op"),
        (("attention", "--threads", "1", "--scaling"), "--scaling compares several threads with one"),
        (("attention", "--threads", "0"), "--threads must be 1 to 1024, got 0"),
        (("attention", "--threads", "two"), "invalid int value: 'two'"),
        (("attention", "--min-time", "nan"), "--min-time must be a number of seconds, 0 or more, got nan"),
        (("attention", "--min-time", "-1"), "got -1.0"),
        (("attention", "--contenders", "cudnn"), "no contender 'cudnn'"),
        (("softmax", "--contenders", "eager"), "no contender 'eager'"),
        (("attention", "--out", "/no/such/folder/x.json"), "a folder that exists, or a file in one, is needed"),
        (("attention", "--allocator", "jemalloc"), "invalid choice: 'jemalloc'"),
        (("attention", "--quik"), "unrecognized arguments: --quik"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(capsys, arguments, message):
    assert message in error_line(capsys, *arguments)
