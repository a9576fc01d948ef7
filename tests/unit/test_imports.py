"""The seams of the package: which folder may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_tikmix"

# Folders, lowest first: each may import those before it, and nothing after it.
ALLOWED = {
    "mixing": set(),
    "influence": {"mixing"},
    "parallel": set(),
    "data": {"mixing", "parallel"},
    "monitoring": {"mixing"},
    "training": {"mixing", "influence", "parallel", "data", "monitoring"},
}
FORBIDDEN = {
    "mixing": ("torch", "megatron."),
    "influence": ("torch.distributed", "megatron."),
    "monitoring": ("torch.distributed", "megatron."),
}
# The only files that may touch private names of megatron-core.
PRIVATE = {"parallel/cpu.py", "training/optimizer_state.py"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_lies_below(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        for name in imports(path):
            if name.startswith("megatron_tikmix."):
                other = name.split(".")[1]
                ours = ALLOWED[folder] | {folder, "errors", "seeds", "config"}
                assert other in ours, f"{path} imports {name}"
            for word in FORBIDDEN.get(folder, ()):
                assert not (name + ".").startswith(word.rstrip(".") + "."), f"{path} imports {name}"


def test_torch_distributed_is_imported_in_parallel_only() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imports(path))
    }
    assert {user.split("/")[0] for user in users} <= {"parallel"}


def test_private_names_of_megatron_are_imported_in_two_files_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) in PRIVATE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron."):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{path} imports {private}"


def test_mixing_needs_no_torch() -> None:
    code = "import megatron_tikmix.mixing, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
