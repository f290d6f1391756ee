"""Row arithmetic: which rows belong to which rank, and how far a convolution looks.

    latent rows   0 ........ 16 | 16 ....... 32 | 32 ... 41        41 rows, 3 ranks, blocks of 4
    one level down   0 ..... 8  |  8 ...... 16  | 16 .. 21         every cut is still a whole row
    two levels down  0 .. 4     |  4 .. 8       |  8 . 11

A band begins on a multiple of 2^levels, so that after each stride-2 convolution it begins on a
whole row; only the last band may be ragged, and it rounds up just as the whole picture does.
"""

from itertools import accumulate, pairwise

from engine.config import UserError


def split_rows(height: int, parts: int, multiple: int = 1) -> list[range]:
    """Cut `height` rows into `parts` bands, as even as blocks of `multiple` rows allow.

    Every band begins on a multiple of `multiple` and has at least one row.

    Raises:
        UserError: there are fewer blocks than parts.
    """
    blocks = max_bands(height, multiple)
    if parts > blocks:
        raise UserError(
            f"{height} rows in blocks of {multiple} can be shared by {blocks} ranks at most, "
            f"not by {parts}: start fewer ranks or ask for a taller picture"
        )
    small, larger = divmod(blocks, parts)
    cuts = [multiple * (small * part + min(part, larger)) for part in range(parts)] + [height]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def max_bands(height: int, multiple: int = 1) -> int:
    """How many bands `height` rows can be cut into."""
    return -(-height // multiple)


def scale_rows(rows: range, factor: int) -> range:
    """The rows of an enlarged picture that come from `rows`: 8 pixel rows per latent row."""
    return range(rows.start * factor, rows.stop * factor)


def stack_rows(lengths: list[int]) -> list[range]:
    """The rows of bands that are that many rows high, from the top."""
    return [
        range(stop - length, stop)
        for length, stop in zip(lengths, accumulate(lengths), strict=True)
    ]


def overlap(a: range, b: range) -> range:
    """The rows that two runs of rows share; an empty range where there are none."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def halo_rows(kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """Rows that a convolution needs (above, below) its band.

    Output row i reads input rows i*stride - padding ... i*stride - padding + dilation*(kernel-1).
    For a band of rows [a, b), both multiples of the stride, the first output row reaches `padding`
    rows above a and the last one dilation*(kernel-1) + 1 - stride - padding rows below b.
    """
    return padding, max(0, dilation * (kernel - 1) + 1 - stride - padding)
