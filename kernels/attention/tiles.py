"""Pieces shared by the attention kernels: tiles of one head, matrix products over a split head, RMS norm of rows.

A head of D columns is held as two tiles side by side, a pair (wide, tail) of power-of-two widths: 72 = 64 + 16, of
which 8 are padding. Every matrix product then has a shape that the matrix units take: 80 columns of work for 72, where
one tile would need 128. Padding columns are read as zero and never written, but in padded rows, which carry a number
there: see `row_width`.

Letters: D head size, m n rows of tiles. "A head tile [m, D]" below is such a pair ([m, wide], [m, tail]).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SMALLEST_TILE = 16  # the matrix units take nothing narrower
# A number beside a head is the sum of three of the row's dtype, each times its factor: three times the 8 bits of
# bfloat16 are float32's 24. float16 ends at 65504; with these factors it reaches 2^31 and still resolves 2^-25.
PART_FACTORS = (2.0**15, 2.0**5, 1.0)
ONES_PART = 2  # of the factors

LOG2_E = tl.constexpr(1.4426950408889634)
# Softmax goes without a running maximum up to this |score| in base 2. Its largest probability 2^limit must fit the
# dtype (float16 ends at 2^16), its smallest keep full precision (float16: 2^-14), and probability · V summed over a
# sequence must fit float32: with 60, |V| up to 2^50 in sequences of 2^17 tokens.
BOUNDED_UP_TO = {torch.float32: 60.0, torch.bfloat16: 60.0, torch.float16: 14.0}


@triton.constexpr_function
def split_head(head_size: int) -> tuple[int, int]:
    """(wide, tail): two powers of two of at least 16 that together hold the head: 72 → (64, 16), 128 → (64, 64)."""
    wide = max(SMALLEST_TILE, triton.next_power_of_2(head_size) // 2)
    return wide, max(SMALLEST_TILE, triton.next_power_of_2(max(head_size - wide, 0)))


@triton.constexpr_function
def wide_of(head_size):
    return split_head(head_size)[0]


@triton.constexpr_function
def tail_of(head_size):
    return split_head(head_size)[1]


@triton.constexpr_function
def has_padding(head_size):
    """True where the last column of the tail is padding."""
    return sum(split_head(head_size)) > head_size


@triton.constexpr_function
def number_column(head_size):
    """The first column of the tail that is padding: where a number beside the head begins."""
    return max(head_size, wide_of(head_size))


@triton.constexpr_function
def carries_number(head_size):
    """True where a row's padding has room for a number beside its head."""
    return sum(split_head(head_size)) - number_column(head_size) >= len(PART_FACTORS)


@triton.constexpr_function
def number_of_parts():
    return len(PART_FACTORS)


@triton.constexpr_function
def factor_of(part):
    return PART_FACTORS[part]


@triton.constexpr_function
def row_width(head_size):
    """Columns of a padded row: of both tiles, with their padding.

    A float32 number lies in the padding as three of the row's dtype (`append_number`), or their factors lie there
    (`append_factors`). The product of a row of each kind is that of their heads plus the number, at no cost.
    """
    return sum(split_head(head_size))


@triton.constexpr_function
def ones_column():
    """The column of `append_factors` that holds ones, counted from `number_column`."""
    return ONES_PART


