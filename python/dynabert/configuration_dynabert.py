"""Configuration of a DynaBERT model, and how other configurations become one."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, PreTrainedConfig, RobertaConfig

from dynabert.subnet import DEPTH_RULES, Count, LayerShape

ARCHITECTURES = ("bert", "roberta")

# Hugging Face's activation names, and the kernel that computes each.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# What the original code and old transformers left in config.json, and what makes no sense for this
# model. `output_*` would silently put every later call on the slow path that returns all
# intermediate results.
_DROPPED_KEYS = (
    "model_type",
    "architectures",
    "output_attentions",
    "output_hidden_states",
    "output_intermediate",
    "output_past",
    "pruned_heads",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "is_decoder",
    "add_cross_attention",
    "cross_attention_hidden_size",
    "position_embedding_type",
    "gradient_checkpointing",
    "finetuning_task",
    "num_labels",
    "transformers_version",
    "_name_or_path",
    "_num_labels",
)


# What Hugging Face's configurations do not have, or set themselves.
_OWN_KEYS = (
    "model_type",
    "architecture",
    "architectures",
    "depth_rule",
    "head_dim",
    "num_heads_per_layer",
    "intermediate_size_per_layer",
    "transformers_version",
    "_name_or_path",
)


@strict
class DynaBertConfig(PreTrainedConfig):
    """Configuration of a DynaBERT model: BERT's fields, the architecture and the depth rule.

    Attributes:
        architecture: ``"bert"`` or ``"roberta"``: decides positions, pooler and heads.
        depth_rule: ``"paper"`` keeps the last layer of a shallower subnet, ``"reference"``
            reproduces the original code (needed for checkpoints trained with it). See
            `SubnetConfig.resolve`.
        hidden_act: ``"gelu"``, ``"gelu_new"`` or ``"relu"``, or one of Hugging Face's other names
            for these.
        num_attention_heads: Heads of every layer; of the layer with the most, where
            `num_heads_per_layer` is set.
        intermediate_size: FFN neurons, likewise with `intermediate_size_per_layer`.
        head_dim: Size of a head. None takes ``hidden_size // num_attention_heads``; a network with
            fewer heads than that, such as an extracted subnet, has to name it.
        num_heads_per_layer: Heads of each layer; None where all have `num_attention_heads`.
        intermediate_size_per_layer: FFN neurons of each layer; None where all have
            `intermediate_size`.
        pad_token_id: None takes the architecture's own, 0 for BERT and 1 for RoBERTa.

    Raises:
        ValueError: A field is out of range, or the fields do not fit each other.
        huggingface_hub.errors.StrictDataclassError: The same, as a `ValueError` or `TypeError`,
            where the library does the check.
    """

    model_type = "dynabert"
    attribute_map: ClassVar[dict[str, str]] = {}

    architecture: str = "bert"
    depth_rule: str = "paper"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    if TYPE_CHECKING:
        head_dim: int = 0  # a number in every configuration there is
    else:
        head_dim: int | None = None
    num_heads_per_layer: list[int] | None = None
    intermediate_size_per_layer: list[int] | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pad_token_id is None:
            self.pad_token_id = 1 if self.architecture == "roberta" else 0
        divides = self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0
        if self.head_dim is None and divides:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def validate_choices(self) -> None:
        """Check the fields that name something; called by `@strict`."""
        choices = {
            "architecture": ARCHITECTURES,
            "depth_rule": DEPTH_RULES,
            "hidden_act": tuple(ACTIVATIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"DynaBertConfig: {name}={getattr(self, name)!r}, expected one of "
                    f"{list(allowed)}."
                )

    def validate_sizes(self) -> None:
        """Check that sizes are positive and fit each other; called by `@strict`."""
        names = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        )
        for name in (*names, "max_position_embeddings", "type_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"DynaBertConfig: {name}={getattr(self, name)}, expected at least 1."
                )
        if self.head_dim is None:
            raise ValueError(
                f"DynaBertConfig: hidden_size={self.hidden_size}, expected a multiple of "
                f"num_attention_heads={self.num_attention_heads}, or head_dim. Every head has the "
                "same size."
            )
        most = self.hidden_size // self.head_dim if self.head_dim > 0 else 0
        if not 1 <= self.num_attention_heads <= most:
            raise ValueError(
                f"DynaBertConfig: num_attention_heads={self.num_attention_heads} with "
                f"head_dim={self.head_dim}, expected 1 or more of size 1 or more that fit into "
                f"hidden_size={self.hidden_size}. Leave head_dim out to have it divided evenly."
            )
        self._check_per_layer("num_heads_per_layer", "num_attention_heads")
        self._check_per_layer("intermediate_size_per_layer", "intermediate_size")
        if self.max_seq_len < 1:
            raise ValueError(
                f"DynaBertConfig: max_position_embeddings={self.max_position_embeddings}, expected "
                f"more than {self.position_offset}. RoBERTa counts positions from pad_token_id + 1."
            )

    def _check_per_layer(self, name: str, most_name: str) -> None:
        counts, most = getattr(self, name), getattr(self, most_name)
        if counts is None:
            return
        if len(counts) != self.num_hidden_layers or min(counts) < 1 or max(counts) != most:
            raise ValueError(
                f"DynaBertConfig: {name}={counts}, expected num_hidden_layers="
                f"{self.num_hidden_layers} numbers of at least 1, the largest of them "
                f"{most_name}={most}. Leave it out where all layers have the same."
            )

    @property
    def head_counts(self) -> Count:
        """Heads: one number, or one per layer where they differ."""
        return _count(self.num_attention_heads, self.num_heads_per_layer)

    @property
    def neuron_counts(self) -> Count:
        """FFN neurons: one number, or one per layer where they differ."""
        return _count(self.intermediate_size, self.intermediate_size_per_layer)

    @property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Heads and neurons of every layer of the full network."""
        count = self.num_hidden_layers
        heads = self.num_heads_per_layer or [self.num_attention_heads] * count
        neurons = self.intermediate_size_per_layer or [self.intermediate_size] * count
        return tuple(map(LayerShape, range(count), heads, neurons))

    @property
    def activation(self) -> str:
        """The activation as the kernels name it."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def position_offset(self) -> int:
        """Position of the first token: 0 for BERT, ``pad_token_id + 1`` for RoBERTa."""
        return 0 if self.architecture == "bert" else (self.pad_token_id or 0) + 1

    @property
    def max_seq_len(self) -> int:
        """Tokens the position embeddings can number."""
        return self.max_position_embeddings - self.position_offset

    @classmethod
    def from_hf(cls, config: PreTrainedConfig, **changes: Any) -> "DynaBertConfig":
        """Take over a ``BertConfig`` or ``RobertaConfig``.

        Args:
            config: The configuration; labels, dropouts and task settings come along.
            **changes: Fields to set differently.

        Raises:
            ValueError: The model is not an encoder of the BERT family.
        """
        return cls(**{**from_hf_dict(config.to_dict()), **changes})

    def to_hf(self) -> BertConfig | RobertaConfig:
        """The ``BertConfig`` or ``RobertaConfig`` of the same network.

        Raises:
            ValueError: Plain BERT cannot express the network; the message says why.
        """
        most = self.hidden_size // self.head_dim
        narrow = [layer.num_heads for layer in self.layer_shapes if layer.num_heads != most]
        if narrow or self.hidden_size % self.head_dim:
            heads = narrow[0] if narrow else most
            raise ValueError(
                f"DynaBertConfig.to_hf: {heads} heads of {self.head_dim} in a layer, expected "
                f"heads that fill hidden_size={self.hidden_size}. Plain BERT divides hidden_size "
                "among its heads and has no narrower layer. Use full width in attention, or our "
                "own format."
            )
        sizes = sorted({layer.intermediate_size for layer in self.layer_shapes})
        if len(sizes) > 1:
            raise ValueError(
                f"DynaBertConfig.to_hf: intermediate_size={sizes}, expected the same in every "
                "layer. Plain BERT has one number for all. Use one size, or our own format."
            )
        values = {name: value for name, value in self.to_dict().items() if name not in _OWN_KEYS}
        kind = RobertaConfig if self.architecture == "roberta" else BertConfig
        return kind(**values)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read ``config.json``; that of BERT, RoBERTa or the original code arrives converted."""
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(
                f"DynaBertConfig: {pretrained_model_name_or_path} has no config.json, expected the "
                "directory or hub id of a BERT, RoBERTa or DynaBERT model."
            )
        return from_hf_dict(config_dict), unused


