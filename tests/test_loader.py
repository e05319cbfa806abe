"""The order is one function of the seed for every number of ranks, and a resumed run sees what comes next."""

import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch

from data.build import Job
from data.chat import Document
from data.dataset import Dataset, prepare
from data.loader import EvaluationBatches, Loader, epoch_order, probe_batch
from data.packing import Batch
from data.show import describe, show_document, show_pack
from data.sources import DataError, Source
from data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
SETTINGS = {"sequence_tokens": 64, "packing": "packed", "on_bad_row": "stop", "over_long": "drop"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ROOT / "recipes" / "base")


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def rows(count: int) -> list[dict]:
    return [chat(f"Say {n}.", f"It is {n}. " * (n % 5 + 1)) for n in range(count)]


def write(path: Path, rows: list[dict]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return prepare([write(folder / "a.jsonl", rows(120))], tokenizer=tokenizer, cache=folder / "cache", **SETTINGS)


def loader(dataset: Dataset, *, rank: int = 0, ranks: int = 1, packs: int = 4, steps: int = 1, seed: int = 3) -> Loader:
    return Loader(dataset, packs_per_micro_batch=packs, micro_batches_per_step=steps, rank=rank, ranks=ranks, seed=seed)


def packs_of(batches: list[Batch]) -> list[bytes]:
    return [row.numpy().tobytes() for batch in batches for row in batch.input_ids]


# --- order ---


def test_every_epoch_has_every_pack_once_in_another_order(dataset):
    packs = len(dataset)
    one = loader(dataset, packs=1)
    epochs = [[packs_of(one.next_step())[0] for _ in range(packs)] for _ in range(3)]
    expected = Counter(dataset.batch([i]).input_ids.numpy().tobytes() for i in range(packs))
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("ranks", "packs", "steps"), [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 2, 1), (8, 1, 1)]
)
def test_a_step_holds_the_same_packs_for_every_number_of_ranks(dataset, ranks, packs, steps):
    assert len(dataset) % 8, "an epoch should end inside a step"
    reference = loader(dataset, packs=8)
    loaders = [loader(dataset, rank=rank, ranks=ranks, packs=packs, steps=steps) for rank in range(ranks)]
    for _ in range(2 * len(dataset) // 8):
        shares = [each.next_step() for each in loaders]
        assert all(len(share) == steps and all(len(b.input_ids) == packs for b in share) for share in shares)
        in_order = [pack for step in range(steps) for share in shares for pack in packs_of([share[step]])]
        assert in_order == packs_of(reference.next_step())
    assert len({json.dumps(each.state()) for each in [*loaders, reference]}) == 1


@pytest.mark.parametrize("done", [0, 1, 4, 11])
def test_a_resumed_loader_goes_on_exactly_also_on_other_ranks(dataset, done):
    uninterrupted = loader(dataset, packs=4)
    for _ in range(done):
        uninterrupted.next_step()
    state = json.loads(json.dumps(uninterrupted.state()))
    resumed = [loader(dataset, rank=rank, ranks=2, packs=2) for rank in range(2)]
    for each in resumed:
        each.next_step()  # where it stood before does not matter
        each.restore(state)
    for _ in range(12):
        assert [pack for each in resumed for pack in packs_of(each.next_step())] == packs_of(uninterrupted.next_step())


def test_data_smaller_than_a_step_repeats_whole_epochs(dataset):
    packs = packs_of(loader(dataset, packs=3 * len(dataset)).next_step())
    assert set(Counter(packs).values()) == {3}


def test_the_order_follows_the_seed():
    assert not np.array_equal(epoch_order(50, seed=1, epoch=0), epoch_order(50, seed=2, epoch=0))
    assert not np.array_equal(epoch_order(50, seed=1, epoch=0), epoch_order(50, seed=1, epoch=1))
    assert not np.array_equal(epoch_order(50, seed=1, epoch=2), epoch_order(50, seed=2, epoch=1))


def test_a_state_of_other_data_or_seed_is_refused(dataset, tokenizer, tmp_path):
    other = prepare([write(tmp_path / "b.jsonl", rows(119))], tokenizer=tokenizer, cache=tmp_path, **SETTINGS)
    with pytest.raises(
        DataError, match=r"place in the data does not fit: data was .* train\.sequence_tokens or packing"
    ):
        loader(dataset).restore(loader(other).state())
    with pytest.raises(DataError, match=r"seed was 4 and is 3 \(train\.seed changed\); undo the change"):
        loader(dataset).restore(loader(dataset, seed=4).state())


# --- evaluation and probe ---


@pytest.mark.parametrize(("ranks", "packs"), [(1, 1), (1, 7), (2, 3), (4, 2), (64, 4)])
def test_evaluation_sees_every_pack_once_in_equally_many_batches(dataset, ranks, packs):
    shares = [EvaluationBatches(dataset, packs_per_micro_batch=packs, rank=r, ranks=ranks) for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert {batch.input_ids.shape for batch in batches} == {(packs, 64)}
    real = [batch.segment_ids[:, 0] >= 0 for batch in batches]
    seen = Counter(row.numpy().tobytes() for b, keep in zip(batches, real, strict=True) for row in b.input_ids[keep])
    assert seen == Counter(dataset.batch([i]).input_ids.numpy().tobytes() for i in range(len(dataset)))
    for batch, keep in zip(batches, real, strict=True):
        assert (batch.labels[~keep] == -100).all()
        assert (batch.segment_ids[~keep] == -1).all()


def test_the_probe_is_fixed_and_no_larger_than_the_data(dataset):
    first, again = (probe_batch(dataset, packs=5, seed=1) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert len(set(packs_of([first]))) == 5
    assert len(probe_batch(dataset, packs=10_000, seed=1).input_ids) == len(dataset)


# --- preparing ---


def test_what_is_read_back_is_what_was_written(dataset, tokenizer):
    documents = [document for pack in range(len(dataset)) for document in dataset.documents(pack)]
    texts = Counter(tokenizer.decode(document.ids) for document in documents)
    assert texts == Counter(
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n".format(
            *(message["content"] for message in row["messages"])
        )
        for row in rows(120)
    )
    facts = dataset.manifest
    batch = dataset.batch(range(len(dataset)))
    assert facts["tokens"] == (batch.segment_ids >= 0).sum() == sum(len(document.ids) for document in documents)
    assert facts["supervised_tokens"] == (batch.labels != -100).sum()
    assert (facts["rows"], facts["documents"], facts["packs"]) == (120, 120, len(dataset))
    assert facts["fill"] == pytest.approx(facts["tokens"] / batch.input_ids.numel())


def test_padded_means_one_document_a_pack(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", rows(9))
    padded = prepare([source], tokenizer=tokenizer, cache=tmp_path, **SETTINGS | {"packing": "padded"})
    packed = prepare([source], tokenizer=tokenizer, cache=tmp_path, **SETTINGS)
    assert len(padded) == 9 > len(packed)
    assert (padded.batch(range(9)).segment_ids.amax(1) == 0).all()
    assert padded.manifest["supervised_tokens"] == packed.manifest["supervised_tokens"]
    assert padded.sha256 != packed.sha256


def test_text_is_split_and_over_long_conversations_are_dropped_or_stop(tmp_path, tokenizer):
    text = write(tmp_path / "text.jsonl", [{"text": "word " * 200}])
    long = write(tmp_path / "chat.jsonl", [chat("Q", "word " * 200), chat("Q", "A")])
    found = prepare([text, long], tokenizer=tokenizer, cache=tmp_path, **SETTINGS)
    assert found.manifest["split_rows"] == 1
    assert found.manifest["dropped"] == {"over-long": 1}
    assert found.manifest["rows"] == 2
    tokens = len(tokenizer.encode_plain("word " * 200)) + 1
    assert found.manifest["supervised_tokens"] == tokens - 1 + len(tokenizer.encode_plain("A")) + 1
    with pytest.raises(DataError, match=r"chat\.jsonl:1: \d+ tokens, more than train\.sequence_tokens = 64"):
        prepare([long], tokenizer=tokenizer, cache=tmp_path, **SETTINGS | {"over_long": "stop"})


def test_bad_rows_stop_or_are_counted_and_leave_nothing_half_written(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [*rows(3), {"body": 1}, chat("Q", "A") | {"tools": [{"name": "f"}]}])
    cache = tmp_path / "cache"
    with pytest.raises(DataError) as caught:
        prepare([source], tokenizer=tokenizer, cache=cache, **SETTINGS)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[:2]] == [
        f"{source.path}:4",
        f"{source.path}:5",
    ]
    assert "this chat template has no tools" in str(caught.value)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    found = prepare([source], tokenizer=tokenizer, cache=cache, **SETTINGS | {"on_bad_row": "skip"})
    assert found.manifest["dropped"] == {"unknown columns": 1, "chat template": 1}
    assert "dropped 2 (chat template 1, unknown columns 1)" in describe(found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], r"no rows left to train on \(there are none\)"), ([{"text": ""}], r"\(empty: 1\)")],
)
def test_nothing_to_train_on_is_an_error(tmp_path, tokenizer, rows, message):
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        prepare([source], tokenizer=tokenizer, cache=tmp_path / "cache", **SETTINGS | {"on_bad_row": "skip"})


