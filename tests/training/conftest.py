"""A tiny model, tokeniser and task, small enough that a stage of training takes a second."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer, PreTrainedTokenizerBase, TrainingArguments

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, DynaBertModel
from dynabert.data.collators import DynamicPadCollator, EncodedDataset, encode
from dynabert.data.examples import (
    Answer,
    AnyExample,
    Example,
    Question,
    TaggedSentence,
    TaskData,
    TaskSpec,
)

SENTIMENT = TaskSpec(
    name="toy",
    problem="classification",
    text_fields=("text",),
    label_names=("bad", "good"),
    metrics=("accuracy",),
    primary_metric="accuracy",
)
LENGTH = TaskSpec(
    name="toy-score",
    problem="regression",
    text_fields=("text",),
    metrics=("spearman", "pearson"),
    primary_metric="spearman",
)
PLAIN = TaskSpec(name="toy-text", problem="none", text_fields=("text",))
TAGS = TaskSpec(
    name="toy-tags",
    problem="token-classification",
    text_fields=("tokens",),
    label_names=("O", "B-BAD", "B-GOOD", "I-BAD", "I-GOOD"),
    metrics=("f1", "precision", "recall"),
    primary_metric="f1",
)
QUESTIONS = TaskSpec(
    name="toy-questions",
    problem="question-answering",
    text_fields=("question", "context"),
    metrics=("f1", "exact_match"),
    primary_metric="f1",
)
_FILLERS = list("abcdefghijklmn")
_TELLING = {0: "awful", 1: "great"}


@pytest.fixture(autouse=True)
def one_thread(seeds_and_threads: None) -> None:
    """Tensors here are too small to share; threads would spend the time waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_FILLERS, *_TELLING.values()]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


@pytest.fixture(scope="session")
def config() -> DynaBertConfig:
    return tiny_config()


def tiny_config(**changes: Any) -> DynaBertConfig:
    """Two layers of four heads; no dropout unless asked for, so that numbers can be compared."""
    sizes: dict[str, Any] = {
        "vocab_size": 21,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,  # at 0.02 a tiny network hardly depends on its input
    }
    return DynaBertConfig(**{**sizes, **changes})


@pytest.fixture
def make_model() -> Callable[..., DynaBertForSequenceClassification]:
    """``make_model(seed=0, **config changes)``: a random classifier, weights fixed by the seed."""

    def make(seed: int = 0, **changes: Any) -> DynaBertForSequenceClassification:
        torch.manual_seed(seed)
        return DynaBertForSequenceClassification(tiny_config(**changes)).eval()

    return make


@pytest.fixture
def make_encoder() -> Callable[..., DynaBertModel]:
    """``make_encoder(seed=0, **config changes)``: a random encoder without pooler."""

    def make(seed: int = 0, **changes: Any) -> DynaBertModel:
        torch.manual_seed(seed)
        return DynaBertModel(tiny_config(**changes), add_pooling_layer=False).eval()

    return make


def toy_examples(count: int, problem: str = "classification", seed: int = 0) -> list[Example]:
    """Sentences of 2 to 9 words; one word tells the class, and for a score, how often it occurs."""
    generator = random.Random(seed)
    examples = []
    for line in range(count):
        words = generator.choices(_FILLERS, k=generator.randrange(1, 8))
        label = generator.randrange(2)
        repeats = generator.randrange(1, 3) if problem == "regression" else 1
        for _ in range(repeats):
            words.insert(generator.randrange(len(words) + 1), _TELLING[label])
        score = float(repeats if label else -repeats)
        value = {"classification": label, "regression": score, "none": None}[problem]
        examples.append(Example(" ".join(words), None, value, line))
    return examples


def toy_sentences(count: int, seed: int = 0) -> list[TaggedSentence]:
    """Sentences of 3 to 9 words, in which one telling word, or two of them, are an entity."""
    generator = random.Random(seed)
    sentences = []
    for line in range(count):
        words = generator.choices(_FILLERS, k=generator.randrange(2, 8))
        tags = [0] * len(words)
        label, length = generator.randrange(2), generator.randrange(1, 3)
        where = generator.randrange(len(words) + 1)
        words[where:where] = [_TELLING[label]] * length
        tags[where:where] = [1 + label, 3 + label][:length]
        sentences.append(TaggedSentence(tuple(words), tuple(tags), line))
    return sentences


def toy_questions(count: int, seed: int = 0) -> list[Question]:
    """Contexts of 4 to 12 words; the answer is the telling word, and the question says nothing."""
    generator = random.Random(seed)
    questions = []
    for number in range(count):
        words = generator.choices(_FILLERS, k=generator.randrange(3, 12))
        answer = _TELLING[generator.randrange(2)]
        words.insert(generator.randrange(len(words) + 1), answer)
        context = " ".join(words)
        answers = (Answer(answer, context.index(answer)),)
        questions.append(Question(f"q{number}", generator.choice(_FILLERS), context, answers))
    return questions


def toy_task(problem: str, count: int, seed: int) -> tuple[TaskSpec, Sequence[AnyExample]]:
    """A learnable task and examples of it."""
    if problem == "token-classification":
        return TAGS, toy_sentences(count, seed)
    if problem == "question-answering":
        return QUESTIONS, toy_questions(count, seed)
    spec = {"classification": SENTIMENT, "regression": LENGTH, "none": PLAIN}[problem]
    return spec, toy_examples(count, problem, seed)


@pytest.fixture
def make_data() -> Callable[..., TaskData]:
    """``make_data(problem, train rows, validation rows)``: a learnable task."""

    def make(problem: str = "classification", num_train: int = 64, num_val: int = 32) -> TaskData:
        spec, train = toy_task(problem, num_train, seed=1)
        return TaskData(
            spec=spec,
            train=train,
            validation=toy_task(problem, num_val, seed=2)[1],
            source="made up",
            fingerprint=f"{problem}-{num_train}-{num_val}",
        )

    return make


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerBase) -> DynamicPadCollator:
    return DynamicPadCollator(tokenizer)


@pytest.fixture
def make_rows(tokenizer: PreTrainedTokenizerBase) -> Callable[..., EncodedDataset]:
    """``make_rows(count, problem)``: tokenised toy examples."""

    def make(count: int, problem: str = "classification", seed: int = 0) -> EncodedDataset:
        return encode(toy_examples(count, problem, seed), tokenizer, 24)

    return make


@pytest.fixture
def make_batches(
    make_rows: Callable[..., EncodedDataset], collator: DynamicPadCollator
) -> Callable[..., list[dict[str, torch.Tensor]]]:
    """``make_batches(sizes, problem)``: padded batches of ragged rows with labels."""

    def make(sizes: tuple[int, ...], problem: str = "classification") -> list[dict[str, Any]]:
        rows = make_rows(sum(sizes), problem)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [
            collator([rows[i] for i in range(end - size, end)])
            for size, end in zip(sizes, ends, strict=True)
        ]

    return make


@pytest.fixture
def make_arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """``make_arguments(**changes)``: quiet float32 training on the CPU without checkpoints."""

    def make(**changes: Any) -> TrainingArguments:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "trainer"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            "seed": 3,
        }
        return TrainingArguments(**{**settings, **changes})

    return make


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
