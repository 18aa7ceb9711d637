"""Finds and imports the packages of an exported folder, for ``run.py`` and for the classes that transformers loads."""

import filecmp
import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

PACKAGES = ("data_pipelines", "mplug2_torch")
COMPANIONS = (
    "*.py", *(f"{package}/**/*.py" for package in PACKAGES), "requirements.txt", "inference.json",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "sentencepiece.model",
)  # fmt: skip
"""Patterns of the files that a model needs besides ``config.json`` and its weights."""


def find_runtime(name: str | None, revision: str | None = None) -> Path:
    """Import the packages of a model, and return its folder.

    Args:
        name: a folder, or the name of a repository on the hub, whose code and settings are then downloaded.
        revision: of the repository.

    Raises:
        ImportError: as :func:`import_runtime`; or the model was not loaded from a folder.
    """
    folder = Path(name or "")
    if not name:
        raise ImportError("this config has no folder; load the model by from_pretrained of a folder or a repository")
    if not folder.is_dir():
        hub = importlib.import_module("huggingface_hub")
        folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=[*COMPANIONS, "config.json"]))
    import_runtime(folder)
    return folder


def copy_companions(folder: Path, target: Path) -> list[str]:
    """Copy the files of :data:`COMPANIONS` from a folder to another; return their new paths."""
    copies = []
    for path in sorted({path for pattern in COMPANIONS for path in folder.glob(pattern)}):
        copy = target / path.relative_to(folder)
        if copy.resolve() != path.resolve():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        copies.append(str(copy))
    return copies


def import_runtime(folder: Path) -> None:
    """Import the packages of a folder, so that ``import mplug2_torch`` gives its own.

    Raises:
        ImportError: Python or a package is missing or too old, the folder is not complete, or a package of the same
            name with other code is imported already.
    """
    requirements = folder / "requirements.txt"
    if not requirements.is_file():
        raise ImportError(f"{folder} is not complete, copy it again: there is no {requirements.name}")
    if problem := _find_problem(requirements):
        raise ImportError(problem)
    for name in PACKAGES:
        _import_package(name, folder / name)


def _find_problem(requirements: Path) -> str:
    """Return what is wrong with the installed Python and packages; empty if nothing is."""
    if sys.version_info < (3, 11):  # noqa: UP036  nothing else has checked it here
        return f"Python {sys.version.split()[0]} is too old, expected at least 3.11"
    for name, minimum in re.findall(r"(?m)^([\w-]+)>=([\d.]+)$", requirements.read_text(encoding="utf-8")):
        if problem := find_old(name, minimum):
            return f"{problem}: pip install -r {requirements}"
    return ""


def find_old(name: str, minimum: str) -> str:
    """Return that an installed package is missing or too old; empty if it is neither."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {name} is not installed"
    is_old = _numbers(found) < _numbers(minimum)
    return f"{name} {found} is too old, expected at least {minimum}" if is_old else ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def _import_package(name: str, folder: Path) -> None:
    """Import a package from its folder. ``sys.path`` stays as it is: run.py and others would become modules."""
    if not (folder / "__init__.py").is_file():
        raise ImportError(f"{folder.parent} is not complete, copy it again: there is no {name}/__init__.py")
    if imported := sys.modules.get(name):
        found = Path(str(imported.__file__)).parent
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
        if found != folder and filecmp.cmpfiles(found, folder, files, shallow=False)[0] != files:
            raise ImportError(
                f"the package {name} of {found} is imported already and its code differs from that of {folder}; use a "
                "process for each"
            )
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
