"""Wheels that travel with the checkout, for a machine without network. Standard library only."""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".wheels"
LIMIT_MIB = 64
PYTHON = "3.12"
# pip takes each of these by its exact name.
PLATFORMS = tuple(
    f"{name}_x86_64"
    for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
)
MEGATRON = "megatron-core==0.19.2"
"""The newest that setup.py allows; all else has the version of constraints.txt."""

# What setup.py requires, with what those need in turn, and what runs tests/gpu.
CARRIED = (
    *("jsonargparse", "docstring_parser", "PyYAML", "lightgbm", "clarabel", "cffi", "pycparser"),
    *("plotly", "narwhals", "packaging", "Jinja2", "MarkupSafe", "rich", "markdown-it-py", "mdurl"),
    *("tensorboard", "tensorboard-data-server", "absl-py", "grpcio", "Markdown", "protobuf"),
    *("Werkzeug", "pillow", "Pygments", "tokenizers", "psutil"),
    *("pytest", "pytest-timeout", "iniconfig", "pluggy", "hypothesis", "sortedcontainers"),
)
AT_HOME = "torch, numpy and scipy"
"""Not carried: too large, and there where torch is, as a rule."""


class PackError(Exception):
    """The wheels cannot be had, or do not fit; the message says which and what helps."""


def pinned(also: Iterable[str] = (), leave_out: Iterable[str] = ()) -> list[str]:
    """`name==version` of all that is carried.

    Raises:
        PackError: a name has no version in constraints.txt.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = {_name(line.partition("==")[0]): line for line in lines if "==" in line}
    without = set(map(_name, leave_out))
    wanted = [name for name in map(_name, [*CARRIED, *also]) if name not in without]
    for name in sorted({*wanted, *without}):
        if name not in versions:
            raise PackError(f"{name} is not in constraints.txt; name a package as it stands there")
    return [MEGATRON, *(versions[name] for name in dict.fromkeys(wanted))]


def pack(also: Sequence[str] = (), leave_out: Sequence[str] = (), folder: Path = FOLDER) -> str:
    """Download the wheels into `folder`, which holds no others afterwards; says their size.

    Raises:
        PackError: pip cannot get one of them, or they and the checkout are larger than LIMIT_MIB.
    """
    wanted = pinned(also, leave_out)
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    if subprocess.run([*command, "--dest", str(folder), *wanted]).returncode:
        raise PackError("pip could not download the wheels; the reason is above")
    return fits(folder)


def fits(folder: Path, limit_mib: float = LIMIT_MIB) -> str:
    """The size of the wheels in `folder` and of the tracked files, in a sentence.

    Raises:
        PackError: it is over the limit.
    """
    wheels = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    checkout = _tracked_bytes()
    total = sum(wheels.values()) + checkout
    text = (
        f"{len(wheels)} wheels of {_mib(sum(wheels.values()))} and the checkout of "
        f"{_mib(checkout)} are {_mib(total)} of {limit_mib:g} MiB"
    )
    if total > limit_mib * 2**20:
        largest = sorted(wheels, key=wheels.__getitem__, reverse=True)[:3]
        listed = ", ".join(f"{name.split('-')[0]} {_mib(wheels[name])}" for name in largest)
        raise PackError(f"{text}: too much; --leave-out some of the largest ({listed})")
    return text


def install_missing(target: Path, folder: Path = FOLDER) -> list[str]:
    """Install into `target` the wheels of packages that this Python lacks; their names.

    Raises:
        PackError: megatron-core is neither here nor carried, or pip fails.
    """
    here = {_name(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    there = importlib.metadata.distributions(path=[str(target)])
    here |= {_name(each.metadata["Name"]) for each in there}
    carried = {_name(wheel.name.partition("-")[0]): wheel for wheel in folder.glob("*.whl")}
    if not here & {"megatron-core"} and "megatron-core" not in carried:
        raise PackError(
            f"megatron-core is not installed, and {folder.name}/ has no wheel of it; run "
            f"'benchmarks/gpu_first.sh pack' where there is a network, and take the folder along"
        )
    missing = sorted(carried.keys() - here)
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--target", str(target)]
        if subprocess.run([*command, *(str(carried[name]) for name in missing)]).returncode:
            raise PackError("pip could not install the wheels; the reason is above")
    return missing


def _tracked_bytes() -> int:
    listed = subprocess.run(  # git's own list, so that ignored folders do not count
        ["git", "ls-files", "-z"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def _name(name: str) -> str:
    """As package indices compare names."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