def _count(one: int, per_layer: list[int] | None) -> Count:
    return one if per_layer is None else tuple(per_layer)


def from_hf_dict(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `DynaBertConfig` that says the same as a Hugging Face ``config.json``.

    Args:
        values: A BERT, RoBERTa or DynaBERT configuration, or one of the original DynaBERT code,
            which has no ``model_type``.

    Returns:
        Fields of `DynaBertConfig`; a DynaBERT configuration comes back as it is.

    Raises:
        ValueError: Another kind of model, a decoder, pruned heads, or relative positions.
    """
    model_type = values.get("model_type", "")
    if model_type == "dynabert":
        return dict(values)
    if not model_type:
        model_type = _architecture_of_untyped(values)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"DynaBertConfig: model_type={model_type!r}, expected 'bert', 'roberta' or 'dynabert'. "
            "Other architectures are not supported."
        )
    unsupported = {
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
        "pruned_heads": ({}, None),
        "position_embedding_type": ("absolute", None),
    }
    for name, allowed in unsupported.items():
        if values.get(name) not in allowed:
            raise ValueError(
                f"DynaBertConfig: {name}={values[name]!r}, expected {allowed[0]!r}. "
                "Only unpruned encoders with absolute positions can be converted."
            )
    fields = {name: value for name, value in values.items() if name not in _DROPPED_KEYS}
    if "id2label" not in fields and values.get("num_labels") is not None:
        fields["num_labels"] = values["num_labels"]
    return {**fields, "model_type": "dynabert", "architecture": model_type}


def _architecture_of_untyped(values: Mapping[str, Any]) -> str:
    """Which architecture a configuration without ``model_type`` describes.

    RoBERTa's vocabulary and its two extra positions are the only trace the original code leaves.
    """
    required = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(
            f"DynaBertConfig: config.json has neither model_type nor {missing}, expected a BERT, "
            "RoBERTa or DynaBERT configuration."
        )
    is_roberta = values["vocab_size"] == 50265 or values.get("max_position_embeddings") == 514
    return "roberta" if is_roberta else "bert"
