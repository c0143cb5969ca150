import pytest
import torch

from trimtab.grpo.policy.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 40), (2, 64, 7)])
def test_singular_values_come_out_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_scaled_gradient_takes_the_same_step():
    torch.manual_seed(0)
    start, grad = torch.randn(6, 4), torch.randn(6, 4)
    ends = []
    for scale in (1.0, 1000.0):
        matrix = torch.nn.Parameter(start.clone())
        matrix.grad = scale * grad
        Muon([matrix], lr=0.1).step()
        ends.append(matrix.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(ends[0], start)


def test_it_fits_a_linear_map():
    torch.manual_seed(0)
    target, x = torch.randn(8, 8), torch.randn(64, 8)
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([matrix], lr=0.05)
    losses = []
    for _ in range(200):
        loss = (x @ (matrix - target).T).square().mean()
        matrix.grad = torch.autograd.grad(loss, matrix)[0]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
