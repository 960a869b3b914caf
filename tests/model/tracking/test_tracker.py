"""Trackers: the scalars that they get, and failures that never stop a run. Real local trackers."""

import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

import recipes
from model.recipe import Recipe
from model.tracking import tracker as tracking
from model.tracking.history import History, rows_of, scalars_of
from model.tracking.tracker import TrackedRun, Tracker
from model.training import step as step_module
from model.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the trackers' packages

Rows = list[tuple[int, dict[str, float]]]


class InMemory:
    """Connection that stores what it is sent, and fails or hangs where it is told to."""

    identity, address = "abc", "memory"
    sent: ClassVar[Rows] = []
    runs: ClassVar[list[TrackedRun]] = []
    breaks_at: int | None = None
    hangs: threading.Event | None = None

    def __init__(self, run: TrackedRun):
        self.runs.append(run)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if step == self.breaks_at:
            raise ConnectionError("the server\nis gone")
        if self.hangs:
            self.hangs.wait(20)
        self.sent.append((step, dict(scalars)))

    def close(self, failed: bool) -> None:
        self.sent.append((-1, {"failed": failed}))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[InMemory]:
    """Register the connection as the tracker `json`, a package that is always installed."""
    kind = type("Fresh", (InMemory,), {"sent": [], "runs": []})
    monkeypatch.setitem(tracking.CONNECT, "json", kind)
    return kind


def test_rows_are_sent_in_order_and_the_run_is_resumed(
    memory: type[InMemory], tmp_path: Path, logged: list[str]
) -> None:
    for number in range(2):
        with Tracker("json", tmp_path, "a/b", {"optim.lr": 0.1}) as tracker:
            tracker.log(number, {"train/loss": 0.5})
    assert memory.sent == [
        (0, {"train/loss": 0.5}), (-1, {"failed": False}),
        (1, {"train/loss": 0.5}), (-1, {"failed": False}),
    ]  # fmt: skip
    first, second = memory.runs
    assert (first.name, first.begun, first.settings) == ("a/b", False, {"optim.lr": 0.1})
    assert (second.identity, second.begun) == ("abc", True)
    assert logged == ["run.tracker json: memory"] * 2
    with pytest.raises(RuntimeError), Tracker("json", tmp_path, "a/b", {}):
        raise RuntimeError("the run's own")
    assert memory.sent[-1] == (-1, {"failed": True})


def test_a_tracker_that_breaks_is_one_warning(
    memory: type[InMemory], tmp_path: Path, logged: list[str]
) -> None:
    memory.breaks_at = 2
    with Tracker("json", tmp_path, "a", {}) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"train/loss": 0.5})
    assert [step for step, _ in memory.sent] == [1]
    said = "run.tracker json: ConnectionError: the server is gone; the run goes on without it"
    assert logged[1:] == [said]


def test_a_package_that_cannot_be_imported_is_one_warning(
    tmp_path: Path, logged: list[str]
) -> None:
    with Tracker("no_such_tracker", tmp_path, "a", {}) as tracker:
        tracker.log(1, {"train/loss": 0.5})
    (said,) = logged
    assert said.startswith("run.tracker no_such_tracker: ModuleNotFoundError")


def test_a_tracker_that_hangs_does_not_delay_the_run(
    memory: type[InMemory], tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.2)
    memory.hangs = threading.Event()
    with Tracker("json", tmp_path, "a", {}) as tracker:
        tracker.log(1, {"train/loss": 0.5})
        tracker.log(2, {"train/loss": 0.5})
    memory.hangs.set()
    assert "no answer within 0.2 s" in logged[1]


