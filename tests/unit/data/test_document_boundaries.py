"""Intra-document masking: megatron-core's own masks, and attention that keeps to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_tikmix.config import TaskConfig
from megatron_tikmix.data.domain_stream import _EndOfDocument
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.tasks import build_task
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron.samples import DocumentBoundaries, stack
from megatron_tikmix.training.evaluate import evaluate
from tests.conftest import EOD, VOCAB_SIZE, overridden, write_prompts
from tests.one_rank import one_rank

LENGTH = 128


def megatrons(corpus: Path, **switches: bool) -> list[dict[str, torch.Tensor]]:
    """Samples as megatron-core's dataset masks them."""
    split = DomainManifest.load(corpus).split("low", "train")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        tokenizer=_EndOfDocument(EOD, VOCAB_SIZE),
        create_attention_mask=True,
        **{"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
        | switches,
    )
    tokens = IndexedDataset(str(split.prefix))
    documents = np.arange(split.documents, dtype=np.int32)
    dataset = GPTDataset(tokens, None, documents, None, Split.train, config)
    return [{k: v.clone() for k, v in dataset[i].items()} for i in range(8)]


@pytest.mark.parametrize(
    "on", [(), ("reset_attention_mask",), ("reset_position_ids",), ("eod_mask_loss",), None]
)
def test_masks_are_megatrons(corpus: Path, on: tuple[str, ...] | None) -> None:
    names = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
    switches = dict.fromkeys(names if on is None else on, True)
    expected = stack(megatrons(corpus, **switches))
    plain = stack(megatrons(corpus))
    assert (plain["tokens"] == EOD).sum() > 8
    causal = plain.pop("attention_mask")
    found = DocumentBoundaries(EOD, **switches).applied(plain)
    found.setdefault("attention_mask", causal)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].equal(expected[name]), name


def losses(run: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output, _ = run.forward_backward.forward_step_func(iter([batch]), run.forward_backward.model[0])
    return output.detach()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", ["local", "flash"])
def test_a_document_does_not_see_the_one_before_it(
    settings: dict[str, Any], tmp_path: Path, backend: str, masked: bool
) -> None:
    fields = {"data.reset_attention_mask": masked, "model.attention_backend": backend}
    with one_rank(overridden(settings, fields), tmp_path) as run, torch.no_grad():
        run.forward_backward.model[0].eval()
        sample = stack([run.streams[0][0]])
        sample["tokens"][0, 10] = EOD
        other = {name: value.clone() for name, value in sample.items()}
        other["tokens"][0, 3] = 77
        before, after = losses(run, sample)[0], losses(run, other)[0]
        assert not torch.allclose(before[3:11], after[3:11])
        assert torch.allclose(before[11:], after[11:], atol=1e-6) == masked
        # And a document has the loss that it has alone, with positions from 0 on.
        alone = {name: value[:, 11:] for name, value in sample.items()}
        alone["position_ids"] = torch.arange(len(before) - 11)[None]
        close = torch.allclose(losses(run, alone)[0], before[11:], atol=1e-5)
        assert close == masked
        assert all(loss > 0 for loss in evaluate(run.forward_backward, run.tasks, 4).values())


def test_completions_without_a_prompt_do_not_count_behind_a_masked_eod(
    corpus: Path, tmp_path: Path
) -> None:
    path = write_prompts(tmp_path / "q.jsonl")
    path.write_text(path.read_text() + '{"prompt": "", "completion": "w1"}\n')
    manifest, config = DomainManifest.load(corpus), TaskConfig(prompts=str(path))
    build_task("t", config, manifest, seed=1, sequence_length=LENGTH)
    with pytest.raises(
        InputError, match=r"line 1: field .prompt. is empty, and with data.eod_mask"
    ):
        build_task("t", config, manifest, seed=1, sequence_length=LENGTH, scores_first_token=False)
