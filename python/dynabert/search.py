"""Search for subnets that are better than those of the uniform grid: NSGA-II over every layer.

A `SubnetSearch` is a folder with Optuna's journal in it. Any number of processes, on any number of
machines that share the folder, work on it at once; one that is killed costs the subnets it was
scoring, and the next goes on from what is there. With one worker the search is a function of its
seed, interrupted or not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

from dynabert.picking import pareto_front
from dynabert.search_space import Genes, SearchSpace
from dynabert.subnet import SubnetConfig

JOURNAL = "journal.log"
POPULATION_SIZE = 32
# Subnets a worker scores at a time: rows are collated once for all of them, and no more is lost
# with a worker that is killed.
BATCH_SIZE = 8
_STUDY = "subnets"
_PLAN = "plan"
_DIRECTIONS = ("maximize", "minimize")  # score, latency

# Scores of subnets, higher is better, in their order.
Score = Callable[[Sequence[SubnetConfig]], Sequence[float]]
LatencyOf = Callable[[SubnetConfig], float]


@dataclass(frozen=True)
class Found:
    """A subnet that a search has scored.

    Attributes:
        subnet: The subnet, heads and neurons given for each kept layer.
        score: Its score on the rows that were searched on.
        latency_ms: Its predicted latency in milliseconds.
    """

    subnet: SubnetConfig
    score: float
    latency_ms: float


class SubnetSearch:
    """One search, kept in a folder.

    Attributes:
        space: What it chooses from.
        latency_of: Predicts the latency of a subnet, in milliseconds.
    """

    def __init__(
        self,
        folder: Path | str,
        space: SearchSpace,
        latency_of: LatencyOf,
        *,
        first: Sequence[Genes] = (),
        seed: int = 0,
        population_size: int = POPULATION_SIZE,
        plan: Mapping[str, Any] | None = None,
        is_first_worker: bool = True,
    ) -> None:
        """Open the search in `folder`, or begin it.

        Args:
            folder: Folder of the journal; made if missing.
            space: What to choose from.
            latency_of: Predicts the latency of a subnet, in milliseconds.
            first: Subnets to look at first, as genes; the population is filled up with others.
            seed: Every choice depends on it.
            population_size: Subnets of a generation.
            plan: What the scores depend on, as plain values: data, model, setting. A search that
                was begun with another plan is refused.
            is_first_worker: False for every worker but one, whose choices are a function of the
                seed.

        Raises:
            ImportError: Optuna is not installed; the message names the extra that brings it.
            ValueError: The folder holds a search with another plan.
        """
        optuna = _optuna()
        self.space = space
        self.latency_of = latency_of
        self._population_size = population_size
        self._seed = seed
        self._is_first_worker = is_first_worker
        self._distributions = {
            name: optuna.distributions.IntDistribution(low, high)
            for name, (low, high) in space.bounds.items()
        }
        fill = space.draw(max(population_size - len(first), 0), seed)
        self._first = [dict(genes) for genes in (*first, *fill)]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
        _cut_torn_line(optuna, folder / JOURNAL)
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=_STUDY,
            directions=_DIRECTIONS,
            load_if_exists=True,
        )
        whole = {
            "seed": seed,
            "population_size": population_size,
            "layers": space.num_layers,
            "heads": space.num_heads,
            "neurons": list(space.neurons),
            "first": [list(genes.values()) for genes in first],
            **(plan or {}),
        }
        self._check_plan(folder, json.loads(json.dumps(whole)))

    @property
    def num_trials(self) -> int:
        """Trials that are done, in all workers; several can be the same subnet."""
        return len(self._done())

    def run(self, score: Score, num_trials: int, *, progress: bool = True) -> None:
        """Score subnets until all workers together have done `num_trials`.

        Args:
            score: Scores a few subnets at once. A subnet that any worker has scored before is not
                scored again.
            num_trials: Where to stop; workers at it at the same time go over by a few.
            progress: Show a progress bar, on stderr, where that is a terminal.
        """
        with tqdm(
            total=num_trials, desc="search", unit="trial", disable=not progress or None
        ) as bar:
            while True:
                done = self._done()
                bar.update(len(done) - bar.n)
                if len(done) >= num_trials:
                    return
                self._step(score, done, min(BATCH_SIZE, num_trials - len(done)))

    def found(self) -> list[Found]:
        """Every subnet that was scored, in the order it was first scored in."""
        return list(self._known(self._done()).values())

    def front(self) -> list[Found]:
        """Those that no other beats in score and predicted latency, from the fastest to the
        best."""
        found = self.found()
        return [found[i] for i in pareto_front([(each.latency_ms, each.score) for each in found])]

    def best(self, count: int) -> list[Found]:
        """At least `count` subnets, if there are as many: the front, the front of the rest, ..."""
        rest, best = self.found(), list[Found]()
        while rest and len(best) < count:
            front = pareto_front([(each.latency_ms, each.score) for each in rest])
            best += [rest[index] for index in front]
            rest = [each for index, each in enumerate(rest) if index not in front]
        return best

    def _step(self, score: Score, done: Sequence[Any], count: int) -> None:
        """Draw `count` trials from what is done, score the subnets that are new, and add them.

        They are drawn in memory and reach the journal when they are done, one line each.
        """
        optuna = _optuna()
        # Depends on what is done, not on how often the search was interrupted.
        source = random.Random(f"{self._seed}:{len(done)}")
        if not self._is_first_worker:
            source = random.SystemRandom()
        sampler = optuna.samplers.NSGAIISampler(
            population_size=self._population_size, seed=source.getrandbits(32)
        )
        drafts = optuna.create_study(directions=_DIRECTIONS, sampler=sampler)
        drafts.add_trials(done)
        begun = [trial.params for trial in done]
        first = [genes for genes in self._first if genes not in begun]
        if not self._is_first_worker:
            source.shuffle(first)  # another worker is at the next ones
        for genes in first[:count]:
            drafts.enqueue_trial(genes)
        trials = [drafts.ask(self._distributions) for _ in range(count)]
        known = self._known(done)
        subnets = [self.space.subnet(trial.params) for trial in trials]
        new = list({each.name: each for each in subnets if each.name not in known}.values())
        if new:
            for subnet, value in zip(new, score(new), strict=True):
                known[subnet.name] = Found(subnet, float(value), self.latency_of(subnet))
        for trial, subnet in zip(trials, subnets, strict=True):
            result = known[subnet.name]
            self._study.add_trial(drafts.tell(trial, [result.score, result.latency_ms]))

    def _done(self) -> list[Any]:
        state = _optuna().trial.TrialState.COMPLETE
        done: list[Any] = self._study.get_trials(deepcopy=False, states=(state,))
        return done

    def _known(self, done: Sequence[Any]) -> dict[str, Found]:
        known: dict[str, Found] = {}
        for trial in done:
            subnet = self.space.subnet(trial.params)
            known.setdefault(subnet.name, Found(subnet, *trial.values))
        return known

    def _check_plan(self, folder: Path, plan: dict[str, Any]) -> None:
        known = self._study.user_attrs.get(_PLAN)
        if known is None:
            self._study.set_user_attr(_PLAN, plan)
            return
        changed = [name for name in {**known, **plan} if known.get(name) != plan.get(name)]
        if changed:
            raise ValueError(
                f"SubnetSearch: {folder} holds a search with another {', '.join(changed)}, "
                "expected the same. Repeat the command that began it, or use another folder."
            )


def _optuna() -> ModuleType:
    """Optuna, which says only what goes wrong.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise ImportError(
            "a search needs Optuna, which is not installed. "
            'Run: pip install "dynabert-kernels[search]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _cut_torn_line(optuna: ModuleType, journal: Path) -> None:
    """Take off half a line at the end, which a machine that stopped while writing has left."""
    lock = optuna.storages.journal.JournalFileSymlinkLock(str(journal))
    lock.acquire()  # nobody is writing now
    try:
        with journal.open("rb+") as stream:
            content = stream.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                stream.truncate(whole)
    finally:
        lock.release()
