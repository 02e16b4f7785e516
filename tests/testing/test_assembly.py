"""What is read off machine code, and the laws."""

import types

import pytest

from fastattn.testing import assembly
from fastattn.testing.recorded import Launch, gpu_target

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/              @!P0 LDG.E.U16 R5, desc[UR6][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR6][R2.64] ;
        /*0040*/                   LDGSTS.E.LTC128B [R7], desc[UR6][R2.64] ;
        /*0050*/             @UP0  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;
        /*0070*/                   STL.64 [R1+0x8], R4 ;
        /*0080*/                   LDL.LU R4, [R1+0x8] ;
        /*0090*/                @P1 STG.E.64 desc[UR6][R2.64], R4 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   NOP ;
"""

AMDGCN = """
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
	global_load_ushort v3, v[1:2], off
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[4:5], v[6:7], a[0:15]
	v_mfma_f32_16x16x8_xf32 a[0:3], v[4:5], v[6:7], a[0:3]
	global_store_short v[1:2], v3, off
	s_endpgm
"""


def test_nvidias_instructions_are_counted():
    counts = assembly.sass_counts(SASS)
    assert counts == {
        "instructions": 11,
        "spills": 2,
        "matrix": {"HGMMA": 1, "HMMA.TF32": 1},
        "loads": {"16": 2, "2": 1, "4": 1},
        "stores": {"8": 1},
    }


def test_amds_instructions_are_counted():
    counts = assembly.amdgcn_counts(AMDGCN)
    assert counts == {
        "instructions": 6,
        "matrix": {"MFMA": 1, "MFMA.TF32": 1},
        "loads": {"16": 1, "2": 1},
        "stores": {"2": 1},
    }


@pytest.mark.parametrize("tool", ["true", "false"])
def test_a_tool_that_tells_nothing_is_an_error(tool):
    with pytest.raises(assembly.ToolFailed, match=f"{tool}( printed nothing|: exit 1)"):
        assembly._output(tool)


WAITING = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Used 255 registers, used 1 barriers
"""


@pytest.mark.parametrize(("printed", "count"), [(WAITING, 1), (WAITING.replace("C7510", "C6000"), 0)])
def test_products_that_wait_are_counted(printed, count, monkeypatch):
    monkeypatch.setattr(assembly, "_output", lambda *command: printed)
    kernel = types.SimpleNamespace(asm={"ptx": ".target sm_90a\nwgmma.mma_async.sync.aligned"})
    assert len(assembly.serialised(kernel)) == count


def test_only_asynchronous_products_wait(monkeypatch):
    monkeypatch.setattr(assembly, "_output", lambda *command: pytest.fail("the assembler was asked"))
    assert assembly.serialised(types.SimpleNamespace(asm={"ptx": ".target sm_80\nmma.sync"})) == []


def launch_for(target):
    return Launch("module:kernel", target, (), (), (), ())


def test_wide_heads():
    assert [assembly.wide_heads("sm_90", dim) for dim in (0, 128, 256, 512)] == [False, False, False, True]
    assert [assembly.wide_heads("gfx942", dim) for dim in (128, 256)] == [False, True]


def test_accesses_of_aligned_tensors_are_wide():
    def narrow(**counts):
        return [what for _, what in assembly.narrow_accesses(assembly.Facts(32, 0, 0, 0, 100, **counts))]

    assert narrow(loads={"16": 2, "4": 3}, stores={"16": 1}) == []
    assert narrow(loads={"16": 1, "8": 7}) == ["loads of aligned tensors are narrow: {'16': 1, '8': 7}"]
    assert narrow(loads={"16": 1, "8": 3, "4": 5}) == []
    assert narrow(stores={"2": 1}) == ["stores of aligned tensors are narrow: {'2': 1}"]


triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    c = tl.dot(tl.load(a_ptr + places), tl.load(b_ptr + places), input_precision=PRECISION)
    tl.store(c_ptr + places, c)


def compiled(target, dtype, size, precision, **options):
    signature = {f"{name}_ptr": f"*{kind}" for name, kind in (("a", dtype), ("b", dtype), ("c", "fp32"))}
    source = triton.compiler.ASTSource(
        product,
        {**signature, "SIZE": "constexpr", "PRECISION": "constexpr"},
        {(3,): size, (4,): precision},
        {(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    return triton.compile(source, target=gpu_target(target), options=options)


def complaints(target, kernel):
    return assembly.complaints(launch_for(target), kernel, assembly.facts(kernel))


@pytest.mark.compiled
@pytest.mark.parametrize(("target", "name"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "MFMA")])
def test_sixteen_bit_products_are_seen(target, name):
    kernel = compiled(target, "bf16", 64, "ieee")
    seen = assembly.facts(kernel)
    assert seen.matrix[name] > 0 and seen.spills == 0 and seen.loads["16"] > 0 and seen.registers > 0
    assert complaints(target, kernel) == []


@pytest.mark.compiled
def test_the_law_against_tf32():
    (complaint,) = complaints("sm_80", compiled("sm_80", "fp32", 64, "tf32"))
    assert complaint.startswith("float32 products are rounded to tf32")
    assert complaints("sm_80", compiled("sm_80", "fp32", 32, "ieee")) == []


@pytest.mark.compiled
def test_the_law_against_spills():
    found = complaints("sm_80", compiled("sm_80", "bf16", 64, "ieee", num_warps=1, maxnreg=40))
    assert [what.split()[1] for what in found] == ["spills"]
