"""What users copy: every example configuration plans a run, every script is a script."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_tikmix.__main__ import main
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.tokenizer import TokenizerFiles
from tests.conftest import EOD, ROOT, VOCAB_SIZE, write_prompts, write_tokens, write_word_tokenizer

EXAMPLES = ROOT / "examples"
DOMAINS = {
    "quickstart": ("tables", "noise", "python_code", "python_docs", "cpp_headers", "package_prose")
}
RANKS = {"quickstart": 2, "1b": 8, "7b": 64}
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])


def stand_in(manifest: Path, names: tuple[str, ...]) -> None:
    """Domains of 8,000 tokens each, with a tokenizer, where a configuration looks for them."""
    manifest.parent.mkdir(parents=True)
    generator = np.random.default_rng(0)
    domains = {}
    for name in names:
        documents = [np.append(generator.integers(1, VOCAB_SIZE, 1000), EOD) for _ in range(8)]
        domains[name] = {
            split: write_tokens(manifest.parent / f"{name}_{split}", documents)
            for split in ("train", "validation")
        }
    tokenizer = TokenizerFiles(write_word_tokenizer(manifest.parent / "tokenizer.json"))
    DomainManifest(manifest, tokenizer, VOCAB_SIZE, EOD, domains).save()


@pytest.fixture
def plan(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, str]:
    """The plan of a configuration, by subject, made in a folder that has its data."""
    name = request.param
    config = (EXAMPLES / f"{name}.yaml").read_text()
    manifest = re.search(r"manifest: (\S+)", config)
    assert manifest is not None
    names = DOMAINS.get(name, tuple(f"domain_{j:02}" for j in range(26)))
    stand_in(tmp_path / manifest[1], names)
    for prompts in re.findall(r"prompts: ([^\s}]+)", config):
        (tmp_path / prompts).parent.mkdir(exist_ok=True)
        write_prompts(tmp_path / prompts, count=200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(RANKS[name]))
    code = main([str(EXAMPLES / f"{name}.yaml"), "--dry_run", "true"])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert not (tmp_path / "runs" / name).exists(), "a dry run writes nothing"
    return dict(line.split(maxsplit=1) for line in told.out.splitlines())


def test_every_configuration_is_planned_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(RANKS)


@pytest.mark.parametrize("plan", ["quickstart"], indirect=True)
def test_the_quickstart_has_its_plan(plan: dict[str, str]) -> None:
    assert plan["layout"] == "2 ranks = tensor 1 × pipeline 1 × data 2"
    assert "GiB" in plan["memory"]


# The paper: 1 T tokens and 4 resets; 500 B + 200 B and one. A probe takes 0.1 B tokens.
@pytest.mark.parametrize(
    ("plan", "layout", "tokens", "mixture", "parameters", "most_gib"),
    [
        ("1b", "8 ranks = tensor 1 × pipeline 1 × data 8", 1e12, "at 4 boundaries", "974 M", 70),
        ("7b", "64 ranks = tensor 2 × pipeline 1 × data 32", 7e11, "at 1 boundaries", "6.48 B", 70),
    ],
    indirect=["plan"],
)
def test_the_paper_settings(
    plan: dict[str, str], layout: str, tokens: float, mixture: str, parameters: str, most_gib: float
) -> None:
    assert plan["layout"] == layout
    planned = re.search(r"= ([\d,]+) tokens$", plan["training"])
    assert planned is not None
    assert float(planned[1].replace(",", "")) == pytest.approx(tokens, rel=1e-4)
    assert mixture in plan["mixture"]
    assert plan["domains"].startswith("26 with ")
    # Without the embedding, which here is that of 256 tokens.
    assert plan["memory"].startswith(f"{parameters} parameters")
    total = re.search(r"= about ([\d.]+) GiB$", plan["memory"])
    assert total is not None
    assert 5 < float(total[1]) < most_gib
    probe = re.search(r"\(([\d,]+) tokens", plan["probe"])
    assert probe is not None
    assert float(probe[1].replace(",", "")) == pytest.approx(1e8, rel=0.05)
    assert "26 domains × 14 sub-batches + 9 tasks" in plan["probe"]
    assert "padding" not in plan["probe"], "sub-batches fill their micro-batches"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def test_scripts_ask_for_a_configuration() -> None:
    for script in ("node.sh", "slurm.sbatch"):
        result = subprocess.run(
            ["bash", str(EXAMPLES / script)], capture_output=True, text=True, check=False
        )
        assert result.returncode != 0
        assert "usage: " in result.stderr


SLURM = {
    "python": "exit 0",
    "scontrol": 'echo "$@" >> scontrol.log',
    # The ranks end cleanly as soon as they are told; srun, that told them, some time later.
    "srun": """
        echo "$SRUN_CPUS_PER_TASK" > cpus
        case $1 in
        --overlap)
            touch told
            while kill -0 "$(cat job)" 2>/dev/null; do sleep 0.05; done ;;
        *)
            echo $$ > job.new && mv job.new job
            while [ ! -e told ] && [ ! -e failed ]; do sleep 0.05; done
            [ ! -e failed ] || exit 3 ;;
        esac
    """,
    # The first look at the job comes only when it has ended.
    "late": 'kill() { while builtin kill "$@"; do sleep 0.05; done; return 1; }',
}


def start_under_slurm(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """slurm.sbatch in `folder`, with stand-ins for what it calls."""
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment |= {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_ID": "7",
        "USER": "user",
    }
    return subprocess.Popen(
        ["bash", EXAMPLES / "slurm.sbatch", "run.yaml"], cwd=folder, env=environment
    )


def test_a_job_that_was_told_to_save_is_requeued(tmp_path: Path) -> None:
    script = start_under_slurm(tmp_path)
    while not (tmp_path / "job").exists():
        assert script.poll() is None
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=60) == 0
    assert "requeue 7\n" in (tmp_path / "scontrol.log").read_text()
    assert (tmp_path / "cpus").read_text() == "64\n"


def test_a_job_that_fails_at_once_gives_its_code(tmp_path: Path) -> None:
    (tmp_path / "failed").touch()
    script = start_under_slurm(tmp_path, BASH_ENV=str(tmp_path / "late"))
    assert script.wait(timeout=60) == 3
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
