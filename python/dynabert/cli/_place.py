"""What a path given to a verb stands for: the folder of a run, or of a model alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynabert.json_file import read_json, write_bytes

if TYPE_CHECKING:
    from dynabert.latency_table import LatencyTable
    from dynabert.modeling_pretrained import DynaBertPreTrainedModel
    from dynabert.report import GridReport
    from dynabert.subnet import SubnetConfig

_log = logging.getLogger(__name__)
_RUN_SCHEMA = 1


@dataclass(frozen=True)
class ModelPlace:
    """A trained model and the files beside it.

    Attributes:
        path: Folder of the reports: the run's, or the model's own.
        model_dir: Folder of the model.
        run: Contents of ``run.json``; None for a model alone.
    """

    path: Path
    model_dir: Path
    run: dict[str, Any] | None

    @classmethod
    def find(cls, path: Path) -> ModelPlace:
        """Look at what is there.

        Raises:
            FileNotFoundError: Neither a run nor a model, or a run without its final model.
        """
        if (path / "run.json").is_file():
            model_dir = path / "model"
            if not (model_dir / "config.json").is_file():
                raise FileNotFoundError(
                    f"{path} is a run that has not finished, expected {model_dir} in it. "
                    "Repeat the command that began it, and it goes on."
                )
            return cls(path, model_dir, read_json(path / "run.json", schema=_RUN_SCHEMA))
        if (path / "config.json").is_file():
            return cls(path, path, None)
        raise FileNotFoundError(
            f"{path} holds neither run.json nor config.json, expected the folder of a run or of a "
            "model. Check the path."
        )

    @property
    def grid_json(self) -> Path:
        """Scores of every subnet."""
        return self.path / "grid.json"

    @property
    def latency_json(self) -> Path:
        """Latencies of every subnet."""
        return self.path / "latency.json"

    def load_model(self) -> DynaBertPreTrainedModel:
        """The model, in float32: with its head if it has one for a task, else an encoder without
        pooler."""
        import torch

        from dynabert import DynaBertModel
        from dynabert.configuration_dynabert import DynaBertConfig
        from dynabert.training.problems import MODEL_CLASSES

        config = DynaBertConfig.from_pretrained(self.model_dir)
        _, _, head = (config.architectures or [""])[0].partition("For")
        for kind in MODEL_CLASSES.values():
            if head and kind.__name__.endswith(f"For{head}"):
                return kind.from_pretrained(self.model_dir, dtype=torch.float32)
        return DynaBertModel.from_pretrained(
            self.model_dir, dtype=torch.float32, add_pooling_layer=False
        )

    def subnets(
        self,
        model: DynaBertPreTrainedModel,
        widths: tuple[float, ...] | None,
        depths: tuple[float, ...] | None,
    ) -> list[SubnetConfig]:
        """The grid asked for; by default the one the run trained, else the model's own default.

        Raises:
            ValueError: A width or depth is not a whole number of heads or layers.
        """
        from dynabert.subnet import default_depths, default_widths, subnet_grid

        trained = self.run["arguments"] if self.run else {}
        grid = subnet_grid(
            widths or trained.get("widths") or default_widths(model.config.head_counts),
            depths or trained.get("depths") or default_depths(model.config.num_hidden_layers),
        )
        for subnet in grid:
            model.subnet_shape(subnet)
        return grid

    def uneven_subnets(self) -> list[SubnetConfig]:
        """The evaluated subnets that are no cell of a grid of widths and depths."""
        from dynabert.report import GridReport

        if not self.grid_json.exists():
            return []
        return [row.subnet for row in GridReport.load(self.grid_json).rows if not row.is_uniform]

    def save_report(self, report: GridReport) -> None:
        """Write ``grid.json``, ``grid.md`` and, where latencies are known, ``grid.png``."""
        from dynabert.latency_file import locked

        with locked(self.path):
            self._write_report(report)

    def add_latency(self, table: LatencyTable) -> GridReport | None:
        """Save latencies, and show them in the grid where there is one; returns it."""
        from dynabert.latency_file import locked, merge_latency
        from dynabert.report import GridReport

        with locked(self.path):
            whole = merge_latency(table, self.latency_json)  # with what was timed before
            if not self.grid_json.exists():
                return None
            report = GridReport.load(self.grid_json).with_latency(whole)
            self._write_report(report)
        return report

    def _write_report(self, report: GridReport) -> None:
        from dynabert.report import plot_pareto, render_grid

        write_bytes(self.path / "grid.md", render_grid(report).encode())
        report.save(self.grid_json)
        if report.latency_setting is None:
            return
        try:
            plot_pareto(report, self.path / "grid.png")
        except ImportError as error:
            _log.warning("no plot: %s", error)
