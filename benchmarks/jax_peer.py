"""P3: the encoder in JAX, jax.jit in bf16 with cuDNN attention, in a process of its own.

Weights, a two-sequence input and float32 references come from `gpu_peers.Bench.write_exchange`.
Times are wall-clock over many asynchronous dispatches and one wait, so at batch 1 they include
dispatch where that is slower than the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.geometry import BASE, TINY, Geometry, Subnet
from benchmarks.records import Deadline, Recorder, Timing, describe_machine

SECTION = "D inference"
PEER = "P3 jax.jit cudnn"
TOLERANCE = 3e-2
SUBNETS = ((1.0, 1.0), (0.25, 1.0), (0.5, 0.5))


def extract(arrays: dict[str, np.ndarray], subnet: Subnet) -> list[dict[str, np.ndarray]]:
    """The subnet's bfloat16 weights per layer; merged QKV as ``[3 * H * D, C]``."""
    import ml_dtypes

    geometry = subnet.geometry
    inner, neurons = subnet.num_heads * geometry.head_dim, subnet.intermediate_size
    layers = []
    for index in subnet.layers:
        w = {
            name: stacked[index].view(ml_dtypes.bfloat16)
            for name, stacked in arrays.items()
            if stacked.dtype == np.uint16
        }
        qkv = w["qkv_weight"].reshape(3, -1, geometry.hidden_size)[:, :inner]
        w["qkv_weight"] = qkv.reshape(3 * inner, geometry.hidden_size)
        w["qkv_bias"] = w["qkv_bias"].reshape(3, -1)[:, :inner].reshape(-1)
        w["out_weight"] = w["out_weight"][:, :inner]
        w["up_weight"], w["up_bias"] = w["up_weight"][:neurons], w["up_bias"][:neurons]
        w["down_weight"] = w["down_weight"][:, :neurons]
        layers.append({name: np.ascontiguousarray(value) for name, value in w.items()})
    return layers


def _norm(x: Any, scale: Any, bias: Any) -> Any:
    import jax.numpy as jnp

    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-12)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def encoder(layers: Any, hidden: Any, *, head_dim: int, implementation: str) -> Any:
    """All layers on ``[B, S, C]``, unrolled; each matrix product is ``x @ W.T``."""
    import jax

    for w in layers:
        batch_size, seq_len, _ = hidden.shape
        qkv = hidden @ w["qkv_weight"].T + w["qkv_bias"]
        heads = qkv.reshape(batch_size, seq_len, 3, -1, head_dim)
        query, key, value = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        context = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
        out = context.reshape(batch_size, seq_len, -1) @ w["out_weight"].T + w["out_bias"]
        hidden = _norm(out + hidden, w["attention_norm_weight"], w["attention_norm_bias"])
        up = jax.nn.gelu(hidden @ w["up_weight"].T + w["up_bias"], approximate=False)
        down = up @ w["down_weight"].T + w["down_bias"]
        hidden = _norm(down + hidden, w["ffn_norm_weight"], w["ffn_norm_bias"])
    return hidden


def _time(call: Any, *, count: int, samples: int, max_s: float) -> Timing:
    taken = []
    started = time.monotonic()
    for index in range(samples):
        clock = time.perf_counter()
        result = None
        for _ in range(count):
            result = call()
        result.block_until_ready()
        taken.append((time.perf_counter() - clock) * 1e3 / count)
        if index >= 2 and time.monotonic() - started > max_s:
            break
    return Timing(tuple(taken))


def measure(
    recorder: Recorder,
    arrays: dict[str, np.ndarray],
    geometry: Geometry,
    deadline: Deadline,
    *,
    implementation: str,
    smoke: bool,
) -> None:
    """Check, then time batch 128 and batch 1 at three subnets."""
    import jax
    import jax.numpy as jnp

    seq_len = arrays["hidden"].shape[1]
    run = jax.jit(partial(encoder, head_dim=geometry.head_dim, implementation=implementation))
    for width, depth in SUBNETS:
        subnet = Subnet(geometry, width, depth)
        fields: dict[str, Any] = {"peer": PEER, "subnet": subnet.name, "dtype": "bf16"}
        with recorder.guarded(SECTION, "jax", **fields):
            layers = jax.device_put(extract(arrays, subnet))
            small = jnp.asarray(arrays["hidden"], dtype=jnp.bfloat16)
            reference = arrays[f"reference {subnet.name}"].astype(np.float64)
            for batch_size in (3 if smoke else 128, 1):
                fields["shape"] = {"B": batch_size, "S": seq_len}
                case = "batch1" if batch_size == 1 else f"batch{batch_size}"
                if deadline.left_s() < 0:
                    recorder.add(SECTION, case, error="shed: no time left", **fields)
                    continue
                noise = np.random.default_rng(0).standard_normal(
                    (batch_size, seq_len, geometry.hidden_size)
                )
                rows = min(2, batch_size)
                hidden = jnp.asarray(noise, dtype=jnp.bfloat16).at[:rows].set(small[:rows])
                clock = time.monotonic()
                output = np.asarray(run(layers, hidden)[:rows].astype(jnp.float32))
                compile_s = time.monotonic() - clock
                expected = reference[:rows]
                error = float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
                count = 2 if smoke else (20 if batch_size > 1 else 100)
                timing = _time(partial(run, layers, hidden), count=count, samples=8, max_s=2.0)
                wrong = None if error < TOLERANCE else f"wrong: relative error {error:.2e}"
                recorder.add(
                    SECTION,
                    case,
                    timing=timing,
                    flops=subnet.flops(batch_size, seq_len),
                    ceiling_of="bf16",
                    rel_err=error,
                    error=wrong,
                    sequences_per_s=batch_size / timing.median_ms * 1e3,
                    clock="host, dispatches in a row and one wait",
                    notes=f"implementation {implementation}; first call {compile_s:.1f} s",
                    l2="warm",
                    **fields,
                )


def main() -> None:
    """Command line of the JAX process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--exchange", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=60)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.smoke else "cuda"
    machine = describe_machine(device, with_libraries=False)
    recorder = Recorder(
        options.out.parent, machine, options.commit, name=options.out.name, process="jax"
    )
    if importlib.util.find_spec("jax") is None:
        recorder.add(SECTION, "jax", peer=PEER, error="skipped: jax is not installed")
        return
    with recorder.guarded(SECTION, "jax", peer=PEER):
        import jax

        machine["jax"] = jax.__version__
        machine["hardware"] = jax.devices()[0].device_kind
        with np.load(options.exchange) as stored:
            arrays = dict(stored)
        measure(
            recorder,
            arrays,
            TINY if options.smoke else BASE,
            Deadline(options.budget_s),
            implementation="xla" if options.smoke else "cudnn",
            smoke=options.smoke,
        )


if __name__ == "__main__":
    main()
