"""What every test may ask for. Types and shapes of every call into our packages are checked while tests run."""

import os
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # ahead-of-time compilation beside other test processes
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

install_import_hook(["mplug2_jax", "data_pipelines"], "beartype.beartype")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with the official release's facts and golden numbers: MPLUG2_REFERENCE, or beside the repository."""
    folder = Path(os.environ.get("MPLUG2_REFERENCE", REPOSITORY.parent / "shared" / "reference"))
    if not folder.is_dir():
        pytest.skip(f"no golden numbers at {folder}; set MPLUG2_REFERENCE to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY
