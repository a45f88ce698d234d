"""FSDP2, by which several processes share the weights of a student, as accelerate configures it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule


def prepare_sharding(plugin: Any) -> None:
    """Check the settings, and shard by layer unless they name other modules.

    Args:
        plugin: accelerate's ``FullyShardedDataParallelPlugin``.

    Raises:
        ValueError: FSDP version 1, or a way of loading that gives a model to one process only.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"DynaBertTrainer: fsdp_version={plugin.fsdp_version}, expected 2. Launch with "
            "--fsdp_version 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "DynaBertTrainer: fsdp_cpu_ram_efficient_loading=True, expected False, as every "
            "process keeps a whole teacher. Launch with --fsdp_cpu_ram_efficient_loading false."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate's own choice has the embeddings in it, whose words it then shards once more.
        plugin.transformer_cls_names_to_wrap = ["DynaBertLayer"]


def whole_weights(model: nn.Module) -> dict[str, Any] | None:
    """The weights of a sharded model in one piece, for the first process; None if not sharded.

    All processes have to call this together.
    """
    if not isinstance(model, FSDPModule):
        return None
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
