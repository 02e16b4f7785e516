"""The house rules of docs/architecture.md, read off the source files themselves."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastattn"
CSRC = ROOT / "csrc"

#: The longest matching prefix decides. Imports may go down, or stay within one entry.
FLOORS = {
    "fastattn.version": 0,
    "fastattn.env": 0,
    "fastattn.numerics": 0,
    "fastattn.philox": 0,
    "fastattn._C": 0,
    "fastattn.ceilings": 0.5,
    "fastattn.machine": 0.5,
    "fastattn.cases": 0.5,
    "fastattn.backends": 1,
    "fastattn.dispatch": 1.5,
    "fastattn.ops": 2,
    "fastattn.testing": 3,
    "fastattn.models": 4,
    "fastattn.train": 5,
    "fastattn.generate": 5.5,
    "fastattn.train.demo": 6,
    "fastattn.bench": 6,
    "fastattn.cli": 7,
    "fastattn.__main__": 8,
    "fastattn": 9,  # the front door
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def entry(name: str) -> str:
    """The entry of FLOORS that a module belongs to; the bare package is only itself."""
    candidates = [
        prefix for prefix in FLOORS if name == prefix or (prefix != "fastattn" and name.startswith(prefix + "."))
    ]
    assert candidates, f"{name} stands on no floor: add it to FLOORS and docs/architecture.md"
    return max(candidates, key=len)


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    known = {module_name(m) for m in MODULES} | {"fastattn._C"}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module or "")
    return {name for name in found if name == "fastattn" or name.startswith("fastattn.")}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_go_down(path):
    name = module_name(path)
    here = entry(name)
    for imported in imports(path):
        there = entry(imported)
        assert here == there or FLOORS[there] < FLOORS[here], f"{name} ({here}) must not import {imported} ({there})"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("ops/*/*.py")), ids=module_name)
def test_ops_do_not_import_each_other(path):
    own = f"fastattn.ops.{path.parent.name}"
    for imported in imports(path):
        assert not imported.startswith("fastattn.ops") or imported.startswith(own), f"{path.name} imports {imported}"


def test_every_op_has_the_same_rooms():
    for folder in sorted(PACKAGE.glob("ops/*/")):
        if folder.name == "__pycache__":
            continue
        names = {path.name for path in folder.glob("*.py")}
        assert {"__init__.py", "op.py", "reference.py", "cpu.py", "cases.py"} <= names, folder.name


SOURCES = [
    path
    for top in ("fastattn", "csrc", "tests", "benchmarks")
    for path in sorted((ROOT / top).rglob("*"))
    if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}
]


def test_files_are_named_by_what_they_hold():
    drawers = [p for p in SOURCES if re.match(r"(utils?|common|helpers?|misc)", p.stem)]
    assert not drawers


def test_no_file_is_too_big_to_live_in():
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in SOURCES}
    assert not {p: n for p, n in lengths.items() if n > 800}


def test_only_the_bindings_see_torch_or_pybind11():
    for path in CSRC.rglob("*"):
        if path.suffix not in {".h", ".cpp"} or path.parent.name == "bindings":
            continue
        foreign = re.findall(r"#include\s*<((?:torch|ATen|c10|pybind11|Python)[^>]*)>", path.read_text())
        assert not foreign, f"{path.relative_to(ROOT)} includes {foreign}"


def test_instruction_sets_are_told_apart_in_the_vocabulary_only():
    """`#if` on an instruction set belongs to csrc/cpu/simd; kernels ask the vocabulary (kHasDot2)."""
    # A bf16 dot product needs types that only some vocabularies have; table.cpp lists what was compiled.
    allowed = {CSRC / "cpu" / "table.cpp", CSRC / "attention" / "microkernel.inl.h", CSRC / "ceilings" / "cpu.inl.h"}
    for path in CSRC.rglob("*"):
        if path.suffix not in {".h", ".cpp"} or path.parent.name == "simd" or path in allowed:
            continue
        assert not re.search(r"#\s*if.*(__AVX|__SSE|FASTATTN_ISA_)", path.read_text()), path.relative_to(ROOT)


def test_no_standard_library_in_code_that_is_compiled_once_per_instruction_set():
    """An inline function of the standard library would be merged across objects: AVX-512 code for everybody."""
    allowed = {"cstring", "cstdint", "cstddef", "immintrin.h", "arm_neon.h"}
    for path in CSRC.rglob("*.h"):
        if path.parent.name == "bindings":
            continue
        included = set(re.findall(r"#include\s*<([^>]+)>", path.read_text()))
        assert included <= allowed, f"{path.relative_to(ROOT)} includes {included - allowed}"


def test_tests_mirror_the_package():
    """Every test file is named after a module or folder that it tests, or after a law that holds for all of them."""
    laws = {"architecture", "contract", "isa", "native_build", "conformance", "opinfo", "bad_input", "compile"}
    names = {part for path in MODULES for part in (path.stem, path.parent.name)} | laws
    for path in (ROOT / "tests").rglob("test_*.py"):
        stem = path.stem.removeprefix("test_")
        assert any(stem == name or stem.startswith(name + "_") for name in names), path.relative_to(ROOT)
