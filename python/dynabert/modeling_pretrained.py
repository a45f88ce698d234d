"""Around the forward pass of every DynaBERT model: loading, saving, initialisation, views."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from dynabert import hf_checkpoint
from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.modeling_release import check_conversion, release_model, released_parameter
from dynabert.rewiring_record import FILE_NAME as REWIRING_FILE
from dynabert.rewiring_record import RewiringRecord
from dynabert.subnet import SubnetConfig, SubnetShape
from dynabert_kernels.layout import QUANTIZATIONS
from dynabert_kernels.quantization import check_finite
from dynabert_kernels.released import refuse_released

if TYPE_CHECKING:
    from typing_extensions import Self

    from dynabert.modeling_capture import CapturedModel
    from dynabert.picking import IfNone, Percentile, Pick


# Bytes; what PyTorch gives every tensor it makes on the CPU.
_ALIGNMENT = 64
_resolve = lru_cache(maxsize=4096)(SubnetConfig.resolve)


class DynaBertPreTrainedModel(PreTrainedModel):
    """Base of all DynaBERT models."""

    config_class = DynaBertConfig
    config: DynaBertConfig
    base_model_prefix = "dynabert"
    # Before the encoder's weight names; none in DynaBertModel itself.
    weights_prefix = hf_checkpoint.PREFIX
    supports_gradient_checkpointing = True
    # Losses are means over the batch; the Trainer divides them where it accumulates gradients.
    accepts_loss_kwargs = False
    _no_split_modules = ["DynaBertEmbeddings", "DynaBertLayer"]  # noqa: RUF012
    _supports_sdpa = True  # the reference backend attends with it; "eager" selects nothing else
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]  # noqa: RUF012  (once a saved buffer)

    default_subnet: SubnetConfig | SubnetShape | None = None
    _rewiring: RewiringRecord | None = None

    @property
    def rewiring(self) -> RewiringRecord | None:
        """How this model was rewired, if it was; saved and loaded with the weights."""
        return cast(DynaBertPreTrainedModel, self.base_model)._rewiring

    @rewiring.setter
    def rewiring(self, record: RewiringRecord | None) -> None:
        cast(DynaBertPreTrainedModel, self.base_model)._rewiring = record

    def subnet_shape(self, subnet: SubnetConfig | SubnetShape | None) -> SubnetShape:
        """The layers, heads and neurons `subnet` means for this model; None is the full network.

        Raises:
            TypeError: It is not a subnet.
            ValueError: It does not fit this model; the message lists what would.
        """
        config = self.config
        if isinstance(subnet, SubnetShape):
            if any(layer.index >= config.num_hidden_layers for layer in subnet.layers):
                raise ValueError(
                    f"{type(self).__name__}: subnet keeps layer {subnet.layers[-1].index}, "
                    f"expected 0 to {config.num_hidden_layers - 1}. It was resolved for another "
                    "model."
                )
            return subnet
        if subnet is not None and not isinstance(subnet, SubnetConfig):
            raise TypeError(
                f"{type(self).__name__}: subnet={subnet!r}, expected a SubnetConfig, a "
                "SubnetShape, None, or a list with one of these per sequence of the batch."
            )
        # Dynamo traces through a cache, and warns that it does.
        resolve = SubnetConfig.resolve if torch.compiler.is_compiling() else _resolve
        return resolve(
            subnet or SubnetConfig(),
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.head_counts,
            intermediate_size=config.neuron_counts,
            depth_rule=config.depth_rule,
        )

    def with_subnet(self, subnet: SubnetConfig | SubnetShape | None) -> Self:
        """A view of this model that runs `subnet` wherever a call names none.

        For callers that cannot pass an argument, such as pipelines. The view shares every parameter
        and submodule with this model, which keeps its own answer to ``subnet=None``; so ``train()``
        and ``eval()`` of either act on the layers of both, and saving the view saves the full
        network.

        Raises:
            TypeError: It is not a subnet.
            ValueError: It does not fit this model.
        """
        shape = self.subnet_shape(subnet)
        view = copy.copy(self)
        # Which hooks and submodules the view has is its own affair.
        own = {name: value.copy() for name, value in vars(view).items() if isinstance(value, dict)}
        vars(view).update(own)
        view.default_subnet = shape
        base = cast(DynaBertPreTrainedModel, self.base_model)
        if base is not self:
            setattr(view, self.base_model_prefix, base.with_subnet(shape))
        return view

    def capture(
        self,
        batch_size: int,
        seq_len: int,
        *,
        subnets: Sequence[SubnetConfig | SubnetShape | None] = (),
        lazy: bool = True,
        clone: bool = False,
        output_hidden_states: bool = False,
    ) -> CapturedModel:
        """A runner for batches of up to this size that replays CUDA graphs, one for each depth.

        Every width runs in the graph of its depth. For arguments, what the runner takes and what
        it returns see `dynabert.modeling_capture.CapturedModel`.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The model is not on a GPU, in training or quantised; or a size is out of
                range.
            NotImplementedError: The kernels that would run cannot be captured.

        Example:
            >>> runner = model.to("cuda").capture(batch_size=8, seq_len=128)  # doctest: +SKIP
            >>> logits = runner(input_ids, mask, subnet=SubnetConfig(0.5)).logits  # doctest: +SKIP
        """
        from dynabert.modeling_capture import CapturedModel  # stands above this module

        return CapturedModel(
            self,
            batch_size,
            seq_len,
            subnets=subnets,
            lazy=lazy,
            clone=clone,
            output_hidden_states=output_hidden_states,
        )

    def pick(
        self,
        *,
        budget_ms: float,
        batch_size: int = 1,
        seq_len: int = 128,
        percentile: Percentile = "p80",
        if_none: IfNone = "raise",
        margin: float = 0.05,
        folder: str | os.PathLike[str] | None = None,
        seconds_per_subnet: float = 2.0,
    ) -> Pick:
        """The most accurate subnet whose latency on this machine is within a budget.

        Scores come from the ``grid.json`` beside the model and latencies from its
        ``latency.json``: those of the model where it is and as it is (device, dtype, int8), with
        the threads and the backend of now. What that table lacks is measured first, which takes
        seconds for every subnet, and kept; the log says so.

        Args:
            budget_ms: Longest acceptable latency of one batch, in milliseconds.
            batch_size: Sequences of that batch.
            seq_len: Tokens of each sequence.
            percentile: Percentile of the measured latencies that must fit: ``median``, ``p20``,
                ``p80`` or ``p99``.
            if_none: Where no subnet fits, ``"raise"``, or take the ``"fastest"`` with
                ``is_within`` False.
            margin: Share of the measured latency to keep free below the budget.
            folder: Folder of the two files; None for the one the model was loaded from, or the run
                whose result that is.
            seconds_per_subnet: Time to measure each subnet for, in seconds, where there is need.

        Raises:
            FileNotFoundError: There are no scores.
            ValueError: An argument is out of range, or no subnet is within the budget.

        Example:
            >>> choice = model.pick(budget_ms=10)  # doctest: +SKIP
            >>> model(**inputs, subnet=choice.subnet)  # doctest: +SKIP
        """
        from dynabert.picking import pick_for_model  # stands above this module

        return pick_for_model(
            self,
            budget_ms,
            batch_size=batch_size,
            seq_len=seq_len,
            percentile=percentile,
            if_none=if_none,
            margin=margin,
            folder=None if folder is None else Path(folder),
            seconds_per_subnet=seconds_per_subnet,
        )

    @property
    def quantization(self) -> str | None:
        """The form of the encoder's matrix products that `quantize` set; None for floats."""
        return next((sublayer.quantization for sublayer in self._sublayers()), None)

    def quantize(self, quantization: str | None) -> Self:
        """Compute the encoder's matrix products in integers, or in floats again.

        ``"int8"`` takes effect at the next call: weights with one scale per neuron or channel and
        tokens, their channels mixed, with one scale each (see `dynabert_kernels.quantization`),
        the rest in float32. Every subnet reads the same integers, and views (`with_subnet`) share
        them. The parameters do not change and nothing about it is saved: a loaded model is not
        quantised. Integers have no gradients, so calls that need them are refused; use
        ``torch.no_grad()``.

        Args:
            quantization: ``"int8"``, or None to use the parameters as they are.

        Returns:
            This model.

        Raises:
            ValueError: There is no such form, or a weight holds NaN or infinity.

        Example:
            >>> model.eval().quantize("int8")  # doctest: +SKIP
        """
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise ValueError(
                f"{type(self).__name__}.quantize: quantization={quantization!r}, expected None or "
                f"one of {', '.join(map(repr, QUANTIZATIONS))}."
            )
        left = released_parameter(self)
        if left is not None and quantization not in (None, *left.forms):
            refuse_released(f"{type(self).__name__}.quantize", [left])
        if quantization is not None and left is None:
            for name, parameter in self.base_model.named_parameters():
                if name.startswith("encoder.") and name.endswith("_weight"):
                    check_finite(name, parameter)
        for sublayer in self._sublayers():
            sublayer.quantization = quantization
        return self

    def release_packed(self, forms: Sequence[str] | None = None) -> Self:
        """Give the encoder's packed weights back, and keep only their prepared forms: for serving.

        Backend ``cpu`` reads prepared weights (`dynabert_kernels.prepared_forms`), and beside
        them the packed ones only wait for a form to be built again. Afterwards calls without
        gradients compute what they did, to the bit, at every subnet, also in views and copies of
        this model. All else is refused with a `dynabert_kernels.ReleasedWeightsError`: training,
        saving, moving, conversion, rewiring, other backends, other forms. Embeddings and the head
        stay as they are. It cannot be undone; load the model again.

        Memory is free once nothing else holds the parameters: an optimizer, a state dict.

        Args:
            forms: Forms to keep: ``"float32"``, ``"bfloat16"``, ``"int8"``, one or several. None:
                the one of the next call, int8 of a model quantised so, else the parameters' dtype.
                Serving under autocast needs that one's.

        Returns:
            This model.

        Raises:
            ValueError: There is no such form, a weight has no int8 form, or the model is in
                training mode or has parametrised weights.
            NotImplementedError: Backend ``cpu`` cannot run this model.
            ReleasedWeightsError: It was released before.

        Example:
            >>> model.eval().quantize("int8").release_packed()  # doctest: +SKIP
        """
        release_model(self, list(self._sublayers()), forms)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        check_conversion(self, fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        refuse_released("load_state_dict", self.parameters())
        super()._load_from_state_dict(*args, **kwargs)

    def _sublayers(self) -> Iterator[Any]:
        """The elastic sublayers, which own the encoder's parameters."""
        return (module for module in self.modules() if hasattr(module, "packed"))

    def wants_dict(self, return_dict: bool | None) -> bool:
        """Whether a call returns an output object rather than a tuple."""
        return bool(self.config.return_dict if return_dict is None else return_dict)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a BERT, RoBERTa or DynaBERT checkpoint.

        A Hugging Face BERT or RoBERTa may have any head or none; weights of a head that this class
        also has are kept. So may a checkpoint of the original DynaBERT code. Weights that are
        missing are initialised as for a new model, and they and those without a place are named in
        a warning. Only a hub id is downloaded.

        Args:
            pretrained_model_name_or_path: A directory or a hub id.
            *model_args: Further arguments of the class.
            config: Configuration to use in the place of the checkpoint's.
            **kwargs: As for `transformers.PreTrainedModel.from_pretrained` (``dtype``,
                ``revision``, ``cache_dir``, ``token``, ``local_files_only``,
                ``output_loading_info``, ...), and fields of the configuration to set differently,
                such as ``num_labels`` or ``depth_rule``.

        Raises:
            OSError: There is no such checkpoint, or no weights in it.
            ValueError: A file is damaged or not a plain file of tensors, or the checkpoint is of
                another kind.
        """
        weights_only = kwargs.pop("weights_only", True)
        if not weights_only:
            raise ValueError(
                f"{cls.__name__}.from_pretrained: weights_only={weights_only}, expected True. "
                "Reading tensors never needs to execute what is in their file."
            )
        path = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in hf_checkpoint.HUB_ARGUMENTS if name in kwargs}
        if path is None or _is_dynabert(path, hub):
            try:
                loaded = super().from_pretrained(path, *model_args, config=config, **kwargs)
            except hf_checkpoint.UNREADABLE as error:
                raise hf_checkpoint.unreadable(path or "state_dict", error) from error
        else:
            loaded = cls._from_hugging_face(path, *model_args, config=config, hub=hub, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _align(model)
        if path is not None:
            record = cached_file(
                path, REWIRING_FILE, _raise_exceptions_for_missing_entries=False, **hub
            )
            model.rewiring = None if record is None else RewiringRecord.load(record)
        return loaded

    @classmethod
    def _from_hugging_face(
        cls,
        path: str | os.PathLike[str],
        *model_args: Any,
        config: Any,
        hub: Mapping[str, Any],
        **kwargs: Any,
    ) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name not in hub}
        settings = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        choice = {n: kwargs.pop(n) for n in ("variant", "use_safetensors") if n in kwargs}
        if not isinstance(config, PreTrainedConfig):
            source = path if config is None else config
            config, kwargs = DynaBertConfig.from_pretrained(
                source, return_unused_kwargs=True, **hub, **kwargs
            )
        elif not isinstance(config, DynaBertConfig):
            config = DynaBertConfig.from_hf(config)
        state = hf_checkpoint.read_weights(
            Path(path) if os.path.isdir(path) else str(path), **choice, **hub
        )
        state = hf_checkpoint.from_hf_state_dict(state, config, prefix=cls.weights_prefix)
        with _report_names(path):
            loaded = super().from_pretrained(
                None, *model_args, config=config, state_dict=state, **settings, **kwargs
            )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(path)
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Save the model and its rewiring record; see `PreTrainedModel.save_pretrained`."""
        refuse_released("save_pretrained", self.parameters())
        is_main_process = kwargs.get("is_main_process", True)
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            (Path(save_directory) / REWIRING_FILE).unlink(missing_ok=True)
            if self.rewiring is not None:
                self.rewiring.save(save_directory)
        super().save_pretrained(save_directory, **kwargs)
        # Loading prefers a single file; one of an earlier save would shadow the new shards.
        if is_main_process and (Path(save_directory) / SAFE_WEIGHTS_INDEX_NAME).exists():
            _remove_older(Path(save_directory))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if hasattr(module, "packed"):  # a sublayer, which owns its parameters
            for name, parameter in module.named_parameters(recurse=False):
                if name == "norm_weight":
                    init.ones_(parameter)
                elif name.endswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


def _is_dynabert(path: str | os.PathLike[str], hub: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved by one of our classes."""
    values, _ = PreTrainedConfig.get_config_dict(path, **hub)
    return values.get("model_type") == "dynabert"


@contextmanager
def _report_names(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have transformers' report of a state dict say which checkpoint that came from."""

    def name_source(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).replace("from: None", f"from: {path}")
        return True

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(name_source)
    try:
        yield
    finally:
        logger.removeFilter(name_source)


def _align(model: nn.Module) -> None:
    """Move weights that start at an odd address, as those of a mapped file do.

    The sums of PyTorch's own products depend on it in their last bit, and a model shall not depend
    on where its weights were read from.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _remove_older(directory: Path) -> None:
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if single.exists() and single.stat().st_mtime_ns < index.stat().st_mtime_ns:
        single.unlink()
