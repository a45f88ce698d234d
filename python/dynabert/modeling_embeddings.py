"""The embeddings of DynaBERT, which also take the padding out of a batch.

Letters: B sequences, S padded length, T real tokens, C hidden_size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.modeling_inputs import check_range
from dynabert.modeling_watch import ModuleWatch
from dynabert_kernels.ops.embeddings import EmbeddingTables, embeddings
from dynabert_kernels.ops.gpu_embeddings import gpu_embeddings
from dynabert_kernels.varlen import Packing

_PARTS = {
    "word_embeddings": nn.Embedding,
    "position_embeddings": nn.Embedding,
    "token_type_embeddings": nn.Embedding,
    "norm": nn.LayerNorm,
    "dropout": nn.Dropout,
}


class DynaBertEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised; never elastic."""

    _watch: ModuleWatch[EmbeddingTables] | None = None

    def __init__(self, config: DynaBertConfig) -> None:
        super().__init__()
        self.config = config
        pad = config.pad_token_id
        position_pad = pad if config.architecture == "roberta" else None
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=pad)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=position_pad
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        packing: Packing,
    ) -> Tensor:
        """Embed the real tokens of a padded batch.

        Args:
            tokens: Token ids, ``[B, S]`` integer; or embeddings in their place, ``[B, S, C]``.
            position_ids: ``[B or 1, S]`` integer; None as the architecture counts them.
            token_type_ids: ``[B or 1, S]`` integer; None for 0.
            packing: Where the real tokens are.

        Returns:
            ``[T, C]``.

        Raises:
            ValueError: An id is out of range.
        """
        config, has_ids = self.config, not tokens.is_floating_point()
        offset = config.position_offset
        if position_ids is None and has_ids and config.architecture == "roberta":
            pad = cast(int, config.pad_token_id)
            is_token = tokens.ne(pad).long()
            position_ids = is_token.cumsum(dim=1) * is_token + (offset - 1)
        if has_ids and not self.training and not torch.is_grad_enabled():
            fused = self._fused(tokens, position_ids, token_type_ids, packing, offset)
            if fused is not None:
                return fused
        if has_ids:
            check_range("input_ids", tokens, config.vocab_size)
        check_range("token_type_ids", token_type_ids, config.type_vocab_size)
        check_range("position_ids", position_ids, config.max_position_embeddings)
        shape = batch_size, seq_len = packing.batch_size, packing.seq_len
        if position_ids is None:
            positions = torch.arange(offset, offset + seq_len, device=tokens.device)
            position_ids = positions.unsqueeze(0)
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long, device=tokens.device)
        words = packing.pack(tokens)
        positions = packing.pack(position_ids.expand(batch_size, seq_len))
        segments = packing.pack(token_type_ids.expand(batch_size, seq_len))
        embedded = self.word_embeddings(words) if has_ids else words
        embedded = (
            embedded + self.token_type_embeddings(segments) + self.position_embeddings(positions)
        )
        normed: Tensor = self.dropout(self.norm(embedded))
        return normed

    def _fused(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        packing: Packing,
        first_position: int,
    ) -> Tensor | None:
        """The embeddings from one native call, or None where it cannot make them."""
        if torch.compiler.is_compiling():
            return None
        kept = self._watch
        if kept is None or not kept.is_plain():
            kept = self._watch = self._watched()
            if kept is None:
                return None
        run = gpu_embeddings if input_ids.is_cuda else embeddings
        return run(
            input_ids,
            position_ids,
            token_type_ids,
            packing,
            kept.made,
            first_position=first_position,
            norm_eps=self.norm.eps,
        )

    def _watched(self) -> ModuleWatch[EmbeddingTables] | None:
        """The tables for the native call, or None where a part does more than look up or norm."""
        if any(type(self._modules.get(name)) is not kind for name, kind in _PARTS.items()):
            return None
        lookups = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        own = [*(lookup.weight for lookup in lookups), self.norm.weight, self.norm.bias]
        if any(tensor is None for tensor in own):  # a norm without bias
            return None
        if any(lookup.max_norm is not None for lookup in lookups):
            return None
        watch = ModuleWatch([self], [_PARTS], EmbeddingTables(*own))
        return watch if watch.is_plain() else None
