"""The look-up of tile sizes."""

import json

import pytest
import torch

from fastattn.gpu import tuning
from fastattn.gpu.devices import KNOWN, Target


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An op with a table of its own."""

    def write(document):
        (tmp_path / "op").mkdir()
        (tmp_path / "op" / "tuning.json").write_text(json.dumps(document))
        monkeypatch.setattr(tuning, "OPS", tmp_path)

    tuning.forget()
    yield write
    tuning.forget()


def test_the_nearest_size_and_the_next_larger_dim(room):
    entries = [
        {"dtype": dtype, "dim": dim, "size": size, "options": {"SEEN": number}}
        for number, (dtype, dim, size) in enumerate(
            (d, e, s) for d in ("float32", "bfloat16") for e in (64, 128) for s in (128, 4096)
        )
    ]
    room({"kernel": {"sm_90": entries}})

    def seen(dtype, dim, size):
        return tuning.options("op", "kernel", KNOWN["sm_90"], dtype, dim, "", size)["SEEN"]

    assert seen(torch.float32, 64, 1) == 0
    assert seen(torch.float32, 65, 700) == 2
    assert seen(torch.float32, 65, 800) == 3
    assert seen(torch.bfloat16, 300, 10**9) == 7


def test_a_target_without_a_table_has_that_of_the_nearest_older_one(room):
    room({"kernel": {n: [{"options": {"SEEN": i}}] for i, n in enumerate(("sm_80", "sm_90", "gfx942", "sm_100"))}})

    def seen(name):
        return tuning.options("op", "kernel", Target(name, 1))["SEEN"]

    assert [seen(n) for n in ("sm_80", "sm_86", "sm_90", "sm_103", "sm_120", "gfx942", "gfx950", "gfx90a")] == [
        0, 0, 1, 3, 3, 2, 2, 2,
    ]  # fmt: skip


def test_rows_that_registers_do_not_hold_have_a_kernel_of_their_own(room):
    rows = [{"dim": n, "options": {"ROWS": 256 // n, "COLUMNS": n}} for n in (64, 128)]
    room({"rows": {"sm_90": rows}, "long": {"sm_90": [{"options": {"LANES": 32}}]}})
    found = [tuning.row_kernel("op", "rows", "long", KNOWN["sm_90"], columns) for columns in (1, 64, 65, 128, 129)]
    assert [(kernel, together) for kernel, together, _ in found] == [
        ("rows", 4), ("rows", 4), ("rows", 2), ("rows", 2), ("long", 1)
    ]  # fmt: skip
    assert found[-1][2] == {"LANES": 32}


def test_an_unknown_kind_is_an_error(room):
    room({"kernel": {"sm_90": [{"kind": "causal", "options": {}}]}})
    with pytest.raises(LookupError, match=r"op/tuning.json has no entry of kernel on sm_90 for None 'full'"):
        tuning.options("op", "kernel", KNOWN["sm_90"], None, 0, "full")


def test_every_committed_table_serves_every_known_target():
    paths = sorted(tuning.OPS.glob("*/tuning.json"))
    assert paths
    for path in paths:
        for kernel, known in tuning.table(path.parent.name).items():
            for target in KNOWN:
                assert known[tuning._relative(target, known)], (path, kernel, target)


def test_measurements_of_this_device_come_first(room, monkeypatch):
    entries = [{"dim": 128, "size": size, "options": {"ROWS": size}} for size in (64, 4096)]
    room({"kernel": {"sm_90": entries}})
    found = [
        {"dtype": "bfloat16", "dim": 128, "kind": "", "size": 2048, "options": {"ROWS": 7}},
        {"dtype": "bfloat16", "dim": 64, "kind": "", "size": 2048, "options": {"ROWS": 8}},
        {"dtype": "bfloat16", "dim": 128, "kind": "", "size": 64, "options": {"OTHER": 9}},
    ]
    monkeypatch.setattr(tuning.measured, "entries", lambda device, op, kernel: found if device == "GPU" else [])
    here = Target("sm_90", 232_448, device="GPU")

    def seen(target, size, dtype=torch.bfloat16):
        return tuning.options("op", "kernel", target, dtype, 100, "", size)["ROWS"]

    assert [seen(here, size) for size in (64, 2048, 3000, 4096)] == [64, 7, 4096, 4096]
    assert seen(here, 2048, torch.float16) == 4096 == seen(KNOWN["sm_90"], 2048)


def test_options_can_be_forced_for_one_target(room):
    room({"kernel": {"sm_90": [{"options": {"ROWS": 1}}]}, "other": {"sm_90": [{"options": {"ROWS": 2}}]}})
    forced = Target("sm_90", 232_448, forced={("op", "kernel"): {"ROWS": 5}})
    assert [tuning.options("op", name, forced)["ROWS"] for name in ("kernel", "other")] == [5, 2]
    assert tuning.options("op", "kernel", KNOWN["sm_90"])["ROWS"] == 1


def test_look_ups_are_watched(room):
    room({"kernel": {"sm_90": [{"dim": 64, "options": {"ROWS": 1}}, {"dim": 128, "options": {"ROWS": 2}}]}})
    with tuning.watched() as found:
        tuning.options("op", "kernel", KNOWN["sm_90"], torch.float16, dim=100, size=7)
    tuning.options("op", "kernel", KNOWN["sm_90"])
    (one,) = found
    assert (one.kernel, one.dtype, one.dim, one.size, one.options) == ("kernel", torch.float16, 100, 7, {"ROWS": 2})
    assert one.tile_dim == 128
