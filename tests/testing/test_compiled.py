"""The ahead-of-time gate: its verdicts, its table, its workers; and its quick subset, run."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastattn import env, testing
from fastattn.testing import compiled
from fastattn.testing.compiled import Job, changes, compile_all, judge, read, write
from fastattn.testing.problems import EVERY, problems
from fastattn.testing.recorded import Launch, recording

ROW = {
    "kernel": "op/kernel", "target": "sm_90", "variant": " |  | ", "problem": "op, case, bfloat16", "registers": 32,
    "spills": 0, "matrix": {"HGMMA": 2},
}  # fmt: skip


def job(kernel="fastattn.ops.op.triton_kernels:kernel", target="sm_90", dim=64):
    return Job(Launch(kernel, target, (), (), (), (), "op, case, bfloat16"), aligned=False, dim=dim)


def test_a_row_like_the_tables_is_right():
    verdict = judge([(job(), ROW, [])], [ROW], same_compiler=True)
    assert not verdict.failures and not verdict.differences


def test_a_broken_law_fails_whatever_the_table_says():
    verdict = judge([(job(), ROW, ["7 spills"])], [ROW], same_compiler=False)
    (failure,) = verdict.failures
    assert failure.startswith("op/kernel on sm_90 (op, case, bfloat16;") and failure.endswith("7 spills")


@pytest.mark.parametrize("what", ["spills", "waits"])
def test_some_things_may_not_grow_and_may_shrink(what):
    verdict = judge([(job(), {**ROW, what: 9}, [])], [{**ROW, what: 8}], same_compiler=True)
    assert f"{what} grew from 8 to 9" in verdict.failures[0]
    verdict = judge([(job(), {**ROW, what: 7}, [])], [{**ROW, what: 8}], same_compiler=True)
    assert not verdict.failures and f"{what} 8 -> 7" in verdict.differences[0]


def test_another_compiler_is_held_to_the_laws_alone():
    verdict = judge([(job(), {**ROW, "registers": 99}, [])], [ROW], same_compiler=False)
    assert not verdict.failures and not verdict.differences


def test_what_is_not_in_the_table_is_a_difference():
    verdict = judge([(job(), ROW, []), (job(), {**ROW, "waits": 2}, [])], [], same_compiler=True)
    assert [line.partition("): ")[2] for line in verdict.differences] == [
        "not in the table",
        "not in the table, 2 waits",
    ]


def test_changes_are_named():
    assert changes(ROW, {**ROW, "registers": 40, "problem": "another"}) == ["registers 32 -> 40"]


def test_the_table_has_a_line_for_every_row_in_order(tmp_path):
    rows = [{**ROW, "kernel": name} for name in ("b", "a")]
    write(tmp_path / "t.json", {"triton": "3.7.1", "rows": rows})
    assert read(tmp_path / "t.json") == {"triton": "3.7.1", "rows": rows[::-1]}
    assert sum('"kernel"' in line for line in (tmp_path / "t.json").read_text().splitlines()) == 2


@pytest.mark.compiled
def test_what_is_recorded():
    swiglu = [problem for problem in problems() if problem.suite.name == "swiglu"]
    broken = replace(swiglu[0], name="broken", build=lambda sampler: 1 / 0)
    recorded = compiled.record([*swiglu, broken], most=10**6)
    jobs = recorded.jobs.values()
    assert {one.launch.target for one in jobs} == set(EVERY)
    assert {one.launch.name for one in jobs} == {"swiglu/forward", "swiglu/backward"}
    assert any("not by 16" in one.launch.variant for one in jobs if one.launch.target == "sm_90")
    assert [line for line in compiled.never_used(recorded) if line.startswith("swiglu")] == []
    assert recorded.raised == [
        f"swiglu, broken, bfloat16 on {target}: ZeroDivisionError: division by zero" for target in EVERY
    ]
    few = compiled.record(swiglu, most=0)
    assert few.jobs.keys() < recorded.jobs.keys() and compiled.never_used(few)


@pytest.mark.compiled
def test_a_compiler_that_dies_takes_nothing_with_it(tmp_path, monkeypatch):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "dies.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "room" / "lacks.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    jobs = [job(f"room.{name}:kernel", target) for name, target in
            (("lacks", "sm_80"), ("dies", "sm_120"), ("lacks", "sm_90"), ("lacks", "sm_100"))]  # fmt: skip
    found = {one.key: wrong for one, _, wrong in compile_all(jobs, 2)}
    assert len(found) == 4
    for one in jobs:
        (wrong,) = found[one.key]
        assert (
            wrong == "the compiler died" if "dies" in one.launch.kernel else wrong.startswith("does not compile: Att")
        )


@pytest.mark.compiled
@pytest.mark.timeout(900)
def test_quick_subset():
    """One problem of every op, for the main targets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastattn.testing.compiled", "--quick"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.compiled
def test_the_committed_table_is_one():
    document = json.loads(compiled.TABLE.read_text())
    assert document["triton"] and len({compiled.key_of(row) for row in document["rows"]}) == len(document["rows"])


ASSERTING = [
    ("cross_entropy", "none ignoring 3", "cross entropy: "),
    ("decode", "lengths, rows of the cache", "decode: "),
    ("decode", "pages of 16", "decode: a page outside of the cache"),
    ("rotary", "halves offsets", "rotary: "),
    ("attention", "prefix 40 of 300 bottom_right", "attention: prefix_len"),
    ("attention_varlen", "of other lengths", "attention_varlen: "),
]


@pytest.mark.compiled
@pytest.mark.parametrize(("suite", "case", "message"), ASSERTING, ids=lambda part: part.replace(" ", "_"))
def test_values_are_asserted_on_the_device_when_debugging(suite, case, message, monkeypatch):
    """A device assert without the launch option `debug` is nothing."""
    found = testing.suites()[suite]
    problem = next(case_ for case_ in found.cases if case_.name == case)
    monkeypatch.setattr(env, "debugging", lambda: True)
    with recording("sm_80") as launches:
        found.function(**found.arguments(problem, "cpu", torch.float16), backend="triton")
    kernels = [launch.compile().asm for launch in launches]
    asserting = [asm for asm in kernels if message in asm["ttir"]]
    assert asserting and all("__assertfail" in asm["ptx"] for asm in asserting)
