"""A tracker that gets a run's figures beside TensorBoard: Weights & Biases, MLflow or Trackio.

A thread of its own talks to it, so that a server which is gone, slow or full costs a warning and
never a step. What it gets is decided in `model/training/history.py`.
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
from storage import write_text

TrackerName = Literal["", "wandb", "mlflow", "trackio"]

PROJECT = "ai-images-detector"
"""Where runs are listed, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT says."""

TRACKER_FILE = "tracker.json"
"""In the folder of a run: the identity that its tracker knows it by."""

OPEN_TIMEOUT_S = 20.0
"""How long the begin of a run waits for the tracker; it may open later."""

CLOSE_TIMEOUT_S = 30.0
"""How long the end of a run waits for the tracker to take the last rows."""

_INSTALLED_AS = {"wandb": "wandb", "mlflow": "mlflow-skinny sqlalchemy alembic"}


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as a tracker sees it: its name, an `identity` that is kept over interruptions, whether
    the tracker has `begun` it before, and the recipe as one level of settings.
    """

    name: str
    identity: str
    begun: bool
    settings: Mapping[str, Any]


class Connection(Protocol):
    """An open run of a tracker: the identity that finds it again, and where a person looks."""

    identity: str
    address: str

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send scalars of one step."""

    def close(self, failed: bool) -> None:
        """Send the rest; `failed` says that the run stopped before its end."""


class _Wandb:
    """Weights & Biases."""

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
    """MLflow, at MLFLOW_TRACKING_URI or where MLflow itself puts its runs."""

    def __init__(self, run: TrackedRun):
        # By itself it tries a server that does not answer for minutes.
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
            for start in range(0, len(params), 100):  # it takes no more in one call
                self._client.log_batch(self.identity, params=params[start : start + 100])
        self.address = f"{self._client.tracking_uri}, run {self.identity}"

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.identity, "FAILED" if failed else "FINISHED")


class _Trackio:
    """Trackio, which finds a run by its name."""

    def __init__(self, run: TrackedRun):
        import trackio

        self.identity = run.identity
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.name}-{run.identity}"
        self._run = trackio.init(
            project, name, resume="allow", config=dict(run.settings), embed=False
        )
        self.address = f"project {project}, run {name}"

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:  # noqa: ARG002 - it knows no failed runs
        self._run.finish()


CONNECT: Mapping[str, Callable[[TrackedRun], Connection]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def check_tracker(name: TrackerName) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ValueError: what to install.
    """
    if name and not is_installed(name):
        raise ValueError(
            f"run.tracker is {name}, and its package is not installed: type `pip install "
            f"{_INSTALLED_AS.get(name, name)}`, or leave run.tracker out (TensorBoard and "
            "metrics.jsonl are always written)"
        )


class Tracker:
    """Sends scalars to the tracker `name` for the run in `folder`; a context manager. Whatever
    fails is one warning, and from there on nothing is sent.
    """

    def __init__(self, name: str, folder: Path, run_name: str, settings: Mapping[str, Any]):
        self.name, self.path = name, folder / TRACKER_FILE
        self._run_name, self._settings = run_name, settings
        self._rows: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._opened, self._given_up, self._failed = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._send_all, name="tracker", daemon=True)

    def __enter__(self) -> "Tracker":
        with self._warning():  # here: loading workers are forked, and an import must not be halved
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
        """Have scalars of one step sent; returns at once."""
        if not self._given_up.is_set():
            self._rows.put((step, dict(scalars)))

    def _send_all(self) -> None:
        """Open the run, send what comes, and close it."""
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
        """Turn whatever a tracker raises into the one warning."""
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
        """The run with the identity of its earlier part, or a new one."""
        identity, begun = uuid.uuid4().hex[:12], False
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["tracker"] == self.name:
                identity, begun = str(saved["run"]), True
        return TrackedRun(
            name=self._run_name, identity=identity, begun=begun, settings=self._settings
        )

    def _keep(self, identity: str) -> None:
        write_text(self.path, json.dumps({"tracker": self.name, "run": identity}) + "\n")
