"""``dynabert augment``: texts with some words replaced, for the stages that need no labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli.train import set_threads
from dynabert.training.arguments import RunArguments

if TYPE_CHECKING:
    from dynabert.training.augmentation import CandidateSource


@app.command()
def augment(
    task: options.Task,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="A .jsonl file; an unfinished one goes on.")
    ],
    data_dir: options.DataDir = None,
    train_file: options.TrainFile = None,
    validation_file: options.ValidationFile = None,
    text_column: options.TextColumn = "text",
    pair_column: options.PairColumn = None,
    from_hub: options.FromHub = False,
    max_train_rows: Annotated[
        int | None, typer.Option(help="Augment a seeded choice of this many rows.")
    ] = None,
    mlm: Annotated[
        str | None,
        typer.Option(
            metavar="M", help="Masked language model, for words that are one piece to it."
        ),
    ] = None,
    word_vectors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Vectors in GloVe's text form, for the other words."),
    ] = None,
    wordnet: Annotated[
        bool, typer.Option("--wordnet", help="WordNet's synonyms, for what is left.")
    ] = False,
    attempts: Annotated[
        int | None, typer.Option(help="Draws per text; default: the task's, 10 to 30.")
    ] = None,
    probability: Annotated[
        float, typer.Option(help="Chance of a word to be replaced in one draw.")
    ] = 0.4,
    candidates: Annotated[int, typer.Option(help="Most replacements to choose from.")] = 15,
    seed: Annotated[
        int, typer.Option(help="Chooses rows, as for train, and replacements.")
    ] = RunArguments.seed,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens per forward pass of the masked language model.")
    ] = 8192,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda; default: cuda if there is one.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 autocast.")] = False,
    threads: options.Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Write variants of the training texts, with some words replaced, to a file.

    Words are replaced by what a masked language model, word vectors or WordNet put in their place;
    at least one of the three is needed. Labels are not read. The file is for train's
    --augmented-file; give both the same --seed, so that rows train sets aside are not in it.
    """
    from dynabert.data.examples import Example
    from dynabert.data.tasks import load_task
    from dynabert.training.augmentation import (
        ATTEMPTS,
        DEFAULT_ATTEMPTS,
        AugmentationArguments,
        FirstAnswer,
        check_task,
        write_augmented,
    )

    if mlm is None and word_vectors is None and not wordnet:
        raise ValueError(
            "augment: no source of words, expected --mlm, --word-vectors or --wordnet. "
            "Give one or several."
        )
    set_threads(threads)
    data = load_task(
        task,
        data_dir,
        train_file=train_file,
        validation_file=validation_file,
        text_column=text_column,
        pair_column=pair_column,
        label_column=None,
        max_train_rows=max_train_rows,
        seed=seed,
        from_hub=from_hub,
    )
    check_task(data.spec)
    arguments = AugmentationArguments(
        attempts=ATTEMPTS.get(data.spec.name, DEFAULT_ATTEMPTS) if attempts is None else attempts,
        probability=probability,
        seed=seed,
    )
    how = {"batch_tokens": batch_tokens, "device": device, "bf16": bf16}
    sources = _sources(mlm, word_vectors, wordnet, candidates, how)
    examples = [example for example in data.train if isinstance(example, Example)]
    made = write_augmented(out, examples, FirstAnswer(sources), arguments)
    rate = made.num_examples / made.seconds
    text = (
        f"{made.num_rows} rows from {made.num_examples}, {made.num_rows / made.num_examples:.1f} "
        f"each, in {made.seconds:.1f} s, {rate:.1f} rows/s.\nThey are in {made.path}."
    )
    document = {
        "file": str(made.path),
        "source_rows": made.num_examples,
        "rows": made.num_rows,
        "seconds": made.seconds,
        "source_rows_per_second": rate,
    }
    finish(text, document, json_file)


def _sources(
    mlm: str | None,
    word_vectors: Path | None,
    wordnet: bool,
    candidates: int,
    how: dict[str, Any],
) -> list[CandidateSource]:
    """What was asked for, in the order a word is looked up."""
    import torch

    from dynabert.training.augmentation import (
        MaskedLMSource,
        WordNetSource,
        WordVectorSource,
        load_masked_lm,
    )

    sources: list[CandidateSource] = []
    if mlm is not None:
        device = options.parse_device(how["device"])
        model, tokenizer = load_masked_lm(mlm)
        torch.nn.Module.to(model, device)
        source = MaskedLMSource(
            model,
            tokenizer,
            name=mlm,
            num_candidates=candidates,
            batch_tokens=how["batch_tokens"],
            autocast_dtype=torch.bfloat16 if how["bf16"] else None,
        )
        sources.append(source)
    if word_vectors is not None:
        sources.append(WordVectorSource(word_vectors, num_candidates=candidates))
    if wordnet:
        sources.append(WordNetSource(num_candidates=candidates))
    return sources
