"""Files are found by few requests, whatever the number of names."""

import re
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.files import find_files, path_exists
from data_pipelines.storage.file_system import file_system
from tests import fault_proxy


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a folder with files, on a disk and in a bucket."""
    root = str(tmp_path / "data") if request.param == "disk" else f"{request.getfixturevalue('bucket')}/data"
    fs, fs_path = file_system(root)
    for i in range(40):
        for name in (f"{i:03}.tar", f"b/{i:02}/x [1].tar", f"b/{i:02}/{i}.txt"):
            if fs.is_local:
                Path(fs_path, name).parent.mkdir(parents=True, exist_ok=True)
            fs.write(f"{fs_path}/{name}", b"x" * i)
    fs.write(f"{fs_path}/.hidden.tar", b"")
    return root


CASES = {
    "": [f"{i:03}.tar" for i in range(40)],
    "/007.tar": ["007.tar"],
    "/*.tar": [f"{i:03}.tar" for i in range(40)],
    "/{000..039}.tar": [f"{i:03}.tar" for i in range(40)],
    "/{038..039}.tar": ["038.tar", "039.tar"],
    "/b/{00..39}/x [1].tar": [f"b/{i:02}/x [1].tar" for i in range(40)],
    "/b/{05..06}/*.t*": ["b/05/5.txt", "b/05/x [1].tar", "b/06/6.txt", "b/06/x [1].tar"],
    "/b/0{5..6}/{0..6}*": ["b/05/5.txt", "b/06/6.txt"],
    "/**/1.txt": ["b/01/1.txt"],
}


@pytest.mark.parametrize("pattern", CASES)
def test_files_of_a_pattern(pattern: str, root: str, proxy: fault_proxy.FaultProxy) -> None:
    fs, fs_path = file_system(root)
    proxy.requests.clear()
    found = find_files(f"{root}{pattern}", ".tar")
    num_folders = 40 if re.fullmatch("/b/.*[*].*", pattern) else 0  # each is listed
    assert len(proxy.requests) <= 6 + num_folders
    assert [file.path for file in found] == [f"{fs.url(fs_path)}/{name}" for name in CASES[pattern]]
    assert [file.size for file in found[-1:]] == [fs.info(f"{fs_path}/{CASES[pattern][-1]}")["size"]]
    assert len({file.version for file in found} - {""}) >= 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/{000..040}.tar", r"data/040\.tar does not exist; check the path"),
        ("/nothing", "data/nothing does not exist; check the path"),
        ("/x*", r"data/x\* matches no file; check the pattern"),
        ("/b", r"data/b holds no file that ends in \.tar; found 0 other files"),
        ("/b**", "cannot be matched: Invalid pattern"),
        ("/{0..9999999}.tar", "matches more than 1,000,000 files; split it"),
    ],
)
def test_missing_files(pattern: str, message: str, root: str) -> None:
    with pytest.raises(DataError, match=message):
        find_files(f"{root}{pattern}", ".tar")


@pytest.mark.parametrize(
    ("path", "exists"),
    [
        ("a.txt", True), ("run[1]", True), ("", True), ("{0..2}.tar", True), ("{0..3}.tar", False), ("*.tar", True),
        ("*.zip", False), ("b.txt", False), ("run1", False), ("x/y", False),
    ],
)  # fmt: skip
def test_whether_a_path_exists_by_the_rules_of_sources(path: str, exists: bool, tmp_path: Path) -> None:
    for name in ("a.txt", "0.tar", "1.tar", "2.tar"):
        (tmp_path / name).touch()
    (tmp_path / "run[1]").mkdir()
    assert path_exists(f"{tmp_path}/{path}") == exists
