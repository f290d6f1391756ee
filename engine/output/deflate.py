"""Deflate streams, by isal where it is installed (the extra `fast`), else by Python's zlib.

Both write what RFC 1950 and 1951 describe, and any reader reads both. At level 1, isal takes about
a third of the time and compresses a little better.
"""

import zlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

ADLER_PRIME = 65521


def library() -> ModuleType:
    """The module that compresses, with the interface of zlib."""
    if find_spec("isal") is None:
        return zlib
    from isal import isal_zlib

    return isal_zlib


def raw_stream() -> Any:
    """A compressor of one deflate stream without zlib's header and checksum."""
    return library().compressobj(level=1, wbits=-zlib.MAX_WBITS)


def compress(data: Any) -> bytes:
    """A whole zlib stream."""
    compressed: bytes = library().compress(data, 1)
    return compressed


def adler32_combine(first: int, second: int, second_bytes: int) -> int:
    """The Adler-32 of two byte strings put together, from their own ones (RFC 1950, section 8.2).

    For bytes d_1 ... d_n the checksum is b * 65536 + a, both modulo 65521, with

        a = 1 + d_1 + ... + d_n            b = a_1 + ... + a_n   (a after each byte)

    Behind a first string, each a of the second is larger by a_first - 1, thus

        a = a_first + a_second - 1         b = b_first + b_second + n_second * (a_first - 1)
    """
    a_first, b_first = first & 0xFFFF, first >> 16
    a_second, b_second = second & 0xFFFF, second >> 16
    a = (a_first + a_second - 1) % ADLER_PRIME
    b = (b_first + b_second + second_bytes * (a_first - 1)) % ADLER_PRIME
    return b << 16 | a
