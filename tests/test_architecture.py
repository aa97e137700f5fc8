"""The shape of the code: imports run downwards, files and functions stay short, and the project speaks only of itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "faltung"
FILES = sorted(PACKAGE.rglob("*.py"))
TEXTS = sorted(
    path
    for folder in ("src", "tests", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".txt", ".toml")
)

# what may import what: every unit may import those named before it that its line allows
LAYERS: dict[str, set[str]] = {
    "problem": set(),
    "config": set(),
    "layout": {"problem"},
    "reference": {"problem"},
    "arguments": {"problem"},
    "dispatch": {"config", "problem"},
    "codegen": {"config", "problem"},
    "choices": {"codegen"},
    "cpu": {"choices", "codegen", "config", "dispatch", "problem"},
    "cuda": {"choices", "codegen", "config", "dispatch", "layout", "problem"},
}
LAYERS["prepared"] = {"arguments", "config", "dispatch", "layout", "problem"}
LAYERS["ops"] = LAYERS["prepared"] | {"prepared"}
LAYERS["flops"] = {"ops"}
LAYERS["functional"] = LAYERS["ops"] | {"flops", "ops"}
LAYERS["frozen"] = LAYERS["functional"] | {"functional"}
LAYERS["nn"] = LAYERS["frozen"] | {"frozen"}
LAYERS["convert"] = LAYERS["nn"] | {"nn"}
LAYERS["explain"] = LAYERS["nn"] | {"nn"}
LAYERS["testing"] = LAYERS["explain"] | {"explain", "reference"}
LAYERS["__init__"] = LAYERS["explain"] | {"convert", "explain"}
LAYERS["bench"] = set(LAYERS) - {"__init__"}
LAYERS["cli"] = set(LAYERS)
LAYERS["__main__"] = {"cli"}

FOREIGN = {
    "torch": {"problem", "config", "layout", "reference", "choices", "dispatch", "codegen", "cpu"},
    "llvmlite": set(LAYERS) - {"codegen", "cpu", "cli", "bench"},
}


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports when it runs: annotations may name what stands above."""
    package = ["faltung", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"]
    unused = {id(child) for block in blocks for statement in block.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if not node.module or module == "faltung":
                yield from (f"{module}.{alias.name}" for alias in node.names)


def test_every_unit_has_its_layer() -> None:
    assert len(FILES) >= 20
    assert {_unit(path) for path in FILES} <= set(LAYERS)


def test_imports_run_downwards() -> None:
    checked = 0
    for path in FILES:
        unit = _unit(path)
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "faltung" or len(parts) < 2:
                continue
            checked += 1
            if parts[1] not in LAYERS:  # a name of the package itself
                assert unit in ("bench", "cli"), f"{path.relative_to(ROOT)} imports {name}"
                continue
            assert parts[1] == unit or parts[1] in LAYERS[unit], f"{path.relative_to(ROOT)} imports {name}"
    assert checked >= 60


def test_what_must_not_know_torch_or_llvm_does_not() -> None:
    for path in FILES:
        for name in _imports(path):
            top = name.split(".")[0]
            assert _unit(path) not in FOREIGN.get(top, set()), f"{path.relative_to(ROOT)} imports {name}"


def test_the_emitter_imports_neither() -> None:
    path = PACKAGE / "codegen" / "emit.py"
    assert not {name.split(".")[0] for name in _imports(path)} & {"torch", "llvmlite", "numpy"}


def test_the_oracle_is_for_tests() -> None:
    users = {path for path in FILES for name in _imports(path) if name.startswith("faltung.reference")}
    assert {_unit(path) for path in users} <= {"testing", "bench", "cli"}


def test_files_and_functions_are_short() -> None:
    functions = 0
    for path in FILES + sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions += 1
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 80, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"
    assert functions >= 200


@pytest.mark.parametrize(
    "pattern",
    [
        r"/(?:home|root|work|tmp|opt)/\w",  # paths of one machine
        r"\b(?:issue|pull request|PR) #?\d+\b",  # trackers are not part of the code
        r"\b(?:co-authored|chatgpt|claude|copilot|openai|anthropic|as an ai)\b",
        r"\b(?:TODO|FIXME|XXX|HACK)\b",
    ],
)
def test_the_project_speaks_of_itself(pattern: str) -> None:
    assert len(TEXTS) >= 30
    for path in TEXTS:
        if path == Path(__file__):
            continue
        found = re.search(pattern, path.read_text(), re.IGNORECASE if "claude" in pattern else 0)
        assert found is None, f"{path.relative_to(ROOT)}: {found[0] if found else ''}"
