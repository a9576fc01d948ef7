"""TiKMiX in NVIDIA's own loop, `megatron.training`: one more argument to a Megatron command.

::

    torchrun … -m megatron_tikmix.hosts.megatron_lm SCRIPT ARGUMENTS --tikmix-config tikmix.yaml

SCRIPT is run as it is, with the arguments it knows. The training data are the domains of
tikmix.yaml; validation and test data, the loop, its log, its checkpoints and its exits stay
Megatron's. tikmix.yaml has the sections data, tasks, remix, probe, rollout and audit of this
package's configuration; all else comes from Megatron's arguments.

Six functions of `megatron.training` are wrapped, where their module looks them up; nothing else
is touched. Megatron needs megatron-core 0.17 or newer for the package `megatron.training`.
"""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_tikmix.config import HostedConfig
from megatron_tikmix.config.command_line import load_hosted_config
from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.hosts.host import Host
from megatron_tikmix.log import configure_logging, print_error
from megatron_tikmix.megatron import cpu
from megatron_tikmix.megatron.collectives import make_on_all_ranks
from megatron_tikmix.megatron.faults import mend_torch_adam, unshare_steps
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.samples import Sample
from megatron_tikmix.monitoring.words import decision_in_words


class _Binding:
    """What is known of the run while Megatron calls the wrapped functions, in this order."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.saved: str | None = None
        """The state in the checkpoint that was loaded; None: it has none, or none was loaded."""


def bind() -> None:
    """Wrap the six functions of `megatron.training`. Once a process, before `pretrain` is called.

    Raises:
        InputError: this megatron-core has no `megatron.training`, or lacks one of them.
    """
    binding = _Binding()
    wrappers: dict[tuple[str, str], Callable[..., Any]] = {
        ("arguments", "add_megatron_arguments"): _with_our_argument,
        ("training", "load_checkpoint"): _with_mended_adam,
        ("checkpointing", "check_checkpoint_args"): _bound(binding, _note_saved_state),
        ("training", "build_train_valid_test_data_iterators"): _bound(binding, _our_iterator),
        ("training", "train"): _bound(binding, _connected),
        ("training", "post_training_step_callbacks"): _bound(binding, _boundary_after),
    }
    for (module_name, name), wrapper in wrappers.items():
        module = _module(module_name)
        wrapped = getattr(module, name, None)
        if wrapped is None:
            raise InputError(
                f"megatron.training.{module_name} has no {name}: this version of megatron-core is "
                f"not known; use 0.17 to 0.19"
            )
        setattr(module, name, functools.wraps(wrapped)(functools.partial(wrapper, wrapped)))
    _without_cuda()


def _bound(binding: _Binding, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Give `wrapper` the binding after the function that it wraps."""

    def bound(wrapped: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return wrapper(binding, wrapped, *arguments, **options)

    return bound


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"megatron.training.{name}")
    except ImportError as error:
        raise InputError(
            f"megatron.training cannot be imported ({error}); it comes with megatron-core 0.17 or "
            f"newer, or with Megatron-LM on PYTHONPATH"
        ) from error


def _without_cuda() -> None:
    """Let Megatron start without CUDA, and without a compiler for what is compiled already."""
    if not torch.cuda.is_available():
        training = vars(_module("training"))
        training["initialize_megatron"] = functools.partial(
            training["initialize_megatron"], allow_no_cuda=True
        )
    datasets = importlib.import_module("megatron.core.datasets.utils")
    if not (Path(str(datasets.__file__)).parent / "Makefile").exists():
        # The wheel has the helpers, and no Makefile, without which Megatron exits.
        vars(datasets)["compile_helpers"] = lambda: None


