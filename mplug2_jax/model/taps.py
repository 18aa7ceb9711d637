"""Named intermediates ("taps") of a forward pass, for tests and probes; free when not requested."""

from collections.abc import Iterable

import jax
from jaxtyping import Array, Shaped


class Taps(dict[str, jax.Array]):
    """Container for the intermediates named at construction, or for all of them.

    A forward pass exposes arrays by name with :func:`tap`; scanned layers expose one array stacked over depth. Without
    taps a pass traces to the same program as if it called :func:`tap` nowhere.

    Example:
        ``taps = Taps(["vision/out"]); model.encode_visual(frames, taps=taps); taps["vision/out"]``
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self._names = None if names is None else frozenset(names)

    def is_requested(self, name: str) -> bool:
        """Return whether this intermediate was requested."""
        return self._names is None or name in self._names


def tap(taps: Taps | None, name: str, x: Shaped[Array, "..."]) -> None:
    """Expose one intermediate; it is stored only if it was requested."""
    if taps is not None and taps.is_requested(name):
        taps[name] = x
