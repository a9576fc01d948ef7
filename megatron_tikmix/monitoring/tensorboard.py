"""A run in TensorBoard: Megatron's usual scalars, and those of the mixture.

`TensorBoardWriter` writes the rows of a run; below it are the layout of the Custom Scalars tab, the
settings for the HParams tab, and an influence matrix as a bitmap for the Images tab.

The horizontal axis is always the iteration. Megatron's "... vs samples" charts are left out: a
resumed run hides old points by their step, and would mistake samples for iterations.
Tags are stable; docs/monitoring.md lists them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.monitoring.figures import DIVERGING, GREY, GREY_TEXT, INK
from megatron_tikmix.monitoring.history import share_of
from megatron_tikmix.monitoring.words import (
    Influence,
    decision_in_words,
    mean_loss,
    shorten,
    signed,
    spent,
)

MEGATRON_TAGS = {
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "tokens_per_second": "tokens-per-second",
    "memory_bytes": "mem-max-allocated-bytes",
    "skipped_iterations": "skipped-iterations",
    "loss_spikes": "loss-spikes",
}
SOLVER_TAGS = {"objective": "objective", "solve_seconds": "seconds"}
CERTIFICATE_TAGS = {"gap": "duality_gap", "lower_bound": "lower_bound", "violation": "violation"}
AUDITED = ("predicted", "difference", "low", "high")

HPARAM_SECTIONS = ("model", "data", "train", "optimizer", "scheduler", "remix", "probe")
METRICS = ("validation/mean_loss", "lm loss")
"""Tags by which the HParams tab compares runs."""

WEIGHTS = ("weight", "realised")
MOST_BANDS, FEW_CHARTS = 12, 8
"""The most domains in a chart; and the most charts in a category that is open at first."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL_WIDTH, BARE_CELL_WIDTH, GAP, LETTERS = 64, 24, 2, 24
"""Pixels before enlarging, of a heat map's cell with a number, of one without, and between cells;
then the most characters of a name."""

FEW_CELLS, ENLARGED = 400, 3
"""A matrix of at most so many cells has numbers in them, and is enlarged by this factor, since
TensorBoard shrinks a picture to the width of its card by dropping pixels: a thin + would become −.
"""


