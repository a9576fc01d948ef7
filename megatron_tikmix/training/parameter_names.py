"""Names of parameters that are the same on every layout."""

import re

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

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
