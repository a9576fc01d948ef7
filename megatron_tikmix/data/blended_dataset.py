"""Global sample index -> (domain, k) -> sample, through the mixture schedule."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.samples import Sample
from megatron_tikmix.mixing import MixtureSchedule


class BlendedDataset(Dataset[Sample]):
    """The training samples in the order the schedule gives them.

    The order is a pure function of (schedule, seed, index), so any rank can read any sample
    at any time. Each sample also has ``domain``, the index of its domain, int64 ().
    """

    def __init__(self, schedule: MixtureSchedule, streams: Sequence[DomainStream]) -> None:
        self._schedule = schedule
        self._streams = list(streams)

    def __getitem__(self, index: int) -> Sample:
        place = self._schedule.locate(index)
        sample = self._streams[place.domain][place.k]
        sample["domain"] = torch.tensor(place.domain)
        return sample
