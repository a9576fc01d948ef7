"""megatron-core on the CPU: what is rewritten, and that torch is left alone."""

import ast
import subprocess
import sys

import pytest

from megatron_tikmix.megatron.cpu import _Rewriter


def rewritten(source: str) -> str:
    return ast.unparse(_Rewriter().visit(ast.parse(source)))


def test_devices_types_and_methods_are_redirected() -> None:
    assert rewritten("x = torch.zeros(1, device='cuda')") == "x = torch.zeros(1, device='cpu')"
    assert "torch.cuda" not in rewritten("d = torch.cuda.current_device()")
    assert rewritten("t == 'torch.cuda.FloatTensor'") == "t == 'torch.FloatTensor'"
    assert rewritten("y = x.cuda(non_blocking=True)") == "y = x.to('cpu')"


def test_other_code_stays_as_it_is() -> None:
    source = "if x.is_cuda or 'cuda graphs' in text:\n    f(cuda, self.cuda_seed)"
    assert rewritten(source) == source


def test_line_numbers_stay_true() -> None:
    source = "a = 1\nb = torch.cuda.current_device()\nraise ValueError\n"
    tree = _Rewriter().visit(ast.parse(source))
    compile(tree, "x", "exec")  # every new node has its place
    assert [node.lineno for node in tree.body] == [1, 2, 3]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )


def test_torch_itself_is_not_patched() -> None:
    code = """
import torch
before = {name: id(value) for name, value in vars(torch.cuda).items()}
import megatron_tikmix
from megatron.core.models.gpt import GPTModel
changed = [n for n, i in before.items() if id(vars(torch.cuda)[n]) != i]
assert not changed, changed
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_megatron_imported_too_early_is_told() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("with CUDA the order does not matter")
    result = run("import megatron.core\nimport megatron_tikmix")
    assert result.returncode == 1
    assert "import megatron_tikmix before megatron.core" in result.stderr


def test_the_tracked_generator_gives_dropout_its_own_stream() -> None:
    code = """
import torch, megatron_tikmix
from megatron.core import tensor_parallel
tracker = tensor_parallel.get_cuda_rng_tracker()
tracker.add("model-parallel-rng", 7)
torch.manual_seed(1)
expected = torch.rand(3)
torch.manual_seed(1)
with tracker.fork():
    inside = torch.rand(3)
assert torch.equal(torch.rand(3), expected), "the outer stream was drawn from"
with tracker.fork():
    assert not torch.equal(torch.rand(3), inside), "the tracked stream did not go on"
torch.manual_seed(7)
assert torch.equal(torch.rand(3), inside)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
