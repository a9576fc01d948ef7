"""Reads ``[CONFIG.yaml] [--section.field value ...]``, and teaches it with ``--help``."""

import dataclasses
import difflib
import os
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, set_parsing_settings

from megatron_tikmix.config.ranges import out_of_range
from megatron_tikmix.config.run import RunConfig
from megatron_tikmix.config.sections import HostedConfig
from megatron_tikmix.errors import InputError

_USAGE = """\
torchrun --nproc-per-node N -m megatron_tikmix CONFIG.yaml [--section.field value ...]

Pretrain a megatron-core GPT while TiKMiX resets the mixture of domains at every interval
boundary. CONFIG.yaml gives the run; options on the command line override it. Started again
with the same run_dir, a run resumes from its newest checkpoint.

examples:
  torchrun --nproc-per-node 2 -m megatron_tikmix examples/quickstart.yaml
  torchrun --nproc-per-node 2 -m megatron_tikmix examples/quickstart.yaml \\
      --model.tensor_model_parallel_size 2 --run_dir runs/tp2
  WORLD_SIZE=8 python -m megatron_tikmix CONFIG.yaml --dry_run true     # check and plan only

Below are the fields most often set. Sections model, optimizer and ddp take every field of
megatron-core's TransformerConfig, OptimizerConfig and DistributedDataParallelConfig as well.
"""

# Of megatron-core's several hundred fields, those that --help lists.
_SHOWN = {
    "model": """num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size
        normalization gated_linear_unit activation_func add_bias_linear hidden_dropout
        attention_dropout init_method_std tensor_model_parallel_size
        pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel
        bf16 recompute_granularity position_embedding_type rotary_base rotary_percent
        share_embeddings_and_output_weights make_vocab_size_divisible_by transformer_impl
        attention_backend""",
    "optimizer": "lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad",
    "ddp": "overlap_grad_reduce overlap_param_gather bucket_size grad_reduce_in_fp32",
}


# Fields that follow from others (see the `__post_init__` methods).
_DERIVED = (
    "model.params_dtype",
    "model.pipeline_dtype",
    "model.deallocate_pipeline_outputs",
    "model.overlap_p2p_comm",
    "model.batch_p2p_comm",
    "model.ffn_hidden_size",
    "model.num_query_groups",
    "model.kv_channels",
    "remix.constraints.pareto",
    "remix.influence",
    "remix.gain",
    "remix.diversity_reference",
    "remix.smoothing",
    "optimizer.bf16",
    "optimizer.params_dtype",
    "optimizer.use_distributed_optimizer",
    "optimizer.min_lr",
    "ddp.use_distributed_optimizer",
    "ddp.grad_reduce_in_fp32",
)


set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser(for_help: bool = False) -> ArgumentParser:
    """The parser of every ``--section.field``, with a ``--config`` file beneath them.

    `for_help` hides the rarely used fields of megatron-core; hidden ones would be left out of
    the resolved configuration too, so a real run is parsed without it.
    """
    parser = ArgumentParser(
        prog="megatron_tikmix", usage=_USAGE, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="the run's YAML file")
    parser.add_class_arguments(RunConfig, as_group=True)
    for action in parser._actions if for_help else ():
        section, _, name = action.dest.partition(".")
        if section in _SHOWN and name and name not in _SHOWN[section].split():
            action.help = SUPPRESS
    return parser


def load_config(arguments: list[str]) -> tuple[RunConfig, str]:
    """Read ``[CONFIG.yaml] [--section.field value ...]``.

    Returns:
        The run, and its resolved YAML, which read back gives the same run.

    Raises:
        InputError: an unknown field (the nearest valid name is given), a value of the wrong
            type, or a combination that megatron-core refuses.
        SystemExit: ``--help`` was asked for.
    """
    file = "the configuration"
    if arguments and not arguments[0].startswith("-"):
        file = arguments[0]
        if not Path(file).is_file():
            raise InputError(f"{file}: no such configuration file")
        arguments = ["--config", *arguments]
    parser = build_parser(for_help=bool({"-h", "--help"} & set(arguments)))
    try:
        settings = parser.parse_args(arguments)
        settings.pop("config")
        config = RunConfig(**parser.instantiate(settings).as_dict())
        for name in _DERIVED:  # the record shows what is used, not what was asked for
            settings[name] = attrgetter(name)(config)
        return config, parser.dump(settings, skip_none=False)
    except InputError:
        raise
    except (ArgumentError, ValueError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise InputError(_in_one_sentence(str(error), parser, file)) from error


def load_hosted_config(path: str, given: dict[str, Any]) -> HostedConfig:
    """Read the configuration of a loop that is not ours.

    Args:
        path: a YAML file with the sections that the loop does not give.
        given: what the loop gives: sections, or some of their fields.

    Raises:
        InputError: an unknown field, one that the loop gives, or a wrong value.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} must hold sections: data, tasks, remix, probe, rollout, audit")
    known = {field.name for field in dataclasses.fields(HostedConfig)}
    for section in settings:
        if section not in known:
            raise InputError(
                f"{path}: {section} is no section of it; it has {', '.join(sorted(known))}"
            )
    for section, fields in given.items():
        ours = settings.setdefault(section, {} if isinstance(fields, dict) else None)
        if not isinstance(fields, dict):
            twice = [] if ours is None else [section]
            settings[section] = fields
        elif not isinstance(ours, dict):
            raise InputError(f"{path}: {section} must be a section")
        else:
            twice = [f"{section}.{name}" for name in fields if name in ours]
            ours |= fields
        if twice:
            raise InputError(f"{path}: {twice[0]} follows from the loop's arguments; leave it out")
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(HostedConfig, as_group=True)
    try:
        return HostedConfig(**parser.instantiate(parser.parse_object(settings)).as_dict())
    except InputError:
        raise
    except (ArgumentError, ValueError, AssertionError, TypeError, KeyError) as error:
        raise InputError(f"{path}: {_in_one_sentence(str(error), parser, path)}") from error


def _in_one_sentence(message: str, parser: ArgumentParser, file: str) -> str:
    """The parser's complaint on one line; an unknown field gets the nearest valid name."""
    message = re.sub(r"\s+", " ", message).strip()
    if "codec can't decode" in message:
        return f"{file} is not valid UTF-8: {message}"
    message = message.replace("Unexpected config:", f"{file} holds no configuration:")
    message = message.replace("Problems parsing config", f"{file} is not readable YAML")
    if refused := re.search(
        r'key "(?P<key>[^"]+)":.*?(?P<value>\S+)? does not conform to restriction '
        r"(?P<range>v\S+(?: and v\S+)*)(?:.*Given value: (?P<given>.+))?",
        message,
    ):
        value = refused["given"] or refused["value"]
        return out_of_range(refused["key"], value, refused["range"])
    unknown = re.search(
        r"Group '(?P<group>\S+)' does not accept option '(?P<key>\S+)'"
        r"|Option '(?P<name>\S+)' is not accepted|[Uu]nrecognized arguments: --(?P<option>[^\s=]+)",
        message,
    )
    if unknown is None:
        return message
    name = unknown["name"] or unknown["option"] or f"{unknown['group']}.{unknown['key']}"
    fields = [action.dest for action in parser._actions] + ["domain", "weight"]
    nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
    return f"unknown configuration field {name}; {hint}"


def launched_world() -> tuple[int, int, int]:
    """(rank, local rank, world size), from the variables torchrun sets; 0, 0, 1 without it."""
    read = os.environ.get
    return int(read("RANK", 0)), int(read("LOCAL_RANK", 0)), int(read("WORLD_SIZE", 1))