@triton.jit
def padded_rows(pointer, head, num_tokens, first_token, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Where the padded rows of one head begin, from `first_token` (int64) on: a pair of pointers, see `load_head`.

    All wide tiles [HEADS, N, wide] lie before all tails [HEADS, N, tail]: consecutive rows of a tile are consecutive
    in memory and begin where cache lines do. Rows of 144 bytes in [N, HEADS, D] lie across two lines each, so that
    copies into shared memory take twice their time, and those of tails four times [measured on an H200].
    """
    row = head * num_tokens + first_token
    tails = pointer + num_tokens.to(tl.int64) * (HEADS * wide_of(HEAD_SIZE))
    return pointer + row * wide_of(HEAD_SIZE), tails + row * tail_of(HEAD_SIZE)


@triton.jit
def _load_part(pointer, rows, inside, ROW_STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_SIZE):
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * ROW_STRIDE + columns[None, :]
    if FIRST + WIDTH <= HEAD_SIZE:
        if inside is None:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        mask = (columns < HEAD_SIZE)[None, :]
        if inside is not None:
            mask = mask & inside[:, None]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def load_head(
    pointer, rows, inside, ROW_STRIDE: tl.constexpr, HEAD_SIZE: tl.constexpr, WITH_PADDING: tl.constexpr = False
):
    """The given rows of one head: a head tile [m, D] in the pointer's dtype, zero where not `inside` (None = all are).

    `pointer` points to the head's first column in row 0; its tile of rows is reached with 32-bit offsets. Strides and
    sizes are constexpr so that loads are sixteen bytes wide. WITH_PADDING: `pointer` is a pair of `padded_rows`, and
    the stride is theirs.
    """
    WIDE: tl.constexpr = wide_of(HEAD_SIZE)
    TAIL: tl.constexpr = tail_of(HEAD_SIZE)
    if WITH_PADDING:
        head = (
            _load_part(pointer[0], rows, inside, WIDE, 0, WIDE, WIDE),
            _load_part(pointer[1], rows, inside, TAIL, 0, TAIL, TAIL),
        )
    else:
        head = (
            _load_part(pointer, rows, inside, ROW_STRIDE, 0, WIDE, HEAD_SIZE),
            _load_part(pointer, rows, inside, ROW_STRIDE, WIDE, TAIL, HEAD_SIZE),
        )
    return head


@triton.jit
def load_numbers(pointer, rows, inside, other):
    """One number for each row, `other` where not `inside` (None = all are)."""
    if inside is None:
        numbers = tl.load(pointer + rows)
    else:
        numbers = tl.load(pointer + rows, mask=inside, other=other)
    return numbers


@triton.jit
def _store_part(pointer, tile, rows, inside, ROW_STRIDE: tl.constexpr, FIRST: tl.constexpr, HEAD_SIZE: tl.constexpr):
    columns = FIRST + tl.arange(0, tile.shape[1])
    pointers = pointer + rows[:, None] * ROW_STRIDE + columns[None, :]
    mask = inside[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_head(
    pointer, head, rows, inside, ROW_STRIDE: tl.constexpr, HEAD_SIZE: tl.constexpr, WITH_PADDING: tl.constexpr = False
):
    """Writes a head tile in the pointer's dtype, as `load_head` reads it."""
    WIDE: tl.constexpr = wide_of(HEAD_SIZE)
    TAIL: tl.constexpr = tail_of(HEAD_SIZE)
    if WITH_PADDING:
        _store_part(pointer[0], head[0], rows, inside, WIDE, 0, WIDE)
        _store_part(pointer[1], head[1], rows, inside, TAIL, 0, TAIL)
    else:
        _store_part(pointer, head[0], rows, inside, ROW_STRIDE, 0, HEAD_SIZE)
        _store_part(pointer, head[1], rows, inside, ROW_STRIDE, WIDE, HEAD_SIZE)


@triton.jit
def mark_column(COLUMN: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """True in one column of the tail, counted from the start of the head: [1, tail]."""
    return (wide_of(HEAD_SIZE) + tl.arange(0, tail_of(HEAD_SIZE)) == COLUMN)[None, :]


@triton.jit
def set_column(head, marked, values):
    """A head tile with `values` where its tail is `marked`."""
    return head[0], tl.where(marked, values, head[1]).to(head[1].dtype)


@triton.jit
def get_column(head, marked):
    """The column of a head tile [m, D] whose place in the tail is `marked`: [m]."""
    return tl.sum(tl.where(marked, head[1], 0.0), axis=1)


@triton.jit
def append_factors(head, HEAD_SIZE: tl.constexpr):
    """A head tile with `PART_FACTORS` in the columns behind it, which take what `append_number` puts there."""
    for part in tl.static_range(number_of_parts()):
        head = set_column(head, mark_column(number_column(HEAD_SIZE) + part, HEAD_SIZE), factor_of(part))
    return head


@triton.jit
def append_number(head, numbers, HEAD_SIZE: tl.constexpr):
    """A head tile with a float32 number for each row [m] behind it, in parts of its dtype that add up to it.

    Each part counts its factor times. The numbers must be less than 2^31 in rows of float16.
    """
    for part in tl.static_range(number_of_parts()):
        rounded = (numbers * (1.0 / factor_of(part))).to(head[1].dtype)
        head = set_column(head, mark_column(number_column(HEAD_SIZE) + part, HEAD_SIZE), rounded[:, None])
        numbers -= rounded.to(tl.float32) * factor_of(part)
    return head


@triton.jit
def load_tile(tiles, HEADS: tl.constexpr, AGAIN: tl.constexpr = False):
    """What this program computes: one head of one tile of `tables.row_tiles`; heads run fastest.

    AGAIN is as in `load_weight_product`.

    Returns:
        (head, first token of the sequence (int64), its length, the tile's first row in it).
    """
    HINT: tl.constexpr = ".ca" if AGAIN else ""
    program = tl.program_id(0).to(tl.int64)
    tile = tiles + program // HEADS * 4
    first_token = tl.load(tile, cache_modifier=HINT).to(tl.int64)
    length = tl.load(tile + 1, cache_modifier=HINT)
    first_row = tl.load(tile + 2, cache_modifier=HINT)
    return program % HEADS, first_token, length, first_row


@triton.jit
def load_weight(pointer, HEAD_SIZE: tl.constexpr):
    """A vector [D] as a pair of float32 rows [1, wide], [1, tail] that broadcasts against a head tile; padding is 0."""
    wide = tl.arange(0, wide_of(HEAD_SIZE))
    tail = wide_of(HEAD_SIZE) + tl.arange(0, tail_of(HEAD_SIZE))
    return (
        tl.load(pointer + wide, mask=wide < HEAD_SIZE, other=0.0).to(tl.float32)[None, :],
        tl.load(pointer + tail, mask=tail < HEAD_SIZE, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def load_weight_product(left, right, HEAD_SIZE: tl.constexpr, AGAIN: tl.constexpr = False):
    """left · right of two vectors [D], as `load_weight` gives one.

    A kernel that needs it before and after its loop reads it AGAIN: with another (equivalent) cache hint, so that the
    compiler does not keep the first copy in registers meanwhile.
    """
    HINT: tl.constexpr = ".ca" if AGAIN else ""
    wide = tl.arange(0, wide_of(HEAD_SIZE))
    tail = wide_of(HEAD_SIZE) + tl.arange(0, tail_of(HEAD_SIZE))
    product_wide = tl.load(left + wide, mask=wide < HEAD_SIZE, other=0.0, cache_modifier=HINT).to(tl.float32)
    product_tail = tl.load(left + tail, mask=tail < HEAD_SIZE, other=0.0, cache_modifier=HINT).to(tl.float32)
    product_wide *= tl.load(right + wide, mask=wide < HEAD_SIZE, other=0.0, cache_modifier=HINT).to(tl.float32)
    product_tail *= tl.load(right + tail, mask=tail < HEAD_SIZE, other=0.0, cache_modifier=HINT).to(tl.float32)
    return product_wide[None, :], product_tail[None, :]


@triton.jit
def store_vector(pointer, vector, HEAD_SIZE: tl.constexpr):
    """Writes a pair of vectors [wide], [tail] to `pointer` [D]."""
    wide = tl.arange(0, wide_of(HEAD_SIZE))
    tail = wide_of(HEAD_SIZE) + tl.arange(0, tail_of(HEAD_SIZE))
    tl.store(pointer + wide, vector[0], mask=wide < HEAD_SIZE)
    tl.store(pointer + tail, vector[1], mask=tail < HEAD_SIZE)


@triton.jit
def column_sums(head, inside=None):
    """The sum of a head tile's rows [m, D], of those `inside` where that is given: a pair of vectors [wide], [tail]."""
    if inside is None:
        sums = tl.sum(head[0], axis=0), tl.sum(head[1], axis=0)
    else:
        wide = tl.sum(tl.where(inside[:, None], head[0], 0.0), axis=0)
        sums = wide, tl.sum(tl.where(inside[:, None], head[1], 0.0), axis=0)
    return sums


@triton.jit
def store_column_sums(partials, head, inside, HEAD_SIZE: tl.constexpr):
    """Writes the sum of the rows of a head tile that are `inside` (None = all are) to this program's row of `partials`,
    [programs, D].
    """
    sums = column_sums(head, inside)
    store_vector(partials + tl.program_id(0).to(tl.int64) * HEAD_SIZE, sums, HEAD_SIZE)


@triton.jit
def zero_head(ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Sums to start from: a float32 head tile [ROWS, D]."""
    return (
        tl.zeros([ROWS, wide_of(HEAD_SIZE)], tl.float32),
        tl.zeros([ROWS, tail_of(HEAD_SIZE)], tl.float32),
    )


@triton.jit
def to_float32(head):
    return head[0].to(tl.float32), head[1].to(tl.float32)


@triton.jit
def to_dtype(head, dtype: tl.constexpr):
    return head[0].to(dtype), head[1].to(dtype)


@triton.jit
def multiply(left, right):
    """Products of two pairs: head tiles [m, D], or a head tile and a weight [1, D]."""
    return left[0] * right[0], left[1] * right[1]


@triton.jit
def row_products(left, right):
    """Σ left · right over the columns of each row of two head tiles [m, D] of any dtypes: float32 [m]."""
    products = multiply(to_float32(left), to_float32(right))
    return tl.sum(products[0], axis=1) + tl.sum(products[1], axis=1)


@triton.jit
def scale_head(head, factor):
    """A head tile times a number, or [m, 1]."""
    return head[0] * factor, head[1] * factor


@triton.jit
def scale_rows(head, factors):
    """Row i of a head tile times factors[i]."""
    return head[0] * factors[:, None], head[1] * factors[:, None]


@triton.jit
def hand_over(factors):
    """The same numbers [m] as a value whose place in the threads the compiler chooses anew.

    The rows of the wide tile lie in other threads than those of the tail. Numbers made from both tiles, such as a
    norm, would tie them together, and the compiler would move a whole tile through shared memory to where the other
    lies; handing over m numbers is all it takes [compiled: 223 registers for the temporal backward of 64 rows, and
    255 with 216 bytes of spills without this].
    """
    return tl.gather(factors, tl.arange(0, factors.shape[0]), axis=0)


@triton.jit
def scale_rows_apart(head, factors):
    """`scale_rows` for factors [m] that were made from both tiles."""
    return head[0] * hand_over(factors)[:, None], head[1] * factors[:, None]


@triton.jit
def fold_query(q, factors, weight):
    """q · factors (rows [m]) · weight (columns [1, D]), rounded once to q's dtype; the same bits in every kernel.

    Without `hand_over` the compiler computes it in the layout of each matrix product that takes it, twice.
    """
    dtype: tl.constexpr = q[0].dtype
    return to_dtype(multiply(scale_rows(to_float32(q), hand_over(factors)), weight), dtype)


@triton.jit
def dot_rows(left, right):
    """left · rightᵀ of head tiles [m, D], [n, D] → float32 [m, n]."""
    product = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    return tl.dot(left[1], tl.trans(right[1]), product, input_precision="ieee")


@triton.jit
def add_product(sums, matrix, head):
    """sums + matrix · head: float32 head tile [m, D], matrix [m, n] in the head's dtype, head tile [n, D]."""
    return (
        tl.dot(matrix, head[0], sums[0], input_precision="ieee"),
        tl.dot(matrix, head[1], sums[1], input_precision="ieee"),
    )


@triton.jit
def settle(sums):
    """The sums unchanged; makes the compiler wait for the matrix products of a loop's step at the end of that step.

    Products left in flight into the next step make ptxas run all matrix instructions of the loop one by one (its
    message C7515). Adding zero to the smaller part is the cheapest use of them that is not optimized away.
    """
    return sums[0], sums[1] + 0.0


@triton.jit
def reciprocal_rms(head, eps, HEAD_SIZE: tl.constexpr):
    """1 / sqrt(mean(z²) + eps) of each row z of a head tile, float32 [m]."""
    wide, tail = to_float32(head)
    squares = tl.sum(wide * wide, axis=1) + tl.sum(tail * tail, axis=1)
    return tl.rsqrt(squares / HEAD_SIZE + eps)


@triton.jit
def rms_norm_gradient(gradient, normed, reciprocal, HEAD_SIZE: tl.constexpr):
    """Gradient of z from that of normed = z · reciprocal_rms(z): (g - normed · mean(g · normed)) · reciprocal.

    Head tiles float32 [m, D]; `reciprocal` [m].
    """
    wide = hand_over(tl.sum(gradient[0] * normed[0], axis=1))
    along = (wide + tl.sum(gradient[1] * normed[1], axis=1)) / HEAD_SIZE
    part = scale_rows_apart(normed, along)
    return scale_rows((gradient[0] - part[0], gradient[1] - part[1]), reciprocal)
