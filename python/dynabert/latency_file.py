"""``latency.json``, which lies beside a model and gathers tables of any number of settings.

Tables are merged, not overwritten, also where several processes measure at once: who writes holds
the lock of the folder (`locked`). What was measured elsewhere, or with other versions, is refused
with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dynabert.json_file import read_json, write_json
from dynabert.latency_table import LatencyTable, describe_model
from dynabert.modeling_pretrained import DynaBertPreTrainedModel

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

SCHEMA = 2
_LOCK_NAME = ".reports.lock"


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Be the only one, of all processes and threads, to write the reports in a folder.

    Waits for whoever is writing. The lock ends with the process that holds it, however that ends.
    Systems without ``fcntl`` have none. Not to be taken twice by one thread.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    path = folder / _LOCK_NAME
    descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go, so nobody locks a file without a name
        os.close(descriptor)


def _lock(path: Path) -> int:
    """An open, locked file that is still the one of that name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it removed it meanwhile


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def save_latency(table: LatencyTable, path: Path | str) -> LatencyTable:
    """Add a table to ``latency.json``, whole or not at all.

    A table of the same setting keeps its rows, save those of subnets timed again; tables of other
    settings stay, also those that other processes save meanwhile.

    Returns:
        What the file now holds for this setting.

    Raises:
        ValueError: The file exists and is not a latency file this version can read.
    """
    with locked(Path(path).parent):
        return merge_latency(table, path)


def merge_latency(table: LatencyTable, path: Path | str) -> LatencyTable:
    """`save_latency` for who holds the lock."""
    path = Path(path)
    tables = check_latency_file(path)
    same = [index for index, kept in enumerate(tables) if kept.setting == table.setting]
    if same:
        table = tables[same[0]] = tables[same[0]].merged(table)
    else:
        tables.append(table)
    write_json(path, {"schema": SCHEMA, "tables": [kept.to_dict() for kept in tables]})
    return table


def check_latency_file(path: Path | str) -> list[LatencyTable]:
    """Every table of a file, none where there is no file: whether a table could be added to it.

    Raises:
        ValueError: It is not a latency file this version can read.
    """
    try:
        return _read_tables(Path(path))
    except FileNotFoundError:
        return []


def load_latency(
    path: Path | str,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    lengths: str | None = "",
    captured: bool | None = False,
    model: DynaBertPreTrainedModel | None = None,
    allow_foreign: bool = False,
) -> LatencyTable:
    """The table of ``latency.json`` that holds here and for what is asked.

    A table holds here if this machine and the versions of now made it.

    Args:
        path: The file `save_latency` wrote.
        batch_size: Only tables of this many sequences; None for any, here and below.
        seq_len: Only tables of this many tokens per sequence.
        device: Only tables of ``cpu`` or ``cuda``.
        threads: Only tables of this many CPU threads.
        dtype: Only tables of this element type, for instance ``float32``.
        backend: Only tables of this backend; ``auto`` for whatever was chosen automatically.
        lengths: Only tables of these lengths: ``""`` for sequences of `seq_len` tokens each, else
            a description or the name it begins with.
        captured: Only tables of calls that replayed CUDA graphs, or of calls that did not.
        model: Only tables of a model of this class and size.
        allow_foreign: Also take a table of another machine or other versions, when none is of this
            one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a latency file, no table fits, or more than one does; the
            message says why not or between which to choose.
    """
    fields_asked = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "device": device,
        "threads": threads,
        "dtype": dtype,
        "backend": backend,
        "lengths": lengths,
        "captured": captured,
        "model": None if model is None else describe_model(model),
    }
    wanted = {name: value for name, value in fields_asked.items() if value is not None}
    usual = {"lengths": "", "captured": False}
    asked = ", ".join(
        f"{name}={value}" for name, value in wanted.items() if usual.get(name) != value
    )
    asked = asked or "any setting"
    every = _read_tables(Path(path))
    tables = [table for table in every if _holds(table, wanted)]
    if not tables:
        raise ValueError(
            f"load_latency: {path} has no table with {asked}. Measure one with `dynabert latency`."
            + _listed(every)
        )
    here = [table for table in tables if table.setting.why_not_here() is None]
    if not here and not allow_foreign:
        raise ValueError(
            f"load_latency: {path} does not hold for this machine: "
            f"{tables[-1].setting.why_not_here()}. "
            "Measure again with `dynabert latency`, or allow a foreign table."
        )
    fitting = here or tables
    if len(fitting) > 1:
        raise ValueError(
            f"load_latency: {path} has {len(fitting)} tables with {asked}, expected one. "
            f"Ask for one.{_listed(fitting)}"
        )
    return fitting[0]


def _read_tables(path: Path) -> list[LatencyTable]:
    document = read_json(path, schema=SCHEMA)
    try:
        return [LatencyTable.from_dict(table) for table in document["tables"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_latency: {path} holds a table that cannot be read ({error!r}), expected what "
            "`dynabert latency` writes. Remove the file and measure again."
        ) from error


def _holds(table: LatencyTable, wanted: Mapping[str, str | int]) -> bool:
    return all(
        getattr(table.setting, name) == value or _begins(name, getattr(table.setting, name), value)
        for name, value in wanted.items()
    )


def _begins(name: str, got: str, value: str | int) -> bool:
    """Whether a field with a detail behind it was asked for without."""
    separator = {"backend": " (", "lengths": ": "}.get(name)
    return bool(separator and value) and got.startswith(f"{value}{separator}")


def _listed(tables: list[LatencyTable]) -> str:
    """What each table holds for, and why not here."""
    about = []
    for table in tables:
        reason = table.setting.why_not_here()
        what = f"{table.setting.describe()}, {table.setting.model}"
        about.append(what + (f" ({reason})" if reason else ""))
    return f" It has: {'; '.join(about)}." if about else ""
