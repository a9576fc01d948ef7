"""How TensorBoard arranges a run: the charts of its Custom Scalars tab, and its HParams tab."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_tikmix.monitoring.run_files import Row

HPARAM_SECTIONS = ("model", "data", "train", "optimizer", "scheduler", "remix", "probe")
METRICS = ("validation/mean_loss", "lm loss")
"""Tags that the HParams tab compares runs by."""

WEIGHTS = ("weight", "realised")
MOST_BANDS, FEW_CHARTS = 12, 8
"""Of more domains, a chart shows as many as can be told apart; a longer category begins closed."""


def layout_of(
    domains: Sequence[str], tasks: Sequence[str], *, decides: bool = True, audits: bool = True
) -> Any:
    """A tensorboard `layout_pb2.Layout` for these domains and tasks.

    A margin chart draws a value with a band from `low` to `high`: here, one standard error. Many
    domains, the largest first, are spread over several charts. What a run that does not decide or
    audit never writes has no chart.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2 as pb

    def lines(title: str, *patterns: str) -> Any:
        return pb.Chart(title=title, multiline=pb.MultilineChartContent(tag=patterns))

    def bands(title: str, *tags: tuple[str, str, str]) -> Any:
        series = [
            pb.MarginChartContent.Series(value=value, lower=low, upper=high)
            for value, low, high in tags
        ]
        return pb.Chart(title=title, margin=pb.MarginChartContent(series=series))

    largest = domains[:MOST_BANDS]
    few = len(domains) <= MOST_BANDS
    of_these = "" if few else f", the {MOST_BANDS} domains largest at the start"
    groups = list(_groups(domains, MOST_BANDS))
    categories = {
        "mixture": [
            lines(f"target and realised weights{of_these}", *_tags(WEIGHTS, largest)),
            lines("total variation and its noise", r"^mixture/total_variation"),
            lines("effective domains, exp(H)", r"^mixture/effective_domains$"),
            *(lines(f"{name}{of_these}", *_tags([name], largest)) for name in ("epochs", "tokens")),
        ],
        **{
            f"influence on {task} (± one standard error)": [
                bands(
                    _span(group) if len(groups) > 1 else "all domains",
                    *(_band("influence", f"{task}/{name}") for name in group),
                )
                for group in groups
            ]
            for task in tasks
        },
        "losses": [
            lines("training", r"^lm loss$"),
            lines("training, by domain", r"^domain_loss/"),
            lines("validation, by task", r"^validation/loss/", r"^validation/mean_loss$"),
            lines("skipped updates, loss spikes", r"^(skipped-iterations|loss-spikes)$"),
        ],
        "decision": [
            lines("predicted gain, by task", r"^predicted_gain/"),
            lines("rank stability and its ceiling", r"^rank_stability/"),
            lines("objective and its lower bound", r"^solver/(objective|lower_bound)$"),
            lines("duality gap and violation", r"^solver/(duality_gap|violation)$"),
        ],
        "audit": [
            lines("predicted and realised", r"^audit/(predicted|difference)$"),
            bands("realised", ("audit/difference", "audit/low", "audit/high")),
            *(
                bands("realised, by task", *map(_audited, group))
                for group in _groups(tasks, MOST_BANDS)
            ),
        ],
        "cost": [
            lines("share of compute", r"^(probe|decision)/share_of_compute$"),
            lines("seconds", r"^(probe|decision)/seconds$"),
            lines("tokens per second", r"^tokens-per-second$"),
            lines("peak of memory, bytes", r"^mem-max-allocated-bytes$"),
        ],
        "target and realised, by domain": [
            lines(_span(group), *_tags(WEIGHTS, group))
            for group in _groups(domains, 1 if few else MOST_BANDS // 2)
        ],
    }
    if not few:
        for name in ("epochs", "tokens"):
            categories[f"{name}, by domain"] = [
                lines(_span(group), *_tags([name], group)) for group in groups
            ]
    unwritten = set()
    if not decides:
        unwritten |= {title for title in categories if title.startswith(("influence", "decision"))}
    if not (decides and audits):
        unwritten |= {"audit"}
    return pb.Layout(
        category=[
            pb.Category(title=title, chart=charts, closed=len(charts) > FEW_CHARTS)
            for title, charts in categories.items()
            if title not in unwritten
        ]
    )


def layout_summary(domains: Sequence[str], tasks: Sequence[str], **has: bool) -> Any:
    """:func:`layout_of` as a `Summary` for an event file, as torch's `custom_scalars` makes one:
    that one knows no margin chart of several series."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME

    content = layout_of(domains, tasks, **has).SerializeToString()
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=TensorShapeProto())
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME))
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata)])


def _groups(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """`names` in runs of at most `size`."""
    return (names[start : start + size] for start in range(0, len(names), size))


def _span(names: Sequence[str]) -> str:
    """What a chart of these domains is called."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _band(prefix: str, name: str) -> tuple[str, str, str]:
    """Tags of a value and of the edges of its band."""
    return f"{prefix}/{name}", f"{prefix}_low/{name}", f"{prefix}_high/{name}"


def _audited(task: str) -> tuple[str, str, str]:
    return f"audit/difference/{task}", f"audit/low/{task}", f"audit/high/{task}"


def _tags(kinds: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Patterns of these tags of the mixture, of these domains alone."""
    return [_only(f"mixture/{kind}/{name}") for name in domains for kind in kinds]


def _only(tag: str) -> str:
    """A pattern that this tag alone matches."""
    return f"^{re.escape(tag)}$"


def hparams_of(config: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """The settings of a resolved configuration that runs are compared by, flat, by dotted name."""
    sections = {name: config.get(name) for name in HPARAM_SECTIONS}
    found = dict(_flat({"seed": config.get("seed"), **sections}))
    return {
        name: value if isinstance(value, str | bool | int | float) else str(value)
        for name, value in found.items()
        if value is not None
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def predicted_gain(ledger_row: Row) -> dict[str, float]:
    """By task, what the solver's answer gains over the mixture in force, in units of the largest
    influence of any domain on the task; empty where nothing was solved."""
    solution = ledger_row.get("solution") or {}
    before, after = solution.get("gain_before") or {}, solution.get("gain_after") or {}
    return {task: after[task] - before[task] for task in after if task in before}
