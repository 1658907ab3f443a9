"""The inner loops of attention over one head: forward, gradient of the queries, gradient of keys and values.

Scores are in base 2: a score is log2(e) · logit, so that exp2 makes the probability. Streamed tiles go to the matrix
units as they lie in memory. Without QK-norm the scale is a factor in the exponent. With it, all factors of a query are
folded into the query, rounded once, and a key is either normed in memory or its reciprocal RMS is a factor on its
scores: all three loops then multiply the very same operands, so that the probabilities of the backward pass sum to one
however large the logits are.
The rows beyond a whole number of steps come first, in `key_gradient` when they are asked for, masked, in steps of
REMAINDER; whole steps of STEP need no mask.

Letters: m rows that stay, n rows of one step, D head size. A head tile [m, D] is a pair, see tiles. Pointers
to streamed rows are those of `load_head` to the first row of the sequence, those to their numbers (one for each row,
float32) point to that of the first row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    add_product,
    carries_number,
    dot_rows,
    get_column,
    has_padding,
    load_head,
    load_numbers,
    mark_column,
    number_column,
    ones_column,
    reciprocal_rms,
    row_width,
    scale_head,
    scale_rows_apart,
    set_column,
    settle,
    zero_head,
)

# How keys are normed.
NO_NORM = tl.constexpr(0)
NORM_COMPUTED = tl.constexpr(1)  # by a factor found from the tile at hand; it is kept where `keep_factors` is true
NORM_LOADED = tl.constexpr(2)  # by a factor from memory
NORM_DONE = tl.constexpr(3)  # already, in memory


@triton.constexpr_function
def is_folded(norm, head_size):
    """True where a score minus the log-sum of its query is one product in the backward pass.

    Padded rows (see `tiles.row_width`) of queries, output gradients, normed keys and values carry a number
    beside their head then: minus the log-sum, minus delta, and the factors of its parts.
    """
    return norm == NORM_DONE.value and carries_number(head_size)


@triton.jit
def attend(
    q,
    keys,
    values,
    key_factors,
    keep_factors,
    length,
    eps,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BOUNDED: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """softmax of SCALE · q · (normed) kᵀ in base 2, times v, for the queries q [m, D] over `length` keys.

    BOUNDED promises that exp2(score) neither overflows nor vanishes, so that no maximum is subtracted. Where
    `is_folded`, keys and values are padded rows with factors, and q has zeros in its padding.

    Returns:
        (output float32 head tile [m, D], log2 of the sum of exp2(scores) [m]); zeros where length is 0.
    """
    FOLDED: tl.constexpr = is_folded(NORM, HEAD_SIZE)
    ROWS: tl.constexpr = q[0].shape[0]
    sums = zero_head(ROWS, HEAD_SIZE)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], 0.0 if BOUNDED else -1e30, tl.float32)  # finite: exp2(-inf - row_max) is then zero
    # A column of ones in the padding of V: the matrix units sum the probabilities, rounded as the output sees them.
    ONES: tl.constexpr = number_column(HEAD_SIZE) + ones_column() if FOLDED else row_width(HEAD_SIZE) - 1
    in_ones = mark_column(ONES, HEAD_SIZE)
    whole = length // STEP * STEP
    for masked in tl.static_range(1, -1, -1):
        begin = whole if masked else 0
        end = length if masked else whole
        for start in tl.range(begin, end, REMAINDER if masked else STEP, num_stages=1 if masked else None):
            rows = start + tl.arange(0, REMAINDER if masked else STEP)
            inside = rows < end if masked else None
            k = load_head(keys, rows, inside, KEY_STRIDE, HEAD_SIZE, FOLDED)  # [n, D]
            v = load_head(values, rows, inside, VALUE_STRIDE, HEAD_SIZE, FOLDED)  # [n, D]
            scores = dot_rows(q, k)  # [m, n]
            if NORM == NORM_COMPUTED:
                factors = reciprocal_rms(k, eps, HEAD_SIZE)  # [n]
                if keep_factors:
                    tl.store(key_factors + rows, factors, mask=inside)
                scores *= factors[None, :]
            if masked and (not BOUNDED or not has_padding(HEAD_SIZE)):
                scores = tl.where(inside[None, :], scores, float("-inf"))
            if BOUNDED:
                probabilities = tl.exp2(scores * SCALE)
            else:
                new_max = tl.maximum(row_max, tl.max(scores, axis=1) * SCALE)
                rescale = tl.exp2(row_max - new_max)
                probabilities = tl.exp2(scores * SCALE - new_max[:, None])
                row_max = new_max
                row_sum *= rescale
                sums = sums[0] * rescale[:, None], sums[1] * rescale[:, None]
            # Rows beyond the end have zeros in the column of ones as well, so bounded scores need no mask.
            if has_padding(HEAD_SIZE) and not FOLDED:
                ones = in_ones & inside[:, None] if masked else in_ones
                v = set_column(v, ones, 1.0)
            if not has_padding(HEAD_SIZE):
                row_sum += tl.sum(probabilities, axis=1)
            sums = add_product(sums, probabilities.to(v[0].dtype), v)
    if has_padding(HEAD_SIZE):
        row_sum = get_column(sums, in_ones)
    some = row_sum != 0  # true of NaN, too
    row_sum = tl.where(some, row_sum, 1.0)  # without keys the sums are zero, and so is the output
    return scale_head(sums, 1.0 / row_sum[:, None]), tl.where(some, row_max, 0.0) + tl.log2(row_sum)


@triton.jit
def query_gradient(
    q,
    gradient,
    log_sum,
    delta,
    keys,
    values,
    key_factors,
    length,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CENTERED: tl.constexpr = False,
):
    """Σ over `length` keys of logit gradient · (normed) key: float32 head tile [m, D] for the queries q [m, D].

    `gradient` is that of the output, `delta` [m] its product with the output. `log_sum` [m] must be +inf for rows
    outside the sequence: their probabilities are then zero. Where `is_folded`, q carries minus it, `gradient` minus
    delta, keys and values the factors, and rows outside need a gradient and a delta of zero.

    Returns:
        (the gradient, the sum of the gradients of each query's logits [m], zero if it is not CENTERED: see `center`).
    """
    FOLDED: tl.constexpr = is_folded(NORM, HEAD_SIZE)
    ROWS: tl.constexpr = q[0].shape[0]
    sums = zero_head(ROWS, HEAD_SIZE)
    row_sums = tl.zeros([ROWS], tl.float32)
    whole = length // STEP * STEP
    for masked in tl.static_range(1, -1, -1):
        begin = whole if masked else 0
        end = length if masked else whole
        for start in tl.range(begin, end, REMAINDER if masked else STEP, num_stages=1 if masked else None):
            rows = start + tl.arange(0, REMAINDER if masked else STEP)
            inside = rows < end if masked else None
            k = load_head(keys, rows, inside, KEY_STRIDE, HEAD_SIZE, FOLDED)  # [n, D]
            v = load_head(values, rows, inside, VALUE_STRIDE, HEAD_SIZE, FOLDED)  # [n, D]
            scores = dot_rows(q, k)  # [m, n]
            if NORM == NORM_LOADED:
                factors = load_numbers(key_factors, rows, inside, 0.0)[None, :]
                scores *= factors
            if not FOLDED:
                scores = scores * SCALE - log_sum[:, None]
            if masked:
                scores = tl.where(inside[None, :], scores, float("-inf"))
            score_gradient = dot_rows(gradient, v)  # [m, n]
            if not FOLDED:
                score_gradient -= delta[:, None]
            score_gradient *= tl.exp2(scores)
            if CENTERED and not FOLDED:
                row_sums += tl.sum(score_gradient, axis=1)
            if NORM == NORM_LOADED:
                score_gradient *= factors
            sums = settle(add_product(sums, score_gradient.to(k[0].dtype), k))
    if CENTERED and FOLDED:  # beside each key is a one
        row_sums = get_column(sums, mark_column(number_column(HEAD_SIZE) + ones_column(), HEAD_SIZE))
    return sums, row_sums


@triton.jit
def center(
    sums,
    row_sums,
    keys,
    key_factors,
    length,
    STEP: tl.constexpr,
    NORM: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """What `query_gradient` returns, less its `row_sums` times a mean of the first STEP keys.

    The gradients of a query's logits sum to zero, but for the rounding of the output in `delta`. What is left of the
    sum is times a mean of keys in the result: more than the result itself where keys, and values, are much alike.
    Added to `delta`, the sum makes it that of the output before it was rounded.

    The mean is a product with ones: a sum of columns would go through shared memory, between barriers. `row_sums` are
    no factor of that product: small ones would vanish in float16.
    """
    FOLDED: tl.constexpr = is_folded(NORM, HEAD_SIZE)
    ROWS: tl.constexpr = row_sums.shape[0]
    rows = tl.arange(0, STEP)
    inside = rows < length
    k = load_head(keys, rows, inside, KEY_STRIDE, HEAD_SIZE, FOLDED)  # [n, D]
    total = add_product(zero_head(ROWS, HEAD_SIZE), tl.full([ROWS, STEP], 1.0, k[0].dtype), k)  # [m, D]
    if NORM == NORM_LOADED:  # Σ key = Σ RMS · normed key: a mean weighted by the RMS
        weight = tl.sum(1.0 / load_numbers(key_factors, rows, inside, float("inf")), axis=0)
    else:
        weight = tl.minimum(length, STEP)
    part = scale_rows_apart(total, row_sums / weight)
    return sums[0] - part[0], sums[1] - part[1]


@triton.jit
def key_gradient(
    sums,
    k,
    v,
    key_factors,
    queries,
    gradients,
    log_sums,
    deltas,
    length,
    REST: tl.constexpr,
    STEP: tl.constexpr,
    REMAINDER: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    GRADIENT_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Adds to `sums` those over `length` queries for the keys k [m, D]; `key_factors` [m]: their reciprocal RMS.

    The queries are those in whole steps, or with REST those that are left. What a kernel reads in between for use
    behind both arrives during the second, and what it computes from it and the sums stays in the layout of products.
    Where `is_folded`, queries and gradients carry minus log-sum and minus delta, k and v carry the factors.

    Returns:
        (Σ logit gradient · query, Σ probability · output gradient), float32 head tiles [m, D]; the queries as given.
    """
    FOLDED: tl.constexpr = is_folded(NORM, HEAD_SIZE)
    key_sums, value_sums = sums
    whole = length // STEP * STEP
    begin = whole if REST else 0
    end = length if REST else whole
    for start in tl.range(begin, end, REMAINDER if REST else STEP, num_stages=1 if REST else None):
        rows = start + tl.arange(0, REMAINDER if REST else STEP)
        inside = rows < end if REST else None
        q = load_head(queries, rows, inside, QUERY_STRIDE, HEAD_SIZE, FOLDED)  # [n, D]
        gradient = load_head(gradients, rows, inside, GRADIENT_STRIDE, HEAD_SIZE, FOLDED)  # [n, D]
        scores = dot_rows(k, q)  # [m, n]: transposed, keys are the rows
        if NORM == NORM_LOADED:
            scores *= key_factors[:, None]
        if not FOLDED:
            log_sum = load_numbers(log_sums, rows, inside, float("inf"))[None, :]  # beyond the end: p = 0
            scores = scores * SCALE - log_sum
        elif REST:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        score_gradient = dot_rows(v, gradient)  # [m, n]
        probabilities = tl.exp2(scores)
        if not FOLDED:
            score_gradient -= load_numbers(deltas, rows, inside, 0.0)[None, :]
        score_gradient *= probabilities
        value_sums = add_product(value_sums, probabilities.to(gradient[0].dtype), gradient)
        key_sums = settle(add_product(key_sums, score_gradient.to(q[0].dtype), q))
    return key_sums, value_sums
