"""Names of parameters that are the same on every layout."""

import re

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import unwrap_model

from megatron_tikmix.config import ParametersConfig
from megatron_tikmix.errors import InputError
from megatron_tikmix.parallel.collectives import sum_over_ranks
from megatron_tikmix.parallel.initialize import Parallel

_LAYER = re.compile(r"(?P<layers>.*\blayers)\.(?P<index>\d+)$")


def global_names(model: list[DistributedDataParallel]) -> dict[torch.nn.Parameter, str]:
    """Each parameter of this rank's chunks with its name in the whole model.

    As GPTModel names it, without the wrappers' ``module.``, and with layers counted over all
    pipeline stages from 0: ``decoder.layers.11.mlp.linear_fc1.weight``.
    """
    names = {}
    for chunk in unwrap_model(model):
        numbers = {
            prefix: f"{match['layers']}.{module.layer_number - 1}"
            for prefix, module in chunk.named_modules()
            if (match := _LAYER.match(prefix)) and hasattr(module, "layer_number")
        }
        for name, parameter in chunk.named_parameters():
            local = next((p for p in numbers if name.startswith(f"{p}.")), None)
            names[parameter] = name if local is None else numbers[local] + name[len(local) :]
    return names


def check_selection(
    model: list[DistributedDataParallel], parameters: ParametersConfig, parallel: Parallel
) -> None:
    """Refuse a selection that leaves nothing, and a pattern that matches nothing. Collective.

    Raises:
        InputError: on every rank, naming the pattern.
    """
    names = [name for p, name in global_names(model).items() if param_is_not_shared(p)]
    patterns = [
        *(("include", pattern) for pattern in parameters.include),
        *(("exclude", pattern) for pattern in parameters.exclude),
    ]
    selections = [
        parameters,
        *(ParametersConfig(include=[pattern]) for _, pattern in patterns),
    ]
    matches = torch.tensor([sum(map(s.selects, names)) for s in selections])
    selected, *matched = sum_over_ranks(matches, parallel).tolist()
    for (field, pattern), count in zip(patterns, matched, strict=True):
        if not count:
            raise InputError(
                f"probe.parameters.{field}: {pattern} matches no parameter; names are like "
                f"{names[0]} and {names[-1]}"
            )
    if not selected:
        raise InputError(
            "probe.parameters.exclude: every included parameter is excluded; leave some to "
            "measure influence on"
        )
