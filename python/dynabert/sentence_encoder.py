"""An elastic encoder as a `SentenceTransformer`, with the subnet chosen at loading or per call.

sentence-transformers passes an argument of ``encode`` on to each module whose entry in
``modules.json`` names it, and its own Transformer module hands it to the model. So ``subnet``
travels with the call, and what is saved names no class of this package: after ``import dynabert``
a plain ``SentenceTransformer(...)`` loads it, without ``trust_remote_code``.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import PreTrainedConfig

from dynabert import hf_checkpoint
from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.json_file import read_json
from dynabert.modeling_dynabert import DynaBertModel
from dynabert.subnet import SubnetConfig, SubnetShape

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

Pooling = Literal["mean", "cls"]

_WHO = "load_sentence_transformer"
_RUN_SCHEMA = 1
_ARGUMENT = "subnet"  # of `DynaBertModel.forward`
_NO_POOLER = {"add_pooling_layer": False}


def load_sentence_transformer(
    path: str | os.PathLike[str],
    *,
    subnet: SubnetConfig | SubnetShape | None = None,
    pooling: Pooling | None = None,
    **kwargs: Any,
) -> SentenceTransformer:
    """Load an encoder whose ``encode`` takes ``subnet``, one for all texts of the call.

    What is loaded is a plain `SentenceTransformer`: similarity, several processes, training and
    saving are its own. ``encode`` without ``subnet``, and training, run the subnet chosen here.
    Calls from several threads may name different ones. ``save_pretrained`` writes the full network.

    Args:
        path: The folder of a run of ``dynabert train``; a DynaBERT, BERT or RoBERTa model; or a
            sentence-transformers model with one of these inside, whose other modules are kept.
            A folder, or a hub id.
        subnet: What to run wherever a call names none; None is the full network.
        pooling: How tokens become an embedding: by their ``"mean"``, or the first one, ``"cls"``.
            Default: as the run was trained, as the model's modules say, else the mean.
        **kwargs: As for `SentenceTransformer`: ``device``, ``model_kwargs``, ``revision``, ...

    Raises:
        ImportError: sentence-transformers is not installed; the message names the extra.
        FileNotFoundError: The run has not finished.
        OSError: There is no model.
        TypeError: `subnet` is not a subnet.
        ValueError: The subnet does not fit the model, the model is not of the BERT family, or an
            argument is out of range.

    Example:
        >>> model = load_sentence_transformer("runs/encoder", subnet=SubnetConfig(0.5))
        >>> model.encode(["A short text."])  # doctest: +SKIP
        >>> model.encode(["A short text."], subnet=SubnetConfig(0.25, 0.5))  # doctest: +SKIP
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"{_WHO} needs the package sentence-transformers. Install it with "
            '`pip install "dynabert-kernels[sbert]"`.'
        ) from error
    if pooling is not None and pooling not in get_args(Pooling):
        raise ValueError(
            f"{_WHO}: pooling={pooling!r}, expected 'mean', 'cls' or None. None asks the model."
        )
    if kwargs.get("backend", "torch") != "torch":
        raise ValueError(
            f"{_WHO}: backend={kwargs['backend']!r}, expected 'torch'. The others run one subnet."
        )
    folder, trained = _model_of_run(Path(path))
    if folder.is_dir():
        config, _ = PreTrainedConfig.get_config_dict(folder)
        if config.get("model_type") == DynaBertConfig.model_type:
            # One that was trained as a sentence encoder has none to load.
            kwargs["model_kwargs"] = {**_NO_POOLER, **(kwargs.get("model_kwargs") or {})}
    model = SentenceTransformer(os.fspath(folder if folder.is_dir() else path), **kwargs)

    name: str
    transformer: Any
    name, transformer = next(model.named_children())
    _put_elastic(transformer, subnet)
    taken = model.module_kwargs or {}
    if _ARGUMENT not in taken.get(name, ()):
        model.module_kwargs = {**taken, name: [*taken.get(name, ()), _ARGUMENT]}
    encoder = transformer.auto_model.config
    # sentence-transformers takes all position embeddings to be positions; two of RoBERTa's are not.
    asked = trained.get("max_length") or model.max_seq_length or encoder.max_seq_len
    model.max_seq_length = min(asked, encoder.max_seq_len)
    if pooling or trained.get("pooling"):
        _set_pooling(model, pooling or trained["pooling"], encoder.hidden_size)
    return model


def _model_of_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """The model folder and the arguments of a run; `path` and nothing for anything else."""
    if not (path / "run.json").is_file():
        return path, {}
    folder = path / "model"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is a run that has not finished, expected {folder} in it. "
            "Repeat the command that began it, and it goes on."
        )
    return folder, dict(read_json(path / "run.json", schema=_RUN_SCHEMA)["arguments"])


def _put_elastic(transformer: Any, subnet: SubnetConfig | SubnetShape | None) -> None:
    """Have a Transformer module run our encoder, at `subnet` by default and at others by call."""
    encoder = getattr(transformer, "auto_model", None)
    if encoder is None:
        raise ValueError(
            f"{_WHO}: the model begins with {type(transformer).__name__}, expected Transformer. "
            "Only that module runs an encoder."
        )
    if not isinstance(encoder, DynaBertModel):
        encoder = _converted(encoder)
    encoder.pooler = None  # no module reads what it returns
    # What `auto_model` returns is a submodule of this name since sentence-transformers 5.4.
    place = "model" if "model" in transformer._modules else "auto_model"
    setattr(transformer, place, encoder if subnet is None else encoder.with_subnet(subnet))
    # The arguments the module passes on are those of the model it was made with.
    if getattr(transformer, "model_forward_params", None) is not None:
        transformer.model_forward_params |= set(inspect.signature(encoder.forward).parameters)
    # Saved with the module, so that whoever loads it asks for no pooler either.
    transformer.model_args = dict(_NO_POOLER)
    transformer.config_keys = [*transformer.config_keys, "model_args"]
    transformer.register_forward_pre_hook(_refuse_several, with_kwargs=True)


def _converted(encoder: Any) -> DynaBertModel:
    """Our model with the weights of a Hugging Face encoder; device and dtype stay."""
    config = DynaBertConfig.from_hf(encoder.config)
    weights = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("pooler.")
    }
    state = hf_checkpoint.from_hf_state_dict(weights, config, prefix="")
    elastic = DynaBertModel.from_pretrained(
        None, config=config, state_dict=state, dtype=encoder.dtype, **_NO_POOLER
    )
    elastic.name_or_path = elastic.config.name_or_path = encoder.name_or_path
    elastic.to(encoder.device)
    return elastic


def _refuse_several(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A subnet per text would meet texts that ``encode`` has sorted by length."""
    subnet = kwargs.get(_ARGUMENT)
    if subnet is not None and not isinstance(subnet, SubnetConfig | SubnetShape):
        raise TypeError(
            f"encode: subnet is a {type(subnet).__name__}, expected one SubnetConfig for all "
            "texts, or None. Call it once for each subnet."
        )


def _set_pooling(model: SentenceTransformer, pooling: Pooling, size: int) -> None:
    for place, module in enumerate(model):
        if type(module).__name__ == "Pooling":
            model[place] = type(module)(size, pooling)
            return
    raise ValueError(
        f"{_WHO}: pooling={pooling!r}, expected None. The model has no Pooling module to replace."
    )
