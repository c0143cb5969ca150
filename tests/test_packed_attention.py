"""The policy's Triton forms of attention against its plain PyTorch forms, which are tested against transformers."""

import copy

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, needs_gpu
from tiny import tiny_deepseek
from torch import Tensor

from trimtab.grpo.policy import packed_attention
from trimtab.grpo.policy.policy import Policy, PolicyOutput
from trimtab.kernels.lm_head import full_logp

LENGTHS = (23, 1, 5)
FORMS = {"masked": packed_attention.attend_masked, "selected": packed_attention.attend_selected}


def _pack(device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    ids_N = torch.randint(0, 96, (sum(LENGTHS),))
    return ids_N.to(device), torch.tensor([0, *LENGTHS]).cumsum(0).to(device)


def _some_selection(model) -> Tensor:
    """Keys that no indexer would choose, of each layer; rows of tokens with fewer keys hold nonsense."""
    torch.manual_seed(9)
    topk, layers = model.config.index_topk, model.config.num_hidden_layers
    rows = [
        torch.randperm(position + 1)[:topk].sort().values if position >= topk else torch.full((topk,), 999)
        for length in LENGTHS
        for position in range(length)
        for _ in range(layers)
    ]
    return torch.stack(rows).unflatten(0, (-1, layers)).to(torch.uint16)


@pytest.fixture(scope="module")
def model():
    return tiny_deepseek(initializer_range=0.1, num_hidden_layers=2)


def _run(model, *, packed: bool, form: str | None = None, **options) -> tuple[PolicyOutput, dict[str, Tensor]]:
    """Outputs and gradients of a loss that weighs every output differently, on the CPU."""
    device = DEVICE if packed else "cpu"
    policy = Policy(copy.deepcopy(model).to(device), checkpointing=options.pop("checkpointing", False))
    policy.packed = packed
    if form is not None:
        policy.choose_attend = lambda T, topk: FORMS[form]
    if "selected_NLK" in options:
        options["selected_NLK"] = options["selected_NLK"].to(device)
    out = policy(*_pack(device), **options)
    torch.manual_seed(8)
    loss = (out.hidden_ND * torch.randn(out.hidden_ND.shape).to(device)).sum()
    if out.indexer_kl_N is not None:
        loss = loss + out.indexer_kl_N.sum() / len(out.indexer_kl_N)
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in policy.model.named_parameters() if p.grad is not None}
    detached = [None if x is None else x.detach().cpu() for x in out]
    return PolicyOutput(*detached), gradients


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("masked", {}),
        ("masked", {"with_indexer_kl": True}),
        ("masked", {"with_indexer_kl": True, "dense_attention": True}),
        ("masked", {"with_indexer_kl": True, "dense_attention": True, "checkpointing": True}),
        ("selected", {"with_indexer_kl": True, "checkpointing": True}),
        ("selected", {"with_indexer_kl": True, "parts": True}),
        ("selected", {"with_indexer_kl": True, "parts": True, "checkpointing": True}),
        ("masked", {"with_indexer_kl": True, "replayed": True}),
        ("selected", {"with_indexer_kl": True, "replayed": True, "checkpointing": True}),
        ("selected", {"replayed": True, "parts": True}),
    ],
)
def test_triton_forms_equal_plain_pytorch_in_outputs_and_gradients(model, form, options, monkeypatch):
    options = dict(options)
    if options.pop("parts", False):
        monkeypatch.setattr(packed_attention, "QUERIES_AT_ONCE", 12)
        monkeypatch.setattr(packed_attention, "QUERIES_OF_A_PART", 5)
        monkeypatch.setattr(packed_attention, "KEPT_BYTES", 0)
    if options.pop("replayed", False):
        options["selected_NLK"] = _some_selection(model)
    expected, expected_gradients = _run(model, packed=False, **options)
    ours, gradients = _run(model, packed=True, form=form, **options)
    torch.testing.assert_close(ours.hidden_ND, expected.hidden_ND, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.routes_NLK, expected.routes_NLK)
    assert (ours.indexer_kl_N is None) == ("with_indexer_kl" not in options)
    if ours.indexer_kl_N is not None:
        torch.testing.assert_close(ours.indexer_kl_N, expected.indexer_kl_N, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 2e-4 * gradient.norm(), name


@pytest.mark.parametrize(
    ("form", "options", "function", "calls"),
    [
        ("selected", {"with_indexer_kl": True}, "index_topk", 1),
        ("masked", {}, "index_topk", 1),
        ("masked", {"with_indexer_kl": True, "dense_attention": True}, "dense_kl_gradients", 1),
        ("selected", {"with_indexer_kl": True}, "_attend_rows", 2),  # forward, and again for the backward pass
    ],
)
def test_a_layer_that_is_computed_twice_selects_once_and_attends_twice(
    model, form, options, function, calls, monkeypatch
):
    count, original = [], getattr(packed_attention, function)
    monkeypatch.setattr(packed_attention, function, lambda *a, **k: count.append(function) or original(*a, **k))
    monkeypatch.setattr(packed_attention, "QUERIES_AT_ONCE", 4)
    _run(model, packed=True, form=form, checkpointing=True, **options)
    assert len(count) == calls * 2  # layers


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ratio_is_exactly_one_after_an_update_that_changes_nothing(model, dtype):
    policy = Policy(copy.deepcopy(model).to(DEVICE, dtype))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    ids_N, cu_seqlens = _pack(DEVICE)
    passes = []
    for _ in range(3):
        out = policy(ids_N, cu_seqlens, with_indexer_kl=True)
        logp_N = full_logp(out.hidden_ND, policy.head_weight, ids_N, 1.3)
        optimizer.zero_grad()
        (logp_N.sum() + out.indexer_kl_N.mean()).backward()
        optimizer.step()
        passes.append([logp_N.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)])
    assert torch.equal((passes[1][0] - passes[0][0]).exp(), torch.ones_like(passes[0][0]))
    assert all(torch.equal(a, b) for again in passes[1:] for a, b in zip(again, passes[0], strict=True))


def test_spans_part_where_the_form_changes():
    spans = packed_attention.spans_of((3, 2, 200, 1), torch.device("cpu"), 16, packed_attention.choose_attend)
    assert [span.lengths for span in spans] == [(3, 2), (200,), (1,)]
    assert spans[0].start_N.tolist() == [0, 0, 0, 3, 3] and spans[0].end_N.tolist() == [1, 2, 3, 4, 5]
