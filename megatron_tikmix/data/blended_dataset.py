"""Global sample index -> (domain, k) -> sample, through the mixture schedule."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.samples import Sample
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing import MixtureSchedule
from megatron_tikmix.parallel.collectives import agree_on_input
from megatron_tikmix.parallel.initialize import Parallel


class BlendedDataset(Dataset[Sample]):
    """The training samples in the order the schedule gives them.

    The order is a pure function of (schedule, seed, index), so any rank can read any sample
    at any time. Each sample also has ``domain``, the index of its domain, int64 ().

    Args:
        parallel: of streams whose large indices lie on disk: its main rank writes them.
    """

    def __init__(
        self,
        schedule: MixtureSchedule,
        streams: Sequence[DomainStream],
        parallel: Parallel | None = None,
    ) -> None:
        self._schedule = schedule
        self._streams = list(streams)
        self._domains = torch.arange(len(streams)).unbind()
        self._parallel = parallel

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these global indices: what a DataLoader asks for."""
        samples = []
        places = self._schedule.locate_many(indices)
        for domain, k in zip(places.domains_N.tolist(), places.k_N.tolist(), strict=True):
            sample = self._streams[domain][k]
            sample["domain"] = self._domains[domain]
            samples.append(sample)
        return samples

    def prepare(self, start: int, samples: int) -> None:
        """Have ready, before workers start, what the `samples` samples from `start` on need.

        Collective if it was made with `parallel`.
        """
        first_D = self._schedule.domain_counts(start)
        end_D = self._schedule.domain_counts(start + samples)
        needed = [
            (stream, stream.epochs_of(first, end))
            for stream, first, end in zip(
                self._streams, first_D.tolist(), end_D.tolist(), strict=True
            )
        ]
        if self._parallel is not None:
            problem = self._write_indices(needed) if self._parallel.is_main else None
            agree_on_input(problem, self._parallel)
        for stream, epochs in needed:
            stream.prepare(epochs)

    def _write_indices(self, needed: list[tuple[DomainStream, range]]) -> InputError | None:
        try:
            for stream, epochs in needed:
                stream.write_indices(epochs)
        except InputError as error:
            return error
        return None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_parallel": None}  # a worker makes no collective
