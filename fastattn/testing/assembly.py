"""What a kernel became: registers, spills, shared memory and instructions, read off the assembler's own output.

NVIDIA's are read from the machine code, with the tools in Triton's wheel; AMD's from the assembly. A tool that prints
nothing is an error: a check that saw nothing has not passed.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastattn.gpu import devices
from fastattn.testing.recorded import Launch


class ToolFailed(RuntimeError):
    """A tool of Triton's wheel failed or printed nothing to go by."""


@dataclass(frozen=True)
class Facts:
    """registers: of a thread (AMD: vector registers, accumulators among them). stack: bytes of memory of its own.
    spills: instructions that load or store such memory (AMD: registers that went there). shared: bytes of a block.
    instructions: how many there are in all. waits: warnings of NVIDIA's assembler that it makes asynchronous products
    wait for each other. matrix: tensor core instructions by name. loads, stores: accesses to global memory by bytes of
    a thread's access.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    waits: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As it stands in the table."""
        return asdict(self)


# Byte counts of SASS's suffixes; what has none of them takes 4.
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
#: What a program may move of numbers that belong to rows, not to elements, beside the tensors that it moves.
FEW_BYTES = 32
_MATRIX = re.compile(r"^(HGMMA|UTC\w*MMA|HMMA|IMMA|DMMA|QMMA|OMMA)")


def _tool(name: str) -> Path:
    return Path(str(importlib.import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin" / name


def _output(*command: str | Path) -> str:
    """What a tool prints, on both of its streams."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolFailed(f"{command[0]}: exit {done.returncode}: {(done.stderr or done.stdout)[:500]}")
    if not (done.stdout + done.stderr).strip():
        raise ToolFailed(f"{command[0]} printed nothing")
    return done.stdout + done.stderr


def facts(kernel: Any) -> Facts:
    """Of one of Triton's compiled kernels."""
    return _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)


def _counts(text: str, kind_of: Callable[[str], tuple[str, str] | None], *kinds: str) -> dict[str, Any]:
    """How many instructions there are in all, and by name those of some kinds. kind_of: (kind, name) of a line's
    instruction, None where it has none."""
    found = [instruction for line in text.splitlines() if (instruction := kind_of(line)) is not None]
    named = {kind: Counter(name for one, name in found if one == kind) for kind in kinds}
    return {"instructions": len(found), **{kind: dict(sorted(names.items())) for kind, names in named.items()}}


def sass_counts(sass: str) -> dict[str, Any]:
    """instructions, spills, matrix, loads, stores: of nvdisasm's output."""
    counts = _counts(sass, _sass_instruction, "matrix", "loads", "stores", "spills")
    return {**counts, "spills": sum(counts["spills"].values())}


def _sass_instruction(line: str) -> tuple[str, str] | None:
    found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line)
    name, *suffixes = found.group(1).split(".") if found else ["NOP"]
    if name == "NOP":
        return None
    if name in ("LDL", "STL"):
        return "spills", name
    if _MATRIX.match(name):
        return "matrix", name + (".TF32" if "TF32" in suffixes else "")
    if name in ("LDG", "LDGSTS"):
        return "loads", _width(suffixes)
    if name == "STG":
        return "stores", _width(suffixes)
    if name in ("UTMALDG", "UBLKCP"):
        return "loads", "16"
    if name == "UTMASTG":
        return "stores", "16"
    return "others", name


def _width(suffixes: list[str]) -> str:
    return str(next((_WIDTHS[suffix] for suffix in suffixes if suffix in _WIDTHS), 4))


