import subprocess
import sys

import pytest

from finetune.checkpoint.adapter_limits import adapter_limits
from finetune.recipe.sections import MIXER_TARGETS
from tests.commands import ROOT


@pytest.mark.parametrize(
    ("targets", "trains_routers", "starts"),
    [
        (MIXER_TARGETS, False, []),
        (("q_proj", "shared_expert"), False, ["lora.targets: shared_expert has no peft form for this model"]),
        (("q_proj", "experts"), False, ["lora.targets: peft loads adapters of the routed experts, but not every"]),
        (("experts", "shared_expert"), False, ["lora.targets: shared_expert has no peft form for this model"]),
        (("all-linear",), False, ["lora.targets: all-linear includes shared_expert, which has no peft form"]),
        (("q_proj",), True, ["router.train: an adapter cannot hold trained routers"]),
    ],
)
def test_each_limit_is_one_sentence(targets: tuple[str, ...], trains_routers: bool, starts: list[str]) -> None:
    found = adapter_limits(targets, trains_routers=trains_routers)
    assert len(found) == len(starts)
    assert all(sentence.startswith(start) for sentence, start in zip(found, starts, strict=True))


def test_the_limits_are_known_without_torch() -> None:
    loaded = "import finetune.checkpoint.adapter_limits, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
