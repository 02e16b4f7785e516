"""The machine's ceilings: what they are made of, that they are plausible, that they cost little the second time."""

import time

import numpy
import pytest
import torch

from fastattn import backends, ceilings, machine

REMEMBERED = (ceilings._rate, ceilings._read, ceilings._copy)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Little time for each, and nothing remembered from or for other tests."""
    monkeypatch.setattr(ceilings, "COMPUTE_SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "BANDWIDTH_SECONDS", 0.01)
    for measure in REMEMBERED:
        measure.cache_clear()
    yield
    for measure in REMEMBERED:
        measure.cache_clear()


@pytest.fixture
def native(skip_without_native):
    return backends.native_module()


def runnable():
    if backends.probe("cpu") is not None:
        return []
    return [name for name, can_run, _ in backends.native_module().cpu_isas() if can_run]


@pytest.mark.parametrize("isa", runnable())
def test_every_instruction_set_multiplies_and_adds(native, isa):
    rate = ceilings.fma(isa=isa)
    assert 1e8 < rate < 1e13  # between a very old core and more than any core can do


def test_wider_registers_do_more(native):
    if "avx2" not in runnable():
        pytest.skip("needs AVX2")
    assert ceilings.fma(isa="avx2") > 1.2 * ceilings.fma(isa="scalar")


def test_dot_products_where_there_is_an_instruction(native):
    assert ceilings.dot(isa="scalar") is None
    if "avx512_bf16" in runnable():
        assert ceilings.dot(isa="avx512_bf16") > 1.5 * ceilings.fma(isa="avx512_bf16")


def test_arithmetic_of_a_dtype(native):
    assert ceilings.arithmetic(torch.float32) == ceilings.fma()
    assert ceilings.arithmetic(torch.float16) == ceilings.fma()
    assert ceilings.arithmetic(torch.bfloat16) == (ceilings.dot() or ceilings.fma())


@pytest.mark.parametrize("bandwidth", [ceilings.read_bandwidth, ceilings.copy_bandwidth])
@pytest.mark.parametrize("threads", [1, 2])
def test_bandwidth(native, bandwidth, threads):
    for size in (1, 100_000):
        assert 1e7 < bandwidth(size, threads) < 1e13


def test_measured_once(native):
    first = ceilings.fma()
    began = time.perf_counter()
    assert ceilings.fma() == ceilings.fma(1) == ceilings.fma(threads=1, isa=backends.cpu_isa()) == first
    assert time.perf_counter() - began < ceilings.COMPUTE_SECONDS / 2


def test_summary(native):
    found = ceilings.summary()
    assert found["isa"] == backends.cpu_isa()
    assert found["fma"] == ceilings.fma()
    levels = set(found["working_sets"])
    assert "DRAM" in levels
    assert set(found["read"]) == set(found["copy"]) == levels


def test_working_sets_grow():
    for threads in (1, 4):
        sizes = list(ceilings.working_sets(threads).values())
        assert sizes == sorted(sizes)


def test_none_without_the_native_module(monkeypatch):
    monkeypatch.setattr(ceilings, "_native", lambda: None)
    assert ceilings.fma() is None
    assert ceilings.dot() is None
    assert ceilings.arithmetic(torch.bfloat16) is None
    assert ceilings.read_bandwidth(1000) is None
    assert ceilings.copy_bandwidth(1000) is None
    assert ceilings.summary() is None


def test_arguments_that_do_not_fit(native):
    with pytest.raises(ValueError, match="1 thread or more, got 0"):
        ceilings.fma(0)
    with pytest.raises(ValueError, match="1 byte or more, got 0"):
        ceilings.copy_bandwidth(0)
    with pytest.raises(ValueError, match="no instruction set sse9"):
        ceilings.fma(isa="sse9")


def test_native_loops_refuse_buffers_that_they_would_overrun(native):
    isa = backends.cpu_isa()
    aligned = ceilings._buffer(4096)
    with pytest.raises(ValueError, match="multiple of 1024"):
        native.ceiling_read(isa, aligned[:1000], 1)
    with pytest.raises(ValueError, match="multiple of 1024"):
        native.ceiling_read(isa, numpy.empty(0, numpy.uint8), 1)
    with pytest.raises(ValueError, match="64-byte aligned"):
        native.ceiling_read(isa, aligned[4 : 4 + 1024], 1)
    with pytest.raises(ValueError, match="one size"):
        native.ceiling_copy(isa, aligned, aligned[:1024], 1)
    read_only = ceilings._buffer(1024)
    read_only.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        native.ceiling_copy(isa, aligned[:1024], read_only, 1)


def test_native_copy_copies(native):
    source, target = ceilings._buffer(2048), ceilings._buffer(2048)
    source[:] = numpy.arange(2048) % 251
    began, ended = native.ceiling_copy(backends.cpu_isa(), source, target, 1)
    assert began <= ended
    assert (source == target).all()


@pytest.mark.parametrize(
    ("identity", "design", "known"),
    [
        (("AuthenticAMD", 25, 0x01), "Zen 3", None),  # Milan
        (("AuthenticAMD", 25, 0x21), "Zen 3", None),  # Vermeer
        (("AuthenticAMD", 25, 0x50), "Zen 3", None),  # Cezanne
        (("AuthenticAMD", 25, 0x11), "Zen 4", "AMD Zen 4 EPYC"),  # Genoa
        (("AuthenticAMD", 25, 0x61), "Zen 4", None),  # Raphael: another clock
        (("AuthenticAMD", 25, 0xA0), "Zen 4", None),  # Bergamo: another clock
        (("AuthenticAMD", 26, 0x02), "Zen 5", "AMD Zen 5 EPYC"),  # Turin
        (("AuthenticAMD", 26, 0x24), "Zen 5", None),  # Strix: registers in two halves
        (("GenuineIntel", 6, 0x8F), None, None),
        (("", 0, 0), None, None),
    ],
)
def test_designs_of_one_family_are_told_apart(identity, design, known):
    found = ceilings.known_cpu(*identity)
    assert machine.cpu_design(*identity) == design
    assert (found and found.name) == known
