"""``dynabert search``: subnets better than those of the uniform grid, each layer with its width."""

from __future__ import annotations

import copy
import logging
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._search_job import PREDICTOR, SearchJob, SearchWorker, work
from dynabert.durable import remove_folder
from dynabert.json_file import write_json

if TYPE_CHECKING:
    import torch

    from dynabert.latency_predictor import LatencyPredictor, PredictorError
    from dynabert.latency_table import LatencyTable
    from dynabert.modeling_pretrained import DynaBertPreTrainedModel
    from dynabert.report import GridReport
    from dynabert.search import Found, SubnetSearch
    from dynabert.search_gain import Measured, SearchGain

_log = logging.getLogger(__name__)
_PERCENTILE = "p80"
_PREDICTOR_SECONDS = 10.0  # for every second that a subnet is measured
_NEAR_FRONT = 3  # times as many as are kept are scored again
_GOOD_ERROR = 0.05  # on average; neighbours on a front differ by about as much
SEARCH = "Search"
RESULT = "result.json"


@app.command()
def search(
    place: options.Place,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="As for train; default: the run's own task.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    train_file: options.TrainFile = None,
    validation_file: options.ValidationFile = None,
    text_column: options.TextColumn = "text",
    pair_column: options.PairColumn = None,
    label_column: options.LabelColumn = "label",
    from_hub: options.FromHub = False,
    trials: Annotated[
        int, typer.Option(help="Trials of all workers together.", rich_help_panel=SEARCH)
    ] = 400,
    workers: Annotated[
        int, typer.Option(help="Processes that search on this machine.", rich_help_panel=SEARCH)
    ] = 1,
    search_rows: Annotated[
        int,
        typer.Option(
            help="Training rows to search on; twice as many choose among what is found.",
            rich_help_panel=SEARCH,
        ),
    ] = 1500,
    keep: Annotated[
        int,
        typer.Option(
            help="Subnets of the front to score, time and add to the grid.", rich_help_panel=SEARCH
        ),
    ] = 16,
    seed: Annotated[
        int, typer.Option(help="Chooses rows and subnets.", rich_help_panel=SEARCH)
    ] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder of the search; default: RUN/search.", rich_help_panel=SEARCH),
    ] = None,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Only help with a search that has begun, here or on another machine.",
            rich_help_panel=SEARCH,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Remove the former search and start anew.", rich_help_panel=SEARCH
        ),
    ] = False,
    batch_size: options.BatchSize = 1,
    seq_len: options.SeqLen = 128,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = None,
    seconds: options.Seconds = 2.0,
    json_file: JsonFile = None,
) -> None:
    """Search for subnets with heads, neurons and layers of their own, and add the best to the grid.

    Chooses on training rows, by score and predicted latency (NSGA-II), and reports on the
    validation rows and with measured latencies: the gain over the uniform grid at equal latency.
    Adds what it found to grid.json and latency.json in RUN, from which `dynabert pick` chooses.

    The same command goes on where an interrupted one stopped.
    """
    import torch

    from dynabert.latency import measure_latency
    from dynabert.latency_predictor import PredictorError
    from dynabert.report import build_report
    from dynabert.search_gain import SearchGain

    least = {"--trials": trials, "--workers": workers, "--search-rows": search_rows, "--keep": keep}
    for name, count in least.items():
        if count < 1:
            raise ValueError(f"{name}: {count}, expected 1 or more.")
    all_threads = torch.get_num_threads() if threads is None else threads
    if all_threads < 1:
        raise ValueError(f"--threads: {threads}, expected 1 or more. Leave it out for all cores.")
    element_type = options.parse_dtype(dtype)
    job = SearchJob(
        place=place,
        folder=place / "search" if folder is None else folder,
        task=task,
        data={
            "data_dir": data_dir,
            "train_file": train_file,
            "validation_file": validation_file,
            "text_column": text_column,
            "pair_column": pair_column,
            "label_column": label_column or None,
            "from_hub": from_hub,
        },
        search_rows=search_rows,
        seed=seed,
        num_trials=trials,
        device=options.parse_device(device),
        threads=max(1, all_threads // workers),
    )
    if join:
        done = work(job)
        finish(f"{done} trials are done.", {"trials": done}, json_file)
        return
    worker = SearchWorker(job)
    options.check_seq_len(seq_len, worker.model.config.max_seq_len)
    if overwrite:
        _remove(job.folder)
    timed = _as_timed(worker.model, element_type)
    setting: dict[str, Any] = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "threads": all_threads,
        "backend": backend,
    }
    predictor = _predictor(timed, job.folder / PREDICTOR, _PREDICTOR_SECONDS * seconds, setting)
    found = worker.open(predictor, is_first_worker=True)
    _log.info("searching on %d %s", worker.num_rows, worker.rows_are)
    with _other_workers(job, workers - 1):
        found.run(worker.score, trials)
    chosen = _choose(found, worker, keep)
    kept = [each.subnet for each in chosen if each.subnet not in worker.uniform]
    names = {subnet.name for subnet in (*worker.uniform, *kept)}
    older = [each for each in worker.where.uneven_subnets() if each.name not in names]
    every = [*worker.uniform, *kept, *older]
    table = measure_latency(timed, every, **setting, seconds_per_subnet=seconds)
    report = build_report(worker.model, worker.score_report(every), worker.data.spec)
    worker.where.save_report(report)
    worker.where.add_latency(table)
    rows = _measured_rows(chosen, report, table)
    gain = SearchGain.of(rows)
    predicted = [predictor.predict_ms(worker.model.subnet_shape(row.subnet)) for row in table.rows]
    off = PredictorError.of(predicted, [row.median_ms for row in table.rows])
    document = {
        "setting": asdict(table.setting),
        "task": report.task,
        "metric": report.primary_metric,
        "trials": found.num_trials,
        "subnets_scored": len(found.found()),
        "search_rows": worker.num_rows,
        "choice_rows": worker.num_choice_rows,
        "search_rows_are": worker.rows_are,
        "report_rows": report.rows[0].num_rows,
        "percentile": _PERCENTILE,
        "predictor_error": asdict(predictor.error),
        "predictor_error_on_these": asdict(off),
        "subnets": [{**asdict(row), "subnet": row.subnet.to_dict()} for row in rows],
        "gain": gain.to_json(),
    }
    write_json(job.folder / RESULT, {"schema": 1, **document})
    finish(_in_words(document, rows, gain, predictor.error, off), document, json_file)


