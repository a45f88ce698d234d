"""Counter-based dropout: the mask of an element is a function of (seed, element) alone.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch
integer arithmetic, bit for bit what Triton's ``tl.philox`` and ``tl.rand`` give, so that a kernel
that regenerates its mask in the backward pass agrees with this file.

How elements are numbered (the first output word of Philox decides; the 64-bit seed is the key):

- hidden dropout: ``tl.rand(seed, token * hidden_size + channel)``, token counted over the ragged
  batch; counter words ``(offset & 0xffffffff, offset >> 32, 0, 0)``.
- attention dropout: counter words ``(key, query, head, 1)``: key counted within its sequence,
  query over the ragged batch. Width, `max_seqlen` and padding do not enter, and the last word
  keeps the two kinds apart under one seed.

An element is kept where the uniform number is greater than the probability of dropping it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
# The largest float32 that keeps (2**31 - 1) * scale below 1, as in Triton.
_UNIFORM_SCALE = 4.6566127342e-10
_BLOCK = 1 << 15


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps, so all 64 bits are there."""
    product = word * constant
    return (product >> 32) & _MASK_32, product & _MASK_32


def philox(
    seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 of broadcastable counter words.

    Args:
        seed: 64-bit key, low word first; in [0, 2**63).
        counter: Four words, int64 tensors with values in [0, 2**32).

    Returns:
        Four words, int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK_32, seed >> 32
    for _ in range(10):
        high_b, low_b = _multiply(_ROUND_B, c2)
        high_a, low_a = _multiply(_ROUND_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK_32, (k1 + _KEY_B) & _MASK_32
    return c0, c1, c2, c3


def _first_word(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    words = torch.empty(shape, dtype=torch.int64, device=c0.device)
    counter = [c.reshape((1,) * (len(shape) - c.dim()) + tuple(c.shape)) for c in (c0, c1, c2, c3)]
    # Blocks that stay in a core's cache through the ten rounds.
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        block = slice(start, start + rows)
        b0, b1, b2, b3 = (c if c.shape[0] == 1 else c[block] for c in counter)
        words[block] = philox(seed, (b0, b1, b2, b3))[0]
    return words


def _first_word_fake(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    return torch.empty(shape, dtype=torch.int64, device=c0.device)


# One op to tracers: Inductor would inline each round into the next, four times over.
torch.library.define(
    "dynabert::philox_word",
    "(SymInt seed, Tensor c0, Tensor c1, Tensor c2, Tensor c3) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("dynabert::philox_word", "default", _first_word)
torch.library.register_fake("dynabert::philox_word", _first_word_fake)


def uniform(word: Tensor) -> Tensor:
    """A 32-bit word as a float32 in [0, 1), the way ``tl.rand`` does it."""
    signed = torch.where(word > 0x7FFFFFFF, _MASK_32 - word, word)
    return signed.to(torch.float32) * _UNIFORM_SCALE


def rand(seed: int, offset: Tensor) -> Tensor:
    """The uniform numbers of ``tl.rand(seed, offset)``, float32, shape of `offset` (int64)."""
    zero = torch.zeros((), dtype=torch.int64, device=offset.device)
    low, high = offset & _MASK_32, (offset >> 32) & _MASK_32
    return uniform(torch.ops.dynabert.philox_word(seed, low, high, zero, zero))


def hidden_uniform(seed: int, tokens: Tensor, hidden_size: int) -> Tensor:
    """Uniform numbers of the hidden dropout of some tokens, ``[len(tokens), hidden_size]``.

    Args:
        seed: See `philox`.
        tokens: Position of each token in the ragged batch, ``[n]``, int64.
        hidden_size: Channels of a token.
    """
    channels = torch.arange(hidden_size, device=tokens.device)
    return rand(seed, tokens[:, None] * hidden_size + channels)


def attention_uniform(seed: int, queries: Tensor, num_heads: int, num_keys: int) -> Tensor:
    """Uniform numbers of the attention dropout, ``[batch, num_heads, queries, num_keys]``.

    Args:
        seed: See `philox`.
        queries: Position of each query in the ragged batch, ``[batch, queries]``, int64; any
            value at padding.
        num_heads: Heads, a prefix.
        num_keys: Keys, counted within the sequence.
    """
    device = queries.device
    key = torch.arange(num_keys, device=device)
    head = torch.arange(num_heads, device=device)[:, None, None]
    stream = torch.ones((), dtype=torch.int64, device=device)
    query = queries[:, None, :, None]
    return uniform(torch.ops.dynabert.philox_word(seed, key, query, head, stream))


def unseeded(values: Tensor, dropout_p: float) -> Tensor:
    """Dropout with numbers from torch's own generator.

    On the CPU 16 bits decide about an element, a quarter of what PyTorch draws and several times as
    fast; the probability is then `dropout_p` to within 2**-17, and the scale is that of the
    probability in effect.
    """
    if dropout_p == 0:
        return values
    if values.device.type != "cpu" or dropout_p == 1 or torch.compiler.is_compiling():
        return F.dropout(values, dropout_p)
    count = values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[:count].view(values.shape)  # uniform in -2**15 to 2**15 - 1
    num_dropped = round(dropout_p * 2**16)
    kept = (numbers >= num_dropped - 2**15).to(values.dtype)
    return values * kept * (2**16 / (2**16 - num_dropped))


def apply_mask(values: Tensor, numbers: Tensor, dropout_p: float) -> Tensor:
    """Drop `values` where `numbers` do not exceed `dropout_p`, and rescale the rest."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    return torch.where(numbers > dropout_p, values / (1.0 - dropout_p), zero)
