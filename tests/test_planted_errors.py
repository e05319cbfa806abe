"""The tests of the kernels are tested: with an error planted in a backward pass, each time one of them fails.

Every error is a small, plausible one: a term left out, a factor forgotten, one token off. It is planted in a copy of
the checkout, in which the tests of that kernel then run under Triton's interpreter.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import ROOT

pytestmark = pytest.mark.slow


class Planted(NamedTuple):
    kernel: str  # file of finetune/kernels
    right: str
    wrong: str
    tests: str  # file that must notice


PLANTED = {
    "experts: gradient of gate without the slope of the sigmoid": Planted(
        "triton/expert_products", "up * sigmoid * (1 + gate * (1 - sigmoid))", "up * sigmoid", "test_fused_experts"
    ),
    "experts: gradient of the pre-activations without the routing weight": Planted(
        "triton/expert_products", "d_act *= weight[:, None]", "d_act *= 1.0", "test_fused_experts"
    ),
    "experts: gradient of the input from one choice too few": Planted(
        "triton/fused_experts", "d_x = combine(d_rows, rows, None)",
        "d_x = combine(d_rows, rows, None) - d_rows[:: rows.top_k]", "test_fused_experts",
    ),
    "experts: gradient of down without one row": Planted(
        "triton/expert_products", "left.t(), right, offs=ends)", "left.t(), right * 0.999, offs=ends)",
        "test_fused_experts"
    ),
    "experts: factor A of the adapters without its scale": Planted(
        "triton/fused_experts", "b1.transpose(1, 2), rows, gathered=False, scale=scale)",
        "b1.transpose(1, 2), rows, gathered=False, scale=1.0)", "test_fused_experts",
    ),
    "router: softmax over all instead of over the chosen": Planted(
        "triton/router", "share = probability * is_chosen", "share = probability", "test_router_kernel"
    ),
    "router: gradient that the router losses give is dropped": Planted(
        "triton/router", "if d_logits_given is not None:\n        out +=",
        "if d_logits_given is not None:\n        out -=",
        "test_router_kernel",
    ),
    "norm: mean of the products forgotten": Planted(
        "triton/norm", "back = scale * (given - normed * (tl.sum(given * normed, 0) / dim))", "back = scale * given",
        "test_norm_kernel",
    ),
    "norm: gain of the weight summed after it was applied": Planted(
        "triton/norm", "summed += given * normed\n        given *= gain",
        "given *= gain\n        summed += given * normed",
        "test_norm_kernel",
    ),
    "residual norm: gradient of the sum itself left out": Planted(
        "triton/residual_norm", "back += tl.load(d_total", "back += 0.0 * tl.load(d_total", "test_residual_norm_kernel"
    ),
    "swiglu: gradient of up from the gate, not its activation": Planted(
        "triton/swiglu", "(d * g * sigmoid).to(d_up", "(d * g).to(d_up", "test_swiglu_kernel"
    ),
    "shared expert: gradient of its gate without the slope": Planted(
        "triton/swiglu", "* factor * (1 - factor)", "* factor", "test_swiglu_kernel"
    ),
    "loss: the label's own probability kept": Planted(
        "triton/loss", "start + at == label, 1.0, 0.0)", "start + at == label, 0.99, 0.0)", "test_loss_kernel"
    ),
    "loss: scale of the gradient rounded to bfloat16": Planted(
        "triton/loss", "d * gradient for d", "d * gradient.to(d.dtype) for d", "test_loss_kernel"
    ),
    "attention: rotation turned forward instead of back": Planted(
        "triton/attention", "tl.where(at < half, 1.0, -1.0)[None, :] * aside",
        "tl.where(at < half, -1.0, 1.0)[None, :] * aside", "test_attention_kernel",
    ),
    "attention: gate's gradient without the slope": Planted(
        "triton/attention", "d_opening = given * value * sigmoid * (1 - sigmoid)",
        "d_opening = given * value * sigmoid",
        "test_attention_kernel",
    ),
    "deltanet: a later document's gradient crosses into the one before": Planted(
        "triton/deltanet", "debt = tl.where(reached[back], gradient * weights[back], 0.0)",
        "debt = gradient * weights[back]",
        "test_deltanet_kernel",
    ),
    "deltanet: convolution weight's gradient counts tokens twice": Planted(
        "triton/deltanet", "tl.where(own, gradient * values[back], 0.0)", "gradient * values[back]",
        "test_deltanet_kernel"
    ),
    "deltanet: unit length not differentiated": Planted(
        "triton/deltanet", "gradient = scale * (gradient - act * (scale * scale * tl.sum(gradient * act, 1)[:, None]))",
        "gradient = scale * gradient", "test_deltanet_kernel",
    ),
    "deltanet: gradient of the decay without its rate": Planted(
        "triton/deltanet", "d_a = given * -rate * tl.sigmoid(a)", "d_a = given * -tl.sigmoid(a)", "test_deltanet_kernel"
    ),
    "gated norm: slope of the gate's activation": Planted(
        "triton/gated_norm", "normed * sigmoid * (1.0 + gate * (1.0 - sigmoid))", "normed * sigmoid",
        "test_deltanet_kernel"
    ),
    "delta rule: state's gradient does not decay": Planted(
        "triton/delta_rule_kernels", "d_state = tl.dot(tl.trans(q), reads, d_state * stays,",
        "d_state = tl.dot(tl.trans(q), reads, d_state,", "test_delta_rule_kernel",
    ),
    "delta rule: corrections of the keys forgotten": Planted(
        "triton/delta_rule_kernels", "d_state = tl.dot(tl.trans(k), recalls, d_state, input_precision=PRECISION)",
        "d_state += 0.0", "test_delta_rule_kernel",
    ),
    "delta rule: decay's gradient of the last token": Planted(
        "triton/delta_rule_kernels", "d_total += tl.where(at == C - 1, of_last, 0.0)", "d_total += 0.0",
        "test_delta_rule_kernel",
    ),
    "delta rule: keys get nothing from the scores": Planted(
        "triton/delta_rule_kernels", "d_written = tl.dot(tl.trans(scores), q, d_written, input_precision=PRECISION)",
        "d_written += 0.0", "test_delta_rule_kernel",
    ),
    "delta rule: value heads that share a key head counted once": Planted(
        "triton/delta_rule", "(x.unflatten(2, (key.shape[2], -1)).sum(3) for x in (d_query, d_key))",
        "(x.unflatten(2, (key.shape[2], -1))[:, :, :, 0] for x in (d_query, d_key))", "test_delta_rule_kernel",
    ),
    "adapters: scale of A's gradient": Planted(
        "torch/lora", "d_thin = torch.mm(given, b).mul_(ctx.scale)", "d_thin = torch.mm(given, b)", "test_lora_kernel"
    ),
    "rule by products: gradient of the writes without the triangular system": Planted(
        "cpu/delta_rule_products", " - (d_system * alike.unsqueeze(2)).sum(-2).flatten(1, 2)", "",
        "test_delta_rule_products",
    ),
    "rule by products: decays of a chunk's last token without the state": Planted(
        "cpu/delta_rule_products", "d_total[..., -1] += (state[1:] * d_state[1:]).sum((2, 3))", "pass",
        "test_delta_rule_products",
    ),
    "rule by products: gradient of the keys without the state's": Planted(
        "cpu/delta_rule_products", " - (d_value * decays.since_start) @ before", "", "test_delta_rule_products"
    ),
    "rule by products: state of another document is differentiated": Planted(
        "cpu/delta_rule_products", "d_state[n + 1], decays.survives[n], out=d_state[n]",
        "d_state[n + 1], decays.survives[n].clamp(min=1e-3), out=d_state[n]", "test_delta_rule_products",
    ),
    "rule by products: blocks joined without the sign": Planted(
        "cpu/delta_rule_products", "corner.neg_()", "corner", "test_delta_rule_products"
    ),
    "prepare on a CPU: unit length without its projection": Planted(
        "cpu/deltanet", "keepdim=True), value=-1).mul_(shorter)", "keepdim=True), value=0).mul_(shorter)",
        "test_deltanet_cpu",
    ),
    "prepare on a CPU: gradient reaches another document": Planted(
        "cpu/deltanet", "_of_same_document(d_before[:, back:], segment_ids, back)", "d_before[:, back:]",
        "test_deltanet_cpu",
    ),
    "prepare on a CPU: weights of the convolution in the order of time": Planted(
        "cpu/deltanet", "by_tap.flip(0).permute", "by_tap.permute", "test_deltanet_cpu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_error_is_found(what: str, tmp_path: Path) -> None:
    planted = PLANTED[what]
    for part in ("finetune", "data", "monitoring", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "corpus"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "finetune/kernels" / f"{planted.kernel}.py"
    text = file.read_text(encoding="utf-8")
    assert text.count(planted.right) == 1, f"{file.name} has changed: {planted.right}"
    file.write_text(text.replace(planted.right, planted.wrong), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{planted.tests}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stdout[-2000:]
    assert " failed" in done.stdout.splitlines()[-1], done.stdout[-2000:]
