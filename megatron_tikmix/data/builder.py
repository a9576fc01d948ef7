"""Opens the data that a configuration names: domains, tasks, and the first mixture."""

from pathlib import Path

from megatron_tikmix.config import RunConfig
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.samples import DocumentBoundaries
from megatron_tikmix.data.tasks import Task, build_task
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing import Mixture, MixtureSchedule, propose_mixture


class TrainingData:
    """The domains, tasks and first mixture that a configuration names.

    Raises:
        InputError: names the file or field, and the remedy.
    """

    def __init__(self, config: RunConfig) -> None:
        data = config.data
        self.manifest = DomainManifest.load(data.manifest)
        self.manifest.check_tokenizer()
        self.boundaries = DocumentBoundaries(
            self.manifest.eod,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            eod_mask_loss=data.eod_mask_loss,
        )
        self.names = list(data.domains or self.manifest.domains)
        self.manifest.check_files(self.names, ["train"])
        held_out = {name: t.domain for name, t in config.tasks.items() if t.domain is not None}
        for name, domain in held_out.items():
            if domain not in self.manifest.domains:
                raise InputError(
                    f"tasks.{name}.domain: {data.manifest} has no domain {domain}; it has "
                    f"{', '.join(self.manifest.domains)}"
                )
        self.manifest.check_files(held_out.values(), ["validation"])
        cache = Path(data.path_to_cache or Path(config.run_dir) / "cache")
        self.streams = [
            self.stream(name, config.seed, data.sequence_length, cache) for name in self.names
        ]
        self.tasks: list[Task] = [
            build_task(
                name,
                task,
                self.manifest,
                seed=config.seed,
                sequence_length=data.sequence_length,
                scores_first_token=not data.eod_mask_loss,
            )
            for name, task in config.tasks.items()
        ]
        self.deciding_tasks = [t for t in self.tasks if config.tasks[t.name].decides]
        self._initial_mixture = self._read_initial_mixture(config)
        self._order = (self.names, config.train.global_batch_size, config.seed)
        self.initial_schedule()  # refuses a domain named twice before anything is built

    def stream(
        self, name: str, seed: int, sequence_length: int, index_folder: Path | None = None
    ) -> DomainStream:
        """A stream of the domain's train split (see there for `index_folder`)."""
        return DomainStream(
            name,
            self.manifest.split(name, "train"),
            seed=seed,
            sequence_length=sequence_length,
            eod=self.manifest.eod,
            vocab_size=self.manifest.vocab_size,
            index_folder=index_folder,
        )

    def initial_schedule(self) -> MixtureSchedule:
        """The first stage: the initial mixture, in blocks of one global batch."""
        schedule = MixtureSchedule(*self._order)
        schedule.append(0, self._initial_mixture.rounded())
        return schedule

    def _read_initial_mixture(self, config: RunConfig) -> Mixture:
        initial = config.data.initial_mixture
        if isinstance(initial, str):
            train = config.train
            samples = train.train_iters * train.global_batch_size
            tokens = {name: self.manifest.split(name, "train").tokens for name in self.names}
            try:
                return propose_mixture(
                    initial,
                    tokens,
                    temperature=config.data.temperature,
                    budget_tokens=samples * config.data.sequence_length,
                    max_epochs=config.data.unimax_epochs,
                )
            except InputError as error:
                raise InputError(f"data.initial_mixture {initial}: {error}") from error
        unknown = set(initial) - set(self.names)
        if unknown:
            raise InputError(
                f"data.initial_mixture: unknown domains {', '.join(sorted(unknown))}; the run's "
                f"are {', '.join(self.names)}"
            )
        try:
            return Mixture({name: initial.get(name, 0.0) for name in self.names})
        except InputError as error:
            raise InputError(f"data.initial_mixture: {error}") from error