def _nvidia(kernel: Any) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _output(_tool("cuobjdump"), "--dump-resource-usage", path)
        sass = _output(_tool("nvdisasm"), "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise ToolFailed(f"cuobjdump told no registers: {usage[:500]}")
    registers, stack, static = map(int, found.groups())
    counts = sass_counts(sass)
    if not counts["instructions"]:
        raise ToolFailed(f"nvdisasm told no instructions: {sass[:500]}")
    return Facts(registers, stack, shared=max(kernel.metadata.shared, static), waits=len(serialised(kernel)), **counts)


def amdgcn_counts(assembly: str) -> dict[str, Any]:
    """As `sass_counts`, without spills, of AMD's assembly."""
    return _counts(assembly, _amdgcn_instruction, "matrix", "loads", "stores")


def _amdgcn_instruction(line: str) -> tuple[str, str] | None:
    found = re.match(r"\s+([a-z]+_[a-z0-9_]+)\b", line)
    if found is None:
        return None
    name = found.group(1)
    access = re.match(r"(?:global|buffer|flat)_(load|store)_(?:(dword(?:x\d)?)|([us]?byte|[us]?short)\w*)", name)
    if access is not None:
        width = _AMD_WIDTHS[access[2]] if access[2] else 1 if "byte" in access[3] else 2
        return f"{access[1]}s", str(width)
    if name.startswith(("v_mfma", "v_smfma", "v_wmma")):
        return "matrix", "MFMA" + (".TF32" if "xf32" in name else "")
    return "others", name


def _amd(kernel: Any) -> Facts:
    assembly = kernel.asm["amdgcn"]
    numbers = {}
    for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise ToolFailed(f"the assembly tells no {name}")
        numbers[name] = int(found.group(1))
    counts = amdgcn_counts(assembly)
    if not counts["instructions"]:
        raise ToolFailed("the assembly has no instructions")
    return Facts(
        registers=numbers["vgpr_count"],
        stack=numbers["private_segment_fixed_size"],
        spills=numbers["vgpr_spill_count"],
        shared=kernel.metadata.shared,
        **counts,
    )


def serialised(kernel: Any) -> list[str]:
    """ptxas's warnings that it makes asynchronous products wait for each other; asked of the assembler that can read
    this kernel, which is not the same one in every release of Triton."""
    text = kernel.asm.get("ptx", "")
    if "wgmma.mma_async" not in text:
        return []
    target = re.search(r"\.target\s+(\w+)", text)
    assert target is not None
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        for name in ("ptxas", "ptxas-blackwell"):
            try:
                printed = _output(_tool(name), "-v", "--gpu-name", target[1], "-o", Path(folder) / "out", path)
            except (ToolFailed, FileNotFoundError) as error:
                failed.append(str(error))
                continue
            if not re.search(r"Used \d+ registers", printed):
                failed.append(f"{name} told no registers: {printed[:200]}")
                continue
            return [line.strip() for line in printed.splitlines() if re.search(r"C75\d\d", line)]
    raise ToolFailed("; ".join(failed))


def products(kernel: Any) -> dict[str, int]:
    """How many matrix products the kernel's source has, by the type of what is multiplied; "tf32": those of float32
    that may be rounded to it."""
    found: Counter[str] = Counter()
    for line in kernel.asm["ttir"].splitlines():
        # %d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>
        if " tt.dot " in line:
            operand = re.search(r":\s*tensor<[\dx]*x(\w+)>", line)
            assert operand is not None, line
            found[operand[1]] += 1
            if operand[1] == "f32" and "inputPrecision = tf32" in line:
                found["tf32"] += 1
    return dict(found)


def complaints(launch: Launch, kernel: Any, seen: Facts, *, spills: bool = False, waits: bool = False) -> list[str]:
    """The laws that a kernel breaks, whatever the table says; empty when it is as it should be. spills, waits: there
    may be some."""
    wrong = []
    target = devices.KNOWN[launch.target]
    if seen.shared > target.shared_memory:
        wrong.append(f"{seen.shared} bytes of shared memory, the chip has {target.shared_memory}")
    asked = products(kernel)
    narrow = sum(count for kind, count in asked.items() if kind in ("bf16", "f16"))
    if narrow and not any(not name.endswith("TF32") for name in seen.matrix):
        wrong.append(f"{narrow} 16-bit products and no tensor core instruction: {seen.matrix}")
    if asked.get("tf32") or any(name.endswith("TF32") for name in seen.matrix):
        wrong.append(f"float32 products are rounded to tf32: {asked}, {seen.matrix}")
    if seen.spills and not spills:
        wrong.append(f"{seen.spills} spills")
    if seen.waits and not waits:
        wrong += serialised(kernel)
    return wrong


def wide_heads(target: str, dim: int) -> bool:
    """Head dims that a target's registers cannot hold: beyond 128, or 256 where registers are plenty."""
    return dim > (256 if target in ("sm_80", "sm_90", "sm_100") else 128)


def narrow_accesses(seen: Facts) -> list[tuple[str, str]]:
    """("loads" or "stores", what is wrong): where tensors are aligned and most bytes are not moved 16 at a time."""
    wrong = []
    for what, counts in (("loads", seen.loads), ("stores", seen.stores)):
        wide = sum(int(width) * n for width, n in counts.items() if int(width) >= 16)
        narrow = sum(int(width) * n for width, n in counts.items() if int(width) < 16)
        if narrow > wide + FEW_BYTES * (wide > 0):
            wrong.append((what, f"{what} of aligned tensors are narrow: {counts}"))
    return wrong
