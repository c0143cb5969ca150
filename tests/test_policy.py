"""The training policy against transformers' own models, in fp32."""

import copy

import pytest
import torch
from tiny import tiny_deepseek, tiny_model
from torch import Tensor
from transformers import DeepseekV32ForCausalLM, PreTrainedModel
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as theirs

from trimtab.grpo.policy import attention, parts
from trimtab.grpo.policy.policy import Policy, load_policy, positions_of
from trimtab.kernels import reference

LENGTHS = (9, 40, 38, 16, 1, 60)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


@pytest.fixture
def lower_position_wins(monkeypatch):
    """transformers' indexer uses torch.topk, which leaves ties open: give it our total order."""

    def topk(scores: Tensor, k: int, dim: int = -1, **_: bool) -> torch.return_types.topk:
        values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values[..., :k], indices[..., :k]))

    monkeypatch.setattr(torch.Tensor, "topk", topk)


FORMS = {"dense": attention.attend_dense, "sparse": attention.attend_sparse}


def _policy(model: PreTrainedModel, form: str = "dense") -> Policy:
    policy = Policy(copy.deepcopy(model))
    policy.choose_attend = lambda T, topk: FORMS[form]
    return policy


def _pack(lengths: tuple[int, ...] = LENGTHS, vocab: int = 96) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randint(0, vocab, (sum(lengths),)), torch.tensor([0, *lengths]).cumsum(0)


