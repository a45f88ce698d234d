"""Training without labels: pooling, learning the teacher's embeddings, similarity scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from dynabert import DynaBertModel, SubnetConfig, subnet_grid
from dynabert.data.collators import encode
from dynabert.data.examples import Example
from dynabert.training import DynaBertTrainer, RunArguments, Stage, run_stages
from dynabert.training.task_agnostic import embed, evaluate_fidelity, evaluate_similarity, pool

FULL = SubnetConfig()
WIDTHS = tuple(subnet_grid((1, 0.5, 0.25), (1,)))
MakeEncoder = Callable[..., DynaBertModel]


def test_pooling_reads_real_tokens_only() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden, mask).tolist() == [[1.0, 2.0], [9.0, 10.0]]
    assert pool(hidden, mask, "cls").tolist() == [[0.0, 1.0], [8.0, 9.0]]
    assert pool(hidden, torch.zeros(2, 3)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="pooling='max', expected mean or cls"):
        pool(hidden, mask, "max")  # type: ignore[arg-type]


def test_embeddings_come_in_the_order_of_the_rows(
    make_encoder: MakeEncoder, make_rows: Any, collator: Any
) -> None:
    encoder, rows = make_encoder().train(), make_rows(11, "none")
    whole, narrow = embed(encoder, rows, collator, [FULL, WIDTHS[-1]], batch_size=3, progress=False)
    assert encoder.training
    assert whole.shape == narrow.shape == (11, 32)
    encoder.eval()
    for index in range(11):
        batch = collator([rows[index]])
        with torch.no_grad():
            hidden = encoder(**batch, subnet=WIDTHS[-1]).last_hidden_state
        torch.testing.assert_close(narrow[index], hidden[0].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_training_brings_every_subnet_nearer_to_the_teacher(
    pooling: Any, make_encoder: MakeEncoder, make_arguments: Any, make_rows: Any, collator: Any
) -> None:
    rows, fresh = make_rows(48, "none"), make_rows(24, "none", seed=5)
    teacher, student = make_encoder(seed=1), make_encoder(seed=1)
    options: dict[str, Any] = {"pooling": pooling, "progress": False}
    (target,) = embed(teacher, fresh, collator, [FULL], **options)
    before = evaluate_fidelity(student, target, fresh, collator, WIDTHS, **options)
    assert before[0].primary == pytest.approx(1.0)
    trainer = DynaBertTrainer(
        student,
        make_arguments(num_train_epochs=12, learning_rate=3e-3),
        stage=Stage("width", WIDTHS, "full", 1.0, 0.1),
        problem="none",
        train_dataset=rows,
        data_collator=collator,
        teacher=teacher,
        pooling=pooling,
    )
    trainer.train()
    after = evaluate_fidelity(student, target, fresh, collator, WIDTHS, **options)
    for old, new in zip(before[1:], after[1:], strict=True):
        assert 1 - new.primary < 0.5 * (1 - old.primary), new.subnet.name
    assert after[0].primary > 0.95


def test_a_run_without_labels_gives_an_elastic_encoder(
    make_encoder: MakeEncoder, make_data: Any, tokenizer: Any, tmp_path: Path
) -> None:
    make_encoder(seed=4, hidden_dropout_prob=0.1).save_pretrained(tmp_path / "encoder")
    run = RunArguments(
        tmp_path / "run",
        stages=("width", "width-depth"),
        widths=(1.0, 0.5),
        learning_rate=3e-3,
        batch_size=8,
        width_epochs=6,
        width_depth_epochs=6,
        bf16=False,
        use_cpu=True,
        progress=False,
    )
    result = run_stages(tmp_path / "encoder", make_data("none", 96), tokenizer, run)
    assert result.report.primary_metric == "cosine"
    assert len(result.report.rows) == 4
    assert result.report.mean > 0.85
    encoder = DynaBertModel.from_pretrained(result.model_dir, add_pooling_layer=False)
    assert encoder.rewiring is not None and encoder.rewiring.provenance["rule"] == "paper"


def test_similarity_is_the_correlation_of_cosines(
    make_encoder: MakeEncoder, tokenizer: Any, collator: Any
) -> None:
    encoder = make_encoder()
    pairs = [("a b great", "c great"), ("d e", "f awful g"), ("h", "h"), ("i j k", "awful")]
    scores = [3.5, 1.0, 5.0, 0.0]
    first, second = (
        encode([Example(pair[side], None, None) for pair in pairs], tokenizer, 24)
        for side in (0, 1)
    )
    rows = evaluate_similarity(
        encoder, first, second, scores, collator, [FULL, WIDTHS[-1]], progress=False
    )
    for row in rows:
        cosines = []
        for i in range(4):
            a, b = (
                encoder(**collator([side[i]]), subnet=row.subnet).last_hidden_state[0].mean(0)
                for side in (first, second)
            )
            cosines.append(F.cosine_similarity(a, b, dim=0).item())
        expected = scipy.stats.spearmanr(cosines, scores).statistic
        assert row.primary == row.metrics["spearman"] == pytest.approx(expected)
        assert row.metrics["pearson"] == pytest.approx(
            scipy.stats.pearsonr(cosines, scores).statistic, abs=1e-4
        )
    with pytest.raises(ValueError, match="4 first sentences, 4 second, 3 scores"):
        evaluate_similarity(encoder, first, second, scores[:3], collator, [FULL], progress=False)