def _remove(folder: Path) -> None:
    """Remove a former search.

    Raises:
        ValueError: The folder holds something else.
    """
    if not folder.exists():
        return
    from dynabert.search import JOURNAL

    foreign = {path.name for path in folder.iterdir()} - {PREDICTOR, RESULT, JOURNAL}
    foreign = {name for name in foreign if not name.startswith((f"{JOURNAL}.lock", "."))}
    if foreign:
        raise ValueError(
            f"--overwrite: {folder} holds {', '.join(sorted(foreign))}, expected a search alone. "
            "Only a search is removed; use another folder."
        )
    remove_folder(folder)


def _as_timed(model: DynaBertPreTrainedModel, dtype: torch.dtype) -> DynaBertPreTrainedModel:
    """The model in the element type that latency is predicted for; it is scored in float32."""
    import torch

    if dtype == torch.float32:
        return model
    timed = copy.deepcopy(model)
    if dtype == torch.int8:
        return timed.quantize("int8")
    torch.nn.Module.to(timed, dtype=dtype)
    return timed


def _predictor(
    model: DynaBertPreTrainedModel, path: Path, seconds: float, setting: Mapping[str, Any]
) -> LatencyPredictor:
    """The search's own predictor, or one that is measured now.

    Raises:
        ValueError: The folder has one of another setting, or one that does not hold any more.
    """
    import torch

    from dynabert.latency_predictor import LatencyPredictor, build_predictor
    from dynabert.latency_table import describe_model
    from dynabert_kernels.ops import forced_backend

    if path.exists():
        weight = next(model.parameters())
        dtype = torch.int8 if model.quantization == "int8" else weight.dtype
        wanted = {
            **setting,
            "backend": setting["backend"] or forced_backend() or "auto",
            "device": weight.device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "model": describe_model(model),
        }
        try:
            return LatencyPredictor.load(path, **wanted)
        except ValueError as error:
            raise ValueError(
                f"{error} Use --overwrite, or --folder for a search beside this one."
            ) from error
    _log.info("measuring the two ops, and the model at a few subnets")
    predictor, _ = build_predictor(model, seconds=seconds, **setting)
    _log.info("the latency predictor is %s", predictor.error.describe())
    if predictor.error.mean > _GOOD_ERROR:
        _log.warning(
            "the latency predictor is off by more than %.0f%%: other programs may be running; "
            "close them and start anew with --overwrite",
            100 * _GOOD_ERROR,
        )
    predictor.save(path)
    return predictor


