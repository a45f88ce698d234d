"""Which elements dropout keeps, as Triton device code; `dynabert_kernels.dropout` defines it."""

import triton
import triton.language as tl


@triton.jit
def keeps_hidden(seed, tokens, channels, hidden_size, dropout_p):
    """What the hidden dropout keeps of a tile, bool ``[tokens, channels]``.

    Args:
        seed: int64, not negative.
        tokens: Positions in the ragged batch, ``[tokens]``.
        channels: ``[channels]``.
        hidden_size: Channels of a token.
        dropout_p: float32.
    """
    offsets = tokens.to(tl.int64)[:, None] * hidden_size + channels[None, :]
    return tl.rand(seed, offsets) > dropout_p


@triton.jit
def keeps_attention(seed, queries, keys, head, dropout_p):
    """What the attention dropout keeps of a tile, bool, shape of `queries` and `keys` broadcast.

    Args:
        seed: int64, not negative.
        queries: Positions in the ragged batch, int32.
        keys: Positions in their sequence, int32.
        head: Number of the head.
        dropout_p: float32.
    """
    zero = queries * 0 + keys * 0
    first, _, _, _ = tl.philox(
        seed,
        (zero + keys).to(tl.uint32),
        (zero + queries).to(tl.uint32),
        (zero + head).to(tl.uint32),
        (zero + 1).to(tl.uint32),
    )
    return tl.uint_to_uniform_float(first) > dropout_p
