"""Parts of a source by the hashes of keys: disjoint, complete, and the same whatever is added."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import SourceConfig, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.record import Record
from data_pipelines.sources.formats import open_source
from data_pipelines.sources.hash_range import HashRange, hash_of_key


class Listed:
    """Records by their keys; a key of "" is a record that cannot be read."""

    def __init__(self, keys: list[str]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Record:
        if not self._keys[index]:
            raise DataError("damaged")
        return Record(self._keys[index])


def keys_of(source: HashRange) -> list[str]:
    return [source[index].key for index in range(len(source))]


KEYS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True)


@given(KEYS, st.floats(0.01, 0.99))
def test_parts_are_disjoint_and_complete(keys: list[str], fraction: float) -> None:
    heldout, train = (keys_of(HashRange(Listed(keys), *part)) for part in ((0.0, fraction), (fraction, 1.0)))
    assert sorted([*heldout, *train]) == sorted(keys)


@given(KEYS, KEYS, st.floats(0.01, 0.99))
def test_new_records_move_no_old_ones(keys: list[str], more: list[str], fraction: float) -> None:
    before = keys_of(HashRange(Listed(keys), 0.0, fraction))
    after = keys_of(HashRange(Listed(list({*keys, *more})), 0.0, fraction))
    assert [key for key in after if key in keys] == before


def test_hashes_are_uniform_and_never_change() -> None:
    hashes = [hash_of_key(f"pictures/{i}.jpg") for i in range(4000)]
    counts, _ = np.histogram(hashes, bins=10, range=(0, 1))
    assert abs(counts - 400).max() < 5 * np.sqrt(400)
    assert hashes[0] == 0.9296396487141791


def test_all_records_of_an_image_are_in_the_same_split() -> None:
    rows = [Record(f"{i}", visual_id=f"{i % 5}.jpg") for i in range(50)]
    first = HashRange(rows, 0.0, 0.5)
    assert 0 < len(first) < 50
    assert len(first) == 10 * len({first[i].visual_id for i in range(len(first))})


def test_a_record_that_cannot_be_read_is_in_the_last_part() -> None:
    assert len(HashRange(Listed(["", ""]), 0.0, 0.99)) == 0
    with pytest.raises(DataError, match="damaged"):
        HashRange(Listed([""]), 0.5, 1.0)[0]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(40)))
    return str(tmp_path / "texts.jsonl")


def test_any_source_can_be_split(texts: str) -> None:
    def keys(part: tuple[float, float], max_records: int | None = None) -> list[str]:
        config = SourceConfig(format="annotations", kind="text", path=texts, hash_range=part, max_records=max_records)
        source = open_source(config, VisualConfig())
        return [source[i].key for i in range(len(source))]

    assert sorted(keys((0.0, 0.3)) + keys((0.3, 1.0))) == sorted(keys((0.0, 1.0)))
    assert keys((0.0, 0.3), 3) == keys((0.0, 0.3))[:3]


def test_an_empty_part_names_the_range(texts: str) -> None:
    config = SourceConfig(format="annotations", kind="text", path=texts, hash_range=(0.0, 1e-12))
    with pytest.raises(DataError, match=r"is empty: no record with a hash of its key in \[0\.0, 1e-12\]"):
        open_source(config, VisualConfig())


@pytest.mark.parametrize("part", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_a_range_is_within_0_and_1(part: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="expected two rising numbers from 0 to 1"):
        SourceConfig(hash_range=part)


def test_the_identity_of_a_whole_source_is_that_of_older_versions() -> None:
    assert "hash_range" not in SourceConfig().identity()
    assert SourceConfig(hash_range=(0.0, 0.5)).identity()["hash_range"] == [0.0, 0.5]
