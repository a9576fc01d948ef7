"""Prompt/completion tasks: samples, loss, bits per byte and influence, against plain counting."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tikmix.config import TaskConfig
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.tasks import CompletionStream, Task, build_task
from megatron_tikmix.errors import InputError
from megatron_tikmix.training.evaluate import evaluate
from megatron_tikmix.training.loop import bits_per_byte
from tests.conftest import EOD, VOCAB_SIZE, overridden, write_tokens
from tests.influence_reference import largest_error, reference
from tests.one_rank import one_rank

LENGTH = 32


def quiz(corpus: Path, path: Path, length: int = LENGTH, **fields: Any) -> Task:
    config = TaskConfig(prompts=str(path), **fields)
    manifest = DomainManifest.load(corpus)
    return build_task("quiz", config, manifest, seed=1, sequence_length=length)


def plain_items(path: Path) -> list[tuple[list[int], list[int]]]:
    """What a sample must hold: the ids before the completion, and the completion's."""
    items = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt, completion = (
            [int(word[1:]) for word in row[field].split()] for field in ("prompt", "completion")
        )
        completion = completion[:LENGTH]
        room = LENGTH + 1 - len(completion)
        items.append((([EOD, *prompt])[-room:], completion))
    return items


def as_item(sample: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Read back from a sample by its mask alone."""
    counted = sample["loss_mask"].nonzero().flatten()
    first, last = int(counted[0]), int(counted[-1])
    assert sample["loss_mask"].sum() == last - first + 1
    assert (sample["labels"][last + 1 :] == EOD).all()
    assert sample["position_ids"].tolist() == list(range(LENGTH))
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    return sample["tokens"][: first + 1].tolist(), sample["labels"][first : last + 1].tolist()


def samples(task: Task) -> list[dict[str, torch.Tensor]]:
    return [s[k] for s in (task.decide, task.report) for k in range(s.samples_per_epoch)]


def test_every_item_is_one_sample_cut_so_that_the_completion_survives(
    corpus: Path, prompts: Path
) -> None:
    task = quiz(corpus, prompts)
    expected = plain_items(prompts)
    cut = [len(before) + len(after) == LENGTH + 1 for before, after in expected]
    assert 0 < sum(cut) < len(cut)
    assert sorted(map(as_item, samples(task))) == sorted(expected)
    too_long = sum(
        len(json.loads(line)["completion"].split()) > LENGTH
        for line in prompts.read_text().splitlines()
    )
    assert 0 < too_long < 30
    assert f"{too_long} with the completion cut to data.sequence_length 32" in task.note
    assert task.decide.padding()["loss_mask"].sum() == 0


def test_a_prompt_is_on_one_side_only_and_halves_are_about_equal(
    corpus: Path, prompts: Path
) -> None:
    task = quiz(corpus, prompts, length=200)
    before = [
        {as_whole(s[k])[0] for k in range(s.samples_per_epoch)} for s in (task.decide, task.report)
    ]
    assert not before[0] & before[1]
    tokens = [
        sum(float(s[k]["loss_mask"].sum()) for k in range(s.samples_per_epoch))
        for s in (task.decide, task.report)
    ]
    assert abs(tokens[0] - tokens[1]) < 2 * 5 * 41
    again = quiz(corpus, prompts, length=200)
    assert again.decide[0]["tokens"].equal(task.decide[0]["tokens"])


def as_whole(sample: dict[str, torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = int(sample["loss_mask"].nonzero()[0])
    return tuple(sample["tokens"][: first + 1].tolist()), tuple(sample["labels"].tolist())


def test_blanks_before_the_completion_are_the_completions(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [{"q": "w1 w2 ", "a": "w3"}, {"q": "", "a": "w4 w5"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = quiz(corpus, path, prompt_field="q", completion_field="a")
    streams = [s for s in (task.decide, task.report) if isinstance(s, CompletionStream)]
    # One nat a token: 1 token of 3 bytes, " w3"; 2 tokens of 5 bytes, "w4 w5".
    found = sorted(stream.bits_per_byte(1.0, 9) * math.log(2) for stream in streams)
    assert found == pytest.approx([1 / 3, 2 / 5])
    assert sorted(map(as_item, samples(task))) == [([EOD], [4, 5]), ([EOD, 1, 2], [3])]


def test_loss_and_influence_are_what_autograd_gives_item_by_item(
    settings: dict[str, Any], prompts: Path, tmp_path: Path
) -> None:
    """Ragged completions weigh by their tokens; the padding is left out of the reference."""
    with_quiz = overridden(
        settings, {"tasks.quiz": {"prompts": str(prompts)}, "train.micro_batch_size": 4}
    )
    with one_rank(with_quiz, tmp_path) as run:
        count = run.config.evaluate.task_samples
        losses = evaluate(run.forward_backward, run.tasks, count)
        model = run.forward_backward.model[0].module.eval()
        nats = tokens = 0.0
        for k in range(min(count, run.tasks[2].report.samples_per_epoch)):
            before, after = as_item(run.tasks[2].report[k])
            ids = torch.tensor([*before, *after])
            with torch.no_grad():
                logits = model(ids[None, :-1], torch.arange(len(ids) - 1)[None], None)
            of_each = torch.nn.functional.cross_entropy(
                logits[0].float(), ids[1:], reduction="none"
            )
            nats += of_each[len(before) - 1 :].sum().item()
            tokens += len(after)
        assert losses["quiz"] == pytest.approx(nats / tokens, rel=1e-5)
        by_byte = bits_per_byte(run, losses)
        assert list(by_byte) == ["quiz"]
        # Words of 2 to 4 letters and a blank.
        assert nats / tokens / math.log(2) / 5 < by_byte["quiz"] < nats / tokens / math.log(2) / 3

        assert run.remixer is not None
        probe = run.remixer.probe
        with probe.open(stage=1):
            bank = probe.add([8, 8, 8])
        expected = reference(
            run, curvature=probe.curvature, stage=1, sub_batch_samples=4, task_samples=12
        )
        assert largest_error(bank.sums_DBV, bank.tokens_DB, expected) < 1e-5


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"prompt": "w1"}\n', r"q.jsonl: line 2: no field 'completion' among 'prompt'; name"),
        ('{"prompt": 3, "completion": "w1"}\n', "line 2: field 'prompt' must be a string"),
        ('{"prompt": "w3", "completion": " "}\n', "line 2: field 'completion' has no text"),
        ("{\n", "line 2: malformed JSON"),
        ("", "has 1 different prompts, and at least 2 are needed"),
    ],
)
def test_bad_items_are_named(corpus: Path, tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "w1 w2", "completion": "w3"}\n' + lines)
    with pytest.raises(InputError, match=said):
        quiz(corpus, path)


def test_a_tokenizer_or_tokens_of_another_vocabulary_are_refused(
    corpus: Path, prompts: Path, tmp_path: Path
) -> None:
    manifest = dataclasses.replace(DomainManifest.load(corpus), vocab_size=200)
    with pytest.raises(InputError, match="the manifest has a vocabulary of 200"):
        build_task("t", TaskConfig(prompts=str(prompts)), manifest, seed=1, sequence_length=LENGTH)
    write_tokens(tmp_path / "extra", [np.arange(100, VOCAB_SIZE)] * 2)
    with pytest.raises(InputError, match=r"token 100 has id 200, and .* a vocabulary of 200"):
        build_task(
            "t", TaskConfig(prefix=f"{tmp_path}/extra"), manifest, seed=1, sequence_length=LENGTH
        )
    unnamed = dataclasses.replace(manifest, tokenizer=None)
    with pytest.raises(InputError, match="names no tokenizer to encode them with"):
        build_task("t", TaskConfig(prompts=str(prompts)), unnamed, seed=1, sequence_length=LENGTH)


def test_an_extra_pair_is_halved_like_a_held_out_split(corpus: Path) -> None:
    manifest = DomainManifest.load(corpus)
    prefix = manifest.split("high", "validation").prefix
    config = TaskConfig(prefix=str(prefix))
    task = build_task("t", config, manifest, seed=1, sequence_length=LENGTH)
    decide, report = set(task.decide._documents.tolist()), set(task.report._documents.tolist())
    assert not decide & report
    assert len(decide | report) == manifest.split("high", "validation").documents
