"""The public names: loaded when asked for, known to type checkers, on one page; and every import
that the documents show."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_tikmix
from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", megatron_tikmix.__all__)
def test_a_public_name_is_that_of_its_module(name: str) -> None:
    module = importlib.import_module(f"megatron_tikmix.{megatron_tikmix._MODULES[name]}")
    assert getattr(megatron_tikmix, name) is getattr(module, name)
    assert name in dir(megatron_tikmix)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'megatron_tikmix' has no attribute 'Mixtures'"):
        megatron_tikmix.Mixtures  # noqa: B018


def test_type_checkers_see_the_same_table() -> None:
    (block,) = (
        node
        for node in ast.parse(Path(megatron_tikmix.__file__).read_text()).body
        if isinstance(node, ast.If)
    )
    seen = {
        alias.asname: str(node.module).removeprefix("megatron_tikmix.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == megatron_tikmix._MODULES


def test_importing_the_package_loads_nothing_and_prepares_megatron_for_the_cpu() -> None:
    heavy = "{'torch', 'megatron', 'megatron.core', 'numpy'} & set(sys.modules)"
    assert run(f"import sys, megatron_tikmix; print({heavy})") == "set()\n"
    finder = (
        "any(type(finder).__module__ == 'megatron_tikmix.megatron.cpu' for finder in sys.meta_path)"
    )
    assert run(f"import sys, megatron_tikmix; print({finder})") == "True\n"


def test_what_solves_needs_no_torch() -> None:
    """Everything of the first table of docs/api.md."""
    names = ", ".join(tables()[0])
    code = f"import sys; from megatron_tikmix import {names}; print('torch' in sys.modules)"
    assert run(code) == "False\n"


def tables() -> list[list[str]]:
    """The names in the tables of docs/api.md, by section."""
    sections = (ROOT / "docs" / "api.md").read_text().split("\n## ")[1:]
    found = [re.findall(r"^\| `(\w+)` \| \w", section, re.MULTILINE) for section in sections]
    return [names for names in found if names]


def test_the_page_lists_every_name_once() -> None:
    listed = [name for names in tables() for name in names]
    assert sorted(listed) == sorted(megatron_tikmix.__all__)


def imports(path: Path) -> list[str]:
    """The import statements in the Python blocks of a document."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [
        ast.unparse(node)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if imports(path)], ids=lambda p: p.name
)
def test_imports_of_the_documents_work(path: Path) -> None:
    exec("\n".join(imports(path)), {})


def test_documents_with_imports_are_found() -> None:
    assert {"hosting.md", "mixing.md"} <= {path.name for path in DOCUMENTS if imports(path)}