@contextmanager
def _other_workers(job: SearchJob, count: int) -> Iterator[None]:
    """Further processes that work on the same search; waits for them at the end."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=work, args=(job,), daemon=True) for _ in range(count)]
    for process in others:
        process.start()
    try:
        yield
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()  # no more than a few trials are lost
            process.join()
    failed = [process.exitcode for process in others if process.exitcode]
    if failed:
        _log.warning(
            "%d of %d workers stopped early (exit codes %s); the others did their part",
            len(failed),
            count + 1,
            ", ".join(map(str, failed)),
        )


def _choose(search: SubnetSearch, worker: SearchWorker, keep: int) -> list[Found]:
    """The uniform grid and the front of what was found, by scores on rows of their own.

    The best of many scores is partly luck: those near the front are scored again, on rows that were
    not searched on, and the front among these is spread from the fastest to the best.
    """
    from dynabert.picking import pareto_front
    from dynabert.search import Found

    shape_of = worker.model.subnet_shape
    uniform = {shape_of(subnet).layers: subnet for subnet in worker.uniform}
    near = [
        each
        for each in search.best(_NEAR_FRONT * keep)
        if shape_of(each.subnet).layers not in uniform
    ]
    subnets = [*worker.uniform, *(each.subnet for each in near)]
    scores = worker.score_choice(subnets)
    predicted = [search.latency_of(subnet) for subnet in subnets]
    every = [Found(*values) for values in zip(subnets, scores, predicted, strict=True)]
    front = pareto_front([(each.latency_ms, each.score) for each in every])
    new = [every[index] for index in front if index >= len(uniform)]
    if len(new) > keep:
        step = (len(new) - 1) / max(keep - 1, 1)
        new = [new[round(place * step)] for place in range(keep)] if keep > 1 else new[-1:]
    return [*every[: len(uniform)], *new]


def _measured_rows(
    chosen: Sequence[Found], report: GridReport, table: LatencyTable
) -> list[Measured]:
    """Everything known of the subnets to compare, from the fastest."""
    from dynabert.search_gain import Measured

    records = {row.subnet.name: row for row in report.rows}
    rows = []
    for each in chosen:
        times, record = table.row(each.subnet), records[each.subnet.name]
        assert times is not None, "every one was measured"
        rows.append(
            Measured(
                each.subnet,
                each.score,
                record.primary,
                times.at(_PERCENTILE),
                record.is_uniform,
            )
        )
    return sorted(rows, key=lambda row: row.latency_ms)


def _in_words(
    document: Mapping[str, Any],
    rows: Sequence[Measured],
    gain: SearchGain,
    held_out: PredictorError,
    on_these: PredictorError,
) -> str:
    from dynabert.latency_table import LatencySetting

    setting = LatencySetting(**document["setting"])
    metric = document["metric"]
    choosing = "the same rows chose among the best"
    if document["choice_rows"]:
        choosing = f"{document['choice_rows']} others of these chose among the best"
    lines = [
        setting.describe(),
        f"{document['trials']} trials, {document['subnets_scored']} subnets scored on "
        f"{document['search_rows']} {document['search_rows_are']};",
        f"{choosing}.",
        f"Predicted latency is {held_out.describe()};",
        f"on the {on_these.num_subnets} subnets below, {on_these.mean:.1%} and "
        f"{on_these.worst:.1%}.",
        "",
        f"Of the grid (*) and of the front, {metric} on the {document['report_rows']} validation "
        "rows, which chose nothing:",
        "",
        f"  {_PERCENTILE} (ms)  {metric}  chosen by  subnet",
    ]
    for row in rows:
        mark = "*" if row.is_uniform else " "
        lines.append(
            f"{mark} {row.latency_ms:8.2f}  {row.score:{len(metric)}.4f}  {row.choice_score:9.4f}"
            f"  {row.subnet.name}"
        )
    lines += [
        "",
        f"Gain at equal latency, in {metric} on the validation rows:",
        "",
        "  budget (ms)    grid  with search    gain",
    ]
    lines += [
        f"  {at.budget_ms:11.2f}  {at.uniform.score:.4f}  {at.best.score:11.4f}  {at.score:+.4f}"
        for at in gain.at
    ]
    lines.append(
        f"  {'all between':>11}  {gain.uniform_mean:.4f}  {gain.best_mean:11.4f}  "
        f"{gain.best_mean - gain.uniform_mean:+.4f}"
    )
    return "\n".join(lines)
