"""Send the figures of a training run to Weights & Biases or MLflow.

Main entry: `Tracker(name, folder, run_name, settings)`, a context manager.

- `name`: the tracker, "wandb" or "mlflow".
- `folder`: the `Path` of the run's folder, which must exist.
- `run_name`: a text, the name that the run has at the tracker.
- `settings`: the recipe as a flat dict, key -> value: `flat_settings(asdict(recipe))` of
  `model/recipe.py`.

Inside the `with` block, `log(step, scalars)` takes the number of a step and a dict, name -> number.
A background thread sends them, so that the server never delays a step. The first error, such as a
missing package or an unreachable server, is logged as a warning, and the later figures are not
sent; nothing is raised. The start of the block imports the tracker's package, and then waits at
most `OPEN_TIMEOUT_S` seconds for the connection. After that time the block begins, and the thread
goes on connecting; it sends the figures once it is connected. The end of the block waits at most
`CLOSE_TIMEOUT_S` seconds for the last figures. If an exception ended the block, the tracker shows
the run as failed. The run's identity at the tracker is written to `TRACKER_FILE` in the folder, so
that a resumed run continues there. On several ranks, only rank 0 makes a `Tracker`.

`check_tracker(name)` raises `ValueError` if the tracker's package is not installed.
`is_installed(package)` returns whether a package is installed, without importing it. `TrackerName`
is the type of the names; the empty name means no tracker (make no `Tracker` then). `PROJECT` is the
project at the tracker, unless an environment variable of the tracker names another. A `TrackedRun`
describes the run for a tracker; a `Connection` is the open run there, made by one of the functions
`CONNECT`.
"""

import contextlib
import importlib.util
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import console
from installed import install_extra
from storage import parse_json, read_text, write_text

TrackerName = Literal["", "wandb", "mlflow"]

PROJECT = "ai-images-detector"
"""Default project of runs; WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME overrides it."""

TRACKER_FILE = "tracker.json"
"""File in the folder of a run with the identity of the run in its tracker."""

OPEN_TIMEOUT_S = 20.0
"""Seconds that the start of a run waits for the tracker, which may connect later."""

CLOSE_TIMEOUT_S = 30.0
"""Seconds that the end of a run waits for the tracker to receive the last rows."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as a tracker needs it: its name, its `identity` (the same after an interruption),
    whether the tracker already has it (`begun`), and the recipe as flat settings.
    """

    name: str
    identity: str
    begun: bool
    settings: Mapping[str, Any]


class Connection(Protocol):
    """An open run in a tracker: its identity, and the address where a person can see it."""

    identity: str
    address: str

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of one step."""

    def close(self, failed: bool) -> None:
        """Send the remaining scalars. `failed` means that the run stopped before its end."""


class _Wandb:
    """Connection to Weights & Biases."""

    def __init__(self, run: TrackedRun):
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        if wandb.setup(settings).settings.mode in (None, "online") and not wandb.api.api_key:
            raise ValueError("not logged in; type `wandb login`, or set WANDB_MODE=offline")
        self.identity = run.identity
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.identity,
            resume="allow",
            config=dict(run.settings),
            settings=settings,
        )
        self.address = self._run.url or str(Path(self._run.dir).parent)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """Connection to MLflow: to MLFLOW_TRACKING_URI, or to MLflow's default store."""

    def __init__(self, run: TrackedRun):
        # MLflow's defaults retry an unreachable server for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run.begun:
            self.identity = run.identity
            self._client.update_run(self.identity, status="RUNNING")
        else:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(project)
            number = known.experiment_id if known else self._client.create_experiment(project)
            self.identity = self._client.create_run(number, run_name=run.name).info.run_id
            params = [Param(name, str(value)[:6000]) for name, value in run.settings.items()]
            for start in range(0, len(params), 100):  # MLflow's limit per call
                self._client.log_batch(self.identity, params=params[start : start + 100])
        self.address = f"{self._client.tracking_uri}, run {self.identity}"

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.identity, "FAILED" if failed else "FINISHED")


CONNECT: Mapping[str, Callable[[TrackedRun], Connection]] = {"wandb": _Wandb, "mlflow": _Mlflow}


def is_installed(package: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


def check_tracker(name: TrackerName) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ValueError: the package is missing; the message says what to install.
    """
    if name and not is_installed(name):
        raise ValueError(
            f"run.tracker is {name}, and its package is not installed; leave run.tracker out "
            "(TensorBoard and metrics.jsonl are always written), or "
            f"{install_extra(name)}"
        )


class Tracker:
    """Sender of scalars to the tracker `name` for the run in `folder`; a context manager. The first
    failure is logged as a warning, and nothing is sent after it.
    """

    def __init__(self, name: str, folder: Path, run_name: str, settings: Mapping[str, Any]):
        self.name, self.path = name, folder / TRACKER_FILE
        self._run_name, self._settings = run_name, settings
        self._rows: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._opened, self._given_up, self._failed = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._send_all, name="tracker", daemon=True)

    def __enter__(self) -> "Tracker":
        with self._warning():  # import before loader workers are forked
            importlib.import_module(self.name)
            self._thread.start()
            self._opened.wait(OPEN_TIMEOUT_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if not self._thread.ident:
            return
        self._failed = kind is not None
        self._rows.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._give_up(
                f"no answer within {CLOSE_TIMEOUT_S:g} s, so its last rows may be missing"
            )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Queue the scalars of one step for sending, without waiting."""
        if not self._given_up.is_set():
            self._rows.put((step, dict(scalars)))

    def _send_all(self) -> None:
        """Open the run, send queued rows until the end of the run, and close it."""
        with self._warning():
            run = self._known_run()
            connection = CONNECT[self.name](run)
            if self._given_up.is_set():
                return
            if not run.begun:
                self._keep(connection.identity)
            console.log.info("run.tracker %s: %s", self.name, connection.address)
            self._opened.set()
            while row := self._rows.get():
                connection.log(*row)
            connection.close(self._failed)

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Log any exception of a tracker as a warning and stop sending."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._give_up(f"{type(error).__name__}: {error}")
        finally:
            self._opened.set()

    def _give_up(self, reason: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            line = " ".join(reason.split())[:300]
            console.log.warning("run.tracker %s: %s; the run goes on without it", self.name, line)

    def _known_run(self) -> TrackedRun:
        """Return the run with its stored identity, or with a new one."""
        identity, begun = uuid.uuid4().hex[:12], False
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = parse_json(read_text(self.path))
            if saved["tracker"] == self.name:
                identity, begun = str(saved["run"]), True
        return TrackedRun(
            name=self._run_name, identity=identity, begun=begun, settings=self._settings
        )

    def _keep(self, identity: str) -> None:
        write_text(self.path, json.dumps({"tracker": self.name, "run": identity}) + "\n")
