"""The command ``dynabert``, with FSDP on the CPU if ``accelerate launch --use_fsdp`` starts it;
accelerate itself passes over FSDP there without a word."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_sharding_on_the_cpu() -> None:
    """Have accelerate set up FSDP on the CPU as it does on GPUs."""
    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    from dynabert.cli import app

    allow_sharding_on_the_cpu()
    app(prog_name="dynabert")
