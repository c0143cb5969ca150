"""What doctor says of sparse attention, with a GPU and without."""

from trimtab.grpo.commands import doctor
from trimtab.grpo.commands.doctor import Check


def test_sparse_attention_runs_in_triton_on_a_gpu_and_in_pytorch_elsewhere(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"triton": "3.6.0"}.get)
    on_gpu = doctor._sparse_attention(Check("GPU", True, "any"))
    assert on_gpu.ok and on_gpu.detail == "triton 3.6.0, in training and inside vLLM"
    on_cpu = doctor._sparse_attention(Check("GPU", False, "none"))
    assert not on_cpu.ok and "plain PyTorch" in on_cpu.detail
    monkeypatch.setattr(doctor, "_version", {}.get)
    assert not doctor._sparse_attention(Check("GPU", True, "any")).ok
