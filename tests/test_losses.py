"""Router losses against transformers, against the equations in float64, and against their own sums over parts."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

from finetune.training.losses import load_balance, load_share, router_z

TOKENS, EXPERTS, TOP_K = 61, 7, 3
ONE_GROUP = torch.zeros(TOKENS, dtype=torch.long)
DOCUMENTS = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 40, 2, 18]))  # 1 token, long, short, middling


def scores(seed: int = 0, spread: float = 3.0) -> Tensor:
    """Router logits that prefer some experts to others."""
    generator = torch.Generator().manual_seed(seed)
    lean = torch.linspace(-1, 1, EXPERTS)
    return (spread * torch.randn(TOKENS, EXPERTS, generator=generator) + lean).requires_grad_()


def chosen(logits: Tensor) -> Tensor:
    return logits.detach().topk(TOP_K, dim=-1).indices


def balance(logits: Tensor, group: Tensor, groups: int) -> Tensor:
    """Load balancing loss of all the tokens there are."""
    share = load_share(chosen(logits), group, groups, EXPERTS)
    return load_balance(logits, share, group, torch.tensor(float(len(logits))))


def equation(logits: Tensor, group: Tensor) -> tuple[float, Tensor]:
    """Loss, and its gradient by the chain rule, token by token in float64."""
    z = logits.detach().double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    loss, gradient = 0.0, np.zeros_like(z)
    for t in range(len(z)):
        rows = chosen(logits)[group == group[t]].flatten().tolist()
        f = np.array([rows.count(e) / len(rows) for e in range(EXPERTS)])
        loss += EXPERTS / len(z) * (f @ p[t])
        gradient[t] = EXPERTS / len(z) * p[t] * (f - f @ p[t])
    return loss, torch.from_numpy(gradient).float()


@pytest.mark.parametrize("confidence", [0.0, 3.0, 30.0])
def test_even_load_costs_1_however_sure_the_router_is(confidence: float) -> None:
    logits = confidence * torch.eye(EXPERTS).repeat(3, 1)  # token t prefers expert t modulo 7
    experts = (torch.arange(len(logits)) % EXPERTS).unsqueeze(1)
    group = torch.zeros(len(logits), dtype=torch.long)
    share = load_share(experts, group, 1, EXPERTS)
    loss = load_balance(logits, share, group, torch.tensor(float(len(logits))))
    assert loss.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_collapse_costs_the_number_of_experts_over_those_that_take_all(top_k: int) -> None:
    logits = torch.zeros(TOKENS, EXPERTS)
    logits[:, 2 : 2 + top_k] = 40.0
    share = load_share(logits.topk(top_k, dim=-1).indices, ONE_GROUP, 1, EXPERTS)
    loss = load_balance(logits, share, ONE_GROUP, torch.tensor(float(TOKENS)))
    assert loss.item() == pytest.approx(EXPERTS / top_k, rel=1e-5)


def test_one_layer_is_transformers_loss_over_top_k() -> None:
    ours, theirs = scores(), scores()
    loss = balance(ours, ONE_GROUP, 1)
    expected = load_balancing_loss_func((theirs,), EXPERTS, TOP_K) / TOP_K
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_padding_left_out_is_transformers_loss_under_its_mask() -> None:
    padded = torch.cat((scores(0), scores(1), scores(2))).detach()[: 4 * 45]
    mask = torch.ones(4, 45, dtype=torch.long)
    mask[0, 30:], mask[2, 1:], mask[3] = 0, 0, 0
    ours, theirs = padded[mask.flatten() == 1].requires_grad_(), padded.clone().requires_grad_()
    group = torch.zeros(len(ours), dtype=torch.long)
    loss = balance(ours, group, 1)
    expected = load_balancing_loss_func((theirs,), EXPERTS, TOP_K, mask) / TOP_K
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad[mask.flatten() == 1])


@pytest.mark.parametrize("group", [ONE_GROUP, DOCUMENTS], ids=["one-group", "documents"])
def test_value_and_gradient_follow_the_equation(group: Tensor) -> None:
    logits = scores()
    loss = balance(logits, group, int(group.max()) + 1)
    expected, gradient = equation(logits, group)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, gradient)


def test_documents_are_balanced_one_by_one() -> None:
    """Its own tokens make a document's load, so it is the mean over documents, each alone, weighted by their tokens."""
    logits = scores()
    alone = [logits.detach()[document == DOCUMENTS] for document in range(4)]
    parts = [len(x) * balance(x, torch.zeros(len(x), dtype=torch.long), 1) for x in alone]
    together = balance(logits, DOCUMENTS, 4)
    torch.testing.assert_close(together.detach(), torch.stack(parts).sum() / TOKENS)


