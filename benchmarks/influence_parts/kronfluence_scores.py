"""The same influence by kronfluence, on the same weights and samples in plain PyTorch."""

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from rich.table import Table
from scipy.stats import spearmanr
from torch.nn import functional as F

from influence_parts.cost import cost
from influence_parts.plain_gpt import PlainGPT, plain_copy
from influence_parts.statistics import correlations
from influence_parts.trained import Figures, Settings, Trained, trained
from megatron_tikmix.errors import InputError

SUB_BATCHES = 16
"""Of each domain."""
FITTED_SAMPLES = 1152
"""Samples that kronfluence's factors are fitted on, an equal number of each domain."""
SEED = 7
LINEAR = "*linear_*"
"""The parameters compared: kronfluence knows linear layers only."""

METHODS = {
    "identity": "megatron_tikmix, identity",
    "adam": "megatron_tikmix, adam",
    "kronfluence_identity": "kronfluence, identity",
    "kronfluence_ekfac": "kronfluence, EK-FAC",
}
TARGET_DIFFERENCE = 1e-3
"""The identity has one right answer: both must give it, to so much of a row's largest entry."""
PAIRS = (
    ("identity", "kronfluence_identity"),
    ("identity", "kronfluence_ekfac"),
    ("adam", "kronfluence_ekfac"),
    ("identity", "adam"),
)


def measure(settings: Settings) -> Figures:
    """Every method in a process of its own, so that none sees another's memory."""
    try:
        import kronfluence  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"kronfluence cannot be imported ({error}); install the extra: "
            'pip install -e ".[benchmarks]"'
        ) from error
    found: dict[str, Any] = {}
    for method, label in METHODS.items():
        settings.say(f"{label} …")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[method] = pool.submit(influence_by, settings, method).result()
    return {
        "tasks": found["adam"].pop("tasks"),
        "domains": found["adam"].pop("domains"),
        "methods": found,
        "agreement": {f"{a} ~ {b}": agreement(found[a], found[b]) for a, b in PAIRS},
        "largest_difference_identity": largest_difference(
            *(np.array(found[m]["influence_VD"]) for m in ("identity", "kronfluence_identity"))
        ),
    }


def agreement(a: Figures, b: Figures) -> dict[str, list[float]]:
    """Over domains, for each task, (V,)."""
    a_DV, b_DV = np.array(a["influence_VD"]).T, np.array(b["influence_VD"]).T
    pairs = zip(a_DV.T, b_DV.T, strict=True)
    return {
        "pearson": correlations(a_DV, b_DV).tolist(),
        "spearman": [float(spearmanr(x, y).statistic) for x, y in pairs],
    }


def largest_difference(a_VD: np.ndarray, b_VD: np.ndarray) -> float:
    """As a share of the row's largest entry."""
    scale_V1 = np.abs(a_VD).max(axis=1, keepdims=True)
    return float((np.abs(a_VD - b_VD) / scale_V1).max())


# In the processes of their own -----------------------------------------------------------


def influence_by(settings: Settings, method: str) -> Figures:
    torch.set_num_threads(1)
    with trained(settings) as found:
        if method.startswith("kronfluence"):
            return by_kronfluence(found, method.removeprefix("kronfluence_"))
        return by_us(found, method)


def by_us(found: Trained, curvature: str) -> Figures:
    probe = found.probe(seed=SEED, parameters=[LINEAR], curvature=curvature)
    with cost() as spent, probe.open(0):
        bank = probe.add(np.full(len(probe.domains), SUB_BATCHES))
    matrix = bank.influence_matrix()
    return {
        "influence_VD": matrix.values_VD.tolist(),
        "seconds": spent.seconds,
        "cpu_seconds": spent.cpu_seconds,
        "peak_bytes": spent.peak_bytes,
        "tasks": probe.tasks,
        "domains": probe.domains,
    }


