"""Whether an exported subnet computes what the model computes: batches to run both on, and how far
the outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynabert.configuration_dynabert import DynaBertConfig

Batch = dict[str, Tensor]
Outputs = Mapping[str, Tensor]
Run = Callable[[Batch], Outputs]

# Lengths of the sequences of each batch: one without padding, one with much, one of a single token.
_LENGTHS = ((9,), (23, 1, 12), (5, 5))


@dataclass(frozen=True)
class ExportCheck:
    """How an export was checked.

    Attributes:
        compared_with: What the exported files were run against, in words.
        shapes: Sequences and padded length of each batch.
        max_error: Largest difference of any output at a real token, absolute.
        limit: Largest difference allowed: this times the largest output, or this where all are
            below 1. 0 allows none.
    """

    compared_with: str
    shapes: tuple[tuple[int, int], ...]
    max_error: float
    limit: float


def input_names(config: DynaBertConfig) -> tuple[str, ...]:
    """Inputs of a graph: token types only where the model has more than one."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return names if config.type_vocab_size > 1 else names[:2]


def example_batch(config: DynaBertConfig, lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Random tokens, padded on the right, under `input_names`: ``[B, S]`` int64 each.

    Args:
        config: Of the model to run it on.
        lengths: Real tokens of each sequence; cut to what the model takes.
        seed: Of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths).clamp(max=config.max_seq_len)
    shape = (len(lengths), int(sizes.max()))
    mask = torch.arange(shape[1]) < sizes[:, None]
    ids = torch.randint(0, config.vocab_size, shape, generator=generator)
    pad = config.pad_token_id or 0
    # RoBERTa takes the padding token for padding wherever it stands.
    ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids).masked_fill(~mask, pad)
    types = torch.randint(0, config.type_vocab_size, shape, generator=generator)
    made = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": types}
    return {name: made[name] for name in input_names(config)}


def run_model(model: nn.Module, **options: object) -> Run:
    """Calls of `model` in evaluation, on its device, as tensors by name on the CPU."""
    device = next(model.parameters()).device

    def run(batch: Batch) -> Outputs:
        with torch.no_grad():
            output = model(**{k: v.to(device) for k, v in batch.items()}, **options)
        return {name: value.cpu() for name, value in output.items() if isinstance(value, Tensor)}

    return run


def check_export(
    who: str, config: DynaBertConfig, expected: Run, got: Run, limit: float, compared_with: str
) -> ExportCheck:
    """Run both on batches of several shapes, with and without padding.

    Args:
        who: What was exported, for the message.
        config: Of the model.
        expected: The model.
        got: What was read back from the exported files.
        limit: See `ExportCheck`.
        compared_with: See `ExportCheck`.

    Raises:
        RuntimeError: They differ by more than the limit.
    """
    shapes, worst = [], 0.0
    for seed, lengths in enumerate(_LENGTHS):
        batch = example_batch(config, lengths, seed)
        real = batch["attention_mask"] != 0
        shapes.append((real.shape[0], real.shape[1]))
        truth, found = expected(batch), got(batch)
        for name, value in truth.items():
            # What a model says about padding has no meaning, and differs between them.
            pick = real if value.shape[:2] == real.shape else slice(None)
            wanted, other = value[pick].double(), found[name][pick].double()
            error = float((wanted - other).abs().max())
            scale = max(1.0, float(wanted.abs().max()))
            if not error <= limit * scale:
                raise RuntimeError(
                    f"{who}: {name} differs by {error:.3g} from {compared_with}, expected at most "
                    f"{limit * scale:.3g}. Nothing was written; please report this."
                )
            worst = max(worst, error)
    return ExportCheck(compared_with, tuple(shapes), worst, limit)
