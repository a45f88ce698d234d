"""The grid of a sentence encoder as sentence-transformers sees it: score, and speed, by subnet.

    python -m benchmarks.sentence_grid RUN --name stsb-minilm-encoder --data-dir DATA \\
      --out benchmarks/results/sentence_grid.jsonl

The encoder is loaded as a `SentenceTransformer`; each subnet encodes the development pairs of STS-B
by ``encode(texts, subnet=...)`` and is scored by the correlation of its cosines with the human
scores. Each row has beside it what `dynabert.training.task_agnostic.evaluate_similarity` finds for
the same subnet, on another tokeniser call, other batches and another pooling; a row whose two
scores differ by more than `LARGEST_DIFFERENCE` has an ``error`` and no score, and the status is 1.

With ``--seconds N`` it times ``encode`` of the first texts instead: the subnets and the peers (any
sentence-transformers models) in turn, sample by sample, on a machine that should be quiet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer, __version__
from transformers import AutoTokenizer

from benchmarks.records import Recorder, describe_machine
from dynabert.cli._place import ModelPlace
from dynabert.data.collators import DynamicPadCollator, encode
from dynabert.data.examples import Example
from dynabert.data.tasks import load_task
from dynabert.latency_table import hardware_name
from dynabert.sentence_encoder import load_sentence_transformer
from dynabert.subnet import SubnetConfig
from dynabert.training.problems import row_length
from dynabert.training.task_agnostic import evaluate_similarity
from dynabert_kernels.timing import measure

LARGEST_DIFFERENCE = 1e-4
SCORES, SPEED = "scores", "speed"


def similarity_scores(
    model: SentenceTransformer,
    first: Sequence[str],
    second: Sequence[str],
    scores: Sequence[float],
    subnet: SubnetConfig,
    batch_size: int,
) -> dict[str, float]:
    """Correlations of the cosines of ``encode(..., subnet=subnet)`` with `scores`."""
    embeddings = [
        model.encode(
            list(texts), batch_size=batch_size, convert_to_tensor=True, subnet=subnet
        ).float()
        for texts in (first, second)
    ]
    cosines = torch.cosine_similarity(*embeddings).cpu().numpy()
    return {
        "spearman": float(spearmanr(cosines, scores).statistic),
        "pearson": float(pearsonr(cosines, scores).statistic),
    }


def own_scores(
    place: ModelPlace,
    first: Sequence[str],
    second: Sequence[str],
    scores: Sequence[float],
    subnets: Sequence[SubnetConfig],
) -> dict[SubnetConfig, float]:
    """Spearman by this package alone, as ``dynabert evaluate`` finds it."""
    trained = place.run["arguments"] if place.run else {}
    model = place.load_model().eval()
    tokenizer = AutoTokenizer.from_pretrained(place.model_dir)
    longest = row_length(trained.get("max_length"), "regression", model.config)
    rows = evaluate_similarity(
        model,
        *(
            encode([Example(text, None, None) for text in texts], tokenizer, longest)
            for texts in (first, second)
        ),
        scores,
        DynamicPadCollator(tokenizer),
        subnets,
        pooling=trained.get("pooling", "mean"),
        progress=False,
    )
    return {row.subnet: row.primary for row in rows}


def record_scores(recorder: Recorder, options: argparse.Namespace) -> bool:
    """A row for each subnet of the grid; whether all agree with `own_scores`."""
    place = ModelPlace.find(options.model)
    model = load_sentence_transformer(options.model, device="cpu", local_files_only=True)
    subnets = place.subnets(place.load_model(), None, None)
    pairs = [
        item
        for item in load_task("stsb", options.data_dir, with_train=False).validation
        if isinstance(item, Example)
    ]
    first, second = [item.text for item in pairs], [str(item.text_pair) for item in pairs]
    truth = [float(item.label or 0.0) for item in pairs]
    expected = own_scores(place, first, second, truth, subnets)
    right = True
    for subnet in subnets:
        found = similarity_scores(model, first, second, truth, subnet, options.batch_size)
        fields: dict[str, Any] = {
            "run": options.name,
            "width": subnet.width_mult,
            "depth": subnet.depth_mult,
            "num_rows": len(pairs),
            "own_spearman": expected[subnet],
        }
        difference = abs(found["spearman"] - expected[subnet])
        if difference > LARGEST_DIFFERENCE:
            right = False
            fields["error"] = f"spearman {found['spearman']} by encode, {expected[subnet]} without"
        else:
            fields |= {**found, "difference": difference}
        recorder.add(SCORES, subnet.name, **fields)
        print(f"{subnet.name:14} {found['spearman']:.4f}  difference {difference:.1e}", flush=True)
    return right


def record_speed(recorder: Recorder, options: argparse.Namespace) -> None:
    """A row for each subnet and each peer: the time of one ``encode`` of the first texts."""
    torch.set_num_threads(options.threads)
    place = ModelPlace.find(options.model)
    model = load_sentence_transformer(options.model, device="cpu", local_files_only=True)
    subnets = place.subnets(place.load_model(), None, None)
    pairs = load_task("stsb", options.data_dir, with_train=False).validation
    texts = [item.text for item in pairs if isinstance(item, Example)][: options.texts]
    how = {"batch_size": options.batch_size}

    def at(subnet: SubnetConfig) -> Callable[[], object]:
        return lambda: model.encode(texts, subnet=subnet, **how)

    def of(peer: SentenceTransformer) -> Callable[[], object]:
        return lambda: peer.encode(texts, **how)

    ours = {subnet.name: subnet for subnet in subnets}
    peers = {name: SentenceTransformer(path, device="cpu") for name, path in options.peer}
    variants = {name: at(subnet) for name, subnet in ours.items()}
    variants |= {f"peer {name}": of(peer) for name, peer in peers.items()}
    for name, timing in measure(variants, seconds=options.seconds, min_samples=10).items():
        subnet = ours.get(name)
        recorder.add(
            SPEED,
            name,
            timing=timing,
            run=options.name,
            width=subnet and subnet.width_mult,
            depth=subnet and subnet.depth_mult,
            texts=len(texts),
            texts_per_s=len(texts) / timing.median_ms * 1e3,
            threads=options.threads,
            **how,
        )
        print(f"{name:20} {len(texts) / timing.median_ms * 1e3:8.0f} texts/s", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a run, or of a model alone")
    parser.add_argument("--name", required=True, help="name of the recipe, repeated in each row")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.0, help="time encode, for so long")
    parser.add_argument("--peer", nargs=2, metavar=("NAME", "DIR"), action="append", default=[])
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    machine = {
        **describe_machine("cpu"),
        "hardware": hardware_name(torch.device("cpu")),
        "sentence_transformers": __version__,
    }
    recorder = Recorder(options.out.parent, machine, name=options.out.name)
    if options.seconds > 0:
        record_speed(recorder, options)
    elif not record_scores(recorder, options):
        sys.exit(1)


if __name__ == "__main__":
    main()
