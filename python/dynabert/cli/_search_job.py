"""One worker of ``dynabert search``: what it loads, and what it scores subnets on.

A `SearchJob` is plain values, so that it can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynabert.cli._place import ModelPlace
from dynabert.cli._scoring import Scorer, problem_of_files, rows_like, rows_not_learned, scorer

if TYPE_CHECKING:
    from dynabert.data.examples import AnyExample, TaskData
    from dynabert.latency_predictor import LatencyPredictor
    from dynabert.search import SubnetSearch
    from dynabert.subnet import SubnetConfig

PREDICTOR = "predictor.json"
_SCORING_BATCH = 64


@dataclass(frozen=True)
class SearchJob:
    """What was asked for.

    Attributes:
        place: The run or model.
        folder: Folder of the search.
        task: Name of the task; None for the run's own.
        data: Further arguments of `load_task`.
        search_rows: Rows to search on; twice as many choose among what is found.
        seed: Chooses rows and subnets.
        num_trials: Trials of all workers together.
        device: Where to score.
        threads: CPU threads of this worker.
    """

    place: Path
    folder: Path
    task: str | None
    data: dict[str, Any]
    search_rows: int
    seed: int
    num_trials: int
    device: str
    threads: int


class SearchWorker:
    """A job, loaded.

    Attributes:
        where: The run or model.
        model: The model, in float32 on the job's device.
        data: The task.
        rows_are: What the rows are that are searched on, in words.
        num_rows: Rows that are searched on.
        num_choice_rows: Further ones that choose among what is found; 0 where too few are left.
        score_report: Scores subnets on the validation rows.
        uniform: The subnets of the uniform grid.
    """

    def __init__(self, job: SearchJob) -> None:
        """Load model and data.

        Raises:
            FileNotFoundError: The model or a file of the task is missing.
            ValueError: The task is not one for this model, or has no rows to search on.
        """
        import torch

        from dynabert.training.problems import row_length

        torch.set_num_threads(job.threads)
        self.job = job
        self.where = ModelPlace.find(job.place)
        self.model = self.where.load_model()
        torch.nn.Module.to(self.model, job.device)
        run = self.where.run
        self.data = self._load(seed=run["arguments"]["seed"] if run else 0)
        unseen = rows_not_learned(self.where, self.data.train, self._load)
        pool: Sequence[AnyExample] = unseen or self.data.train
        self.rows_are = "training rows that the run has not learned from"
        if not unseen:
            self.rows_are = "training rows, from which the model may have learned"
        rows = rows_like(pool, self.data.validation, 3 * job.search_rows, job.seed)
        searched, choice = rows[: job.search_rows], rows[job.search_rows :]
        if len(choice) < len(searched):
            choice = []
        self.num_rows, self.num_choice_rows = len(searched), len(choice)
        config: Any = self.model.config
        longest = row_length(
            run["arguments"].get("max_length") if run else None, self.data.spec.problem, config
        )

        def score_on(examples: Sequence[AnyExample]) -> Scorer:
            return scorer(
                self.model,
                self.where,
                self.data.spec,
                examples,
                longest,
                batch_size=_SCORING_BATCH,
                progress=False,
            )

        self._score = score_on(searched)
        self._score_choice = score_on(choice or searched)
        self.score_report = score_on(self.data.validation)
        self.uniform = self._uniform()

    def score(self, subnets: Sequence[SubnetConfig]) -> list[float]:
        """Primary metric of each subnet on the rows that are searched on."""
        return [row.primary for row in self._score(subnets)]

    def score_choice(self, subnets: Sequence[SubnetConfig]) -> list[float]:
        """Primary metric of each subnet on the rows that choose among what is found."""
        return [row.primary for row in self._score_choice(subnets)]

    def open(self, predictor: LatencyPredictor, *, is_first_worker: bool) -> SubnetSearch:
        """The search in the job's folder.

        Raises:
            ImportError: Optuna is not installed.
            ValueError: The folder holds another search.
        """
        from dynabert.data.files import file_digest
        from dynabert.search import SubnetSearch
        from dynabert.search_space import SearchSpace

        space = SearchSpace.of(self.model, self.uniform)
        weights = sorted(self.where.model_dir.glob("*.safetensors"))
        return SubnetSearch(
            self.job.folder,
            space,
            lambda subnet: predictor.predict_ms(self.model.subnet_shape(subnet)),
            first=[space.genes(self.model.subnet_shape(subnet)) for subnet in self.uniform],
            seed=self.job.seed,
            plan={
                "data": self.data.fingerprint,
                "search_rows": self.num_rows,
                "weights": [file_digest(path) for path in weights],
                "predictor": asdict(predictor),
            },
            is_first_worker=is_first_worker,
        )

    def _load(self, **choice: Any) -> TaskData:
        from dynabert.data.tasks import load_task

        run = self.where.run
        task = self.job.task or (run["task"] if run else None)
        if task is None:
            raise ValueError(
                "--task is missing, expected a name. A model alone does not tell its task."
            )
        config: Any = self.model.config
        of_files: dict[str, Any] = {}
        if task == "file":
            if self.job.data.get("train_file") is None:
                raise ValueError(
                    "--train-file is missing, expected the file the model was trained on. A search "
                    "needs rows other than those it reports on."
                )
            of_files = {
                "problem": problem_of_files(self.model),
                "label_names": [config.id2label[index] for index in range(config.num_labels)],
            }
        return load_task(task, **self.job.data, **of_files, **choice)

    def _uniform(self) -> list[SubnetConfig]:
        from dynabert.report import GridReport

        if self.where.grid_json.exists():
            rows = GridReport.load(self.where.grid_json).rows
            subnets = [row.subnet for row in rows if row.is_uniform]
            if subnets:
                return subnets
        return self.where.subnets(self.model, None, None)


def work(job: SearchJob) -> int:
    """Score subnets for a search that has begun, until it is done; how many trials that are."""
    from dynabert.latency_predictor import LatencyPredictor

    path = job.folder / PREDICTOR
    if not path.is_file():
        raise FileNotFoundError(
            f"--join: {path} is missing, expected a search that has begun. Begin it without --join "
            "on the machine that latency is predicted for."
        )
    predictor = LatencyPredictor.load(path, allow_foreign=True)
    worker = SearchWorker(job)
    search = worker.open(predictor, is_first_worker=False)
    search.run(worker.score, job.num_trials, progress=False)
    return search.num_trials
