"""Opens the data that a configuration names: domains, tasks and the first mixture."""

from collections.abc import Iterable
from pathlib import Path

from megatron_tikmix.config import MixtureSections
from megatron_tikmix.data.domain_stream import DomainStream, some_documents
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.open_files import TokenFile
from megatron_tikmix.data.tasks import Task, build_task
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import OWN_ROW
from megatron_tikmix.megatron.samples import DocumentBoundaries
from megatron_tikmix.mixture.initial import propose_mixture
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.repetition import first_shortage
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.mixture.schedule_file import ScheduleFile
from megatron_tikmix.seeds import derived_seed


class TrainingData:
    """The domains, tasks and first mixture that a configuration names.

    Raises:
        InputError: names the file or field, and the remedy.
    """

    def __init__(self, config: MixtureSections) -> None:
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
            self.stream(name, config.seed, data.sequence_length, index_folder=cache)
            for name in self.names
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
        self.probed_tasks = list(self.deciding_tasks)
        """Tasks whose gradients a probe keeps; with joint influence one more for each domain."""
        if config.remix.influence == "joint" and config.remix.policy != "static":
            for name in self.names:
                seed = derived_seed(config.probe.seed, "own", name)
                own = self.stream(
                    name, seed, data.sequence_length, first_samples=config.probe.task_samples
                )
                self.probed_tasks.append(Task(OWN_ROW + name, decide=own, report=own))
        self._order = (self.names, config.train.batch_sizes, config.seed)
        self.planned, self.replays = self._read_schedule(config)
        self._initial_mixture = (
            self.planned.mixture(0) if self.planned else self._read_initial_mixture(config)
        )
        self.initial_schedule()  # refuses repeated domains before anything is built

    def stream(
        self,
        name: str,
        seed: int,
        sequence_length: int,
        *,
        index_folder: Path | None = None,
        first_samples: int | None = None,
    ) -> DomainStream:
        """Return a stream of the domain's train split.

        Args:
            index_folder: as for :class:`DomainStream`.
            first_samples: the most samples that will be read; None: any number.
        """
        split, documents = self.manifest.split(name, "train"), None
        if first_samples is not None:
            documents = some_documents(
                TokenFile(split.prefix).sequence_lengths,
                split.tokens,
                samples=first_samples,
                sequence_length=sequence_length,
                seed=seed,
            )
        return DomainStream(
            name,
            split,
            seed=seed,
            sequence_length=sequence_length,
            eod=self.manifest.eod,
            vocab_size=self.manifest.vocab_size,
            documents=documents,
            index_folder=index_folder,
        )

    def initial_schedule(self) -> MixtureSchedule:
        """Return a schedule with the first stage: the initial mixture, a block per global batch."""
        schedule = MixtureSchedule(*self._order)
        schedule.append(0, self._initial_mixture.rounded())
        return schedule

    def _read_schedule(self, config: MixtureSections) -> tuple[MixtureSchedule | None, str]:
        """Return the given schedule, or None, and say in words what it repeats of another run."""
        if config.remix.schedule is None:
            return None, ""
        try:
            file = ScheduleFile.read(config.remix.schedule)
            planned = file.schedule(*self._order)
        except InputError as error:
            raise InputError(f"remix.schedule: {error}") from error
        settings = {
            "seed": config.seed,
            "data.sequence_length": config.data.sequence_length,
            "train.global_batch_size": config.train.global_batch_size,
            "train.rampup_batch_size": config.train.rampup_batch_size,
        }
        different = file.differences(settings, self.names)
        if file.config is None:
            return planned, f"the stages of {file.path}"
        if different:
            return planned, f"the mixtures of {file.path}, not its samples: {'; '.join(different)}"
        return planned, f"the mixtures and the samples of {file.path}"

    def stage_boundaries(self, config: MixtureSections) -> list[int]:
        """Return the iterations below train_iters at which stages after the first one begin."""
        if self.planned is None:
            return config.boundaries
        sizes = config.train.batch_sizes
        starts = [int(sizes.batch_of(stage.start_sample)) for stage in self.planned.stages[1:]]
        return [iteration for iteration in starts if iteration < config.train.train_iters]

    def check_repetition(self, config: MixtureSections) -> None:
        """Refuse a mixture that takes more than `max_epochs`, as far as it is fixed from the start.

        Raises:
            InputError: says which domain runs out, when, and what would help; or `max_epochs`
                names a domain that the run does not have.
        """
        caps = config.remix.constraints.max_epochs
        if caps is None:
            return
        self._check_known("remix.constraints.max_epochs", caps if isinstance(caps, dict) else ())
        train, reset = config.train, config.first_reset()
        end = train.consumed_samples(train.train_iters if reset is None else reset)
        schedule = self.planned or self.initial_schedule()
        per_epoch = {stream.name: stream.samples_per_epoch for stream in self.streams}
        short = first_shortage(schedule, end, per_epoch, caps)
        if short is None:
            return
        until = "the end" if reset is None else f"the first reset, at iteration {reset},"
        iteration = int(train.batch_sizes.batch_of(short.sample))
        weight = f"lower its weight to {short.largest_weight:.4g} at most"
        if self.planned:
            weight = f"lower its weights in {config.remix.schedule}"
        raise InputError(
            f"remix.constraints.max_epochs: domain {short.domain} would run dry at sample "
            f"{short.sample}, in iteration {iteration + 1}: by {until} its mixture takes "
            f"{short.epochs:.4g} epochs of it, and {short.most_epochs:g} are allowed; {weight}, "
            f"raise max_epochs, or stop at train.train_iters {iteration}"
        )

    def _read_initial_mixture(self, config: MixtureSections) -> Mixture:
        initial = config.data.initial_mixture
        if isinstance(initial, str):
            samples = config.train.consumed_samples(config.train.train_iters)
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
        self._check_known("data.initial_mixture", initial)
        try:
            return Mixture({name: initial.get(name, 0.0) for name in self.names})
        except InputError as error:
            raise InputError(f"data.initial_mixture: {error}") from error

    def _check_known(self, field: str, names: Iterable[str]) -> None:
        unknown = set(names) - set(self.names)
        if unknown:
            raise InputError(
                f"{field}: unknown domains {', '.join(sorted(unknown))}; the run's are "
                f"{', '.join(self.names)}"
            )
