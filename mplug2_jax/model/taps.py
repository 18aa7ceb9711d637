"""Named intermediates ("taps"): what a test or a probe may ask of a forward pass, free when nobody asks."""

from collections.abc import Iterable

import jax
from jaxtyping import Array, Shaped


class Taps(dict[str, jax.Array]):
    """Collects the intermediates named at construction, or all of them.

    A forward pass offers arrays by name with :func:`tap`; scanned layers offer one array stacked over depth. A pass
    without taps traces to the same program as if the offers did not exist.

    Example:
        ``taps = Taps(["vision/out"]); model.encode_visual(frames, taps=taps); taps["vision/out"]``
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self._names = None if names is None else frozenset(names)

    def is_requested(self, name: str) -> bool:
        """Whether this name was asked for."""
        return self._names is None or name in self._names


def tap(taps: Taps | None, name: str, x: Shaped[Array, "..."]) -> None:
    """Offers one intermediate; kept only if it was asked for."""
    if taps is not None and taps.is_requested(name):
        taps[name] = x
