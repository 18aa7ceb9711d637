"""Ask the model in this folder: captions, answers, ranks and features of images and clips. See run.py --help."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    """Check what is installed, then run the command; return the exit status."""
    sys.path.insert(0, str(FOLDER))
    try:
        importlib.import_module("mplug2_runtime").import_runtime(FOLDER)
        status: int = importlib.import_module("mplug2_torch.conversion.exported.command").main(FOLDER)
        return status
    except ModuleNotFoundError as error:
        problem = f"{FOLDER} is not complete, copy it again: {error}"
    except ImportError as error:
        problem = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