def test_a_tracker_gets_what_tensorboard_gets_and_no_row_twice(tmp_path: Path) -> None:
    class Both:
        def __init__(self) -> None:
            self.tensorboard: Rows = []
            self.tracker: Rows = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.tensorboard.append((step, {name: value}))

        def log(self, step: int, scalars: dict[str, float]) -> None:
            self.tracker.extend((step, {name: value}) for name, value in scalars.items())

        def close(self) -> None:
            pass

    both = Both()
    # Rows after the last checkpoint are repeated; the second start is interrupted before row 3.
    for done, last in ((0, 3), (1, 2), (1, 4)):
        with History(tmp_path, done, both) as history:
            history.writer.close()
            history.writer = both
            for step in range(done + 1, last + 1):
                history.write(step, "validate", {"auroc": 0.5 + step, "empty": None})
    assert scalars_of("train", {"a": 1.0, "b": None}) == {"train/a": 1.0}
    values = {step: (step, {"validate/auroc": 0.5 + step}) for step in range(1, 5)}
    assert both.tensorboard == [values[step] for step in (1, 2, 3, 2, 2, 3, 4)]
    assert both.tracker == [values[step] for step in (1, 2, 3, 4)]
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_reported_before_training(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tracking, "is_installed", lambda _package: False)
    recipe = recipes.load(Recipe, tiny_recipe, [f"run.tracker={name}"])
    with pytest.raises(ValueError, match=rf"run.tracker is {name}.*not installed.*pip install"):
        train(recipe, data, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_another_tracker_is_refused(tiny_recipe: Path) -> None:
    with pytest.raises(recipes.RecipeError, match=r"run\.tracker takes .*'wandb'.*, got \"nept"):
        recipes.load(Recipe, tiny_recipe, ["run.tracker=neptune"])


def expected(run: Path) -> dict[tuple[str, int], float]:
    """Return (name, step) -> value of every scalar in the history of a run."""
    return {
        (name, row["step"]): value
        for row in rows_of(run)
        for name, value in scalars_of(
            row["kind"], {k: v for k, v in row.items() if k not in ("step", "kind")}
        ).items()
    }


def in_two_parts(recipe: Recipe, data: Path, runs: Path) -> Path:
    """Train to step 3, then to the end; return the folder of the run."""
    train(recipe, data, runs, stop_at=3)
    return train(recipe, data, runs).parent


def wandb_blobs(data: bytes) -> Iterator[bytes]:
    """Read the records of a `.wandb` file: LevelDB's log format after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or its last part
            yield parts
            parts = b""


def wandb_records(folder: Path) -> tuple[set[str], dict[str, str], dict[tuple[str, int], float]]:
    """Read the identities, configuration and scalars of all offline runs below a folder."""
    from wandb.proto import wandb_internal_pb2

    identities, config, scalars = set(), {}, {}
    for path in sorted(folder.rglob("*.wandb")):
        for blob in wandb_blobs(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(blob)
            if record.run.run_id:
                identities.add(record.run.run_id)
                config |= {entry.key: entry.value_json for entry in record.run.config.update}
            step = record.history.step.num
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                scalars[name, step] = json.loads(item.value_json)
    return identities, config, scalars


@pytest.fixture
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise the time limits: a busy machine is slow to import and to create a database."""
    monkeypatch.setattr(tracking, "OPEN_TIMEOUT_S", 300.0)
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 300.0)


@pytest.mark.slow
def test_wandb_offline(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hurry: None
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=1", "run.tracker=wandb"])
    run = in_two_parts(recipe, data, tmp_path / "runs")
    identities, config, scalars = wandb_records(tmp_path / "wandb")
    assert identities == {json.loads((run / "tracker.json").read_text())["run"]}
    assert json.loads(config["optim.lr"]) == 2e-4
    wanted = expected(run)
    assert {key: scalars[key] for key in wanted} == pytest.approx(wanted)
    assert {name for name, _ in scalars if not name.startswith("_")} == {n for n, _ in wanted}


@pytest.fixture
def mlflow_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hurry: None) -> Path:
    path = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path


@pytest.mark.slow
def test_mlflow_in_a_local_database(
    tiny_recipe: Path, data: Path, tmp_path: Path, mlflow_database: Path
) -> None:
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=1", "run.tracker=mlflow"])
    run = in_two_parts(recipe, data, tmp_path / "runs")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("ai-images-detector")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert (kept.info.run_name, kept.info.status) == ("tiny", "FINISHED")
    assert kept.data.params["optim.lr"] == "0.0002"
    wanted = expected(run)
    history = {
        (name, metric.step): metric.value
        for name in kept.data.metrics
        for metric in client.get_metric_history(kept.info.run_id, name)
    }
    assert history == pytest.approx(wanted)


@pytest.mark.slow
def test_a_database_that_is_destroyed_in_the_middle_stops_no_run(
    tiny_recipe: Path, data: Path, tmp_path: Path, mlflow_database: Path,
    monkeypatch: pytest.MonkeyPatch, logged: list[str],
) -> None:  # fmt: skip
    real_step = step_module.train_step

    def step(*arguments: object, step: int, **options: object) -> object:
        if step == 4:
            mlflow_database.write_bytes(b"no database" * 1000)
        return real_step(*arguments, step=step, **options)

    monkeypatch.setattr(step_module, "train_step", step)
    recipe = recipes.load(Recipe, tiny_recipe, ["run.log_every=1", "run.tracker=mlflow"])
    run = train(recipe, data, tmp_path / "runs").parent
    warnings = [line for line in logged if "the run goes on without it" in line]
    assert len(warnings) == 1 and warnings[0].startswith("run.tracker mlflow: ")
    assert [r["step"] for r in rows_of(run) if r["kind"] == "train"] == [*range(1, 11)]


@pytest.mark.slow
def test_a_server_that_never_answers_stops_no_run(
    tiny_recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tracking, "OPEN_TIMEOUT_S", 1.0)
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        recipe = recipes.load(Recipe, tiny_recipe, ["run.tracker=mlflow"])
        train(recipe, data, tmp_path)
    assert any("run.tracker mlflow: no answer within 1 s" in line for line in logged)
