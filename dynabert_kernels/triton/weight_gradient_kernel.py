"""The gradient of an elastic weight: one full-size tensor for tokens of every width.

Letters: T tokens, N elastic outputs, C channels. ``out[n, c]`` is the sum of ``rows[t, n] *
inputs[t, c]`` over the tokens t whose width reaches row n.

The tokens are cut into steps of BLOCK_T rows of one width, widest first, so those that reach a
block of N are a prefix of the list. All (block, step) pairs in a row are the work; it is dealt out
in equal shares. A share belongs to a group of programs, one for each block of C: they go through
the same tokens together, and `rows` come from memory once. A group that does not see all steps of
a block leaves float32 partial sums, which a second kernel adds in the order of the groups.
"""

import triton
import triton.language as tl

# Numbers the plan holds for each block of N; see `plan_steps_kernel`.
_COUNTS = tl.constexpr(4)


@triton.jit(do_not_specialize=["num_tiles", "unit", "num_steps"])
def plan_steps_kernel(
    table_ptr,  # tiles [num_tiles, 3]: first token, end, width; widest first
    steps_ptr,  # [2, num_steps, 3]: first token, end, reach; whole steps, then those cut short
    counts_ptr,  # [NUM_BLOCKS_N + 1, 4]
    num_tiles,
    unit,
    num_steps,
    N,
    STEPS_OF_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_BLOCKS_N: tl.constexpr,  # a power of two
    CHUNK: tl.constexpr,
):
    """One program lists the steps of all tiles and counts them for each block of N. Grid: (1,).

    The counts of a block: whole steps that reach all of it, whole steps that reach any of it, all
    steps that reach any of it, and what the blocks before have of the last.
    """
    blocks = tl.arange(0, NUM_BLOCKS_N)
    low = blocks * BLOCK_N
    high = tl.minimum(low + BLOCK_N, N)
    covering = tl.zeros((NUM_BLOCKS_N,), dtype=tl.int32)
    whole_reaching = tl.zeros((NUM_BLOCKS_N,), dtype=tl.int32)
    reaching = tl.zeros((NUM_BLOCKS_N,), dtype=tl.int32)
    num_whole = 0
    num_short = 0
    for start in range(0, num_steps, CHUNK):
        entries = start + tl.arange(0, CHUNK)
        tiles = table_ptr + entries // STEPS_OF_TILE * 3
        mask = entries < num_tiles * STEPS_OF_TILE
        first = tl.load(tiles, mask=mask, other=0) + entries % STEPS_OF_TILE * BLOCK_T
        tile_end = tl.load(tiles + 1, mask=mask, other=0)
        reach = tl.load(tiles + 2, mask=mask, other=0) * unit
        end = tl.minimum(first + BLOCK_T, tile_end)
        whole = end == first + BLOCK_T
        short = (end > first) & (end < first + BLOCK_T)
        whole_place = num_whole + tl.cumsum(whole.to(tl.int32), 0) - 1
        short_place = num_steps + num_short + tl.cumsum(short.to(tl.int32), 0) - 1
        place = steps_ptr + tl.where(whole, whole_place, short_place) * 3
        listed = whole | short
        tl.store(place, first, mask=listed)
        tl.store(place + 1, end, mask=listed)
        tl.store(place + 2, reach, mask=listed)
        num_whole += tl.sum(whole.to(tl.int32), 0)
        num_short += tl.sum(short.to(tl.int32), 0)

        covers = whole[None, :] & (reach[None, :] >= high[:, None])
        reaches = listed[None, :] & (reach[None, :] > low[:, None])
        covering += tl.sum(covers.to(tl.int32), 1)
        reaching += tl.sum(reaches.to(tl.int32), 1)
        whole_reaching += tl.sum((reaches & whole[None, :]).to(tl.int32), 1)
    used = low < N
    reaching = tl.where(used, reaching, 0)
    counts = counts_ptr + blocks * _COUNTS
    tl.store(counts, covering)
    tl.store(counts + 1, whole_reaching)
    tl.store(counts + 2, reaching)
    tl.store(counts + 3, tl.cumsum(reaching, 0) - reaching)
    tl.store(counts_ptr + NUM_BLOCKS_N * _COUNTS + 3, tl.sum(reaching, 0))


@triton.jit
def _total_work(counts_ptr, steps, blocks, RAGGED: tl.constexpr, NUM_BLOCKS_N: tl.constexpr):
    if RAGGED:
        return tl.load(counts_ptr + NUM_BLOCKS_N * _COUNTS + 3)
    return steps * blocks


