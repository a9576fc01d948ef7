"""The seams of the package: which folder may import what, at every level of folders."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_tikmix"

# Folders, lowest first: each may import those before it, and nothing after it.
ABOVE = ["mixture", "influence", "solve", "decision"]
"""The half that a notebook on a laptop needs: numpy, scipy, Clarabel and LightGBM."""

MAY_IMPORT = {
    "mixture": [],
    "influence": ["mixture"],
    "solve": ["mixture", "influence"],
    "decision": ["mixture", "influence", "solve"],
    "monitoring": ABOVE,
    "config": ABOVE,
    "data": [*ABOVE, "config", "megatron"],
    "prepare": [*ABOVE, "config", "data"],
    "megatron": [*ABOVE, "config"],
    "measure": [*ABOVE, "config", "data", "megatron"],
    "training": [*ABOVE, "config", "data", "megatron", "measure", "monitoring"],
    "hosts": [*ABOVE, "monitoring", "config", "data", "megatron", "measure"],
    "rehearsal": [*ABOVE, "config", "data", "megatron", "measure", "training"],
    "cli": [
        *ABOVE,
        *("monitoring", "config", "data", "prepare", "megatron", "measure", "training"),
        "rehearsal",
    ],
}
WITHOUT_TORCH = [*ABOVE, "monitoring"]

TENSORBOARD = "torch.utils.tensorboard"
"""What monitoring may import of torch: the writer of event files."""

DISTRIBUTED = {"megatron", "rehearsal"}
PRIVATE = {"megatron/cpu.py", "measure/shards.py"}
"""The only files that may touch private names of megatron-core."""


def modules(folder: str = "") -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)


def test_every_folder_has_its_place() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_lies_below(folder: str) -> None:
    roots = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules(folder)
    for path in modules(folder):
        for name in imports(path):
            if name.startswith("megatron_tikmix."):
                other = name.split(".")[1]
                assert other in {*MAY_IMPORT[folder], folder, *roots}, f"{path} imports {name}"


def test_no_two_folders_import_each_other() -> None:
    """What may be imported is checked above; here, that it makes no circle."""
    pairs = [(a, b) for a, others in MAY_IMPORT.items() for b in others if a in MAY_IMPORT[b]]
    assert pairs == []


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_the_upper_half_needs_neither_torch_nor_megatron(folder: str) -> None:
    for path in modules(folder):
        for name in imports(path):
            if folder == "monitoring" and name.startswith(TENSORBOARD):
                continue
            assert name.split(".")[0] not in ("torch", "megatron"), f"{path} imports {name}"


def test_torch_distributed_is_imported_in_one_folder_only() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in modules()
        if any(name.startswith("torch.distributed") for name in imports(path))
    }
    assert users <= DISTRIBUTED


def test_private_names_of_megatron_are_imported_in_two_files_only() -> None:
    for path in modules():
        if str(path.relative_to(PACKAGE)) in PRIVATE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron."):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{path} imports {private}"


@pytest.mark.parametrize(
    "modules",
    [
        ("decision.decide", "decision.explain", "mixture.schedule_file", "monitoring.report"),
        ("cli.main", "cli.inspect", "cli.report", "cli.checkpoint", "cli.preprocess"),
        ("training.checkpoint_files", "data.domains", "prepare.sources"),
    ],
)
def test_a_fresh_interpreter_needs_no_torch_for(modules: tuple[str, ...]) -> None:
    names = ", ".join(f"megatron_tikmix.{module}" for module in modules)
    code = (
        f"import sys, {names}\n"
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
