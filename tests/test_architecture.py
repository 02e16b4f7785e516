"""The house rules that can be read off the sources: floors, walls between ops, file sizes and names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastattn"

# Floor of every module or package directly under fastattn; docs/architecture.md shows the same table.
FLOORS = {
    "env": 0, "numerics": 0, "philox": 0, "ceilings": 0, "machine": 0, "allocator": 0, "cases": 0, "version": 0,
    "_C": 0, "layouts": 0, "documents": 0, "gpu": 0,
    "backends": 1, "dispatch": 1, "preference": 1, "norms": 1, "losses": 1, "activations": 1,
    "activation_cases": 1,
    "ops": 2,
    "testing": 3, "flash_attn": 3, "nn": 3, "distributed": 3,
    "models": 4, "integrations": 4,
    "train": 5, "generate": 5,
    "bench": 6, "doctor": 6, "cli": 6,
}  # fmt: skip
# The front door and `python -m fastattn` stand outside of the house.
DOORS = {"fastattn", "fastattn.__main__"}
# On one floor these do not know of each other, so that each can be read, tested and replaced alone.
WALLS = ("ops", "testing", "models", "train", "bench")
# Triton's interpreter is repaired by the backend that runs in it, only then: (module, what it loads).
UPWARD_ON_PURPOSE = {("fastattn.gpu.devices", "fastattn.testing.interpreter")}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "shared"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, module: str) -> list[tuple[str, int]]:
    """(imported module, line) of every import of fastattn's own, wherever in the file it stands."""
    found = []
    names = {module_of(p) for p in sources()} | {"fastattn._C"}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import name` imports the submodule of that name if there is one
            found += [
                (f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base, node.lineno)
                for alias in node.names
            ]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.args[0].value, node.lineno))
    return [(name, line) for name, line in found if name.split(".")[0] == "fastattn"]


def floor_of(module: str) -> int:
    room = module.split(".")[1]
    assert room in FLOORS, f"fastattn.{room} has no floor: give it one here and in docs/architecture.md"
    return FLOORS[room]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    module = module_of(path)
    if module in DOORS:
        return
    upward = []
    for name, line in imports_of(path, module):
        if name == "fastattn":
            upward.append(f"line {line}: the front door; import from where the name lives")
        elif floor_of(name) > floor_of(module) and (module, name) not in UPWARD_ON_PURPOSE:
            upward.append(f"line {line}: {name} is on floor {floor_of(name)}, {module} on {floor_of(module)}")
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*/*.py")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_ops_do_not_import_each_other(path):
    own = path.parent.name
    others = [
        f"line {line}: {name}"
        for name, line in imports_of(path, module_of(path))
        if name.startswith("fastattn.ops.") and name.split(".")[2] != own
    ]
    assert not others, "\n".join(others)


def test_floors_have_no_cycles():
    """Modules of one room, or of rooms on one floor, may import each other, but never in a circle."""
    graph = {
        module_of(path): {
            name for name, _ in imports_of(path, module_of(path)) if (module_of(path), name) not in UPWARD_ON_PURPOSE
        }
        for path in sources()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for name in sorted(graph.get(module, ())):
                # A package's own __init__ collects its modules; they may name the package.
                if name in graph and not module.startswith(f"{name}."):
                    visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_backend_files_of_an_op_do_not_know_each_other():
    """A backend can be removed by deleting its file and its line in __init__.py."""
    backends = {"reference", "cpu", "triton", "cuda"}
    for path in (PACKAGE / "ops").glob("*/*.py"):
        if path.stem in backends:
            for name, line in imports_of(path, module_of(path)):
                other = name.split(".")[-1]
                assert other not in backends - {path.stem}, f"{path.relative_to(ROOT)}:{line} imports {other}"


@pytest.mark.parametrize("op", sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "op.py").exists()))
def test_every_op_is_one_room_with_the_same_furniture(op):
    for name in ("__init__.py", "op.py", "reference.py", "cases.py"):
        assert (PACKAGE / "ops" / op / name).exists(), f"fastattn/ops/{op}/{name} is missing"


def tracked_sources():
    for folder, suffixes in ((PACKAGE, {".py", ".pyi"}), (ROOT / "tests", {".py"}), (ROOT / "csrc", {".h", ".cpp"})):
        yield from (path for path in sorted(folder.rglob("*")) if path.suffix in suffixes)


def test_no_file_is_a_drawer_for_everything():
    assert [str(p.relative_to(ROOT)) for p in tracked_sources() if p.stem.split(".")[0] in FORBIDDEN_NAMES] == []


def test_no_file_is_longer_than_800_lines():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in tracked_sources()}
    assert {name: lines for name, lines in lengths.items() if lines > 800} == {}


def includes_of(path: Path) -> list[str]:
    return [
        line.split("include", 1)[1].strip().strip('<>"')
        for line in path.read_text().splitlines()
        if line.lstrip().startswith("#") and "include" in line
    ]


def test_only_bindings_see_torch_and_pybind11():
    seen = {
        str(path.relative_to(ROOT)): name
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and path.parent.name != "bindings"
        for name in includes_of(path)
        if name.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h"))
    }
    assert seen == {}


def test_bindings_use_the_stable_abi_only():
    """ATen, c10 and the rest of torch's C++ change from release to release."""
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    seen = {
        str(path.relative_to(ROOT)): name
        for path in (ROOT / "csrc" / "bindings").iterdir()
        for name in includes_of(path)
        if name.startswith(("torch/", "ATen/", "c10/")) and not name.startswith(allowed)
    }
    assert seen == {}


def test_kernels_use_no_standard_library_templates():
    """An inline function of the standard library, compiled with AVX-512 flags, could become everybody's copy."""
    plain = {
        "cstddef", "cstdint", "cstring", "cmath", "math.h", "string.h", "stdint.h", "stddef.h", "immintrin.h",
        "arm_neon.h", "float.h", "cfloat",
    }  # fmt: skip
    seen = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "csrc").rglob("*.h")
        if path.parent.name != "bindings"
        for name in includes_of(path)
        if "/" not in name and not (path.parent / name).exists() and name not in plain
    }
    assert seen == set()


def test_instruction_sets_are_told_apart_in_the_vocabulary_only():
    """`#if` on an instruction set belongs to csrc/cpu/simd; kernels ask the vocabulary (FASTATTN_HAS_DOT2)."""
    csrc = ROOT / "csrc"
    allowed = {csrc / "cpu" / "table.cpp"}  # lists what was compiled
    for path in csrc.rglob("*"):
        if path.suffix in {".h", ".cpp"} and path.parent.name != "simd" and path not in allowed:
            assert not re.search(r"#\s*if.*(__AVX|__SSE|FASTATTN_ISA_)", path.read_text()), path.relative_to(ROOT)


