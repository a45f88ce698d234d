"""Text classification under a deadline: a LitServe server around `dynabert.runner.ElasticRunner`.

    pip install "dynabert-kernels[serve]"
    python elastic_server.py RUN --deadline-ms 100
    curl localhost:8000/predict -H "Content-Type: application/json" \\
         -d '{"texts": ["a fine film"], "deadline_ms": 50}'
    curl localhost:8000/counters

RUN is what `dynabert train` leaves: a model with its tokenizer, and the scores in grid.json. Every
batch runs on the most accurate subnet with which it, and what waits behind it, is in time; the time
a request has spent in the queue counts. `--fixed` serves the full network only.
"""
# No `from __future__ import annotations`: LitServe reads the type of a request from its annotation.

import argparse
import multiprocessing
import threading
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from queue import Empty
from typing import Any

try:
    import litserve
    from litserve.loops.simple_loops import BatchedLoop
    from pydantic import BaseModel, Field
except ImportError as error:
    raise ImportError('LitServe is missing: pip install "dynabert-kernels[serve]".') from error


class Texts(BaseModel):
    """What a client sends."""

    texts: list[str] = Field(min_length=1, max_length=64)
    deadline_ms: float | None = Field(default=None, gt=0)


class Classifier(litserve.LitAPI):
    """Classifies texts; everything but the constructor runs in LitServe's worker process."""

    def __init__(self, options: argparse.Namespace, counters: Any) -> None:
        super().__init__(max_batch_size=options.max_batch_size, loop=WatchedQueue())
        self.options = options
        self.counters = counters  # a dictionary that all processes of the server see
        self.arrived_at: list[float] = []  # of the requests of this batch; set by the loop
        self.num_waiting = 0

    def setup(self, device: str) -> None:
        """Load the model and time its subnets."""
        # Here, since the processes that only speak HTTP need none of it.
        import torch
        from transformers import AutoTokenizer

        from dynabert import DynaBertForSequenceClassification, SubnetConfig
        from dynabert.report import GridReport
        from dynabert.runner import ElasticRunner

        options = self.options
        torch.set_num_threads(options.threads)
        folder = options.run / "model" if (options.run / "model").is_dir() else options.run
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = DynaBertForSequenceClassification.from_pretrained(folder).to(device).eval()
        self.labels = model.config.id2label
        subnets = GridReport.load(options.run / "grid.json").rows
        if options.fixed:
            subnets = tuple(row for row in subnets if row.subnet == SubnetConfig())
        length = min(options.max_length, model.config.max_seq_len)
        self.runner = ElasticRunner(
            model,
            budget_ms=options.deadline_ms,
            candidates=subnets,
            percentile=options.percentile,
            shapes=[(1, length // 4), (8, length // 4), (32, length // 4)],
        )
        threading.Thread(target=self._publish_counters, daemon=True).start()

    def decode_request(self, request: Texts) -> Texts:
        """The annotation has LitServe check requests before they enter the queue."""
        return request

    def batch(self, requests: list[Texts]) -> list[Texts]:
        """The requests as they are; `predict` joins their texts."""
        return requests

    def predict(self, requests: list[Texts]) -> list[dict[str, Any]]:
        """Run all texts of a batch together, in time for the most urgent request."""
        options = self.options
        inputs = self.tokenizer(
            [text for request in requests for text in request.texts],
            padding=True,
            truncation=True,
            max_length=options.max_length,
            return_tensors="pt",
        )
        first = min(self.arrived_at)
        limits = [request.deadline_ms or options.deadline_ms for request in requests]
        deadline = min(at + ms / 1e3 for at, ms in zip(self.arrived_at, limits, strict=True))
        result = self.runner(
            **inputs.to(self.device),
            submitted_at=first,
            deadline_ms=(deadline - first) * 1e3 - options.reserve_ms,
            waiting=self.num_waiting / len(requests),
        )
        scores, classes = result.output.logits.float().softmax(-1).max(-1)
        pairs = zip(classes.tolist(), scores.tolist(), strict=True)
        now = time.monotonic()
        return [
            {
                "predictions": [
                    {"label": self.labels[index], "class": index, "score": round(score, 4)}
                    for index, score in islice(pairs, len(request.texts))
                ],
                "subnet": result.subnet.name,
                "model_ms": round(result.latency_ms, 2),
                "server_ms": round((now - at) * 1e3, 2),
                "requests_in_batch": len(requests),
            }
            for request, at in zip(requests, self.arrived_at, strict=True)
        ]

    def _publish_counters(self) -> None:
        while True:
            self.counters.update(asdict(self.runner.counters()))
            time.sleep(1.0)


class WatchedQueue(BatchedLoop):
    """Dynamic batching that tells the API when its requests arrived, and how many wait behind.

    A batch is whatever waits when the worker becomes free, so no request waits for a batch to fill.
    """

    def get_batch_requests(self, lit_api: Classifier, request_queue: Any, transport: Any) -> Any:
        """The requests of the next batch, and none that timed out: deadlines are the runner's."""
        requests = [request_queue.get()]
        while len(requests) < lit_api.max_batch_size:
            try:
                requests.append(request_queue.get_nowait())
            except Empty:
                break
        lit_api.arrived_at = [arrived_at for _, _, arrived_at, _ in requests]
        lit_api.num_waiting = request_queue.qsize()
        return [(queue_id, uid, payload) for queue_id, uid, _, payload in requests], []


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Serve an elastic text classifier.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--deadline-ms", type=float, default=100.0, help="where none is sent")
    parser.add_argument(
        "--reserve-ms",
        type=float,
        default=5.0,
        help="kept free of every deadline for HTTP and the tokenizer",
    )
    parser.add_argument("--percentile", type=float, default=99.0, help="of latency to count on")
    parser.add_argument("--fixed", action="store_true", help="the full network only")
    parser.add_argument("--max-batch-size", type=int, default=8, help="requests, not texts")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on the CPU")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args()


def main() -> None:
    """Start the server; ends with Ctrl+C."""
    options = parse_options()
    counters = multiprocessing.Manager().dict()
    server = litserve.LitServer(
        Classifier(options, counters), accelerator=options.accelerator, fast_queue=True
    )
    server.app.add_api_route("/counters", lambda: dict(counters))
    server.run(
        host=options.host, port=options.port, log_level="warning", generate_client_file=False
    )


if __name__ == "__main__":
    main()
