"""The import graph of the packages, as a test."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "rewards": set(),
    "environments": {"rewards"},
    "rollout": {"environments", "kernels", "rewards"},
    "grpo": {"environments", "kernels", "rewards", "rollout"},
}
DOORS = {  # the only places through which a heavy dependency enters; a folder ends in a slash
    "ray": {"rollout/engine/pool.py", "rollout/engine/actor.py"},
    "vllm": {"rollout/engine/"},
    "transformers": {"rollout/formats/", "rollout/scripted.py", "rollout/engine/dsa/model.py"}
    | {"grpo/policy/", "grpo/stages/"},
    "peft": {"grpo/policy/lora.py"},
    "triton": {"kernels/"},
    "torch": {"kernels/", "grpo/", "rollout/engine/"},
}
ROOMS = {  # rooms within a package that must not know each other's upper neighbours
    "grpo/policy": {"grpo/commands", "grpo/stages", "rollout"},
    "grpo/stages": {"grpo/commands"},
    "grpo/cost": {"grpo/commands", "grpo/setup", "grpo/stages", "grpo/policy"},
    "grpo/setup": {"grpo/commands", "grpo/runs"},
    "grpo/runs": {"grpo/commands", "grpo/setup", "grpo/stages"},
    "grpo/sampling": {"grpo/commands", "grpo/setup", "grpo/stages", "grpo/runs"},
    "grpo/results": {"grpo/commands", "grpo/setup", "grpo/stages", "grpo/sampling"},
    "rollout/engine": {"rollout/formats", "environments"},
    "rollout/formats": {"rollout/engine"},
    "environments/tools": {"environments/adapters", "environments/tasks"},
    "rewards/judging": set(),
    "rewards/reading": {"rewards/judging", "rewards/isolation"},
    "rewards/isolation": {"rewards/judging", "rewards/reading"},
    "kernels/hopper": set(),
}
FILES = sorted(path.relative_to(ROOT).as_posix() for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(file: str) -> list[str]:
    """Dotted names of everything a file imports, at its top or inside a function; "." begins a relative import."""
    names = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("file", FILES)
def test_a_package_imports_only_the_layers_below_it(file):
    package = file.split("/")[0]
    ours = [name.split(".")[1] for name in imports(file) if name.split(".")[0] == "trimtab"]
    assert set(ours) <= {package} | MAY_IMPORT[package]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_does_not_import_the_rooms_above_it(room):
    files = [file for file in FILES if file.startswith(f"{room}/")]
    assert files, f"no room at {room}"
    known = {name.removeprefix("trimtab.").replace(".", "/") for file in files for name in imports(file)}
    assert {name for name in known for above in ROOMS[room] if f"{name}/".startswith(f"{above}/")} == set()


@pytest.mark.parametrize("file", FILES)
def test_heavy_dependencies_enter_through_their_doors(file):
    needed = {name.split(".")[0] for name in imports(file)} & DOORS.keys()
    shut = {
        name
        for name in needed
        if not any(file == door or (door[-1] == "/" and file.startswith(door)) for door in DOORS[name])
    }
    assert shut == set()


@pytest.mark.parametrize("file", FILES + SCRIPTS)
def test_our_code_is_imported_as_trimtab_and_never_by_a_bare_or_relative_name(file):
    tops = {name.split(".")[0] for name in imports(file)}
    assert "" not in tops, "a relative import"
    assert tops & MAY_IMPORT.keys() == set()


def test_every_door_that_is_a_file_exists():
    assert {door for doors in DOORS.values() for door in doors if not (ROOT / door).exists()} == set()


BLOCKED = """
import sys
import tomllib

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
import {module}
"""


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("trimtab.grpo.estimators", {"transformers", "ray", "vllm", "triton", "accelerate"}),
        ("trimtab.kernels.reference", {"transformers", "ray", "vllm", "accelerate"}),
        ("trimtab.grpo.batch", {"transformers", "ray", "vllm", "accelerate"}),
        ("trimtab.rollout.types", {"transformers", "ray", "vllm", "torch"}),
        ("trimtab.environments.base", {"transformers", "ray", "vllm", "torch"}),
    ],
)
def test_the_light_modules_import_without_the_heavy_dependencies(module, blocked):
    code = BLOCKED.format(module=module, blocked=sorted(blocked))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_room_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {Path(file).parent.as_posix() for file in FILES}
    assert set(packages) == {f"trimtab.{room.replace('/', '.')}" for room in rooms}
