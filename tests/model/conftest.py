"""Small random Hugging Face models, and the batches the model tests run them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import dynabert

# Odd on purpose: the smallest head dim that kernels take, a vocabulary that is no power of two.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "intermediate_size": 84,
    "max_position_embeddings": 40,
    "num_labels": 3,
}

MakeHF = Callable[..., PreTrainedModel]
MakeOurs = Callable[..., Any]
MakeBatch = Callable[..., dict[str, Tensor]]


@pytest.fixture(autouse=True)
def one_thread(seeds_and_threads: None) -> None:
    """Tiny matrices: handing work to a second thread takes longer than doing it."""
    torch.set_num_threads(1)


@pytest.fixture(params=["bert", "roberta"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_hf() -> MakeHF:
    """Hugging Face model in eval mode, every weight random: `make_hf("bert", "ForMaskedLM")`."""

    def make(architecture: str, head: str = "ForSequenceClassification", **changes: Any) -> Any:
        family = "Bert" if architecture == "bert" else "Roberta"
        sizes = {**SIZES, "num_hidden_layers": 6, **changes}
        if head == "ForQuestionAnswering":
            sizes["num_labels"] = 2
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = getattr(transformers, f"{family}{head}")(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.1 + (1.0 if "orm.weight" in name else 0.0))
        return model.eval()

    return make


@pytest.fixture
def ours(tmp_path: Path) -> MakeOurs:
    """The same weights in one of our classes, through the disk: `ours(hf_model, "ForMaskedLM")`."""

    def load(model: PreTrainedModel, head: str = "ForSequenceClassification", **kw: Any) -> Any:
        folder = tmp_path / f"{type(model).__name__}-{id(model)}"
        model.save_pretrained(folder)
        return getattr(dynabert, f"DynaBert{head}").from_pretrained(folder, **kw)

    return load


@pytest.fixture
def make_batch() -> MakeBatch:
    """Padded batch of random tokens: `make_batch(config, lengths=(7, 1, 5), side="right")`."""

    def make(
        config: Any,
        lengths: tuple[int, ...] = (17, 1, 6),
        side: str = "right",
        seed: int = 0,
        extra: int = 2,
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        seq_len = max(lengths) + extra
        shape = (len(lengths), seq_len)
        ids = torch.randint(3, config.vocab_size, shape, generator=generator)
        types = torch.randint(0, config.type_vocab_size, shape, generator=generator)
        place = torch.arange(seq_len).expand(shape)
        length = torch.tensor(lengths)[:, None]
        mask = place < length if side == "right" else place >= seq_len - length
        ids[~mask] = config.pad_token_id
        return {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": types}

    return make
