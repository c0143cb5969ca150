"""The folders at the top of the repository have generic names; nobody else may trip over them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("environments", "grpo", "kernels", "rewards", "rollout")


def run_in_root(code: str, *, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process with the repository root first on sys.path, as scripts and Ray workers have it."""
    environment = dict(os.environ, PYTHONPATH=str(python_path)) if python_path else None
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


USE_TRANSFORMERS = """
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # lazy: the names are resolved here
config = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
assert sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters()) > 0
"""


def test_transformers_works_with_the_repository_root_first_on_the_path():
    done = run_in_root(USE_TRANSFORMERS + "import trimtab.kernels.reference")
    assert done.returncode == 0, done.stderr


def test_an_installed_package_called_kernels_wins_over_our_folder(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("installed = True\n")
    metadata = tmp_path / "kernels-0.0.1.dist-info"  # too old for transformers to use, so its contents do not matter
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    code = "import kernels; assert kernels.installed\nimport trimtab.kernels.reference as ours; assert ours.select\n"
    done = run_in_root(code + USE_TRANSFORMERS, python_path=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel of this repository, built in a copy."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = source.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_an_installation_adds_trimtab_and_no_other_name_to_site_packages(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"trimtab"} | {top for top in tops if top.startswith("trimtab-") and top.endswith(".dist-info")}


def test_a_wheel_holds_every_module(wheel_names):
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert modules <= {name.removeprefix("trimtab/") for name in wheel_names}


def test_kernels_is_a_namespace_so_that_a_regular_package_of_that_name_is_found_first():
    assert not (ROOT / "kernels" / "__init__.py").exists()
