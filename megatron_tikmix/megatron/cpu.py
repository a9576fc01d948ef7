"""Lets megatron-core run without CUDA. Where there is CUDA, it does nothing.

megatron-core hard-codes the device in its sources: ``device='cuda'``,
``torch.cuda.current_device()``, streams, tensor types compared with the string
``'torch.cuda.FloatTensor'``. :func:`install` puts an import hook in front of the import
system that rewrites those expressions, and only those, as ``megatron.core`` modules are
loaded. torch itself is unchanged, line numbers stay correct, and no file is written.

It must run before the first import of ``megatron.core``; ``megatron_tikmix`` calls it on
import, so spawned children do too. Whether there is CUDA is checked only when ``megatron.core``
is imported, so that ``megatron_tikmix.solve`` can be used without torch.

====================================  =============================================
in megatron-core                      becomes
====================================  =============================================
``torch.cuda.X``                      ``X`` of the stand-in below
``'cuda'``                            ``'cpu'``
``'torch.cuda.FloatTensor'``          ``'torch.FloatTensor'``
``tensor.cuda(...)``                  ``tensor.to('cpu')``
``jit_fuser`` (``torch.compile``)     off: compiling costs more than it gives here
====================================  =============================================

A rehearsal (``megatron_tikmix/rehearsal``) has the same done with torch's ``meta`` device in the
place of the CPU.
"""

import ast
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

_PACKAGE = "megatron.core"
_REWRITTEN = (_PACKAGE, "megatron.training")
_STAND_IN = "megatron_tikmix_cuda_stand_in"

_device = "cpu"  # what takes the place of CUDA


class _Nothing:
    """A stand-in for a stream, event or graph: every call does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *exc: object) -> None: ...


def _stand_in() -> types.ModuleType:
    """Make a module with the part of ``torch.cuda`` that megatron-core uses, without CUDA.

    Other names are those of ``torch.cuda`` itself, which suffices for annotations and exception
    classes; calls that really need a GPU fail with torch's own error.
    """
    import torch

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    module = types.ModuleType(_STAND_IN, _stand_in.__doc__)
    vars(module).update(
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        Stream=_Nothing,
        Event=_Nothing,
        nvtx=_Nothing(),
        random=module,
        default_generators={torch.device(_device): torch.default_generator},
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        current_device=functools.partial(torch.device, _device),
        device_count=lambda: 1,
        # Megatron asks for the generation: one that needs no workarounds.
        get_device_properties=lambda device=None: types.SimpleNamespace(major=10, minor=0),
        is_available=lambda: False,
        synchronize=nothing,
        empty_cache=nothing,
        set_device=nothing,
        current_stream=_Nothing,
        default_stream=_Nothing,
        device=contextlib.nullcontext,
        stream=contextlib.nullcontext,
        _lazy_call=lambda callback, **kwargs: callback(),
        _lazy_init=nothing,
        __getattr__=lambda name: getattr(torch.cuda, name),
    )
    return module


class _Rewriter(ast.NodeTransformer):
    """Redirects CUDA in one module's syntax tree (see the table above)."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            imported = ast.parse(f"__import__({_STAND_IN!r})", mode="eval").body
            for child in ast.walk(imported):
                ast.copy_location(child, node)
            return imported
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr = "to"
            node.args = [ast.copy_location(ast.Constant(_device), node)]
            node.keywords = []
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value == "cuda":
            node.value = _device
        elif isinstance(node.value, str) and node.value.startswith("torch.cuda."):
            prefix = "torch." if _device == "cpu" else f"torch.{_device}."
            node.value = node.value.replace("torch.cuda.", prefix)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.module == "torch.cuda" and node.level == 0:
            node.module = _STAND_IN
        return node


def _compiled(source: bytes, path: str) -> types.CodeType:
    tree = _Rewriter().visit(ast.parse(source, filename=path))
    return compile(tree, path, "exec", dont_inherit=True)


def compiled_script(path: str) -> types.CodeType:
    """Return a script that trains with megatron-core, redirected like megatron-core itself."""
    with open(path, "rb") as file:
        source = file.read()
    if _device == "cpu" and _cuda_is_there():
        return compile(source, path, "exec", dont_inherit=True)
    return _compiled(source, path)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a megatron-core module from its rewritten source; writes no byte code."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return _compiled(self.get_data(path), path)

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == f"{_PACKAGE}.jit":
            module.disable_jit_fuser()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(fullname == name or fullname.startswith(name + ".") for name in _REWRITTEN):
            return None
        if _device == "cpu" and _cuda_is_there():
            return None
        if _STAND_IN not in sys.modules:
            sys.modules[_STAND_IN] = _stand_in()
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        return importlib.util.spec_from_file_location(
            fullname,
            spec.origin,
            loader=_Loader(fullname, str(spec.origin)),
            submodule_search_locations=spec.submodule_search_locations,
        )


def _not_about_the_cpu_generator(record: logging.LogRecord) -> bool:
    # On the CPU the tracked generator *is* the CPU generator, so this warning does not apply.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


@functools.cache
def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def install() -> None:
    """Redirect megatron-core to the CPU when it is imported. Idempotent.

    Raises:
        RuntimeError: there is no CUDA, and ``megatron.core`` has been imported already.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _PACKAGE in sys.modules and not _cuda_is_there():
        raise RuntimeError("import megatron_tikmix before megatron.core: there is no CUDA here")
    sys.meta_path.insert(0, _Finder())
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        _not_about_the_cpu_generator
    )


def redirect(device: str) -> None:
    """Have megatron-core use `device` in the place of CUDA, even where CUDA is there.

    Raises:
        RuntimeError: ``megatron.core`` has been imported already.
    """
    global _device
    if _PACKAGE in sys.modules:
        raise RuntimeError("megatron.core has been imported already")
    install()
    _device = device
