"""Work done by two processes of one gloo group.

They are children of multiprocessing's fork server, which has imported this module and so all there
is to import.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dynabert.training  # noqa: F401  for the fork server
from dynabert.training.processes import join_processes, leave_processes

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


def in_two_processes(
    port: int, folder: Path, work: Callable[..., Any], *args: Any, seconds: float = 120
) -> list[Any]:
    """What ``work(*args)`` returns in each process: tensors, numbers, texts and containers of them.

    Raises:
        AssertionError: A process ended with an error, or not within `seconds`; the message has its
            traceback.
    """
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, port, folder, work, args)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert codes == [0, 0], f"exit codes {codes}\n" + "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _run(
    rank: int, port: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        join_processes(use_cpu=True)
        torch.save(work(*args), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        leave_processes()
