"""The search on a made-up score: what it keeps, how it goes on, and what it is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynabert import DynaBertConfig, DynaBertModel, extract
from dynabert.latency_predictor import build_predictor
from dynabert.search import BATCH_SIZE, JOURNAL, Found, SubnetSearch
from dynabert.search_gain import Measured, SearchGain
from dynabert.search_space import SearchSpace
from dynabert.subnet import SubnetConfig, subnet_grid

pytest.importorskip("optuna", reason="the extra `search` is not installed")

SPACE = SearchSpace(num_layers=3, num_heads=4, neurons=(16, 32, 64))
# What a head and a neuron of each layer are worth: far from alike, so uneven subnets are better.
WORTH = (1.0, 9.0, 3.0)


def score_of(subnet: SubnetConfig) -> float:
    assert isinstance(subnet.num_heads, tuple)
    assert isinstance(subnet.intermediate_size, tuple)
    assert subnet.layers is not None
    return sum(
        WORTH[layer] * (heads + neurons / 16)
        for layer, heads, neurons in zip(
            subnet.layers, subnet.num_heads, subnet.intermediate_size, strict=True
        )
    )


def latency_of(subnet: SubnetConfig) -> float:
    assert isinstance(subnet.num_heads, tuple)
    assert isinstance(subnet.intermediate_size, tuple)
    return 1.0 + sum(subnet.num_heads) + sum(subnet.intermediate_size) / 16


class Scorer:
    """Scores subnets, and knows which it was asked for; fails at the calls it is told to."""

    def __init__(self, fail_at: Sequence[int] = ()) -> None:
        self.asked: list[list[str]] = []
        self._fail_at = fail_at

    def __call__(self, subnets: Sequence[SubnetConfig]) -> list[float]:
        self.asked.append([subnet.name for subnet in subnets])
        if len(self.asked) in self._fail_at:
            raise KeyboardInterrupt
        return [score_of(subnet) for subnet in subnets]


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., SubnetSearch]:
    """Opens a search with a small population in a folder of that name."""

    def open_search(name: str = "search", **change: object) -> SubnetSearch:
        options: dict[str, object] = {"seed": 3, "population_size": BATCH_SIZE, **change}
        return SubnetSearch(tmp_path / name, SPACE, latency_of, **options)  # type: ignore[arg-type]

    return open_search


@pytest.fixture
def model() -> DynaBertModel:
    config = DynaBertConfig(
        vocab_size=31,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=9,
    )
    return DynaBertModel(config, add_pooling_layer=False).eval()


def test_a_model_of_uneven_layers_is_refused(model: DynaBertModel) -> None:
    uneven = extract(model, SubnetConfig(num_heads=(4, 2, 4)))
    with pytest.raises(ValueError, match=r"SearchSpace: .*\(4, 2, 4\) heads"):
        SearchSpace.of(uneven)
    with pytest.raises(ValueError, match="build_predictor: "):
        build_predictor(uneven)


GENES = st.fixed_dictionaries(
    {name: st.integers(low, high) for name, (low, high) in SPACE.bounds.items()}
)


@settings(deadline=None)
@given(GENES)
def test_genes_and_subnets_are_inverse(genes: dict[str, int]) -> None:
    subnet = SPACE.subnet(genes)
    shape = subnet.resolve(num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    assert SPACE.subnet(SPACE.genes(shape)) == subnet
    kept = [layer for layer in range(3) if genes[f"keep{layer}"]] or [2]
    assert [layer.index for layer in shape.layers] == kept
    for layer in shape.layers:
        assert layer.num_heads == genes[f"heads{layer.index}"]
        assert layer.intermediate_size == (16, 32, 64)[genes[f"neurons{layer.index}"]]


def test_the_space_of_a_model_holds_its_uniform_grid(model: DynaBertModel) -> None:
    uniform = [*subnet_grid((1, 0.5), (1, 2 / 3)), SubnetConfig(intermediate_size=37)]
    space = SearchSpace.of(model, uniform)
    assert (space.num_layers, space.num_heads) == (3, 4)
    assert space.neurons == (16, 32, 37, 48, 64)
    for subnet in uniform:
        shape = model.subnet_shape(subnet)
        assert model.subnet_shape(space.subnet(space.genes(shape))).layers == shape.layers
    with pytest.raises(ValueError, match="intermediate_size=5, expected one of 16, 32, 37, 48, 64"):
        space.genes(model.subnet_shape(SubnetConfig(intermediate_size=5)))


def test_first_subnets_are_of_all_sizes_and_about_equally_wide() -> None:
    space = SearchSpace(num_layers=6, num_heads=20, neurons=tuple(range(16, 337, 16)))
    drawn = space.draw(200, seed=1)
    assert drawn == space.draw(200, seed=1) != space.draw(200, seed=2)
    subnets = [space.subnet(genes) for genes in drawn]
    depths = [len(subnet.layers or ()) for subnet in subnets]
    assert all(20 < depths.count(depth) < 50 for depth in range(1, 7))  # 33 on average
    for genes in drawn:
        assert all(low <= genes[name] <= high for name, (low, high) in space.bounds.items())
        shares = [genes[f"heads{layer}"] / 20 for layer in range(6)]
        assert max(shares) - min(shares) <= 0.35


def test_the_front_is_what_nothing_scored_beats(begin: Callable[..., SubnetSearch]) -> None:
    search, scorer = begin(), Scorer()
    search.run(scorer, 40, progress=False)
    found = search.found()
    assert search.num_trials == 40
    assert [each.subnet.name for each in found] == [
        name for names in scorer.asked for name in names
    ]
    assert all(
        (each.score, each.latency_ms) == (score_of(each.subnet), latency_of(each.subnet))
        for each in found
    )

    def beats(one: Found, other: Found) -> bool:
        pairs = (one.score, -one.latency_ms), (other.score, -other.latency_ms)
        return pairs[0] != pairs[1] and all(a >= b for a, b in zip(*pairs, strict=True))

    unbeaten = {
        (each.score, each.latency_ms)
        for each in found
        if not any(beats(other, each) for other in found)
    }
    front = search.front()
    assert {(each.score, each.latency_ms) for each in front} == unbeaten
    assert [each.latency_ms for each in front] == sorted(ms for _, ms in unbeaten)


def test_no_subnet_is_scored_twice(tmp_path: Path) -> None:
    few = SearchSpace(num_layers=1, num_heads=2, neurons=(16, 32))
    search, scorer = SubnetSearch(tmp_path, few, latency_of, population_size=4), Scorer()
    search.run(scorer, 20, progress=False)
    names = [name for names in scorer.asked for name in names]
    assert search.num_trials == 20
    assert len(names) == len(set(names)) <= 4
    assert [each.subnet.name for each in search.found()] == names


def test_the_grid_is_scored_first(begin: Callable[..., SubnetSearch], model: DynaBertModel) -> None:
    grid = subnet_grid((1, 0.5, 0.25), (1, 2 / 3))
    first = [SPACE.genes(model.subnet_shape(subnet)) for subnet in grid]
    search = begin(first=first)
    search.run(Scorer(), BATCH_SIZE, progress=False)
    shapes = [model.subnet_shape(each.subnet).layers for each in search.found()]
    assert shapes[: len(grid)] == [model.subnet_shape(subnet).layers for subnet in grid]
    assert len(shapes) == BATCH_SIZE  # filled up with others


def test_it_finds_better_than_the_grid(
    begin: Callable[..., SubnetSearch], model: DynaBertModel
) -> None:
    grid = subnet_grid((1, 0.5, 0.25), (1, 2 / 3))
    shapes = [model.subnet_shape(subnet) for subnet in grid]
    search = begin(first=[SPACE.genes(shape) for shape in shapes])
    search.run(Scorer(), 48, progress=False)
    narrow = SPACE.subnet(SPACE.genes(shapes[1]))  # w0.5-d1
    within = [each for each in search.found() if each.latency_ms <= latency_of(narrow)]
    assert max(each.score for each in within) > 1.2 * score_of(narrow)


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(
    begin: Callable[..., SubnetSearch],
) -> None:
    whole = begin("whole")
    whole.run(Scorer(), 40, progress=False)
    for fail_at in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            begin("parts").run(Scorer([fail_at]), 40, progress=False)
    search = begin("parts")
    assert search.num_trials == 3 * BATCH_SIZE
    search.run(Scorer(), 40, progress=False)
    assert search.found() == whole.found()
    assert begin("other", seed=4).found() == []


def test_workers_share_what_they_find(begin: Callable[..., SubnetSearch]) -> None:
    first, second = begin(), begin(is_first_worker=False)
    scorers = Scorer(), Scorer()
    for step in range(1, 5):
        worker, scorer = ((first, scorers[0]), (second, scorers[1]))[step % 2]
        worker.run(scorer, step * BATCH_SIZE, progress=False)
    assert first.found() == second.found()
    assert first.num_trials == second.num_trials == 4 * BATCH_SIZE
    asked = [{name for names in scorer.asked for name in names} for scorer in scorers]
    assert asked[0]
    assert asked[1]
    assert not asked[0] & asked[1]


def test_a_finished_choice_scores_nothing_more(begin: Callable[..., SubnetSearch]) -> None:
    begin().run(Scorer(), 9, progress=False)
    scorer = Scorer()
    search = begin()
    search.run(scorer, 9, progress=False)
    assert scorer.asked == []
    assert search.num_trials == 9


def test_half_a_line_at_the_end_is_dropped(
    begin: Callable[..., SubnetSearch], tmp_path: Path
) -> None:
    begin().run(Scorer(), BATCH_SIZE, progress=False)
    journal = tmp_path / "search" / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"')
    search = begin()
    assert journal.read_bytes().startswith(whole + b'{"op_code":0,')
    search.run(Scorer(), BATCH_SIZE + 1, progress=False)
    assert begin().num_trials == BATCH_SIZE + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"population_size": 9}, "population_size"),
        ({"plan": {"data": "b", "rows": 7}}, "data"),
        ({"first": [dict.fromkeys(SPACE.bounds, 1)]}, "first"),
    ],
    ids=["seed", "population", "plan", "first"],
)
def test_another_search_is_not_gone_on_with(
    begin: Callable[..., SubnetSearch], change: dict[str, object], named: str
) -> None:
    plan = {"plan": {"data": "a", "rows": 7}}
    begin(**plan).run(Scorer(), 2, progress=False)
    with pytest.raises(ValueError, match=f"holds a search with another {named}, expected the same"):
        begin(**{**plan, **change})
    assert begin(**plan).num_trials == 2


def test_without_optuna_the_extra_is_named(
    begin: Callable[..., SubnetSearch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "dynabert-kernels\[search\]"'):
        begin()


def measured(name: float, choice_score: float, score: float, ms: float, uniform: bool) -> Measured:
    return Measured(SubnetConfig(name), choice_score, score, ms, uniform)


def test_gain_is_that_of_choices_by_other_rows() -> None:
    small = measured(0.25, 0.6, 0.55, 2.0, True)
    large = measured(0.5, 0.8, 0.75, 6.0, True)
    lucky = measured(0.75, 0.9, 0.65, 4.0, False)  # good on the rows that choose
    missed = measured(1.0, 0.7, 0.99, 4.0, False)  # and the other way round
    gain = SearchGain.of([small, large, lucky, missed])
    assert [(at.budget_ms, at.best) for at in gain.at] == [(2.0, small), (6.0, lucky)]
    assert [at.score for at in gain.at] == pytest.approx([0.0, 0.65 - 0.75])
    assert gain.uniform_mean == pytest.approx(0.55)
    assert gain.best_mean == pytest.approx((2 * 0.55 + 2 * 0.65) / 4)
    document = gain.to_json()
    assert document["at"][1]["best"] == "w0.75-d1"
    assert document["at"][1]["gain"] == pytest.approx(-0.1)


POINTS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 8), st.booleans()), max_size=9
)


@settings(deadline=None, max_examples=50)
@given(POINTS)
def test_mean_gain_is_the_mean_over_many_budgets(
    points: list[tuple[int, int, int, bool]],
) -> None:
    rows = [measured(1.0, *point) for point in [(3, 2, 4, True), *points]]
    gain = SearchGain.of(rows)
    uniform = [row for row in rows if row.is_uniform]
    low, high = min(row.latency_ms for row in uniform), max(row.latency_ms for row in uniform)

    def mean(pool: list[Measured]) -> float:
        steps = int(8 * (high - low)) or 1
        budgets = [low + (high - low) * (step + 0.5) / steps for step in range(steps)]
        chosen = [
            min(
                (row for row in pool if row.latency_ms <= budget),
                key=lambda row: (-row.choice_score, row.latency_ms),
            )
            for budget in budgets
        ]
        return sum(row.score for row in chosen) / steps

    assert gain.uniform_mean == pytest.approx(mean(uniform))
    assert gain.best_mean == pytest.approx(mean(rows))


def test_gain_needs_a_grid() -> None:
    with pytest.raises(ValueError, match="no subnet of the uniform grid"):
        SearchGain.of([measured(1.0, 1.0, 1.0, 1.0, False)])
