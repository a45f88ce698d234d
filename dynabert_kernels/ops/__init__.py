"""The two ops, each a whole post-norm sublayer, and the table of what can run them."""

import dynabert_kernels.ops.attention
import dynabert_kernels.ops.ffn  # noqa: F401
from dynabert_kernels.ops._op import OPS, Backend, Op, forced_backend, use_backend

__all__ = ["OPS", "Backend", "Op", "forced_backend", "use_backend"]
