"""Every Python example of the documents runs, in the order of its document, and what they name exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import faltung

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(document: Path, language: str) -> list[tuple[int, str]]:
    """The code blocks of a document with the line each starts on."""
    text = document.read_text(encoding="utf-8")
    return [(text[: found.start()].count("\n") + 2, found[1]) for found in re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def test_there_are_examples():
    assert len(blocks(ROOT / "README.md", "python")) >= 3
    assert len(EXAMPLES) >= 2
    assert len(DOCUMENTS) >= 6


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda d: d.name)
def test_python_blocks_run(document):
    names: dict[str, object] = {}
    for line, code in blocks(document, "python"):
        source = "\n" * (line - 1) + code  # so that a traceback names the document's line
        exec(compile(source, str(document), "exec"), names)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_examples_run(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_commands_in_documents_exist():
    from faltung.cli import app

    commands = {command.name for command in app.registered_commands}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for _, code in blocks(document, "sh"):
            for line in code.splitlines():
                if found := re.match(r"make (\w+)", line):
                    assert found[1] in targets, (document.name, line)
                if found := re.match(r"faltung (\w+)", line):
                    assert found[1] in commands, (document.name, line)


def test_links_between_documents_lead_somewhere():
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), (document.name, target)


def test_options_are_documented():
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    from dataclasses import fields

    for option in fields(faltung.config.Options):
        if option.init and option.name != "poison":
            assert f"`FALTUNG_{option.name.upper()}`" in text, option.name


def test_version_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{faltung.__version__}"' in text
    assert f"## {faltung.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