def test_the_cache_follows_content_and_not_time_or_place(tmp_path, tokenizer):
    def folder(source: Source, **changes: object) -> Path:
        return prepare([source], tokenizer=tokenizer, cache=tmp_path / "cache", **SETTINGS | changes).folder

    first = write(tmp_path / "a.jsonl", rows(5))
    made = folder(first)
    stamp = made.stat().st_mtime_ns
    os.utime(first.path, (1, 1))
    (tmp_path / "moved").mkdir()
    assert folder(first) == folder(Source(shutil.copy(first.path, tmp_path / "moved"))) == made
    assert made.stat().st_mtime_ns == stamp
    assert folder(first, sequence_tokens=65) != made
    before = Path(first.path).stat()
    Path(first.path).write_text(Path(first.path).read_text().replace("Say 1.", "Say 7."))
    os.utime(first.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Path(first.path).stat().st_size == before.st_size
    assert folder(first) != made


def prepare_on_a_rank(path: str, cache: str, start: Barrier, reports: "Queue[str]") -> None:
    import data.dataset

    build = data.dataset.build

    def counted(job: Job) -> None:
        reports.put("built")
        time.sleep(0.5)  # long enough for the others to come
        build(job)

    data.dataset.build = counted
    tokenizer = load_tokenizer(ROOT / "recipes" / "base")
    start.wait(60)
    found = prepare([Source(path)], tokenizer=tokenizer, cache=Path(cache), **SETTINGS)
    reports.put(found.sha256)


def test_one_of_several_processes_builds_and_all_open_the_same(tmp_path, dataset):
    context = multiprocessing.get_context("forkserver")
    source = write(tmp_path / "a.jsonl", rows(120))
    reports, start = context.Queue(), context.Barrier(3)
    arguments = (source.path, str(tmp_path / "cache"), start, reports)
    ranks = [context.Process(target=prepare_on_a_rank, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    found = Counter(reports.get(timeout=10) for _ in range(4))
    assert found == {"built": 1, dataset.sha256: 3}


# --- for people ---


def test_a_pack_is_shown_as_the_model_sees_it(dataset, tokenizer):
    heading, first, body, *_ = [text.plain for text in show_pack(dataset, tokenizer, 0)]
    documents = dataset.documents(0)
    assert heading.startswith(f"pack 0: {len(documents)} documents, ")
    assert first == f"document 0: {len(documents[0].ids)} tokens, {documents[0].trained.sum()} supervised"
    assert "<|im_start|>assistant\n⟦It is" in body
    assert body.endswith("<|im_end|>⟧\n")
    assert body.replace("⟦", "").replace("⟧", "") == tokenizer.decode(documents[0].ids)


def test_the_first_token_of_a_text_is_not_shown_as_trained(tokenizer):
    ids = np.array([*tokenizer.encode_plain("def f"), tokenizer.document_id])
    shown = show_document(Document(ids, np.ones(len(ids), np.bool_)), tokenizer)
    assert shown.plain == "def⟦ f<|endoftext|>⟧"


def test_one_line_describes_a_dataset(dataset):
    line = describe(dataset)
    assert line.startswith(f"120 rows, 120 documents in {len(dataset)} packs of 64 tokens (")
    assert "\n" not in line
