"""``tikmix``: its commands are listed, teach, start from anywhere, and are what the texts name."""

import ast
import importlib
import re
import runpy
import subprocess
import sys

import pytest

from megatron_tikmix.cli.main import COMMANDS, main
from tests.conftest import ROOT

LAUNCHERS = {
    "preprocess_data.py": "preprocess",
    "inspect_run.py": "inspect",
    "propose_mixture.py": "propose",
    "checkpoint.py": "checkpoint",
}
TEXTS = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *(path for path in (ROOT / "examples").iterdir() if path.is_file()),
    *(ROOT / "megatron_tikmix").rglob("*.py"),
    *(ROOT / "tools").glob("*.py"),
]


def test_help_lists_every_command_with_one_line(run_command):
    result = run_command("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", result.stdout, re.MULTILINE)
    assert run_command().stdout == result.stdout


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from megatron_tikmix.cli.main import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'megatron.core', 'numpy', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("megatron_tikmix 0.1.0\n\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches(name, capsys):
    """It begins as its module does, in words and with a sentence on each option."""
    module = importlib.import_module(f"megatron_tikmix.cli.{name}")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: tikmix {name} [-h]")
    assert module.__doc__.strip() in told
    for action in module.build_parser()._actions:
        options = [option for option in action.option_strings if option.startswith("--")]
        assert action.help or not options, f"{options} is not explained"
        assert not any("-" in option[2:] for option in options), f"{options}: underscores"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("reprot", "error: there is no command 'reprot'; did you mean report?\n"),
        ("xyz", "error: there is no command 'xyz'; tikmix --help lists the commands\n"),
    ],
)
def test_an_unknown_command_is_refused(run_command, command, said):
    result = run_command(command, "--help")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)


@pytest.mark.parametrize("argv", [["--fast"], ["--"], ["--fast", "inspect"]])
def test_an_option_before_the_command_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("tool", "command"), LAUNCHERS.items())
def test_tools_launch_the_commands(run_tool, tool, command):
    result = run_tool(tool, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: tikmix {command} [-h]")


@pytest.mark.parametrize(
    "path", ["megatron_tikmix/cli/__main__.py", *(f"tools/{t}" for t in LAUNCHERS)]
)
def test_worker_processes_can_import_the_program(path):
    """Those of `preprocess` run the file that was started once more, under this name."""
    runpy.run_path(str(ROOT / path), run_name="__mp_main__")


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_bad_input_is_told_in_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    commands = [["inspect", "summary"], ["checkpoint", "list"], ["propose"]]
    if folder == "nowhere":  # an empty folder is a run that has only begun: it has a report
        commands.append(["report"])
    for command in commands:
        assert main([*command, str(tmp_path / folder)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert re.fullmatch(r"error: .+\n", told.err)


def test_the_installed_program_is_the_dispatcher():
    tree = ast.parse((ROOT / "setup.py").read_text())
    (points,) = (
        ast.literal_eval(keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "entry_points"
    )
    assert points == {"console_scripts": ["tikmix = megatron_tikmix.cli.main:main"]}


def test_texts_name_commands_that_exist():
    """No document and no message names another command, or a file of tools/ that has become one."""
    named = set()
    for path in TEXTS:
        text = path.read_text()
        found = re.findall(r"(?<!import )\b(?:tikmix|megatron_tikmix\.cli) ([a-z]\w*)", text)
        unknown = set(found) - set(COMMANDS)
        assert not unknown, f"{path}: {unknown}"
        named |= set(found)
        if path.parent.name != "tools":
            old = re.findall("|".join(map(re.escape, LAUNCHERS)), text)
            assert not old, f"{path}: {old}"
    assert named == set(COMMANDS)