def _with_our_argument(
    wrapped: Callable[..., argparse.ArgumentParser], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    parser = wrapped(parser)
    group = parser.add_argument_group(title="TiKMiX")
    group.add_argument(
        "--tikmix-config",
        metavar="tikmix.yaml",
        help="domains, tasks, and how the mixture follows the model; without it nothing changes",
    )
    return parser


def _with_mended_adam(
    wrapped: Callable[..., Any], model: Any, optimizer: Any, *more: Any, **options: Any
) -> Any:
    """Load a checkpoint; where torch's Adam trains, megatron-core cannot without help."""
    args, checkpointing = _args(), _module("checkpointing")
    known = [path for path in (args.load, args.pretrained_checkpoint) if path is not None]
    # A new run is left alone: help makes a state, with which it would train otherwise.
    loads = any(checkpointing.checkpoint_exists(path) for path in known)
    if not (loads and args.tikmix_config and optimizer is not None):
        return wrapped(model, optimizer, *more, **options)
    mend_torch_adam(optimizer)
    result = wrapped(model, optimizer, *more, **options)
    unshare_steps(optimizer)
    return result


def _note_saved_state(
    binding: _Binding, wrapped: Callable[..., Any], checkpoint_args: Any, *more: Any, **options: Any
) -> Any:
    binding.saved = getattr(checkpoint_args, "tikmix", None)
    return wrapped(checkpoint_args, *more, **options)


_DATA_ARGUMENTS = (
    "data_path",
    "data_args_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)


def _our_iterator(
    binding: _Binding, wrapped: Callable[..., Any], provider: Callable[..., Any]
) -> tuple[Any, Any, Any]:
    args = _args()
    if args.tikmix_config is None:
        return wrapped(provider)
    if binding.host is None:
        parallel = Parallel.from_megatron()
        binding.host = Host(
            make_on_all_ranks(parallel, lambda: hosted_config(args)),
            parallel,
            state=binding.saved,
            iteration=args.iteration,
            consumed_samples=args.consumed_train_samples,
        )
        binding.host.prepare()
        args.tikmix = binding.host.state()
    valid, test = None, None
    if args.mock_data or any(getattr(args, name, None) for name in _DATA_ARGUMENTS):
        _, valid, test = wrapped(provider)
    else:
        args.do_valid = args.do_test = False
    args.do_train = True
    rerun = importlib.import_module("megatron.core.rerun_state_machine")
    batches = _with_masks(binding.host, binding.host.micro_batches())
    return rerun.RerunDataIterator(batches), valid, test


def _with_masks(host: Host, batches: Iterator[Sample]) -> Iterator[Sample]:
    """Yield micro-batches as Megatron's loader makes them, attention masks included."""
    args = _args()
    for batch in batches:
        batch = host.data.boundaries.applied(batch)
        if args.create_attention_mask_in_dataloader and "attention_mask" not in batch:
            size, length = batch["tokens"].shape
            causal = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
            batch["attention_mask"] = causal.expand(size, 1, length, length).contiguous()
        batch.pop("domain", None)
        yield batch


def _connected(
    binding: _Binding,
    wrapped: Callable[..., Any],
    forward_step_func: Callable[..., Any],
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    *more: Any,
    **options: Any,
) -> Any:
    host = binding.host

    def call() -> Any:
        return wrapped(forward_step_func, model, optimizer, opt_param_scheduler, *more, **options)

    if host is None:
        return call()
    with _schedule_hooks(model, optimizer):
        host.connect(model, optimizer, opt_param_scheduler, _masked(host, forward_step_func))
    return call()


def _masked(host: Host, forward_step_func: Callable[..., Any]) -> Callable[..., Any]:
    def step(data_iterator: Any, model: Any, *more: Any) -> Any:
        return forward_step_func(_with_masks(host, data_iterator), model, *more)

    return step


@contextmanager
def _schedule_hooks(model: Any, optimizer: Any) -> Iterator[None]:
    """Set, for a while, the hooks of the schedule that Megatron sets later, in `train`."""
    config = model[0].config
    former = config.finalize_model_grads_func, config.grad_scale_func
    config.finalize_model_grads_func = former[0] or finalize_model_grads
    config.grad_scale_func = former[1] or optimizer.scale_loss
    try:
        yield
    finally:
        config.finalize_model_grads_func, config.grad_scale_func = former


def _boundary_after(
    binding: _Binding,
    wrapped: Callable[..., Any],
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    *more: Any,
    **options: Any,
) -> Any:
    result = wrapped(model, optimizer, opt_param_scheduler, iteration, *more, **options)
    host, args = binding.host, _args()
    if host is None or not host.due(iteration):
        return result
    timers = importlib.import_module("megatron.training.global_vars").get_timers()
    timers("interval-time").stop()
    timers("tikmix-boundary", log_level=0).start(barrier=True)
    before = host.ledger[-1]
    row = host.decide(iteration)
    args.tikmix = host.state()
    timers("tikmix-boundary").stop()
    timers("interval-time", log_level=0).start(barrier=True)
    if host.parallel.is_main:
        print(f"TiKMiX at iteration {iteration}: {decision_in_words(before, row)}", flush=True)
    _to_tensorboard(row.weights, iteration)
    return result


def _to_tensorboard(weights: Any, iteration: int) -> None:
    """Write the mixture to Megatron's own TensorBoard, on the rank that has it."""
    writer = importlib.import_module("megatron.training.global_vars").get_tensorboard_writer()
    if writer:
        for name, weight in weights.items():
            writer.add_scalar(f"mixture/{name}", weight, iteration)


def _args() -> Any:
    return importlib.import_module("megatron.training.global_vars").get_args()


_UNSUPPORTED: dict[str, Any] = {
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "cuda_graph_impl": "none",
    "enable_cuda_graph": False,
    "external_cuda_graph": False,
    "optimizer_cuda_graph": False,
    "optimizer_cpu_offload": False,
    "use_precision_aware_optimizer": False,
    "sft": False,
    "fim_data": False,
    "hybrid_context_parallel": False,
    "dataloader_inter_document_masking": False,
    "perform_rl_step": False,
    "phase_transition_iterations": None,
    "step_batch_size_schedule": None,
    "freeze_all_layers": False,
    "train_samples": None,
}
"""Megatron's arguments with which influence or the order of samples would be wrong, and off."""


def hosted_config(args: Any) -> HostedConfig:
    """Return the configuration of tikmix.yaml and Megatron's arguments.

    Raises:
        InputError: names the field of the file, or the argument.
    """
    if args.save is None:
        raise InputError("--tikmix-config needs --save, where its ledger is written (SAVE/tikmix)")
    if args.train_iters is None:
        raise InputError(
            "--tikmix-config needs --train-iters; --train-samples is not supported yet"
        )
    for name, off in _UNSUPPORTED.items():
        if getattr(args, name, off) not in (off, None, False, []):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is not supported with --tikmix-config yet; leave it out")
    if not args.use_distributed_optimizer:
        raise InputError("--tikmix-config needs --use-distributed-optimizer")
    ramp = args.rampup_batch_size
    return load_hosted_config(
        args.tikmix_config,
        {
            "data": {
                "sequence_length": args.seq_length,
                "num_workers": args.num_workers,
                "path_to_cache": args.data_cache_path,
                "reset_position_ids": args.reset_position_ids,
                "reset_attention_mask": args.reset_attention_mask,
                "eod_mask_loss": args.eod_mask_loss,
            },
            "train": {
                "train_iters": args.train_iters,
                "micro_batch_size": args.micro_batch_size,
                "global_batch_size": args.global_batch_size,
                "rampup_batch_size": None if ramp is None else [int(value) for value in ramp],
            },
            "scheduler": {
                "lr_decay_style": args.lr_decay_style,
                "lr_decay_iters": args.lr_decay_iters,
                "lr_wsd_decay_iters": args.lr_wsd_decay_iters,
            },
            "seed": args.seed,
            "run_dir": str(Path(args.save) / "tikmix"),
        },
    )


def main() -> None:
    """Run SCRIPT with the rest of the command line, bound to TiKMiX."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    configure_logging()
    try:
        if not Path(script).is_file():
            raise InputError(f"{script}: no such script")
        bind()
        code = cpu.compiled_script(script)
    except InputError as error:
        print_error(str(error))
        sys.exit(2)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(script).resolve().parent))
    module = ModuleType("__main__")
    module.__file__ = script
    sys.modules["__main__"] = module
    try:
        exec(code, vars(module))  # noqa: S102 - the user's own script, as python SCRIPT would
    except (InputError, TrainingError) as error:
        # Raised on every rank alike.
        if os.environ.get("RANK", "0") == "0":
            print_error(str(error))
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    main()