@triton.jit
def _first_of_share(share, work, num_shares):
    """First of all (block, step) pairs in a share."""
    return (share.to(tl.int64) * work // num_shares).to(tl.int32)


@triton.jit
def _share_of(pair, work, num_shares):
    """The share that a (block, step) pair is in."""
    return (((pair + 1).to(tl.int64) * num_shares - 1) // work).to(tl.int32)


@triton.jit
def _whole_step(steps_ptr, step, RAGGED: tl.constexpr, BLOCK_T: tl.constexpr):
    """First token of a step that needs no mask."""
    if RAGGED:
        return tl.load(steps_ptr + step * 3)
    return step * BLOCK_T


@triton.jit
def _first_as_wide(steps_ptr, begin, last, reach):
    """First of the steps from `begin` to `last` that reach no further than `reach`, as `last` does.

    Widest first, so halving finds it.
    """
    low = begin
    high = last
    while low < high:
        middle = (low + high) // 2
        wider = tl.load(steps_ptr + middle * 3 + 2) > reach
        low = tl.where(wider, middle + 1, low)
        high = tl.where(wider, high, middle)
    return low


@triton.jit
def _add_whole_steps(
    acc,
    sums,
    rows_desc,
    inputs_desc,
    steps_ptr,
    begin,
    end,
    col_n,
    col_c,
    RAGGED: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # The place of a step is read one step early: read beside its tiles it would cost them a stage.
    token = _whole_step(steps_ptr, begin, RAGGED, BLOCK_T)
    for step in range(begin, end):
        rows = rows_desc.load([token, col_n])
        inputs = inputs_desc.load([token, col_c])
        acc = tl.dot(rows.T, inputs, acc, input_precision=INPUT_PRECISION)
        if SUM_ROWS:
            ones = tl.full((BLOCK_T, 16), 1.0, dtype=rows.dtype)
            sums = tl.dot(rows.T, ones, sums, input_precision=INPUT_PRECISION)
        token = _whole_step(steps_ptr, step + 1, RAGGED, BLOCK_T)
    return acc, sums


@triton.jit(do_not_specialize=["T", "steps", "blocks", "num_steps", "num_shares"])
def weight_gradient_kernel(
    rows_desc,  # [T, N] in tiles [BLOCK_T, BLOCK_N], with DESCRIPTORS
    inputs_desc,  # [T, C] in tiles [BLOCK_T, BLOCK_C], with DESCRIPTORS
    out_desc,  # [out_rows, C] in tiles [BLOCK_N, BLOCK_C], with DESCRIPTORS
    partial_desc,  # float32 [num_slots * BLOCK_N, C] in the same, with DESCRIPTORS
    rows_ptr,  # [T, N], rows stride_rows apart
    inputs_ptr,  # [T, C], rows stride_inputs apart
    out_ptr,  # [out_rows, C]
    partial_ptr,  # float32 [num_slots, BLOCK_N, C]
    bias_partial_ptr,  # float32 [num_slots, cdiv(C, BLOCK_C), BLOCK_N], with HAS_BIAS
    steps_ptr,  # see `plan_steps_kernel`, with RAGGED
    counts_ptr,  # see `plan_steps_kernel`, with RAGGED
    T,
    N,
    C,
    out_rows,
    stride_rows,
    stride_inputs,
    steps,  # of a block, blocks: without RAGGED
    blocks,
    num_steps,
    num_shares,
    RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_BLOCKS_N: tl.constexpr,
):
    """One program computes a block of C of one share. Grid: (num_shares * cdiv(C, BLOCK_C),).

    The first and the last block of a share may be shared with others; those between are its own.
    Slot ``share + n`` is for what a share adds to block n.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    share = tl.program_id(0) // blocks_c
    block_c = tl.program_id(0) % blocks_c
    work = _total_work(counts_ptr, steps, blocks, RAGGED, NUM_BLOCKS_N)
    num_shares = tl.minimum(num_shares, work)
    if share >= num_shares:
        return
    pair = _first_of_share(share, work, num_shares)
    end = _first_of_share(share + 1, work, num_shares)
    if RAGGED:
        every = tl.arange(0, NUM_BLOCKS_N)
        before = tl.load(counts_ptr + every * _COUNTS + 3)
        counted = tl.load(counts_ptr + every * _COUNTS + 2)
        n = tl.sum((before + counted <= pair).to(tl.int32), 0)
    else:
        n = pair // steps
    local_n = tl.arange(0, BLOCK_N)
    local_t = tl.arange(0, BLOCK_T)
    col_c = block_c * BLOCK_C
    cs = col_c + tl.arange(0, BLOCK_C)
    while pair < end:
        col_n = n * BLOCK_N
        ns = col_n + local_n
        if RAGGED:
            counts = counts_ptr + n * _COUNTS
            covering = tl.load(counts)
            whole_reaching = tl.load(counts + 1)
            reaching = tl.load(counts + 2)
            block_begin = tl.load(counts + 3)
        else:
            covering = steps
            whole_reaching = steps
            reaching = steps
            block_begin = n * steps
        step_begin = pair - block_begin
        step_end = tl.minimum(end - block_begin, reaching)
        acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        # For the bias, rows times ones. Each program of the share does it for a part of the steps.
        sums = tl.zeros((BLOCK_N, 16), dtype=tl.float32)
        if DESCRIPTORS:
            # Backwards, narrowest first: after each run of one width what it added past its reach,
            # which may be NaN, is cleared, and nothing wider has come yet.
            run_end = tl.minimum(step_end, whole_reaching)
            while run_end > step_begin:
                run_begin = step_begin
                reach = N
                if RAGGED:  # noqa: SIM102 (decided when compiling, the next when running)
                    if run_end > covering:
                        reach = tl.load(steps_ptr + (run_end - 1) * 3 + 2)
                        widest = tl.maximum(step_begin, covering)
                        run_begin = _first_as_wide(steps_ptr, widest, run_end - 1, reach)
                if HAS_BIAS:
                    length = run_end - run_begin
                    sums_begin = run_begin + length * block_c // blocks_c
                    sums_end = run_begin + length * (block_c + 1) // blocks_c
                    acc, sums = _add_whole_steps(
                        acc,
                        sums,
                        rows_desc,
                        inputs_desc,
                        steps_ptr,
                        run_begin,
                        sums_begin,
                        col_n,
                        col_c,
                        RAGGED,
                        False,
                        INPUT_PRECISION,
                        BLOCK_T,
                    )
                    acc, sums = _add_whole_steps(
                        acc,
                        sums,
                        rows_desc,
                        inputs_desc,
                        steps_ptr,
                        sums_begin,
                        sums_end,
                        col_n,
                        col_c,
                        RAGGED,
                        True,
                        INPUT_PRECISION,
                        BLOCK_T,
                    )
                    acc, sums = _add_whole_steps(
                        acc,
                        sums,
                        rows_desc,
                        inputs_desc,
                        steps_ptr,
                        sums_end,
                        run_end,
                        col_n,
                        col_c,
                        RAGGED,
                        False,
                        INPUT_PRECISION,
                        BLOCK_T,
                    )
                else:
                    acc, sums = _add_whole_steps(
                        acc,
                        sums,
                        rows_desc,
                        inputs_desc,
                        steps_ptr,
                        run_begin,
                        run_end,
                        col_n,
                        col_c,
                        RAGGED,
                        False,
                        INPUT_PRECISION,
                        BLOCK_T,
                    )
                if RAGGED:
                    acc = tl.where((ns < reach)[:, None], acc, 0.0)
                    if HAS_BIAS:
                        sums = tl.where((ns < reach)[:, None], sums, 0.0)
                run_end = run_begin

        if RAGGED or not DESCRIPTORS:
            masked_begin = step_begin
            if DESCRIPTORS:
                masked_begin = tl.maximum(step_begin, whole_reaching)
            for step in range(masked_begin, step_end):
                if RAGGED:
                    # The steps cut short have their own list.
                    listed = step + tl.where(step < whole_reaching, 0, num_steps - whole_reaching)
                    token = tl.load(steps_ptr + listed * 3)
                    token_end = tl.load(steps_ptr + listed * 3 + 1)
                    reach = tl.load(steps_ptr + listed * 3 + 2)
                else:
                    token = step * BLOCK_T
                    token_end = T
                    reach = N
                live = (token + local_t < token_end)[:, None]
                if DESCRIPTORS:
                    # What belongs to other steps, or to no token, may be NaN.
                    rows = rows_desc.load([token, col_n])
                    inputs = inputs_desc.load([token, col_c])
                    inputs = tl.where(live, inputs, 0.0)
                    rows = tl.where(live & (ns < reach)[None, :], rows, 0.0)
                else:
                    rows_tile = rows_ptr + tl.cast(token, tl.int64) * stride_rows
                    rows_at = local_t[:, None] * stride_rows + ns[None, :]
                    rows = tl.load(rows_tile + rows_at, mask=live & (ns < N)[None, :], other=0.0)
                    if RAGGED:
                        rows = tl.where((ns < reach)[None, :], rows, 0.0)
                    tile = inputs_ptr + tl.cast(token, tl.int64) * stride_inputs
                    inputs_at = local_t[:, None] * stride_inputs + cs[None, :]
                    inputs = tl.load(tile + inputs_at, mask=live & (cs < C)[None, :], other=0.0)
                acc = tl.dot(rows.T, inputs, acc, input_precision=INPUT_PRECISION)
                if HAS_BIAS:
                    ones = tl.full((BLOCK_T, 16), 1.0, dtype=rows.dtype)
                    more = tl.dot(rows.T, ones, sums, input_precision=INPUT_PRECISION)
                    sums = tl.where(step % blocks_c == block_c, more, sums)

        slot = share + n
        if (step_begin == 0) & (step_end == reaching):
            if DESCRIPTORS:
                out_desc.store([col_n, col_c], acc.to(out_desc.dtype))
            else:
                corner = out_ptr + tl.cast(col_n, tl.int64) * C
                at = local_n[:, None] * C + cs[None, :]
                stored = (ns < out_rows)[:, None] & (cs < C)[None, :]
                tl.store(corner + at, acc.to(out_ptr.dtype.element_ty), mask=stored)
        else:
            if DESCRIPTORS:
                partial_desc.store([slot * BLOCK_N, col_c], acc)
            else:
                partial_tile = partial_ptr + slot.to(tl.int64) * BLOCK_N * C
                partial_at = local_n[:, None] * C + cs[None, :]
                tl.store(partial_tile + partial_at, acc, mask=(cs < C)[None, :])
        if HAS_BIAS:
            part = bias_partial_ptr + (slot * blocks_c + block_c) * BLOCK_N
            tl.store(part + local_n, tl.sum(sums, axis=1) / 16)
        pair = block_begin + step_end
        n += 1


@triton.jit(do_not_specialize=["steps", "blocks", "blocks_c", "num_shares"])
def add_partial_blocks_kernel(
    out_ptr,  # [out_rows, C]
    bias_ptr,  # float32 [out_rows], with HAS_BIAS
    partial_ptr,  # float32 [num_slots, BLOCK_N, C]
    bias_partial_ptr,  # float32 [num_slots, blocks_c, BLOCK_N], with HAS_BIAS
    counts_ptr,  # see `plan_steps_kernel`, with RAGGED
    C,
    out_rows,
    steps,  # of a block, blocks: without RAGGED
    blocks,
    blocks_c,
    num_shares,
    RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_BLOCKS_N: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One program adds the partial sums of one tile, or clears it where no token reaches.

    Grid: (cdiv(out_rows, TILE_N), cdiv(C, TILE_C)); TILE_N divides BLOCK_N.
    """
    row = tl.program_id(0) * TILE_N
    n = row // BLOCK_N
    work = _total_work(counts_ptr, steps, blocks, RAGGED, NUM_BLOCKS_N)
    num_shares = tl.minimum(num_shares, work)
    if RAGGED:
        reaching = tl.load(counts_ptr + n * _COUNTS + 2)
        first_pair = tl.load(counts_ptr + n * _COUNTS + 3)
    else:
        reaching = tl.where(n < blocks, steps, 0)
        first_pair = n * steps
    first_share = 0
    last_share = -1
    if reaching > 0:
        first_share = _share_of(first_pair, work, num_shares)
        last_share = _share_of(first_pair + reaching - 1, work, num_shares)
    local_n = tl.arange(0, TILE_N)
    within = row - n * BLOCK_N
    if HAS_BIAS and tl.program_id(1) == 0:
        sums = tl.zeros((32, TILE_N), dtype=tl.float32)
        parts_end = (last_share + 1 + n) * blocks_c
        for begin in range((first_share + n) * blocks_c, parts_end, 32):
            parts = begin + tl.arange(0, 32)
            part_at = parts[:, None] * BLOCK_N + (within + local_n)[None, :]
            used_parts = (parts < parts_end)[:, None]
            sums += tl.load(bias_partial_ptr + part_at, mask=used_parts, other=0.0)
        tl.store(bias_ptr + row + local_n, tl.sum(sums, 0), mask=row + local_n < out_rows)
    if (first_share == last_share) & (reaching > 0):
        return
    cs = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    stored = (row + local_n < out_rows)[:, None] & (cs < C)[None, :]
    at = local_n[:, None] * C + cs[None, :]
    acc = tl.zeros((TILE_N, TILE_C), dtype=tl.float32)
    for begin in range(first_share, last_share + 1, 4):
        # Four loads in flight; the sums keep their order.
        for ahead in tl.static_range(4):
            slot = begin + ahead + n
            used = begin + ahead <= last_share
            corner = partial_ptr + (tl.cast(slot, tl.int64) * BLOCK_N + within) * C
            acc += tl.load(corner + at, mask=stored & used, other=0.0)
    out_corner = out_ptr + row.to(tl.int64) * C
    tl.store(out_corner + at, acc.to(out_ptr.dtype.element_ty), mask=stored)