class TensorBoardWriter:
    """Writes the rows of `metrics.jsonl` and of the ledger as they are made, on one rank.

    A run resumed after `iteration` passes `purge_step=iteration + 1`, which hides what the killed
    run wrote after its checkpoint.

    Args:
        sequence_length: tokens in a sample; None: no scalars of tokens are written.
        in_force: weights of the stage in which a run is resumed.
    """

    def __init__(
        self,
        log_dir: str | Path,
        purge_step: int | None = None,
        sequence_length: int | None = None,
        in_force: Mapping[str, float] | None = None,
    ) -> None:
        # Imported here, since it takes a second and only one rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=30)
        self._sequence_length = sequence_length
        # The last iterations with evaluation and consumption written; resuming sets both.
        self._evaluated = self._counted = purge_step - 1 if purge_step else None
        self._weights = in_force
        self._pending: list[tuple[str, float]] = []
        self._has_layout = False
        self._writes = {"decides": True, "audits": True}

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def hparams(self, config: Mapping[str, Any]) -> None:
        """Write the settings of a resolved configuration for the HParams tab, before any stage."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(hparams_of(config), dict.fromkeys(METRICS, 0.0)):
            self._writer.file_writer.add_summary(summary)
        policy, audit = config.get("remix", {}).get("policy"), config.get("audit", {})
        self._writes = {
            "decides": policy not in ("static", "schedule"),
            "audits": bool(audit.get("enabled")),
        }

    def step(self, metrics_row: Mapping[str, Any], realised: Mapping[str, float]) -> None:
        """Write a logged step; `realised` is each domain's share of the samples drawn."""
        iteration = metrics_row["iteration"]
        for field, tag in MEGATRON_TAGS.items():
            self._scalar(tag, metrics_row.get(field))
        self._scalars("domain_loss", metrics_row.get("domain_loss"))
        self._scalars("mixture/realised", realised)
        if "domain_epochs" in metrics_row:  # an interval has ended here
            epochs, samples = metrics_row["domain_epochs"], metrics_row.get("domain_samples")
            self._consumption(iteration, epochs, samples)
        else:  # so that the target is drawn as steps; where an interval ends, the stage has it
            self._scalars("mixture/weight", self._weights)
        self._validation(iteration, metrics_row.get("task_loss"))
        self._scalars("validation/bits_per_byte", metrics_row.get("task_bits_per_byte"))
        self._write(iteration)

    def stage(self, row: StageRow, former: StageRow | None = None) -> None:
        """Write a stage of the mixture, with moves and cost since the row of the stage before."""
        iteration = row.start_iteration
        self._write_layout(row)
        self._weights = row.weights
        self._scalars("mixture/weight", row.weights)
        self._consumption(iteration, row.domain_epochs, row.domain_samples)
        self._influence(row, iteration)
        self._cost(row, former)
        for field in ("total_variation", "total_variation_noise", "effective_domains"):
            self._scalar(f"mixture/{field}", getattr(row, field))
        if row.rank_stability is not None:
            for field, values in row.rank_stability.to_json().items():
                self._scalars(f"rank_stability/{field}", values)
        self._scalars("predicted_gain", predicted_gain(row))
        self._solver(row.solution.to_json() if row.solution else {})
        self._audit(row.audit.to_json() if row.audit else {})
        self._validation(iteration, row.task_loss)
        self._write(iteration)
        words = decision_in_words(former, row)
        self._writer.add_text("mixture/decision", words, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Flush what is pending and close the event file."""
        self._writer.close()

    def _write_layout(self, row: StageRow) -> None:
        """Write the layout of the charts once, when domains and tasks are known."""
        if not self._has_layout:
            tasks, weights = list(row.task_loss), row.weights
            domains = sorted(weights, key=lambda name: -weights[name])  # the largest in one chart
            self._writer.file_writer.add_summary(layout_summary(domains, tasks, **self._writes))
            self._has_layout = True

    def _influence(self, row: StageRow, iteration: int) -> None:
        """Write the matrix with its errors as numbers, as edges of a band, and as a picture."""
        matrix = Influence.of(row)
        if matrix is None:
            return
        for field, numbers_VD in (
            ("influence", matrix.values_VD),
            ("influence_se", matrix.errors_VD),
            ("influence_low", matrix.values_VD - matrix.errors_VD),
            ("influence_high", matrix.values_VD + matrix.errors_VD),
        ):
            for task, numbers_D in zip(matrix.tasks, numbers_VD, strict=True):
                named = dict(zip(matrix.domains, numbers_D.tolist(), strict=True))
                known = {name: value for name, value in named.items() if math.isfinite(value)}
                self._scalars(f"{field}/{task}", known)
        image, _ = heat_map_image(matrix)
        self._writer.add_image("influence/heat_map", image, iteration, dataformats="HWC")

    def _consumption(
        self,
        iteration: int,
        epochs: Mapping[str, float] | None,
        samples: Mapping[str, float] | None,
    ) -> None:
        """Write the samples drawn from each domain so far."""
        # As with evaluations: the end of an interval is in a metrics row and in the ledger.
        if iteration == self._counted:
            return
        self._counted = iteration
        self._scalars("mixture/epochs", epochs)
        if samples and self._sequence_length is not None:
            tokens = {name: count * self._sequence_length for name, count in samples.items()}
            self._scalars("mixture/tokens", tokens)

    def _cost(self, row: StageRow, former: StageRow | None) -> None:
        """Write the probe's and all deciding's shares of the compute since the last stage."""
        parts = spent(row)
        if not parts or former is None:
            return
        probe = [part for part in parts if part.kind == "probe"]
        if self._sequence_length is not None:
            trained = (row.start_sample - former.start_sample) * self._sequence_length
            for name, counted in (("probe", probe), ("decision", parts)):
                compute = sum(part.compute for part in counted)
                self._scalar(f"{name}/share_of_compute", share_of(compute, trained))
        for part in probe:
            self._scalar("probe/seconds", part.seconds)
        seconds = [part.seconds for part in parts if part.seconds is not None]
        self._scalar("decision/seconds", sum(seconds))

    def _solver(self, solution: Mapping[str, Any]) -> None:
        """Write the solution's value, and its certificate."""
        for field, tag in SOLVER_TAGS.items():
            self._scalar(f"solver/{tag}", solution.get(field))
        for field, tag in CERTIFICATE_TAGS.items():
            certificate = solution.get("certificate") or {}
            self._scalar(f"solver/{tag}", certificate.get(field))

    def _audit(self, audit: Mapping[str, Any]) -> None:
        """Write predicted and realised gains, overall and for each task."""
        for field in AUDITED:
            self._scalar(f"audit/{field}", audit.get("overall", {}).get(field))
            for task, found in audit.get("tasks", {}).items():
                self._scalar(f"audit/{field}/{task}", found.get(field))

    def _validation(self, iteration: int, task_loss: Mapping[str, float | None] | None) -> None:
        # A boundary's evaluation is in a metrics row and in the ledger: one point is enough.
        if task_loss and iteration != self._evaluated:
            self._scalars("validation/loss", task_loss)
            mean = mean_loss(task_loss)
            self._scalar("validation/mean_loss", mean if np.isfinite(mean) else None)
            self._evaluated = iteration

    def _scalars(self, prefix: str, values: Mapping[str, float | None] | None) -> None:
        for name, value in (values or {}).items():
            self._scalar(f"{prefix}/{name}", value)

    def _scalar(self, tag: str, value: float | None) -> None:
        if value is not None:
            self._pending.append((tag, value))

    def _write(self, iteration: int) -> None:
        """Write all pending values as one event; one for each is slow with hundreds of domains."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in self._pending]
        self._pending.clear()
        self._writer.file_writer.add_summary(Summary(value=values), iteration)


def layout_of(
    domains: Sequence[str], tasks: Sequence[str], *, decides: bool = True, audits: bool = True
) -> Any:
    """Return a tensorboard `layout_pb2.Layout` for these domains and tasks.

    A margin chart draws a value with a band from `low` to `high`: here, one standard error. Many
    domains, the largest first, are spread over several charts. A run that does not decide, or does
    not audit, has no charts of decisions or audits.
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


def layout_summary(domains: Sequence[str], tasks: Sequence[str], **writes: bool) -> Any:
    """Return :func:`layout_of` as a `Summary` for an event file.

    Torch's `custom_scalars` cannot make margin charts of several series.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME

    content = layout_of(domains, tasks, **writes).SerializeToString()
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=TensorShapeProto())
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME))
    return Summary(value=[Summary.Value(tag=CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata)])


def _groups(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Split `names` into groups of at most `size`."""
    return (names[start : start + size] for start in range(0, len(names), size))


def _span(names: Sequence[str]) -> str:
    """Return the title of a chart of these domains."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _band(prefix: str, name: str) -> tuple[str, str, str]:
    """Return the tags of a value and of the edges of its band."""
    return f"{prefix}/{name}", f"{prefix}_low/{name}", f"{prefix}_high/{name}"


def _audited(task: str) -> tuple[str, str, str]:
    return f"audit/difference/{task}", f"audit/low/{task}", f"audit/high/{task}"


def _tags(kinds: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Return patterns that match these tags of the mixture, of these domains, and no others."""
    return [f"^{re.escape(f'mixture/{kind}/{name}')}$" for name in domains for kind in kinds]


def hparams_of(config: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """Return the settings by which runs are compared, by dotted name."""
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


def predicted_gain(row: StageRow) -> dict[str, float]:
    """Return the solution's predicted gain on each task over the mixture before.

    The unit is the largest influence of any domain on the task. Empty where nothing was solved.
    """
    if row.solution is None:
        return {}
    before, after = row.solution.gain_before, row.solution.gain_after
    return {task: after[task] - before[task] for task in after if task in before}


@dataclass(frozen=True)
class Grid:
    """The positions of a heat map's cells, in pixels."""

    left: int
    top: int
    cell_width: int
    cell_height: int
    gap: int
    numbers: bool

    def corner(self, d: int, v: int) -> tuple[int, int]:
        """Return the upper left of the cell of domain d and task v."""
        return self.left + v * self.cell_width, self.top + d * self.cell_height


def heat_map_image(matrix: Influence) -> tuple[NDArray[np.uint8], Grid]:
    """Draw domains down and tasks across, each task relative to its largest entry; noise is grey.

    Returns:
        Pixels, uint8 of shape (height, width, 3), and the grid of their cells.
    """
    names = [shorten(name, LETTERS) for name in matrix.domains]
    tasks = [shorten(name, LETTERS) for name in matrix.tasks]
    D, V = len(names), len(tasks)
    numbers = D * V <= FEW_CELLS
    scale = ENLARGED if numbers else 1
    font = ImageFont.load_default(scale * (12 if numbers else 9))
    grid = Grid(
        left=int(max(map(font.getlength, names))) + 12 * scale,
        top=int(max(map(font.getlength, tasks))) + 12 * scale,
        cell_width=(CELL_WIDTH if numbers else BARE_CELL_WIDTH) * scale,
        cell_height=(22 if numbers else 12) * scale,
        gap=GAP * scale,
        numbers=numbers,
    )
    size = (grid.left + V * grid.cell_width, grid.top + D * grid.cell_height)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for v, task in enumerate(tasks):
        _draw_upright(image, task, (grid.corner(0, v)[0], 0), (grid.cell_width, grid.top), font)
    for d, name in enumerate(names):
        middle = (grid.left - 6 * scale, grid.corner(d, 0)[1] + grid.cell_height / 2)
        draw.text(middle, name, fill=INK, font=font, anchor="rm")
    _draw_cells(draw, matrix, grid, font)
    return np.asarray(image), grid


def _draw_cells(draw: ImageDraw.ImageDraw, matrix: Influence, grid: Grid, font: Font) -> None:
    relative_VD, noise_VD = matrix.relative().values_VD, matrix.is_noise()
    for v, d in np.ndindex(relative_VD.shape):
        (x, y), value = grid.corner(d, v), float(relative_VD[v, d])
        box = (x, y, x + grid.cell_width - grid.gap, y + grid.cell_height - grid.gap)
        draw.rectangle(box, fill=GREY[0][1] if noise_VD[v, d] else colour(value))
        if grid.numbers and np.isfinite(value):
            ink = GREY_TEXT if noise_VD[v, d] else INK if abs(value) < 0.6 else "white"
            middle = (x + grid.cell_width / 2, y + grid.cell_height / 2)
            # The font that comes with Pillow has no minus sign, and sets signs against digits.
            number = signed(value).replace("\N{MINUS SIGN}", "-")
            number = f"{number[0]} {number[1:]}"
            draw.text(middle, number, fill=ink, font=font, anchor="mm", stroke_width=1)


def colour(value: float) -> tuple[int, int, int]:
    """Return the colour of a relative influence, −1 to 1: orange harms, blue helps."""
    places = [2 * place - 1 for place, _ in DIVERGING]
    channels = np.array([_rgb(name) for _, name in DIVERGING])
    r, g, b = (round(float(np.interp(value, places, channels[:, c]))) for c in range(3))
    return r, g, b


def _rgb(name: str) -> tuple[int, int, int]:
    r, g, b = (int(name[place : place + 2], 16) for place in (1, 3, 5))
    return r, g, b


def _draw_upright(
    image: Image.Image,
    text: str,
    corner: tuple[int, int],
    size: tuple[int, int],
    font: Font,
) -> None:
    """Draw text that runs upwards, in the middle of a box."""
    width, height = size
    turned = Image.new("RGB", (height, width), "white")
    ImageDraw.Draw(turned).text((4, width / 2), text, fill=INK, font=font, anchor="lm")
    image.paste(turned.rotate(90, expand=True), corner)
