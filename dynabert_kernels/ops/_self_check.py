"""The GPU kernels against the reference on fresh random problems, within the tests' tolerance.

Only the device of a caller is used, none of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynabert_kernels import proof
from dynabert_kernels.layout import PackedAttention, PackedFFN
from dynabert_kernels.ops import _trust
from dynabert_kernels.ops._op import OPS
from dynabert_kernels.ops.embeddings import EmbeddingTables
from dynabert_kernels.proof import Path
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    random_attention,
    random_ffn,
    random_hidden,
    tensors_of,
)
from dynabert_kernels.varlen import offsets_of

_SEED = 2**40 + 7  # of dropout: both words of the counter are used


class Problem(NamedTuple):
    """Sizes of one comparison.

    Attributes:
        lengths: Of the sequences.
        hidden_size: Of a token.
        limit: Heads or neurons that the weights hold.
        width: Of all sequences from the host; or of each, read on the device.
        dropout_p: Where gradients are compared.
        activation: Of a feed-forward.
    """

    lengths: tuple[int, ...]
    hidden_size: int
    limit: int
    width: int | tuple[int, ...]
    dropout_p: float = 0.0
    activation: str = "gelu"


_RAGGED, _LONG = (37, 1, 0, 90), (150, 0, 17, 64)
_BATCH, _MIXED = (128,) * 16, (128, 5, 64, 101, 300, 1, 0, 77)
_FEW: dict[str, tuple[Problem, ...]] = {
    "attention": (
        Problem(_RAGGED, 256, 4, 3),
        Problem(_LONG, 256, 4, (4, 1, 2, 3), dropout_p=0.2),
    ),
    "ffn": (
        Problem(_RAGGED, 256, 512, 300),
        Problem(_LONG, 256, 512, (512, 33, 128, 300), dropout_p=0.2),
    ),
}
# In Triton most of the time goes to compiling, so each problem has to reach kernels that no other
# does. In CUDA C++ nothing is compiled, and the first use reaches all: widths from the host and the
# device, one or many; the norm in the product, a warp or a block a row; every activation.
_MANY: dict[str, tuple[Problem, ...]] = {
    "attention": (
        *_FEW["attention"],
        Problem(_BATCH, 768, 12, 12),
        Problem(_MIXED, 768, 12, (12, 3, 6, 9) * 2, dropout_p=0.1),
    ),
    "ffn": (
        *_FEW["ffn"],
        Problem(_RAGGED, 256, 512, 512, activation="relu"),
        Problem(_RAGGED, 40, 70, 33, activation="gelu_tanh"),
        Problem(_BATCH, 768, 3072, 3072),
        Problem(_MIXED, 768, 3072, (3072, 768, 1536, 2304) * 2, dropout_p=0.1),
    ),
}
_CUDA: dict[str, tuple[Problem, ...]] = {
    "attention": (
        *_MANY["attention"],
        Problem(_RAGGED, 40, 3, 2),
        Problem(_MIXED, 768, 12, (7,)),
        Problem(_RAGGED, 1152, 4, 3),
    ),
    "ffn": (
        *_MANY["ffn"],
        Problem(_RAGGED, 768, 70, (33,), activation="relu"),
        Problem(_RAGGED, 768, 512, 77, activation="gelu_tanh"),
        Problem(_RAGGED, 1152, 70, 70),
    ),
}
FIRST_USE = {proof.TRITON: _FEW, proof.CUDA: _CUDA}
THOROUGH = {proof.TRITON: _MANY, proof.CUDA: _CUDA}


class EncoderProblem(NamedTuple):
    """Sizes of one comparison of consecutive layers.

    Attributes:
        lengths: Of the sequences.
        hidden_size: Of a token.
        limit: Heads and neurons that the weights of every layer hold.
        widths: Heads and neurons of each layer.
        on_device: Whether they are read there, and the first of all layers.
    """

    lengths: tuple[int, ...]
    hidden_size: int
    limit: tuple[int, int]
    widths: tuple[tuple[int, int], ...]
    on_device: bool = False


ENCODER = (
    EncoderProblem((37, 1, 90), 256, (4, 512), ((3, 304), (4, 512), (1, 16))),
    EncoderProblem((128,), 768, (12, 3072), ((12, 3072), (3, 768))),
    EncoderProblem((200, 150, 162), 768, (12, 3072), ((6, 1536),) * 2, True),
)


def difference(
    kernels: _trust.Kernels, path: Path, device: torch.device, problems: tuple[Problem, ...]
) -> str | None:
    """How the kernels differ from the reference on some problem, or None.

    Raises:
        torch.cuda.OutOfMemoryError: There is no room to compare, which says nothing of a path.
    """
    compare = [partial(_compare, kernels, path, device, problem) for problem in problems]
    return _first_failure(device, compare)


def embeddings_difference(path: Path, device: torch.device) -> str | None:
    """How the embeddings of a batch differ from PyTorch's, or None.

    Raises:
        torch.cuda.OutOfMemoryError: There is no room to compare.
    """
    sizes = [(size, given) for size in (40, 768) for given in (False, True)]
    compare = [partial(_compare_embeddings, path, device, size, given) for size, given in sizes]
    return _first_failure(device, compare)


def encoder_difference(
    path: Path, device: torch.device, problems: tuple[EncoderProblem, ...] = ENCODER
) -> str | None:
    """How consecutive layers in one launch differ from the two ops in turn, or None.

    Raises:
        torch.cuda.OutOfMemoryError: There is no room to compare.
    """
    compare = [partial(_compare_encoder, path, device, problem) for problem in problems]
    return _first_failure(device, compare)


def _first_failure(device: torch.device, compare: Sequence[Callable[[], None]]) -> str | None:
    for attempt in compare:
        try:
            with _trust.recording(device):
                attempt()
        except torch.cuda.OutOfMemoryError:
            raise
        # Kernels that cannot be compiled or launched fail with errors of many types.
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            text = " ".join(str(error).split())
            return f"{kind}{text[:300]}"
    return None


def _compare_embeddings(path: Path, device: torch.device, size: int, given: bool) -> None:
    from dynabert_kernels.triton import embeddings

    rows, columns, dtype = 4, 19, proof.dtype_of(path)
    tables = tuple(
        random_hidden(count, size, dtype=dtype, device=device, seed=seed)
        for seed, count in enumerate((50, 25, 2))
    )
    norm = tuple(random_hidden(1, size, dtype=dtype, device=device, seed=s)[0] for s in (7, 8))
    places = torch.arange(rows * columns, device=device)
    words = (places * 7 % 50).view(rows, columns)
    positions, segments = (places * 3 % 25, places % 2) if given else (places % columns + 2, None)
    kept = places[places % 3 > 0] if given else places
    numbers = [words.flatten(), positions, places * 0 if segments is None else segments]

    def plain(dtype: torch.dtype) -> Tensor:
        looked_up = [table.to(dtype)[ids[kept]] for table, ids in zip(tables, numbers, strict=True)]
        total = looked_up[0] + looked_up[2] + looked_up[1]
        weight, bias = (tensor.to(dtype) for tensor in norm)
        return torch.nn.functional.layer_norm(total, (size,), weight, bias, 1e-12)

    with torch.no_grad(), torch.cuda.device_of(words):
        actual = embeddings.embeddings(
            words,
            positions.view(rows, columns) if given else None,
            None if segments is None else segments.view(rows, columns),
            kept if given else None,
            torch.tensor([kept.numel()], dtype=torch.int32, device=device) if given else None,
            EmbeddingTables(*tables, *norm),
            first_position=2,
            norm_eps=1e-12,
        )
        assert_as_accurate("embeddings", actual, plain(dtype), plain(torch.float64))


def _compare_encoder(path: Path, device: torch.device, problem: EncoderProblem) -> None:
    from dynabert_kernels.ops import _cuda_encoder
    from dynabert_kernels.ops.attention._arguments import call_of as attention_call
    from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers
    from dynabert_kernels.ops.ffn._arguments import call_of as ffn_call

    assert path.head_dim is not None
    dtype, (heads, neurons) = proof.dtype_of(path), problem.limit
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    size, offsets = problem.hidden_size, offsets_of(problem.lengths, device)
    hidden = random_hidden(sum(problem.lengths), size, seed=12, **options)
    layers = [
        EncoderLayer(
            random_attention(heads, path.head_dim, size, seed=seed, **options),
            random_ffn(neurons, size, seed=seed + 50, **options),
            *width,
        )
        for seed, width in enumerate(problem.widths)
    ]

    def in_turn(dtype: torch.dtype) -> Tensor:
        tokens, name = hidden.to(dtype), proof.name_of(dtype)
        for attention, ffn, num_heads, intermediate_size in layers:
            of_heads = (*tensors_of(converted(attention, dtype)).values(), attention.norm_eps)
            width = (num_heads, None, offsets, max(problem.lengths))
            call = attention_call(tokens, *of_heads, *width, 0.0, 0.0, None, name)
            tokens = OPS["attention"].reference(call)
            of_neurons = (*tensors_of(converted(ffn, dtype)).values(), ffn.norm_eps)
            rest = (ffn.activation, intermediate_size, None, None, 0.0, None, name)
            tokens = OPS["ffn"].reference(ffn_call(tokens, *of_neurons, *rest))
        return tokens

    read = None
    if problem.on_device:
        of_heads, of_neurons = torch.tensor(problem.widths[0], dtype=torch.int32, device=device)
        read = of_heads[None], of_neurons[None]
    with torch.no_grad():
        made = EncoderLayers.of(layers, read)
        assert made is not None
        actual = _cuda_encoder.launch(hidden, made, offsets)
        if actual is None:
            raise AssertionError("the kernel does not take the sizes it is checked with")
        assert_as_accurate("output", actual, in_turn(dtype), in_turn(torch.float64))


def _compare(kernels: _trust.Kernels, path: Path, device: torch.device, problem: Problem) -> None:
    dtype = proof.dtype_of(path)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "seed": 11}
    size, tokens = problem.hidden_size, sum(problem.lengths)
    hidden = random_hidden(tokens, size, dtype=dtype, device=device, seed=12)
    weights: PackedAttention | PackedFFN
    if path.head_dim is not None:
        weights = random_attention(problem.limit, path.head_dim, size, **options)
    else:
        weights = random_ffn(problem.limit, size, activation=problem.activation, **options)
    trains = path.direction == proof.BACKWARD
    arguments = _arguments(path, problem, hidden, weights, path.dtype, trains=trains)
    wide = _arguments(path, problem, hidden.double(), _double(weights), "float64", trains=trains)
    if not trains:
        reference = OPS[path.op].reference
        with torch.no_grad():
            plain, truth = (reference(kernels.call_of(*a)) for a in (arguments, wide))
            assert_as_accurate("output", kernels.forward(*arguments), plain, truth)
        return
    assert isinstance(kernels, _trust.TrainingKernels)
    upstream = random_hidden(tokens, size, dtype=dtype, device=device, seed=13)
    with torch.no_grad():
        output, *kept = kernels.training(*arguments)
        actual = (output, *kernels.backward(upstream, *kept, *arguments))
    plains, truths = (
        _all_gradients(kernels, upstream.to(a[0].dtype), a) for a in (arguments, wide)
    )
    names = (
        "output",
        "gradient of hidden",
        *(f"gradient of {name}" for name in tensors_of(weights)),
    )
    for name, got, plain, truth in zip(names, actual, plains, truths, strict=True):
        assert_as_accurate(name, got, plain, truth)


def _all_gradients(
    kernels: _trust.Kernels, upstream: Tensor, arguments: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    output, gradients = kernels.reference_gradients(upstream, arguments, seed=_SEED)
    return output, *gradients


def _arguments(
    path: Path,
    problem: Problem,
    hidden: Tensor,
    weights: PackedAttention | PackedFFN,
    compute: str,
    *,
    trains: bool,
) -> tuple[Any, ...]:
    """A problem in the order of the op's schema."""
    device, width = hidden.device, problem.width
    each = None
    if not isinstance(width, int):
        each, width = torch.tensor(width, dtype=torch.int32, device=device), problem.limit
    dropout_p = problem.dropout_p if trains else 0.0
    offsets = offsets_of(problem.lengths, device)
    if isinstance(weights, PackedFFN):
        settings: tuple[Any, ...] = (weights.norm_eps, weights.activation)
        rest: tuple[Any, ...] = (width, each, offsets, dropout_p, _SEED, compute)
    else:
        settings = (weights.norm_eps,)
        dropouts = (dropout_p, dropout_p)
        rest = (width, each, offsets, max(problem.lengths), *dropouts, _SEED, compute)
    return (hidden, *tensors_of(weights).values(), *settings, *rest)


def _double(weights: PackedAttention | PackedFFN) -> PackedAttention | PackedFFN:
    if isinstance(weights, PackedFFN):
        return converted(weights, torch.float64)
    return converted(weights, torch.float64)
