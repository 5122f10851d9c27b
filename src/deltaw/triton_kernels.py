"""The Triton kernels behind `fused.py`: imported on a GPU, when first needed."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Of a block of y: rows, columns, and how much of x's width it takes in at a time. Measured on an H200: two programs of this
# size on a processor, each waiting while the other works, are faster than one of twice the size.
ROWS, COLUMNS, DEPTH = 128, 128, 32
PROGRAMS = 2  # a processor


@triton.jit
def _two_products(
    x, w, p, q, bias, y, h,
    blocks, down, across,
    WIDTH: tl.constexpr, W_AS_STORED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, PROGRAMS: tl.constexpr,
):
    """Blocks of y, (ROWS, COLUMNS), each of one slot, and the rows of h beside it: one program makes several, in turn."""
    for block in tl.range(tl.program_id(0), blocks, PROGRAMS, flatten=True):  # the next one's loads begin before this ends
        # Blocks of the same rows follow each other: x comes from the cache.
        slot = block // (down * across)
        row, column = (block // across % down) * ROWS, (block % across) * COLUMNS
        sum_y = tl.zeros((ROWS, COLUMNS), tl.float32)
        sum_h = tl.zeros((ROWS, RANK), tl.float32)
        for at in range(0, WIDTH, DEPTH):
            x_part = x.load([slot, row, at]).reshape(ROWS, DEPTH)
            if W_AS_STORED:
                w_part = w.load([column, at]).T  # (DEPTH, COLUMNS)
            else:
                w_part = w.load([at, column])  # (DEPTH, COLUMNS)
            p_part = p.load([slot, 0, at]).reshape(RANK, DEPTH)
            sum_y = tl.dot(x_part, w_part, sum_y)
            sum_h = tl.dot(x_part, p_part.T, sum_h)
        q_part = q.load([slot, 0, column]).reshape(RANK, COLUMNS)
        h_part = sum_h.to(q_part.dtype)  # (ROWS, RANK)
        sum_y = tl.dot(h_part, q_part, sum_y)
        if HAS_BIAS:
            sum_y += bias.load([column])[None, :].to(tl.float32)
        y.store([slot, row, column], sum_y.to(q_part.dtype).reshape(1, ROWS, COLUMNS))
        h.store([slot, row, 0], h_part.reshape(1, ROWS, RANK))


def two_products(x: Tensor, w: Tensor, p: Tensor, q: Tensor, bias: Tensor | None, y: Tensor, h: Tensor) -> None:
    """Fill y and h; see `fused.two_products`. All but w are contiguous."""
    (slots, tokens, width), (rank, columns) = x.shape, q.shape[1:]
    as_stored = w.stride(-1) == 1
    down, across = triton.cdiv(tokens, ROWS), triton.cdiv(columns, COLUMNS)
    blocks = slots * down * across
    programs = min(blocks, PROGRAMS * _processors(x.device))
    read = TensorDescriptor.from_tensor
    _two_products[(programs,)](
        read(x, [1, ROWS, DEPTH]), read(w, [COLUMNS, DEPTH]) if as_stored else read(w.mT, [DEPTH, COLUMNS]),
        read(p, [1, rank, DEPTH]), read(q, [1, rank, COLUMNS]), None if bias is None else read(bias, [COLUMNS]),
        read(y, [1, ROWS, COLUMNS]), read(h, [1, ROWS, rank]), blocks, down, across,
        width, as_stored, bias is not None, ROWS, COLUMNS, DEPTH, rank, programs, num_warps=4, num_stages=4,
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _sum_over_tokens(
    h, x, out, tokens, columns, stretch,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Some columns of hᵀ x, (RANK, COLUMNS), of one slot, over one stretch of its tokens."""
    slot, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    column, r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(part * stretch, (part + 1) * stretch, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < tokens
        token = slot * tokens + row
        h_part = tl.load(h + token[:, None] * RANK + r[None, :], mask=inside[:, None], other=0.0)  # (ROWS, RANK)
        x_part = tl.load(x + token[:, None] * columns + column[None, :],
                         mask=inside[:, None] & (column < columns)[None, :], other=0.0)  # (ROWS, COLUMNS)
        total = tl.dot(tl.trans(x_part), h_part, total)
    place = (part * tl.num_programs(1) + slot) * RANK
    tl.store(out + (place + r[None, :]) * columns + column[:, None], total, mask=(column < columns)[:, None])


def sum_over_tokens(h: Tensor, x: Tensor) -> Tensor:
    """See `fused.sum_over_tokens`. Both are contiguous."""
    (slots, tokens, width), rank = x.shape, h.shape[-1]
    rows, columns = 128, 64
    across = triton.cdiv(width, columns)
    # Where slots and columns alone do not fill the GPU, several programs share the tokens.
    parts = max(1, min(triton.cdiv(tokens, rows), _processors(x.device) // (slots * across)))
    stretch = triton.cdiv(triton.cdiv(tokens, parts), rows) * rows
    parts = triton.cdiv(tokens, stretch)
    out = x.new_empty(parts, slots, rank, width, dtype=torch.float32)  # (parts, K, R, c)
    _sum_over_tokens[(across, slots, parts)](
        h, x, out, tokens, width, stretch, rank, rows, columns, num_warps=4, num_stages=3,
    )
    return out.sum(0) if parts > 1 else out[0]
