"""A profile: how large the experiments are, and what they are made of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_tikmix.errors import InputError

FOLDER = Path(__file__).resolve().parent / "profiles"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """profiles/<name>.yaml.

    Attributes:
        name: of the profile, and of its folder under the work folder.
        corpus: arguments of the corpus script, whose first names it: `fetched` (the development
            corpus, benchmarks/corpus.py) or `embedded` (tools/build_corpus.py: no network).
        junk: domains that teach nothing.
        seeds: of the paired runs.
        search_seed: of every run that chooses something; none of `seeds`.
        whole_runs: runs on mixtures drawn beforehand, of which the search for a static mixture
            takes its start and the study of influence its outcomes.
        search_rounds, search_runs: of the search for the best static mixture, after those.
        proxy_iters: optimizer steps of a RegMix proxy; proxies: how many, of each quality.
        online_iters: optimizer steps between two mixtures of ODM and DoReMi.
        rollout: settings of TiKMiX-M.
        smaller_model: of the second model of the study of drift: fields of the run that differ.
        only: policies to compare; None for all.
        run: the configuration that all runs share, fields of RunConfig.
    """

    name: str
    corpus: list[str]
    junk: list[str]
    seeds: list[int]
    search_seed: int
    whole_runs: int
    search_rounds: int
    search_runs: int
    proxy_iters: int
    proxies: list[int]
    online_iters: int
    run: dict[str, Any]
    rollout: dict[str, Any] = field(default_factory=dict)
    smaller_model: dict[str, Any] = field(default_factory=dict)
    only: list[str] | None = None
    ablations: bool = True
    ablation_seeds: int = 3

    @classmethod
    def load(cls, name: str) -> "Profile":
        """The profile of this name.

        Raises:
            InputError: there is none.
        """
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
            raise InputError(f"there is no profile {name}; there are {known}")
        return cls(name=name, **yaml.safe_load(path.read_text(encoding="utf-8")))

    @property
    def iters(self) -> int:
        return int(self.run["train"]["train_iters"])

    @property
    def tasks(self) -> list[str]:
        """The tasks that mixtures are decided and judged on."""
        return [name for name, task in self.run["tasks"].items() if task.get("decides", True)]

    @property
    def unseen_tasks(self) -> list[str]:
        """The tasks that nothing is ever decided on."""
        return [name for name in self.run["tasks"] if name not in self.tasks]