def _their_logp(model: PreTrainedModel, ids_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, V], one sequence at a time."""
    sequences = ids_N.split(cu_seqlens.diff().tolist())
    return torch.cat([model(ids[None], use_cache=False).logits[0].log_softmax(-1) for ids in sequences])


def _our_logp(policy: Policy, ids_N: Tensor, cu_seqlens: Tensor, **options) -> Tensor:
    return (policy(ids_N, cu_seqlens, **options).hidden_ND @ policy.head_weight.T).log_softmax(-1)


def _gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        assert (ours[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@pytest.mark.usefixtures("lower_position_wins")
@pytest.mark.parametrize("with_indexer_kl", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("overrides", [{}, {"rope_parameters": YARN}, {"index_topk": 200}], ids=["", "yarn", "no dsa"])
def test_deepseek_logp_equals_transformers_below_and_above_index_topk(form, with_indexer_kl, overrides):
    """At this scale of weights a wrong selection moves some log-probability by about 5 nats."""
    model = tiny_deepseek(initializer_range=0.1, **overrides)
    with torch.no_grad():
        ours = _our_logp(_policy(model, form), *_pack(), with_indexer_kl=with_indexer_kl)
        torch.testing.assert_close(ours, _their_logp(model, *_pack()), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("lower_position_wins")
@pytest.mark.parametrize("form", FORMS)
def test_deepseek_gradients_equal_autograd_through_transformers_dense_mask(form):
    model = tiny_deepseek()
    ids_N, cu_seqlens = _pack()
    weight_NV = torch.randn(len(ids_N), model.config.vocab_size)
    policy = _policy(model, form)
    ours = _gradients(policy.model, (_our_logp(policy, ids_N, cu_seqlens) * weight_NV).sum())
    expected = _gradients(model, (_their_logp(model, ids_N, cu_seqlens) * weight_NV).sum())
    assert len(expected) == sum(".indexer." not in name for name, _ in model.named_parameters())
    _assert_same_gradients(ours, expected)


@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_equal_separate_ones(form):
    policy = _policy(tiny_deepseek(), form)
    ids_N, cu_seqlens = _pack()
    with torch.no_grad():
        packed = policy(ids_N, cu_seqlens, with_indexer_kl=True)
        alone = [policy(ids, torch.tensor([0, len(ids)]), with_indexer_kl=True) for ids in ids_N.split(list(LENGTHS))]
    assert len(parts.blocks_of(LENGTHS, cu_seqlens.device)) > 1
    hidden_ND = torch.cat([output.hidden_ND for output in alone])
    torch.testing.assert_close(packed.hidden_ND, hidden_ND, rtol=0, atol=2e-5)
    kl_N = torch.cat([output.indexer_kl_N for output in alone])
    torch.testing.assert_close(packed.indexer_kl_N, kl_N, rtol=0, atol=1e-5)


def test_positions_restart_with_every_sequence():
    policy = _policy(tiny_deepseek())
    ids_N, cu_seqlens = _pack()
    cos_NR, sin_NR = policy._rotary(policy.model.model.embed_tokens(ids_N), positions_of(LENGTHS, ids_N.device))
    assert (cos_NR[cu_seqlens[:-1]] == 1).all() and not sin_NR[cu_seqlens[:-1]].any()
    assert torch.equal(sin_NR[9:49], sin_NR[104:144])  # the sequences of 40 and of 60 tokens


def test_bfloat16_policies_train_and_stay_near_fp32(tmp_path):
    Policy(tiny_deepseek(initializer_range=0.05)).save(tmp_path)
    exact, rounded = load_policy(tmp_path), load_policy(tmp_path, dtype=torch.bfloat16)
    own = exact(*_pack())
    output = rounded(*_pack(), routes_NLK=own.routes_NLK, with_indexer_kl=True)
    assert output.hidden_ND.dtype == torch.bfloat16
    (output.hidden_ND.float().square().mean() + output.indexer_kl_N.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rounded.model.model.parameters())
    difference = (output.hidden_ND.float() - own.hidden_ND).norm() / own.hidden_ND.norm()
    assert difference < 0.1


def test_dense_attention_equals_a_selection_of_everything():
    ids_N, cu_seqlens = _pack()
    with torch.no_grad():
        dense = _our_logp(_policy(tiny_deepseek()), ids_N, cu_seqlens, dense_attention=True)
        everything = _our_logp(_policy(tiny_deepseek(index_topk=64)), ids_N, cu_seqlens)
        sparse = _our_logp(_policy(tiny_deepseek()), ids_N, cu_seqlens)
    torch.testing.assert_close(dense, everything, rtol=0, atol=1e-6)
    assert (dense - sparse).abs().max() > 1e-2


def _naive_indexer_kl(model: DeepseekV32ForCausalLM, ids_T: Tensor) -> Tensor:
    """[T], from transformers' attention probabilities and the score formula written out."""
    inputs: list[dict] = []
    hooks = [
        layer.self_attn.indexer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append({"args": args, **kwargs}), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model.set_attn_implementation("eager")
    attentions = model(ids_T[None], use_cache=False, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    kls = []
    for layer, given, prob_BHTM in zip(model.model.layers, inputs, attentions, strict=True):
        ix = layer.self_attn.indexer
        x_BTD, q_BTC, (cos, sin) = given["args"][:3]
        R = ix.qk_rope_head_dim
        q = ix.wq_b(q_BTC).unflatten(-1, (ix.n_heads, -1))
        k = ix.k_norm(ix.wk(x_BTD)).unsqueeze(2)
        q_rot, k_rot = theirs.apply_rotary_pos_emb(q[..., :R], k[..., :R], cos, sin, unsqueeze_dim=2)
        q, k = torch.cat([q_rot, q[..., R:]], -1)[0], torch.cat([k_rot, k[..., R:]], -1)[0, :, 0]
        head_weight = ix.weights_proj(x_BTD)[0] * ix.n_heads**-0.5
        rows = []
        for t in range(len(ids_T)):
            used = prob_BHTM[0, :, t].sum(0) > 0
            score = (head_weight[t, :, None] * (q[t] @ k.T * ix.softmax_scale).relu()).sum(0)[used]
            p = prob_BHTM[0, :, t, used].sum(0) / len(prob_BHTM[0])
            rows.append((p * (p.log() - score.log_softmax(-1))).sum())
        kls.append(torch.stack(rows))
    return torch.stack(kls).mean(0)


@pytest.mark.usefixtures("lower_position_wins")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("topk", [16, 200], ids=["sparse stage", "warm-up"])
def test_indexer_kl_equals_the_formula_on_transformers_attention(form, topk):
    model = tiny_deepseek(index_topk=topk)
    ids_N, cu_seqlens = _pack((40,))
    with torch.no_grad():
        kl_N = _policy(tiny_deepseek(), form)(
            ids_N, cu_seqlens, with_indexer_kl=True, dense_attention=topk == 200
        ).indexer_kl_N
        torch.testing.assert_close(kl_N, _naive_indexer_kl(model, ids_N), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_indexer_learns_from_its_kl_alone_and_nothing_else_does(form):
    policy = _policy(tiny_deepseek(), form)
    indexer = {name for name, _ in policy.model.named_parameters() if ".indexer." in name}
    output = policy(*_pack(), with_indexer_kl=True)
    from_kl = _gradients(policy.model, output.indexer_kl_N.sum())
    assert from_kl.keys() == indexer and all(grad.any() for grad in from_kl.values())
    assert len(policy.indexer_parameters()) == len(indexer)
    from_loss = _gradients(policy.model, policy(*_pack(), with_indexer_kl=True).hidden_ND.sum())
    assert not from_loss.keys() & indexer


def test_both_forms_give_the_indexer_the_same_gradient():
    grads = []
    for form in FORMS:
        policy = _policy(tiny_deepseek(), form)
        grads.append(_gradients(policy.model, policy(*_pack(), with_indexer_kl=True).indexer_kl_N.sum()))
    _assert_same_gradients(*grads)


def test_the_indexer_agrees_better_with_attention_after_warm_up():
    policy = _policy(tiny_deepseek())
    optimizer = torch.optim.Adam(policy.indexer_parameters(), lr=1e-2)
    kls = []
    for _ in range(15):
        kl = policy(*_pack(), with_indexer_kl=True, dense_attention=True).indexer_kl_N.mean()
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
        kls.append(kl.item())
    assert kls[-1] < 0.8 * kls[0]


def test_a_trained_policy_saves_what_it_learnt(tmp_path):
    policy = Policy(tiny_deepseek())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    policy.save(tmp_path)
    loaded = load_policy(tmp_path).weights()
    assert all(torch.equal(loaded[name], weight) for name, weight in policy.weights().items())


def test_impossible_calls_are_refused():
    ids_N, cu_seqlens = _pack()
    llama = Policy(tiny_model("LlamaForCausalLM"))
    with pytest.raises(ValueError, match="has no indexer"):
        llama(ids_N, cu_seqlens, with_indexer_kl=True)
    with pytest.raises(ValueError, match=r"routes have shape \(164, 2, 2\), this pack needs \(164, 0, 0\)"):
        llama(ids_N, cu_seqlens, routes_NLK=torch.zeros(164, 2, 2, dtype=torch.uint8))
    chosen = torch.zeros(164, 2, 16, dtype=torch.uint16)
    with pytest.raises(ValueError, match="replayed by sparse attention"):
        llama(ids_N, cu_seqlens, selected_NLK=chosen)
    sparse = Policy(tiny_deepseek())
    with pytest.raises(ValueError, match="leave dense_attention off"):
        sparse(ids_N, cu_seqlens, selected_NLK=chosen, dense_attention=True)
    with pytest.raises(ValueError, match=r"selections have shape \(164, 2, 16\), this pack needs \(164, 3, 16\)"):
        sparse(ids_N, cu_seqlens, selected_NLK=chosen)
    with pytest.raises(ValueError, match="ends at 163, but there are 164 tokens"):
        llama(ids_N, torch.tensor([0, 163]))
    with pytest.raises(ValueError, match="rise with every sequence"):
        llama(ids_N, torch.tensor([0, 20, 20, 164]))
    with pytest.raises(ValueError, match="use_sliding_window"):
        Policy(tiny_model("Qwen3ForCausalLM", use_sliding_window=True))


def test_pad_and_unpad_are_inverse_and_carry_exact_gradients():
    for block in parts.blocks_of(LENGTHS, torch.device("cpu")):
        x_ND = torch.randn(block.tokens, 3, dtype=torch.float64, requires_grad=True)
        assert torch.equal(block.unpad(block.pad(x_ND)), x_ND)
        assert torch.autograd.gradcheck(lambda x, b=block: b.unpad(b.pad(x).square()), x_ND)


@pytest.mark.parametrize("lengths", [(5,), (3, 3, 3), (100, 1, 100), (1, 2, 4, 8, 16, 32), (2000, 2000)])
def test_blocks_cover_every_sequence_in_order_with_little_padding(lengths):
    blocks = parts.blocks_of(lengths, torch.device("cpu"))
    assert tuple(length for block in blocks for length in block.lengths) == lengths
    assert all(len(b.lengths) * b.T <= parts.MAX_PADDING * b.tokens for b in blocks)
    assert all(len(b.lengths) == 1 or len(b.lengths) * b.T**2 <= parts.MAX_PAIRS for b in blocks)


def test_the_head_gives_the_same_logp_over_all_ids_kept_or_full():
    policy = Policy(tiny_deepseek())
    ids_N, cu_seqlens = _pack((20,))
    with torch.no_grad():
        hidden_ND = policy(ids_N, cu_seqlens).hidden_ND
        vocabulary = torch.arange(policy.config.vocab_size).repeat(20)
        offsets = torch.arange(21) * policy.config.vocab_size
        kept = reference.kept_logp(hidden_ND, policy.head_weight, ids_N, vocabulary, offsets, 1.3)
        full = reference.full_logp(hidden_ND, policy.head_weight, ids_N, 1.3)
    torch.testing.assert_close(kept, full, rtol=0, atol=1e-5)