def by_kronfluence(found: Trained, strategy: str) -> Figures:
    """Scores of every sample with each task's summed gradient, added up by domain."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    task_V, domain_D = samples_of(found)
    model = plain_copy(found.model, found.config.model).eval()
    logit_difference = check_same_logits(found, model, task_V[0])
    task = language_modelling_task()
    model = prepare_model(model, task)
    pool = [sample for samples in domain_D for sample in samples]
    size = found.config.train.micro_batch_size
    factor_arguments = FactorArguments(strategy=strategy)
    score_arguments = ScoreArguments(damping_factor=None, aggregate_query_gradients=True)
    scores_VD = np.zeros((len(task_V), len(domain_D)))
    with tempfile.TemporaryDirectory() as folder, cost() as spent:
        started = time.perf_counter()
        analyzer = Analyzer(
            "benchmark", model, task, cpu=True, disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors(
            "factors",
            fitting_samples(found),
            per_device_batch_size=size,
            factor_args=factor_arguments,
        )
        fit_seconds = time.perf_counter() - started
        for v, items in enumerate(task_V):
            analyzer.compute_pairwise_scores(
                f"task{v}",
                "factors",
                query_dataset=items,
                train_dataset=pool,
                per_device_query_batch_size=size,
                per_device_train_batch_size=size,
                score_args=score_arguments,
            )
            scores = analyzer.load_pairwise_scores(f"task{v}")
            by_sample = scores["all_modules"].double().sum(dim=0)
            parts = by_sample.split([len(samples) for samples in domain_D])
            scores_VD[v] = [part.sum().item() for part in parts]
    tokens_V1 = np.array([[unmasked(items)] for items in task_V])
    tokens_D = np.array([unmasked(samples) for samples in domain_D])
    return {
        "influence_VD": (scores_VD / tokens_V1 / tokens_D).tolist(),
        "seconds": spent.seconds,
        "fit_seconds": fit_seconds,
        "cpu_seconds": spent.cpu_seconds,
        "peak_bytes": spent.peak_bytes,
        "logit_difference": logit_difference,
    }


Item = dict[str, torch.Tensor]


def samples_of(found: Trained) -> tuple[list[list[Item]], list[list[Item]]]:
    """What our probe reads, sample by sample: of each task (V lists), of each domain (D lists)."""
    data = found.probe_data(found.config.probe, seed=SEED)
    tasks = [rows(data.of_task(v)) for v in range(len(data.tasks))]
    domains = []
    for d in range(len(data.domains)):
        batches = [batch for part in data.of_domain(d, 0, range(SUB_BATCHES)) for batch in part]
        domains.append(rows(batches))
    return tasks, domains


def fitting_samples(found: Trained) -> list[Item]:
    D = len(found.data.names)
    each = FITTED_SAMPLES // D
    streams = [found.stream(d, SEED, "factors") for d in range(D)]
    return [
        {key: stream[k][key] for key in ("tokens", "labels", "loss_mask")}
        for k in range(each)
        for stream in streams
    ]


def rows(batches: list[Item]) -> list[Item]:
    keys = ("tokens", "labels", "loss_mask")
    return [
        {key: batch[key][n] for key in keys}
        for batch in batches
        for n in range(len(batch["tokens"]))
    ]


def unmasked(items: list[Item]) -> float:
    return float(sum(item["loss_mask"].sum().item() for item in items))


def check_same_logits(found: Trained, plain: PlainGPT, items: list[Item]) -> float:
    """The largest difference of logits, as a share of their spread.

    Raises:
        RuntimeError: the copy is not the model.
    """
    tokens = torch.stack([item["tokens"] for item in items[:4]])
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        theirs = found.model.eval()(tokens, positions, None)
        ours = plain(tokens)
    difference = float((ours - theirs).abs().max() / theirs.std())
    if difference > 1e-3:
        raise RuntimeError(f"the plain copy's logits differ by {difference:.1e} of their spread")
    return difference


def language_modelling_task() -> Any:
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(
            self, batch: Item, model: torch.nn.Module, sample: bool = False
        ) -> torch.Tensor:
            logits, labels = model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(dim=-1), 1).flatten()
            losses = F.cross_entropy(logits, labels, reduction="none")
            return (losses * batch["loss_mask"].flatten()).sum()

        def compute_measurement(self, batch: Item, model: torch.nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

    return LanguageModelling()


# The table and the targets ---------------------------------------------------------------


def tables(figures: Figures) -> list[Table]:
    costs = Table(
        "method",
        "seconds",
        "of the processor",
        "peak memory MB",
        title="The same influence, four ways",
    )
    for method, row in figures["methods"].items():
        peak = row["peak_bytes"]
        memory = "—" if peak is None else f"{peak / 1e6:.0f}"
        costs.add_row(METHODS[method], f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", memory)
    pairs = Table(title="Agreement: Pearson's r / Spearman's ρ of each task")
    pairs.add_column("over domains", no_wrap=True)
    for task in figures["tasks"]:
        pairs.add_column(task, justify="right")
    for pair, row in figures["agreement"].items():
        values = zip(row["pearson"], row["spearman"], strict=True)
        pairs.add_row(pair, *(f"{r:.3f} / {rho:.2f}" for r, rho in values))
    return [costs, pairs]


def missed(figures: Figures) -> list[str]:
    difference = figures["largest_difference_identity"]
    if difference > TARGET_DIFFERENCE:
        return [f"kronfluence's identity differs by {difference:.1e} of a row's largest entry"]
    return []
