"""The fused parts of the engine's layer against the plain PyTorch that a CPU runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DTYPES, FORWARD, poisoned, relative_error
from torch import Tensor

from trimtab.kernels import decoder
from trimtab.rollout.engine.dsa.modules import Router, rotate_halves, rotate_pairs


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def turns(n: int, R: int) -> Tensor:
    angle = numbers(n, 1, R // 2)
    return torch.complex(angle.cos(), angle.sin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 100, 2049])
def test_a_norm_of_a_sum(width, dtype):
    x, delta, gain = numbers(5, width, dtype=dtype), numbers(5, width, dtype=dtype, seed=1), numbers(width, dtype=dtype)
    with poisoned():
        total, out, wide = decoder.add_norm(x, delta, gain, 1e-6)
        same, alone, _ = decoder.add_norm(total, None, gain, 1e-6)
    assert torch.equal(total, x + delta) and same is total and torch.equal(alone, out)
    assert relative_error(out, F.rms_norm((x + delta).double(), (width,), gain.double(), 1e-6)) < FORWARD[dtype]
    assert wide.dtype == torch.float32 and torch.equal(wide, out.float())
    assert decoder.add_norm(x[:0], delta[:0], gain, 1e-6)[1].shape == (0, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Q, C, R, D", [(24, 16, 8, 16), (48, 40, 12, 12), (100, 32, 16, 40)])
def test_a_cache_row_and_the_compressed_query(Q, C, R, D, dtype):
    down, turn = numbers(5, Q + C + R + D, dtype=dtype), turns(5, R)
    q_gain, kv_gain, k_gain = (numbers(width, dtype=dtype) for width in (Q, C, D))
    bias, slot = numbers(D, dtype=dtype, seed=3), torch.tensor([4, -1, 0, 9, 2], device=DEVICE)
    cache = torch.full((10, C + R + D), 7.0, device=DEVICE, dtype=dtype)
    with poisoned():
        q = decoder.latent_rows(down, q_gain, kv_gain, k_gain, bias, turn, slot, cache, 1e-6)
    compressed, latent, rope, key = down.split([Q, C, R, D], -1)
    assert relative_error(q, F.rms_norm(compressed.double(), (Q,), q_gain.double(), 1e-6)) < FORWARD[dtype]
    normed = F.layer_norm(key, (D,), k_gain, bias, 1e-6)
    row = [
        F.rms_norm(latent, (C,), kv_gain, 1e-6),
        rotate_pairs(rope[:, None], turn)[:, 0],
        rotate_halves(normed[:, None], turn)[:, 0],
    ]
    written = slot >= 0
    assert relative_error(cache[slot[written]], torch.cat(row, -1)[written]) < FORWARD[dtype]
    others = [i for i in range(10) if i not in slot.tolist()]
    assert (cache[others] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "H, nope, C, R, index_H, D", [(3, 16, 20, 8, 2, 16), (1, 5, 16, 12, 5, 12), (16, 8, 8, 4, 1, 9)]
)
def test_rotated_queries(H, nope, C, R, index_H, D, dtype):
    up, turn = numbers(5, H * (nope + R) + index_H * D, dtype=dtype), turns(5, R)
    q = torch.full((5, H, C + R), 7.0, device=DEVICE, dtype=dtype)
    with poisoned():
        index = decoder.rotate_queries(up, turn, q, nope, index_H)
    main, index_q = up.split([H * (nope + R), index_H * D], -1)
    assert (q[..., :C] == 7.0).all()
    assert relative_error(q[..., C:], rotate_pairs(main.unflatten(-1, (H, -1))[..., nope:], turn)) < FORWARD[dtype]
    assert relative_error(index, rotate_halves(index_q.unflatten(-1, (index_H, -1)), turn)) < FORWARD[dtype]


@pytest.mark.parametrize(
    "E, groups, kept, K, normalise", [(48, 1, 1, 6, True), (32, 8, 3, 4, True), (12, 4, 2, 5, False)]
)
def test_routes_are_those_of_the_plain_router(E, groups, kept, K, normalise):
    config: Any = SimpleNamespace(
        n_routed_experts=E, hidden_size=E, n_group=groups, topk_group=kept, num_experts_per_tok=K,
        norm_topk_prob=normalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = Router(config)  # on the CPU, where it is plain PyTorch
    router.weight.data.copy_(torch.eye(E))
    bias, logit = 0.1 * numbers(E), numbers(40, E)
    router.e_score_correction_bias.data.copy_(bias)
    ids, gate = router(logit.cpu())
    with poisoned():
        our_ids, our_gate = decoder.route(
            logit, bias, K, groups=groups, groups_kept=kept, normalise=normalise, scale=2.5
        )
    assert torch.equal(our_ids.long().cpu(), ids) and relative_error(our_gate, gate) < 1e-6


def test_equal_experts_are_taken_in_order():
    ids, gate = decoder.route(
        torch.zeros(2, 12, device=DEVICE), torch.zeros(12, device=DEVICE), 3, groups=1, groups_kept=1, normalise=True,
        scale=1.0,
    )  # fmt: skip
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(gate, torch.full_like(gate, 1 / 3))
