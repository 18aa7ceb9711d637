"""HighwayHash of 64 bits with the key of Riegeli's files, for headers of a few bytes: it takes microseconds per byte.

The algorithm: https://github.com/google/highwayhash (Alakuijala, Cox, Wassenberg 2016).
"""

import struct
from collections.abc import Sequence

_MASK, _LOW = 2**64 - 1, 2**32 - 1
_KEY = struct.unpack("<4Q", b"Riegeli/records\n" * 2)
_MUL0 = (0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3)
_MUL1 = (0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377)
_PACKET = struct.Struct("<4Q")
# The bytes of two lanes, 0 to 7 and 8 to 15, that are added to two others.
_ZIPPER = (3, 12, 2, 5, 14, 1, 15, 0, 11, 4, 10, 13, 9, 6, 8, 7)


def highway_hash(data: bytes) -> int:
    """Return the hash of some bytes."""
    state = _State()
    whole = len(data) // _PACKET.size * _PACKET.size
    for start in range(0, whole, _PACKET.size):
        state.update(_PACKET.unpack_from(data, start))
    if rest := data[whole:]:
        state.add_size(len(rest))
        state.update(_PACKET.unpack(_pad(rest)))
    return state.finalize()


def _pad(rest: bytes) -> bytes:
    """Return the last, incomplete packet: whole words, and the bytes after them where they depend on their number."""
    size, words = len(rest), len(rest) // 4 * 4
    packet = bytearray(_PACKET.size)
    packet[:words] = rest[:words]
    if size & 16:
        packet[28:] = rest[-4:]
    elif tail := rest[words:]:
        packet[16:19] = bytes((tail[0], tail[len(tail) // 2], tail[-1]))
    return bytes(packet)


def _swap(lane: int) -> int:
    return lane >> 32 | (lane & _LOW) << 32


class _State:
    def __init__(self) -> None:
        self._v0 = [mul ^ key for mul, key in zip(_MUL0, _KEY, strict=True)]
        self._v1 = [mul ^ _swap(key) for mul, key in zip(_MUL1, _KEY, strict=True)]
        self._mul0, self._mul1 = list(_MUL0), list(_MUL1)

    def update(self, lanes: Sequence[int]) -> None:
        v0, v1, mul0, mul1 = self._v0, self._v1, self._mul0, self._mul1
        for i in range(4):
            v1[i] = (v1[i] + mul0[i] + lanes[i]) & _MASK
            mul0[i] ^= (v1[i] & _LOW) * (v0[i] >> 32)
            v0[i] = (v0[i] + mul1[i]) & _MASK
            mul1[i] ^= (v0[i] & _LOW) * (v1[i] >> 32)
        _add_zipped(v0, v1)
        _add_zipped(v1, v0)

    def add_size(self, size: int) -> None:
        """Mix in the size of the last packet, before it."""
        for i in range(4):
            self._v0[i] = (self._v0[i] + (size << 32) + size) & _MASK
            halves = (self._v1[i] & _LOW, self._v1[i] >> 32)
            low, high = ((half << size | half >> 32 - size) & _LOW for half in halves)
            self._v1[i] = low | high << 32

    def finalize(self) -> int:
        for _ in range(4):
            self.update([_swap(self._v0[i]) for i in (2, 3, 0, 1)])
        return (self._v0[0] + self._v1[0] + self._mul0[0] + self._mul1[0]) & _MASK


def _add_zipped(target: list[int], source: list[int]) -> None:
    for i in (0, 2):
        both = (source[i] | source[i + 1] << 64).to_bytes(16, "little")
        zipped = bytes(both[byte] for byte in _ZIPPER)
        target[i] = (target[i] + int.from_bytes(zipped[:8], "little")) & _MASK
        target[i + 1] = (target[i + 1] + int.from_bytes(zipped[8:], "little")) & _MASK
