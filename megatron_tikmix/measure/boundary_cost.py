"""The cost of a boundary on a named accelerator, in seconds by part, before anything runs."""

import math
from dataclasses import dataclass

from megatron_tikmix.config import RunConfig
from megatron_tikmix.errors import InputError
from megatron_tikmix.measure.probe_plan import ProbePlan, Trained

UTILISATION = 0.4
"""The part of an accelerator's FLOP/s, or of a matrix product's, that training reaches: common."""

LINK_UTILISATION = 0.8
"""The part of a link's bandwidth that a large reduction reaches."""

RANKS_OF_A_NODE = 8

MOST_LOST = 0.25
"""Beyond this part of a sub-batch in filling the pipeline and reducing, the plan says so."""

_SOLVE_SECONDS = 2.6 / 200
"""Of a domain; nine tasks and the noise test, on one core (`benchmarks/decision_time.py`)."""

_BYTES_OF_PRODUCT = 20
"""Read and written for an element of a kept row: float32, and float64 once more each way."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """An accelerator, as its maker describes it; all per second, and of one direction.

    Attributes:
        flops: dense, of matrix products in bf16, and in float32.
        memory_bandwidth: bytes.
        node_bandwidth: bytes between accelerators of a node.
        network_bandwidth: bytes of one accelerator to other nodes, where each has its own adapter.
    """

    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


ACCELERATORS = {
    "a100": Accelerator(
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bandwidth=2.0e12,
        node_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
    "h100": Accelerator(
        bf16_flops=989e12,
        fp32_flops=67e12,
        memory_bandwidth=3.35e12,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    "h200": Accelerator(
        bf16_flops=989e12,
        fp32_flops=67e12,
        memory_bandwidth=4.8e12,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    "b200": Accelerator(
        bf16_flops=2250e12,
        fp32_flops=75e12,
        memory_bandwidth=8.0e12,
        node_bandwidth=900e9,
        network_bandwidth=50e9,
    ),
}
"""SXM modules by NVIDIA's data sheets; adapters of 200 Gbit/s beside A100, else of 400."""


@dataclass(frozen=True, kw_only=True)
class SubBatchCost:
    """What one rank does for one sub-batch.

    Attributes:
        micro_batches: of this rank.
        compute: seconds of its micro-batches.
        fill: seconds in which a stage of the pipeline waits for the others.
        reduced_bytes: of the gradient, handed in to a reduction over data-parallel ranks.
        reduction: seconds of that.
        products: seconds of inner products with the kept rows.
    """

    micro_batches: int
    compute: float
    fill: float
    reduced_bytes: int
    reduction: float
    products: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.fill + self.reduction + self.products

    @property
    def lost(self) -> float:
        """The part of it that fills the pipeline and reduces gradients."""
        return (self.fill + self.reduction) / self.total


@dataclass(frozen=True, kw_only=True)
class BoundaryCost:
    """Seconds of a boundary, without evaluation and rollouts.

    Attributes:
        sub_batches: passes of a rank over sub-batches.
        row, rows: the pass of a row that is kept (a task; with joint influence a domain), and how
            many there are.
        curvature, curvature_passes: passes for the curvature.
        solve: on rank 0, while the others wait.
        enough_samples: `probe.sub_batch_samples` from which on no more than `MOST_LOST` is lost.
    """

    device_name: str
    sub_batch: SubBatchCost
    sub_batches: int
    row: SubBatchCost
    rows: int
    curvature: SubBatchCost
    curvature_passes: int
    solve: float
    enough_samples: int
    replicated: bool

    def seconds(self, part: str) -> float:
        """Seconds of a part of all passes: `compute`, `fill`, `reduction` or `products`."""
        passes = (
            (self.sub_batches, self.sub_batch),
            (self.rows, self.row),
            (self.curvature_passes, self.curvature),
        )
        return float(sum(count * getattr(cost, part) for count, cost in passes))

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(map(self.seconds, ("compute", "fill", "reduction", "products"))) + self.solve

    def in_words(self) -> str:
        text = (
            f"about {self.total:.3g} s on {self.device_name}, at {UTILISATION:.0%} of its FLOP/s: "
            f"micro-batches {self.seconds('compute'):.3g}, "
            f"filling the pipeline {self.seconds('fill'):.3g}, "
            f"reducing gradients {self.seconds('reduction'):.3g}, "
            f"inner products {self.seconds('products'):.3g}, solving {self.solve:.3g}"
        )
        if self.sub_batch.lost <= MOST_LOST:
            return text
        return text + (
            f"; {self.sub_batch.lost:.0%} of a sub-batch fills the pipeline and reduces: make "
            f"probe.sub_batch_samples {self.enough_samples:,}, for {MOST_LOST:.0%}"
            + (
                ""
                if self.replicated
                else ", or probe.data_parallel_mode replicated, which reduces no gradient of a "
                "domain"
            )
        )