def test_tests_mirror_the_package():
    """tests/<room>/test_<module>.py is about fastattn/<room>/<module>.py; what is about no one module is listed."""
    wide = {
        "test_architecture", "test_contract", "test_compile", "test_isa", "test_threads", "test_native_build",
        "test_vocabulary", "test_direct",
        "ops/test_conformance", "ops/test_double_backward", "ops/test_opinfo", "ops/test_bad_input",
        "ops/test_bad_inference", "ops/test_bad_losses", "ops/test_jagged", "bench/test_bench_cli",
        "testing/test_devices", "gpu/test_exponentials", "gpu/test_transforms", "integrations/test_libraries",
    }  # fmt: skip
    strays = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = path.relative_to(ROOT / "tests").with_suffix("")
        target = PACKAGE / relative.parent / relative.name.removeprefix("test_")
        known = target.with_suffix(".py").exists() or target.is_dir()
        if not known and str(relative) not in wide:
            strays.append(str(relative))
    assert strays == []


def test_environment_variables_are_documented_in_one_table():
    """Every FASTATTN_* name that a source reads stands in the table of fastattn/env.py."""
    table = (PACKAGE / "env.py").read_text()
    unknown = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]:
        text = path.read_text()
        for name in ("environ", "getenv"):
            for piece in text.split(name)[1:]:
                head = piece[:60]
                if "FASTATTN_" in head:
                    variable = head[head.index("FASTATTN_") :].split('"')[0].split("'")[0]
                    if variable not in table:
                        unknown.add(f"{path.relative_to(ROOT)}: {variable}")
    assert unknown == set()


def test_no_line_promises_work_for_later():
    marks = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert found == []


def test_no_exception_is_swallowed():
    """`except Exception: pass` hides a broken install; nothing in the library does that."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or (isinstance(node.type, ast.Name) and "Exception" in node.type.id)
            if broad and all(isinstance(statement, ast.Pass) for statement in node.body):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
