"""The split of a folder into training and held-out records."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

from absl import logging

from data_pipelines.config import Kind, SourceConfig
from mplug2_jax.errors import UserError

FRACTIONS = (0.05, 0.1, 0.2, 0.4)
MIN_RECORDS, MIN_HELDOUT = 16, 4
"""Fewest images, or videos, that are used, and fewest of them that are held out."""


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """The split of a folder: its path, the fraction that is held out, and the training records of each kind."""

    path: str
    heldout: float
    num_train: Mapping[Kind, int]

    def train(self, kind: Kind, max_records: int | None = None) -> SourceConfig:
        """Return the training records; of kind "text" the captions of all of them."""
        return self._source(kind, (self.heldout, 1.0), max_records)

    def eval(self, kind: Kind, max_records: int) -> SourceConfig:
        """Return the held-out records, at most ``max_records``."""
        return self._source(kind, (0.0, self.heldout), max_records)

    def _source(self, kind: Kind, hash_range: tuple[float, float], max_records: int | None) -> SourceConfig:
        return SourceConfig(
            format="captioned_folder", kind=kind, path=self.path, hash_range=hash_range, max_records=max_records
        )  # fmt: skip


def split_folder(path: str, fraction: float | None = None) -> FolderSplit:
    """Split a folder by the hashes of its records' keys, so that new files move no old ones.

    Args:
        path: the folder, also a URL.
        fraction: to hold out; None: the smallest of ``FRACTIONS`` that holds out ``MIN_HELDOUT`` of each kind.

    Raises:
        DataError: as :func:`data_pipelines.sources.folder.read_folder`.
        UserError: too few images and videos, or a fraction that holds out too few.
    """
    from data_pipelines.sources.folder import read_folder  # imports decoders, which most recipes do not need
    from data_pipelines.sources.hash_range import hash_of_key

    kinds = read_folder(path).kinds
    totals = Counter(kinds.values())
    used = [kind for kind, total in totals.items() if total >= MIN_RECORDS]
    for kind in totals.keys() - used:
        logging.warning("%s: %d %ss are not used, since there are fewer than %d", path, totals[kind], kind, MIN_RECORDS)
    if not used:
        found = " and ".join(f"{total:,} {kind}s" for kind, total in totals.items())
        raise UserError(
            f"{path} has {found or 'no images'} with captions, expected at least {MIN_RECORDS} of a kind; add some"
        )
    hashes = {kind: [hash_of_key(name) for name, each in kinds.items() if each == kind] for kind in used}
    for heldout in FRACTIONS if fraction is None else (fraction,):
        num_heldout = {kind: sum(each < heldout for each in hashes[kind]) for kind in used}
        if all(MIN_HELDOUT <= count <= totals[kind] - MIN_HELDOUT for kind, count in num_heldout.items()):
            return FolderSplit(path, heldout, {kind: totals[kind] - num_heldout[kind] for kind in used})
    found = " and ".join(f"{count:,} of {totals[kind]:,} {kind}s" for kind, count in num_heldout.items())
    raise UserError(
        f"{path}: the fraction {heldout:g} holds out {found}, expected at least {MIN_HELDOUT} and as many to train on; "
        "add files, or give another fraction, as folder:PATH,tiny,0.5"
    )