def boundary_cost(
    device_name: str, config: RunConfig, world_size: int, trained: Trained, plan: ProbePlan
) -> BoundaryCost:
    """Return what a boundary costs on `world_size` accelerators of that name.

    Raises:
        InputError: no figures are known of it.
    """
    if device_name not in ACCELERATORS:
        raise InputError(
            f"device_name {device_name} is not known; use one of {', '.join(ACCELERATORS)}"
        )
    layout = _Layout(ACCELERATORS[device_name], config, trained)
    probe, train = config.probe, config.train
    rows = plan.tasks + plan.own_gradients
    ranks = trained.data_parallel_size
    replicated = probe.data_parallel_mode == "replicated"
    step = train.micro_batch_size * (1 if replicated else ranks)
    kept = trained.parameters if replicated else trained.parameters // ranks
    groups = math.ceil(rows / (probe.task_group_size or rows)) if replicated else 1
    asked = plan.domains * plan.sub_batches  # passed once for each group of tasks
    sub_batch = layout.pass_of(
        layout.micro_batches(probe.sub_batch_samples, step),
        reduced=not replicated,
        products=math.ceil(rows / groups) * kept,
    )
    lost = sub_batch.fill + sub_batch.reduction
    needed = (1 / MOST_LOST - 1) * lost - sub_batch.products
    enough = max(1, math.ceil(needed / layout.micro_batch_seconds))
    shared = train.micro_batch_size * ranks
    return BoundaryCost(
        device_name=device_name,
        sub_batch=sub_batch,
        sub_batches=groups * math.ceil(asked / ranks) if replicated else asked,
        # Their samples on average.
        row=layout.pass_of(
            layout.micro_batches(plan.samples_of_tasks // rows, shared), reduced=True, products=0
        ),
        rows=rows,
        curvature=layout.pass_of(
            layout.micro_batches(probe.sub_batch_samples, shared), reduced=True, products=0
        ),
        curvature_passes=plan.domains if plan.samples_of_curvature else 0,
        solve=_SOLVE_SECONDS * plan.domains,
        enough_samples=layout.filled(enough) * step,
        replicated=replicated,
    )


class _Layout:
    """Seconds of a rank's passes, for one accelerator and layout."""

    def __init__(self, device: Accelerator, config: RunConfig, trained: Trained) -> None:
        model, train = config.model, config.train
        tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
        self._device, self._trained = device, trained
        flops = device.bf16_flops if model.bf16 else device.fp32_flops
        tokens = train.micro_batch_size * config.data.sequence_length
        of_rank = tokens * trained.flops_per_token / (tp * pp)
        # A forward pass is a third of it, and is done twice where every layer is recomputed.
        again = 4 / 3 if model.recompute_granularity == "full" else 1.0
        self.micro_batch_seconds = again * of_rank / (UTILISATION * flops)
        self._waiting = (pp - 1) / (model.virtual_pipeline_model_parallel_size or 1)
        self._gradient_bytes = 4 if config.ddp.grad_reduce_in_fp32 or not model.bf16 else 2
        within_node = tp * trained.data_parallel_size <= RANKS_OF_A_NODE
        link = device.node_bandwidth if within_node else device.network_bandwidth
        self._link = LINK_UTILISATION * link

    def filled(self, micro_batches: int) -> int:
        multiple = self._trained.microbatch_multiple
        return math.ceil(micro_batches / multiple) * multiple

    def micro_batches(self, samples: int, step: int) -> int:
        """Micro-batches of this rank, for samples that are spread in steps."""
        return self.filled(math.ceil(samples / step))

    def pass_of(self, micro_batches: int, *, reduced: bool, products: int) -> SubBatchCost:
        """A pass over so many micro-batches, and inner products of so many elements of rows."""
        ranks = self._trained.data_parallel_size
        nbytes = self._trained.parameters * self._gradient_bytes if reduced and ranks > 1 else 0
        return SubBatchCost(
            micro_batches=micro_batches,
            compute=micro_batches * self.micro_batch_seconds,
            fill=self._waiting * self.micro_batch_seconds,
            reduced_bytes=nbytes,
            reduction=nbytes * (ranks - 1) / ranks / self._link,
            products=products * _BYTES_OF_PRODUCT / self._device.memory_bandwidth,
        )
