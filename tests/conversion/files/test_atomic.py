"""Atomic outputs: nothing is left of one that failed."""

import contextlib
import threading
import time
from pathlib import Path

import pytest

from mplug2_jax.conversion.files.atomic import atomic_files, atomic_folder


@pytest.mark.parametrize("output", [atomic_folder, atomic_files])
def test_writes_in_flight_when_an_output_fails_leave_nothing(output: object, tmp_path: Path) -> None:
    """Arrays are written by threads, which do not stop at once when one of them fails."""
    target = tmp_path / "out"

    def write(folder: Path) -> None:
        for i in range(300):
            with contextlib.suppress(OSError):
                (folder / "arrays" / str(i)).mkdir(exist_ok=True)
                (folder / "arrays" / str(i) / "0").write_bytes(b"1")
            time.sleep(0.001)

    def fail() -> None:
        with output(target, overwrite=False) as partial:  # type: ignore[operator]
            (partial / "arrays").mkdir()
            threading.Thread(target=write, args=(partial,)).start()
            time.sleep(0.05)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    time.sleep(0.5)
    assert [path for path in tmp_path.rglob("*") if path != target] == []
