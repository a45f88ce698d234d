"""Parameters and floating-point operations of a subnet, in closed form.

Everything here is integer arithmetic on a configuration and a `SubnetShape`; no model is run. The
counts follow the convention of the paper's Figure 2: two operations per multiply-accumulate, matrix
products of the encoder only (projections, attention scores and context, feed-forward), every token
real.

Letters: B sequences, S tokens in each, C hidden size, D head size, H heads and I neurons of one
layer.
"""

from __future__ import annotations

from typing import Protocol

from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import LayerShape, SubnetConfig, SubnetShape


class EncoderSizes(Protocol):
    """The fields of a BERT configuration that the counts depend on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...


def _head_dim(config: EncoderSizes) -> int:
    """Size of a head; Hugging Face's own configurations divide `hidden_size`."""
    own = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if own is None else int(own)


def _layer_parameters(config: EncoderSizes, layer: LayerShape) -> int:
    hidden = config.hidden_size
    attended = layer.num_heads * _head_dim(config)
    attention = 4 * hidden * attended + 3 * attended + hidden
    feed_forward = 2 * hidden * layer.intermediate_size + layer.intermediate_size + hidden
    layer_norms = 2 * 2 * hidden
    return attention + feed_forward + layer_norms


def encoder_parameters(config: EncoderSizes, shape: SubnetShape) -> int:
    """Parameters of the kept layers: projections, feed-forward, their biases and both LayerNorms.

    Args:
        config: Sizes of the full network.
        shape: The subnet, resolved for that network.

    Returns:
        Number of scalars an extracted encoder of this shape holds.
    """
    return sum(_layer_parameters(config, layer) for layer in shape.layers)


def subnet_parameters(config: EncoderSizes, shape: SubnetShape, *, pooler: bool = True) -> int:
    """Parameters of a base model of this shape: embeddings, encoder and, by default, the pooler.

    Embeddings and pooler keep the residual width, so they count in full whatever the subnet.

    Args:
        config: Sizes of the full network.
        shape: The subnet, resolved for that network.
        pooler: Whether the pooler's dense layer counts.

    Example:
        >>> from transformers import BertConfig
        >>> from dynabert.subnet import SubnetConfig
        >>> half = SubnetConfig(width_mult=0.5).resolve(
        ...     num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
        ... )
        >>> subnet_parameters(BertConfig(), half)
        66982656
    """
    hidden = config.hidden_size
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    embeddings = rows * hidden + 2 * hidden
    dense = hidden * hidden + hidden if pooler else 0
    return embeddings + encoder_parameters(config, shape) + dense


def encoder_flops(
    config: EncoderSizes, shape: SubnetShape, seq_len: int, batch_size: int = 1
) -> int:
    """Operations of one forward pass through the encoder, two per multiply-accumulate.

    Per token and layer, ``2 * (4 C H D + 2 C I) + 4 S H D``: the projections, the feed-forward, and
    the scores and context of attention over a sequence of S tokens. Embeddings, LayerNorm, softmax,
    activation and the task head are not counted.

    Args:
        config: Sizes of the full network.
        shape: The subnet, resolved for that network.
        seq_len: Tokens in each sequence, all of them real.
        batch_size: Sequences.

    Raises:
        ValueError: `seq_len` or `batch_size` is below 1.
    """
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(
                f"encoder_flops: {name}={value}, expected 1 or more. Count at least one token."
            )
    hidden = config.hidden_size
    head_dim = _head_dim(config)
    per_token = sum(
        2 * (4 * hidden * layer.num_heads * head_dim + 2 * hidden * layer.intermediate_size)
        + 4 * seq_len * layer.num_heads * head_dim
        for layer in shape.layers
    )
    return per_token * seq_len * batch_size


def count_parameters(model: DynaBertPreTrainedModel, shape: SubnetShape) -> int:
    """Parameters an extracted model of this shape holds.

    Embeddings, pooler and task head count as they are in `model`.

    Args:
        model: A DynaBERT model with any head, at full size; shared parameters count once.
        shape: The subnet, resolved for that model.
    """
    everything = sum(parameter.numel() for parameter in model.parameters())
    config: EncoderSizes = model.config
    full = encoder_parameters(config, model.subnet_shape(SubnetConfig()))
    return everything - full + encoder_parameters(config, shape)
