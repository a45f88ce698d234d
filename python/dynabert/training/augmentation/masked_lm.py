"""Replacements from a masked language model, for words that are one piece of its vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynabert.evaluation import evaluation_mode
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig
from dynabert.training.augmentation.sources import NUM_CANDIDATES, Contenders, contenders
from dynabert.training.augmentation.words import Word, is_word

# Float32 scores of one row differ by some 1e-6 of the largest with the rows beside it; where the
# last candidate is nearer than this to the next, the row is run alone and that decides.
_ROUNDING = 1e-4
_MIN_FILL = 0.85  # of a padded row
_MAX_ROWS = 256  # of a batch; their scores of 50,000 pieces take 50 MB


class _Copy(NamedTuple):
    """A sentence with one word masked, before it is padded; `answer` is the index of the word."""

    input_ids: npt.NDArray[np.int64]  # [num_tokens]
    type_ids: npt.NDArray[np.int64]  # [num_tokens]
    masked: int
    answer: int


class MaskedLMSource:
    """What a masked language model would put in a word's place, as in TinyBERT (Jiao et al., 2020).

    The model reads the sentence with the word masked, followed by the sentence as it is. Its best
    pieces that are words by themselves, and not the word itself, are the candidates; a word that is
    several pieces or unknown has none. A sentence too long to stand twice stands once, masked;
    words beyond the model's positions have none.

    Many masked copies go through the model at once, sorted by length, and only the masked token
    reaches the output layer. In float32 the candidates are those of the copy alone, whatever shares
    its batch: where rounding could decide which is the last, the copy is run again by itself. Equal
    scores are ranked by token id.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        subnet: SubnetConfig | None = None,
        num_candidates: int = NUM_CANDIDATES,
        batch_tokens: int = 8192,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        """Ask `model`, on the device it is on.

        Args:
            model: Any masked language model of Hugging Face, or `DynaBertForMaskedLM`.
            tokenizer: Its tokeniser, a fast one: the places of tokens are needed.
            name: What messages and records call the model; default: its ``name_or_path``.
            subnet: Part of a `DynaBertForMaskedLM` to run; default: all of it.
            num_candidates: Most candidates of a word.
            batch_tokens: Tokens per forward pass, padding included; bounds the memory.
            autocast_dtype: Compute in this type. Which of two nearly equal candidates is the last
                one then depends on the batch, so `batch_tokens` becomes a part of `identity`.

        Raises:
            ValueError: The tokeniser does not tell places, has no mask token or no pieces that are
                words; or a number is out of range.
            TypeError: `subnet` of a model that has none.
        """
        name = name or model.name_or_path or type(model).__name__
        if not tokenizer.is_fast or tokenizer.mask_token_id is None:
            missing = "mask token" if tokenizer.is_fast else "places of tokens in the text"
            raise ValueError(
                f"MaskedLMSource: the tokeniser of {name} has no {missing}, expected a fast "
                "tokeniser of a masked language model. Use another model."
            )
        if num_candidates < 1 or batch_tokens < 1:
            raise ValueError(
                f"MaskedLMSource: num_candidates={num_candidates}, batch_tokens={batch_tokens}, "
                "expected at least 1 of each."
            )
        if subnet is not None:
            if not isinstance(model, DynaBertPreTrainedModel):
                raise TypeError(
                    f"MaskedLMSource: subnet={subnet.name} of a {type(model).__name__}, expected a "
                    "DynaBertForMaskedLM. Convert the checkpoint, or leave out subnet."
                )
            model = model.with_subnet(subnet)
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = _max_tokens(model, tokenizer)
        self._num_candidates = num_candidates
        self._batch_tokens = batch_tokens
        self._autocast_dtype = autocast_dtype
        pieces = _whole_words(tokenizer)
        if not pieces:
            raise ValueError(
                f"MaskedLMSource: the vocabulary of {name} has no piece that is a word, expected "
                "some. Use another model."
            )
        self._words = list(pieces.values())
        self._piece_ids = torch.tensor(list(pieces), device=model.device)
        self._columns: dict[str, list[int]] = {}
        for column, word in enumerate(self._words):
            self._columns.setdefault(word.casefold(), []).append(column)
        shape = getattr(model, "default_subnet", None)
        self._identity: dict[str, Any] = {
            "kind": "masked-lm",
            "model": name,
            "sha256": _digest(model, tokenizer),
            "subnet": None if shape is None else repr(shape),
            "candidates": num_candidates,
            "autocast": None,
        }
        if autocast_dtype is not None:
            dtype = str(autocast_dtype).removeprefix("torch.")
            self._identity |= {"autocast": dtype, "batch_tokens": batch_tokens}

    @property
    def identity(self) -> dict[str, Any]:
        """The model with a digest of weights and tokeniser, its subnet, type and candidates."""
        return self._identity

    def candidates(self, words: Sequence[Word]) -> list[list[str]]:
        """See `CandidateSource`."""
        answers: list[list[str]] = [[] for _ in words]
        # no_grad, not inference_mode: what a model prepares here and keeps must stay usable in
        # training.
        with evaluation_mode(self._model), torch.no_grad():
            for batch in self._batches(list(self._copies(words))):
                for copy, best in zip(batch, self._contenders(batch, words), strict=True):
                    if len(batch) > 1 and self._is_close(best):
                        (best,) = self._contenders([copy], words)
                    order = best.scores.argsort(descending=True, stable=True)
                    columns = best.columns[order][: self._num_candidates].tolist()
                    answers[copy.answer] = [self._words[column] for column in columns]
        return answers

    def _copies(self, words: Sequence[Word]) -> Iterator[_Copy]:
        """One copy of its sentence for each word that is a single known piece."""
        places: dict[str, list[int]] = {}
        for index, word in enumerate(words):
            places.setdefault(word.text, []).append(index)
        texts = list(places)
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            type_ids = np.array(encoding.type_ids, dtype=np.int64)
            tokens = _tokens_by_span(text, encoding)
            for index in places[text]:
                token = tokens.get((words[index].start, words[index].end))
                if token is None or ids[token] == self._tokenizer.unk_token_id:
                    continue
                masked = ids.copy()
                masked[token] = self._tokenizer.mask_token_id
                yield _Copy(masked, type_ids, token, index)

    def _encodings(self, texts: list[str]) -> list[Any]:
        """Each text twice, as a pair, where the model has the positions for it; else once."""
        if not texts:
            return []
        # verbose=False: the tokeniser would warn about texts that are only measured here.
        plain = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        special = self._tokenizer.num_special_tokens_to_add(pair=True)
        fits = [2 * len(ids) + special <= self._max_tokens for ids in plain]
        pairs = [text for text, fit in zip(texts, fits, strict=True) if fit]
        singles = [text for text, fit in zip(texts, fits, strict=True) if not fit]
        options: dict[str, Any] = {"truncation": True, "max_length": self._max_tokens}
        twice = iter(self._tokenizer(pairs, pairs, **options).encodings or () if pairs else ())
        once = iter(self._tokenizer(singles, **options).encodings or () if singles else ())
        return [next(twice if fit else once) for fit in fits]

    def _batches(self, copies: list[_Copy]) -> Iterator[list[_Copy]]:
        """The copies from long to short, as many at once as `batch_tokens` and padding allow."""
        copies.sort(key=lambda copy: len(copy.input_ids), reverse=True)
        start = 0
        for end, copy in enumerate(copies):
            longest = len(copies[start].input_ids)
            is_full = end - start == _MAX_ROWS or (end - start + 1) * longest > self._batch_tokens
            if end > start and (is_full or len(copy.input_ids) < _MIN_FILL * longest):
                yield copies[start:end]
                start = end
        if copies:
            yield copies[start:]

    def _contenders(self, batch: Sequence[_Copy], words: Sequence[Word]) -> list[Contenders]:
        """Of each copy the whole words that are candidates, and those too close to them to tell."""
        logits = self._masked_logits(batch)
        if bool(logits.isnan().any()):
            raise FloatingPointError(
                f"MaskedLMSource: {self._identity['model']} gives scores that are no numbers, "
                "expected finite ones. Check its weights, or compute in float32."
            )
        scores = logits[:, self._piece_ids].float()
        itself = [
            (row, column)
            for row, copy in enumerate(batch)
            for column in self._columns.get(words[copy.answer].form.casefold(), ())
        ]
        if itself:
            rows, columns = torch.tensor(itself, device=scores.device).unbind(dim=1)
            scores[rows, columns] = -torch.inf
        slack: float | Tensor = 0.0
        if self._autocast_dtype is None:
            slack = _ROUNDING * logits.float().abs().amax(dim=1)
        return contenders(scores, self._num_candidates, slack)

    def _masked_logits(self, batch: Sequence[_Copy]) -> Tensor:
        """``[rows, vocab_size]``: one forward pass, with the output layer on masked tokens only."""
        shape = len(batch), max(len(copy.input_ids) for copy in batch)
        padded = {
            "input_ids": np.full(shape, self._tokenizer.pad_token_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "token_type_ids": np.full(shape, self._tokenizer.pad_token_type_id, dtype=np.int64),
        }
        for row, copy in enumerate(batch):
            length = len(copy.input_ids)
            padded["input_ids"][row, :length] = copy.input_ids
            padded["attention_mask"][row, :length] = 1
            padded["token_type_ids"][row, :length] = copy.type_ids
        device = self._model.device
        inputs = {
            name: torch.from_numpy(values).to(device)
            for name, values in padded.items()
            if name in self._tokenizer.model_input_names
        }
        rows = torch.arange(len(batch), device=device)
        masked = torch.tensor([copy.masked for copy in batch], device=device)

        def keep_masked(_: nn.Module, args: tuple[Any, ...]) -> Any:
            hidden = args[0]
            return (hidden[rows, masked][:, None],) if hidden.shape[:2] == shape else None

        decoder = self._model.get_output_embeddings()
        handle = None if decoder is None else decoder.register_forward_pre_hook(keep_masked)
        dtype = self._autocast_dtype
        try:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits: Tensor = self._model(**inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        # A model may apply its output layer in another way than by calling it.
        return logits[rows, masked] if logits.shape[1] == shape[1] else logits[:, 0]

    def _is_close(self, best: Contenders) -> bool:
        return self._autocast_dtype is None and len(best.columns) > self._num_candidates


def load_masked_lm(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model and its tokeniser from a folder or a hub id, in float32.

    Raises:
        OSError: There is no such model.
        ValueError: The checkpoint has no masked-language-model head.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForMaskedLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"load_masked_lm: model={name!r}, expected a masked language model with its tokeniser, "
            f"in a folder or on the hub. ({reason})"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"load_masked_lm: model={name!r} has no {', '.join(sorted(info['missing_keys']))}, "
            "expected a masked language model. Use one with its head, such as a pretrained BERT."
        )
    return model, tokenizer


def _whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The pieces that stand for a word by themselves, by id, ascending.

    Asked of the tokeniser's own way back to text: after another piece, such a one begins with a
    space. So "##s", byte-level "ing" and "▁" need no rules of their own.
    """
    special = set(tokenizer.all_special_ids)
    pieces = sorted((id_, piece) for piece, id_ in tokenizer.get_vocab().items())
    anchor = next((piece for id_, piece in pieces if id_ not in special and piece.isalpha()), "")
    before = tokenizer.convert_tokens_to_string([anchor])
    words = {}
    for id_, piece in pieces:
        word = tokenizer.convert_tokens_to_string([anchor, piece])[len(before) :]
        if id_ not in special and word.startswith(" ") and is_word(word[1:]):
            words[id_] = word[1:]
    return words


def _tokens_by_span(text: str, encoding: Any) -> dict[tuple[int, int], int]:
    """Where the tokens of the first copy of a text stand in it, without the space before them."""
    spans = {}
    for token, ((start, end), sequence) in enumerate(
        zip(encoding.offsets, encoding.sequence_ids, strict=True)
    ):
        if sequence == 0:
            while start < end and text[start].isspace():
                start += 1
            spans[start, end] = token
    return spans


def _max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest sequence the model has positions for; RoBERTa numbers them from its padding index."""
    limits = [tokenizer.model_max_length]
    if (positions := getattr(model.config, "max_position_embeddings", None)) is not None:
        limits.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padding = -1 if module.padding_idx is None else module.padding_idx
            limits.append(module.num_embeddings - (padding + 1))
    return min(limits)


def _digest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all weights and of the tokeniser."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # These are left by whoever called it last.
    settings |= {"truncation": None, "padding": None}
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
