"""Ask the model in this folder: captions, answers, ranks and features of images and clips. See run.py --help."""

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def find_problem(requirements: str) -> str:
    """Return what is wrong with the installed Python and packages; empty if nothing is."""
    if sys.version_info < (3, 11):  # noqa: UP036  nothing else has checked it here
        return f"Python {sys.version.split()[0]} is too old, expected at least 3.11"
    for name, minimum in re.findall(r"(?m)^([\w-]+)>=([\d.]+)$", requirements):
        remedy = f"pip install -r {FOLDER / 'requirements.txt'}"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"the package {name} is not installed: {remedy}"
        if _numbers(found) < _numbers(minimum):
            return f"{name} {found} is too old, expected at least {minimum}: {remedy}"
    return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def main() -> int:
    """Check what is installed, then run the command; return the exit status."""
    sys.path.insert(0, str(FOLDER))
    try:
        problem = find_problem((FOLDER / "requirements.txt").read_text(encoding="utf-8"))
        if not problem:
            status: int = importlib.import_module("mplug2_torch.conversion.exported.command").main(FOLDER)
            return status
    except (FileNotFoundError, ImportError) as error:
        problem = f"{FOLDER} is not complete, copy it again: {error}"
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
