"""What is computed again: as the recipe says, or as little as the plan finds memory for, whatever the memory."""

import json
from dataclasses import replace

import pytest

from finetune.model.config import ALL, NOTHING, ModelConfig, Recompute
from finetune.plan import throughput, workload
from finetune.plan.planner import Plan, plan
from finetune.plan.recompute import asked_for, described
from finetune.plan.workload import GIB, Machine
from finetune.recipe.load import load_recipe
from finetune.recipe.paths import CHECKOUT
from finetune.recipe.recipe import RecipeError

CONFIG = ModelConfig.from_dict(json.loads(throughput.REFERENCE.read_text(encoding="utf-8")))
H100 = Machine(ranks=8, ranks_per_node=8, device_name="NVIDIA H100 80GB HBM3", device_bytes=int(79.6 * GIB))
# Sizes at which the whole model trains on 8 GPUs of 80 GB.
SETTINGS = {
    "adapters": (),
    "long sequences": ("train.sequence_tokens=32768", "train.micro_batch_tokens=32768"),
    "many sequences": ("train.sequence_tokens=4096", "train.micro_batch_tokens=16384"),
    "adapted experts": ("lora.targets=[q_proj,in_proj_qkvz,experts]",),
    "router losses": ("router.train=true", "router.balance.coefficient=0.001"),
    "expert parallel 4": ("parallel.expert=4",),
}


def planned(*overrides: str, gib: float | None = None) -> Plan:
    machine = H100 if gib is None else replace(H100, device_bytes=int(gib * GIB))
    return plan(CONFIG, load_recipe(CHECKOUT / "recipes" / "code.yaml", overrides), machine)


@pytest.mark.parametrize("name", SETTINGS)
def test_auto_takes_the_memory_that_is_left_and_no_more(name: str) -> None:
    full, none = (planned(*SETTINGS[name], f"train.recompute={word}") for word in ("full", "none"))
    least_gib = full.rank_bytes / GIB / (1 - workload.FREE_FRACTION)
    shares = []
    for gib in (least_gib + 0.01, least_gib + 4, 80.0, 141.0, 2000.0):
        made = planned(*SETTINGS[name], gib=gib)
        assert made.fits
        if made.recompute != full.recompute:
            assert made.rank_bytes >= full.rank_bytes
        shares.append(made.recomputed_share)
    assert shares == sorted(shares, reverse=True)  # never more with more memory
    assert shares[-1] == 0
    assert planned(*SETTINGS[name], gib=2000).memory == none.memory
    for gib in (least_gib - 0.05, 10.0):  # what does not fit at all is planned as small as it can be, and refused
        assert not planned(*SETTINGS[name], gib=gib).fits
        assert planned(*SETTINGS[name], gib=gib).recompute == full.recompute


def test_the_last_layers_keep_something_for_nothing_where_no_rows_travel() -> None:
    """A layer's turn needs what it saves, kept or computed again; the last one's is first, with nothing beside it."""
    long = "train.sequence_tokens=32768", "train.micro_batch_tokens=32768", "train.global_batch_tokens=262144"
    alone = "parallel.expert=1", "parallel.ranks=1", *long
    full = planned(*alone, "train.recompute=full", gib=300.0)
    made = planned(*alone, "train.recompute=auto", gib=(full.rank_bytes + 2**20) / GIB / (1 - workload.FREE_FRACTION))
    assert not made.recompute[-1].experts
    assert set(made.recompute[:-4]) == {ALL}
    assert made.rank_bytes <= full.rank_bytes + 2**20


def test_room_is_left_for_experts_that_receive_more_than_the_mean() -> None:
    """Experts of other ranks may be sent more rows than the mean; auto does not fill the card to the brim."""
    made = planned(gib=80)
    held = sum(not again.experts for again in made.recompute)
    assert made.work.room_bytes is not None
    assert 0 < held < CONFIG.num_hidden_layers
    assert made.work.room_bytes - made.rank_bytes > 2 * GIB


def test_what_saves_most_operations_for_a_byte_is_kept_first() -> None:
    made = planned("parallel.expert=1", "parallel.ranks=1", "train.recompute=auto", gib=200.0)
    kinds = {
        kind: sum(not again.mixer for again, of in zip(made.recompute, CONFIG.layer_types, strict=True) if of == kind)
        for kind in ("linear_attention", "full_attention")
    }
    kept = kinds | {"experts": sum(not again.experts for again in made.recompute)}
    # Attention over 8,192 tokens costs most for what it keeps; DeltaNet's states are large and cheap to make again.
    assert kept["full_attention"] == 12
    assert 0 < kept["experts"] + kept["linear_attention"] < 48 + 36
    assert kept["linear_attention"] == 0 or kept["experts"] == 48


def test_without_a_known_memory_everything_is_computed_again() -> None:
    nowhere = replace(H100, device_bytes=None, host_bytes=None)
    assert set(plan(CONFIG, load_recipe(CHECKOUT / "recipes" / "code.yaml"), nowhere).recompute) == {ALL}


@pytest.mark.parametrize(
    ("words", "deltanet", "attention", "text"),
    [
        (("none",), NOTHING, NOTHING, "nothing"),
        (("full",), ALL, ALL, "every layer"),
        (("experts",), Recompute(False, True), Recompute(False, True), "experts of 48 of 48 layers"),
        (("deltanet",), Recompute(True, False), NOTHING, "DeltaNet of 36 of 36 layers"),
        (
            ("attention", "experts"),
            Recompute(False, True),
            ALL,
            "attention of 12 of 12 layers and experts of 48 of 48 layers",
        ),
    ],
)
def test_a_list_says_which_parts(words: tuple[str, ...], deltanet: Recompute, attention: Recompute, text: str) -> None:
    found = asked_for(CONFIG, words)
    assert found is not None
    assert found == tuple(deltanet if kind == "linear_attention" else attention for kind in CONFIG.layer_types)
    assert described(CONFIG, found) == text
    assert planned(f"train.recompute=[{','.join(words)}]").recompute == found


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            "ful",
            "train.recompute.0: 'ful' is not one of auto, full, none, deltanet, attention, experts (did you mean 'f",
        ),
        (
            "[deltanet,expert]",
            "'expert' is not one of auto, full, none, deltanet, attention, experts (did you mean 'exp",
        ),
        ("[full,experts]", "train.recompute: full stands alone; a list holds deltanet, attention and experts"),
        ("[experts,experts]", "train.recompute: experts is there twice"),
        ("[]", "train.recompute: needs at least one item"),
        ("3", "train.recompute: expected a list, found 3"),
    ],
)
def test_words_that_mean_nothing_are_refused(value: str, expected: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(CHECKOUT / "recipes" / "code.yaml", [f"train.recompute={value}"])
    assert expected in str(refused.value)


def test_one_word_needs_no_list() -> None:
    one, listed = (
        load_recipe(CHECKOUT / "recipes" / "code.yaml", [f"train.recompute={value}"]) for value in ("full", "[full]")
    )
    assert one == listed