def test_what_evens_out_over_documents_is_forgiven_in_one_group_alone() -> None:
    experts = torch.tensor([0, 0, 0, 1, 1, 1])  # one expert takes a whole document, the other the other
    logits, document = 40 * torch.eye(2)[experts], experts
    for group, groups, expected in ((torch.zeros_like(document), 1, 1), (document, 2, 2)):
        share = load_share(experts.unsqueeze(1), group, groups, 2)
        assert load_balance(logits, share, group, torch.tensor(6.0)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "sizes", [[61], [1, 60], [20, 0, 41], [1] * 61], ids=["at-once", "one-token", "empty-part", "token-by-token"]
)
@pytest.mark.parametrize("group", [ONE_GROUP, DOCUMENTS], ids=["one-group", "documents"])
def test_parts_of_a_step_add_up_to_it_wherever_it_is_divided(sizes: list[int], group: Tensor) -> None:
    whole, divided, step_tokens = scores(), scores(), torch.tensor(float(TOKENS))
    groups = int(group.max()) + 1
    share = load_share(chosen(whole), group, groups, EXPERTS)
    total = load_balance(whole, share, group, step_tokens) + router_z(whole, step_tokens)
    parts = [
        load_balance(logits, share, place, step_tokens) + router_z(logits, step_tokens)
        for logits, place in zip(divided.split(sizes), group.split(sizes), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), total)
    total.backward()
    for part in parts:  # one backward pass each, as with micro-batches
        part.backward(retain_graph=True)
    torch.testing.assert_close(divided.grad, whole.grad)


def test_shares_are_counted_group_by_group() -> None:
    experts = torch.tensor([[0, 4], [4, 1], [4, 0], [2, 3]])
    group = torch.tensor([2, 0, 2, 2])
    share = load_share(experts, group, groups=4, num_experts=5)
    expected = torch.tensor(
        [[0, 1 / 2, 0, 0, 1 / 2], [0, 0, 0, 0, 0], [2 / 6, 0, 1 / 6, 1 / 6, 2 / 6], [0, 0, 0, 0, 0]]
    )
    torch.testing.assert_close(share, expected)


def test_no_gradient_flows_through_the_share() -> None:
    logits = scores()
    assert not load_share(chosen(logits), ONE_GROUP, 1, EXPERTS).requires_grad
    # An even share makes every probability cost the same, so that nothing is left to gain.
    even = torch.full((1, EXPERTS), 1 / EXPERTS)
    load_balance(logits, even, ONE_GROUP, torch.tensor(float(TOKENS))).backward()
    assert logits.grad.abs().max() < 1e-7


def test_router_z_is_the_mean_squared_log_sum_exp() -> None:
    logits = scores()
    z = logits.detach().double().numpy()
    lse = np.log(np.exp(z).sum(1, keepdims=True))
    loss = router_z(logits, torch.tensor(float(TOKENS)))
    assert loss.item() == pytest.approx((lse**2).mean(), rel=1e-6)
    loss.backward()
    gradient = 2 * lse * np.exp(z - lse) / TOKENS
    torch.testing.assert_close(logits.grad, torch.from_numpy(gradient).float())


def test_large_logits_stay_finite() -> None:
    logits = (1e4 * scores().detach()).requires_grad_()
    loss = balance(logits, ONE_GROUP, 1) + router_z(logits, torch.tensor(float(TOKENS)))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
