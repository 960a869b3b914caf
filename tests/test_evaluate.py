"""evaluate.py: each sample is scored once on any number of ranks; --scores, --reference-reals,
--suite and calibrate.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import evaluate
from model import distributed, score
from model.checkpoint import annotate, find, read_meta
from model.distributed import DistEnv
from model.evaluation.plan import Options
from model.evaluation.run import evaluate as evaluate_sets
from model.evaluation.scores import read_scores
from model.inference.fitness import notices
from model.verdict import probability
from pipeline.loading import Loading
from sharding.format import open_shards
from tests.builders import CALIBRATION, ROOT, build_all, encode, photo, train_tiny

# Warnings come from TensorBoard's use of protobuf and numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]


CATALOG = """
[sets]
val = "val"
evalgen = "test"
test = "test"

[sources.evalgen]
license = "x"
set = "evalgen"
group = '([^/]+)_[0-9]+[.]png$'
fake = [{ folder = "GenEval-JPEG/<generator>" }]

[sources.photos]
license = "x"
set = { test = 0.5, val = 0.5 }
real = [{ folder = "real", generator = "camera" }]

[sources.others]
license = "x"
set = "val"
fake = [{ folder = "fake", generator = "gan" }]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets: `evalgen` (3 generators, 4 prompts, 3 images each, one missing), `test` (real
    photographs only) and `val` (both classes).
    """
    raw = tmp_path_factory.mktemp("raw")
    number = 0
    prompts = [f"a photo of {prompt}_{image}" for prompt in "abcd" for image in range(3)]
    plan = {f"evalgen/GenEval-JPEG/{generator}": prompts for generator in ("Flux", "GoT", "NOVA")}
    plan["photos/real"] = [f"{i:03d}" for i in range(70)]
    plan["others/fake"] = [f"{i:03d}" for i in range(35)]
    for folder, names in plan.items():
        (raw / folder).mkdir(parents=True)
        for name in names:
            number += 1
            pixels = photo(number, 60, 60)
            if "real" not in folder:
                pixels[::2, ::2] //= 2
            (raw / folder / f"{name}.png").write_bytes(encode(pixels, "PNG"))
    (raw / "evalgen/GenEval-JPEG/NOVA/a photo of b_0.png").unlink()
    (raw / "catalog.toml").write_text(CATALOG)
    return build_all(raw, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder with the run `tiny` and its checkpoint."""
    return train_tiny(
        data, tmp_path_factory.mktemp("runs"), 'data.train=["val"]', 'data.validate=["test"]'
    )


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Fail where a set is scored, until `undo()`."""
    for place in ("model.evaluation.scoring.score_set", "model.evaluation.run.score_sets"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("images were scored"))
    return monkeypatch


@pytest.fixture
def own_runs(runs: Path, tmp_path: Path) -> Path:
    """A copy of the runs folder that a test may change."""
    return shutil.copytree(runs, tmp_path / "runs")


def run(data: Path, runs: Path, *arguments: object) -> Result:
    arguments = [*arguments, "--data", data, "--runs", runs]
    return CliRunner().invoke(evaluate.main, [str(argument) for argument in arguments])


def evaluate_on(world_size: int, batch_size: int, data: Path, runs: Path, out: Path) -> dict:
    """Run `evaluate` on `world_size` ranks, each a thread; returns the report of rank 0."""
    meeting = threading.Barrier(world_size, timeout=120)
    brought: dict[int, object] = {}

    def all_gather_object(dist: DistEnv, value: object) -> list:
        brought[dist.rank] = value
        meeting.wait()
        gathered = [brought[rank] for rank in range(world_size)]
        meeting.wait()
        return gathered

    reports: dict[int, dict] = {}

    def work(rank: int) -> None:
        reports[rank] = evaluate_sets(
            find(runs), data, ["evalgen", "val"], out, dist=DistEnv(rank, world_size, 0),
            options=Options(loading=Loading(batch_size=batch_size, num_workers=0, backend="pil")),
        )  # fmt: skip

    users = (score, distributed)
    before = distributed.all_gather_object
    for module in users:
        module.all_gather_object = all_gather_object
    try:
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for module in users:
            module.all_gather_object = before
    assert len(reports) == world_size, "a rank failed"
    assert [bool(reports[rank]) for rank in range(world_size)] == [True] + [False] * (
        world_size - 1
    )
    return reports[0]


def test_scores_do_not_depend_on_ranks_and_batch_size(
    data: Path, runs: Path, tmp_path: Path
) -> None:
    """The sets have 35, 35 and 70 samples, not divisible by these world and batch sizes."""
    outputs = {}
    for world_size, batch_size in ((1, 32), (2, 6), (3, 13)):
        out = tmp_path / f"{world_size}-{batch_size}"
        report = evaluate_on(world_size, batch_size, data, runs, out)
        assert report["sets"]["evalgen"]["overall"]["count"] == 35
        outputs[world_size, batch_size] = (out / "scores.parquet").read_bytes()
        assert sorted(path.name for path in out.iterdir()) == ["scores.parquet", "speed.json"]
    assert len(set(outputs.values())) == 1


def one_rank(rank: int, world_size: int, data: Path, runs: Path, out: Path, store: Path) -> None:
    """Run rank `rank` of `world_size` over gloo, in a forked process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    options = Options(loading=Loading(batch_size=7, num_workers=0, backend="pil"))
    dist = DistEnv(rank, world_size, 0)
    evaluate_sets(find(runs), data, ["evalgen", "val"], out, options=options, dist=dist)
    torch.distributed.destroy_process_group()


def test_processes_give_the_same_scores(data: Path, runs: Path, tmp_path: Path) -> None:
    """Rows of the scores have the order of the index, also when ranks communicate over gloo."""
    evaluate_on(1, 32, data, runs, tmp_path / "one")
    context = multiprocessing.get_context("fork")
    common = (2, data, runs, tmp_path / "two", tmp_path / "store")
    ranks = [context.Process(target=one_rank, args=(rank, *common)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = ((tmp_path / n / "scores.parquet").read_bytes() for n in ("one", "two"))
    assert first == second
    rows = read_scores(tmp_path / "two" / "scores.parquet").table
    kept = list(zip(*(rows.column(n).to_pylist() for n in ("set", "key", "sha256")), strict=True))
    held = []
    for name in ("evalgen", "val", "test"):
        table = open_shards([data / name]).table
        keys = (table.column(column).to_pylist() for column in ("key", "sha256"))
        held += [(name, *both) for both in zip(*keys, strict=True)]
    assert kept == held


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_gives_the_same_scores(data: Path, runs: Path, tmp_path: Path, ranks: int) -> None:
    arguments = ["--shards", "evalgen", "--shards", "val", "--device", "cpu"]
    one = run(data, runs, *arguments, "--out", tmp_path / "one")
    assert one.exit_code == 0, one.output
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
        ROOT / "evaluate.py", *arguments, "--data", data, "--runs", runs, "--out",
        tmp_path / "many",
    ]  # fmt: skip
    many = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert many.returncode == 0, many.stderr[-3000:]
    for name in ("scores.parquet", "report.json"):
        first, second = ((tmp_path / run / name).read_bytes() for run in ("one", "many"))
        assert first == second, name
    assert many.stdout.count("report: ") == 1


def test_the_report_is_rebuilt_from_scores_without_the_network(
    data: Path, runs: Path, tmp_path: Path
) -> None:
    done = run(data, runs, "--shards", "evalgen", "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    report = (tmp_path / "a" / "report.json").read_bytes()
    again = run(
        tmp_path / "none", tmp_path / "none", "--scores", tmp_path / "a" / "scores.parquet",
        "--out", tmp_path / "b",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert (tmp_path / "b" / "report.json").read_bytes() == report
    said = again.stdout.split("tables: ")[0].split("report: ")[0]
    assert said == done.stdout.split("checkpoint: ")[0]
    wrong = run(data, runs, "--scores", tmp_path / "a/scores.parquet", "--shards", "val")
    assert wrong.exit_code == 2
    assert "--scores cannot be combined with --shards" in wrong.output
    other = run(data, runs, "--scores", tmp_path / "a/report.json")
    assert other.exit_code == 1
    assert "not a file of scores" in other.output


def test_evalgen_uses_the_reference_reals_of_the_catalog(
    data: Path, runs: Path, tmp_path: Path
) -> None:
    """The report has both protocols, and uses the reals of `test` as the catalog requires."""
    done = run(data, runs, "--shards", "evalgen", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    reals = len(open_shards([data / "test"]))
    figures = report["sets"]["evalgen"]
    assert figures["reference_reals"] == {"set": "test", "why": "the catalog's default"}
    assert f"of {reals} real images of test called fake" in report["headline"][0]
    assert figures["reference"]["reals"] == reals
    assert figures["protocols"]["all_images"]["images"] == 35
    assert figures["protocols"]["first_per_prompt"]["images"] == 12
    assert set(figures["protocols"]["first_per_prompt"]["generators"]) == {"flux", "got", "nova"}
    assert "the first image of each prompt (12)" in " ".join(done.output.split())
    assert "Rows of generators use all real images of test." in done.output
    assert "first images" in " ".join(done.output.split())
    rows = read_scores(tmp_path / "scores.parquet").table.to_pylist()
    assert sum(row["set"] == "test" for row in rows) == reals
    assert len(rows) == 35 + reals


def test_reference_reals_can_be_chosen(data: Path, runs: Path, tmp_path: Path) -> None:
    done = run(data, runs, "--shards", "evalgen", "--reference-reals", "val", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["sets"]) == ["evalgen"]
    labels = open_shards([data / "val"]).column("label")
    assert report["sets"]["evalgen"]["reference"]["reals"] == (labels == 0).sum()
    for asked, said in (("evalgen", "has no real images"), ("nope", "no shard set at")):
        wrong = run(data, runs, "--shards", "val", "--reference-reals", asked, "--out", tmp_path)
        assert wrong.exit_code == 1
        assert said in wrong.output


def test_without_any_reals_the_first_line_says_so(data: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "evalgen", tmp_path / "shards" / "evalgen")
    shutil.copytree(data / "val", tmp_path / "shards" / "val")
    done = run(
        tmp_path / "shards", runs, "--shards", "val", "--shards", "evalgen", "--out", tmp_path
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("THE CHECKPOINT WAS TRAINED ON val")  # before any other line
    assert lines[1].startswith("evalgen: NO REAL IMAGES AT HAND")
    assert json.loads((tmp_path / "report.json").read_text())["headline"][:2] == lines[:2]


def test_calibration_is_stored_in_the_checkpoint_and_used(
    data: Path, own_runs: Path, tmp_path: Path, bars: list[tuple[str, int]]
) -> None:
    done = run(data, own_runs, "calibrate", "--shards", "val")
    assert done.exit_code == 0, done.output
    shards = open_shards([data / "val"])
    assert bars == [("scoring val", len(shards))]
    meta = read_meta(find(own_runs))
    assert meta["calibration"]["fitted_on"] == ["val"]
    assert meta["calibration"]["index_sha256"] == {"val": shards.sha256}
    assert meta["calibration"]["reals"] + meta["calibration"]["fakes"] == len(shards)
    assert meta["temperature"] != 1.0
    assert meta["threshold"] == meta["calibration"]["band"][1]
    assert "uncertain between" in done.output and "no threshold for 1 %" in done.output
    run(data, own_runs, "--shards", "evalgen", "--out", tmp_path / "out")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["threshold"] == meta["threshold"]
    assert document["band"] == meta["calibration"]["band"]
    at_half = run(data, own_runs, "calibrate", "--shards", "val", "--threshold", "0.5")
    assert read_meta(find(own_runs))["threshold"] == 0.5
    (until_now,) = [line for line in at_half.output.splitlines() if "until now" in line]
    assert f"{meta['temperature']:.3f}" in until_now


def test_calibrating_again_keeps_the_rates_of_left_out_sources(data: Path, own_runs: Path) -> None:
    folder = find(own_runs)
    rates = {"reals": 99, "fakes": 0, "false_positive_rate": 0.4, "recall": None, "uncertain": 0.0}
    method = {"method": "sources left out, pooled", "sources": {"faces": rates}, "band": [0.3, 0.8]}
    annotate(folder, {"temperature": 2.0, "threshold": 0.8, "calibration": CALIBRATION | method})
    (before,) = notices(read_meta(folder))
    assert "AI: 40 % of faces (each" in before.text and "at the threshold 0.8)" in before.text
    (folder / "README.md").write_text("likely AI from 0.8")
    for threshold in ("auto", "0.5"):  # the second time from what the first one has kept
        done = run(data, own_runs, "calibrate", "--shards", "val", "--threshold", threshold)
        assert "README.md still has the thresholds of before" in done.output
        temperature = read_meta(folder)["temperature"]
        (after,) = notices(read_meta(folder))
        same = probability(np.log(0.8 / 0.2) * 2.0, temperature)
        assert temperature != 2.0 and after.text == before.text.replace("0.8)", f"{same:.3g})")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["evalgen"], "evalgen is of the split test; calibration takes validation sets only"),
        (["val", "test"], "test is of the split test"),
        (["nope"], "no shard set at"),
        (["val", "./val"], "two sets have the name val, expected one of each name"),
    ],
)
def test_calibration_accepts_validation_sets_only(
    data: Path, own_runs: Path, names: list[str], said: str
) -> None:
    meta = (find(own_runs) / "meta.json").read_bytes()
    result = run(data, own_runs, "calibrate", *(f"--shards={name}" for name in names))
    assert result.exit_code == 1
    assert said in result.output
    assert (find(own_runs) / "meta.json").read_bytes() == meta


def test_a_detector_that_ships_is_never_calibrated_in_place(
    data: Path, own_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.shipped.backbone.DETECTORS", tmp_path)
    meta = shutil.copytree(find(own_runs), tmp_path / "mine") / "meta.json"
    before = meta.read_bytes()
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(meta.parent)
    for named, shown in (("mine", "mine"), (link, link.name)):
        result = run(data, own_runs, "calibrate", "--shards", "val", "--checkpoint", named)
        assert result.exit_code == 1
        said = f"{shown} is a detector that ships, which is not changed; calibrate a copy"
        assert said in result.output
        assert meta.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threshold", "fpr1"], "36 real images are too few for a threshold at 1 % (needs 99)"),
        (["--max-fpr", "0.01"], "too few real images for a threshold at a rate of 0.01"),
        (["--max-fpr", "0.1", "--max-miss", "0.01"], "too few fake images for a threshold at"),
    ],
)
def test_too_few_images_for_a_rate_are_refused_before_they_are_scored(
    data: Path, own_runs: Path, unscored: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    result = run(data, own_runs, "calibrate", "--shards", "val", *options)
    assert result.exit_code == 1 and said in result.output


def test_calibration_refuses_one_class(
    data: Path, own_runs: Path, tmp_path: Path, unscored: pytest.MonkeyPatch
) -> None:
    """Before anything is scored."""
    alone = tmp_path / "shards" / "val"
    shutil.copytree(data / "evalgen", alone)
    index = json.loads((alone / "index.json").read_text())
    (alone / "index.json").write_text(json.dumps(index | {"split": "val"}))
    result = run(tmp_path / "shards", own_runs, "calibrate", "--shards", "val")
    assert result.exit_code == 1
    said = "0 real and 35 fake images: calibration needs at least 20 of each; add images, or a"
    assert said in " ".join(result.output.split())
    # As docs/evaluation.md says: a set of another place may hold the class that is missing.
    unscored.undo()
    (tmp_path / "shards" / "others").symlink_to(data / "val")
    both = ["--shards", "val", "--shards", "others", "--max-fpr", "0.05", "--over", "worst_source"]
    assert run(tmp_path / "shards", own_runs, "calibrate", *both).exit_code == 0


def test_options_before_a_command_are_refused(data: Path, own_runs: Path) -> None:
    """They would be ignored, and another checkpoint calibrated."""
    for before in (["--checkpoint", "runs/a"], ["--runs", own_runs], ["--shards", "val"]):
        result = run(data, own_runs, *before, "calibrate", "--shards", "val")
        assert result.exit_code == 2
        assert f"put it after: python evaluate.py calibrate {before[0]} ..." in result.output


def test_the_folder_of_a_report_is_below_the_run(data: Path, own_runs: Path) -> None:
    before = sorted((data / "val").iterdir())
    result = run(data, own_runs, "--shards", (data / "val").absolute(), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert sorted((data / "val").iterdir()) == before
    assert (own_runs / "tiny/evaluation/val/report.json").is_file()
    nested = own_runs.parent / "nested"
    shutil.copytree(data / "val", nested / "folders" / "val")
    result = run(nested, own_runs, "--shards", "folders/val", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (own_runs / "tiny/evaluation/folders-val/report.json").is_file()
    many = own_runs.parent / "many"
    names = [f"{letter * 130}" for letter in "ab"]
    for name in names:
        shutil.copytree(data / "val", many / name)
    result = run(many, own_runs, *(f"--shards={name}" for name in names), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert len([*(own_runs / "tiny/evaluation").glob("a*/report.json")]) == 1


def test_folders_that_are_in_no_run_have_reports_of_their_own(
    data: Path, own_runs: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(find(own_runs), tmp_path / "hubs" / name)
        line = ["--shards", "val", "--checkpoint", str(tmp_path / "hubs" / name)]
        run(data, own_runs, *line, "--device", "cpu")
    reports = sorted(own_runs.glob("*/evaluation/val/report.json"))
    assert [path.parts[-4][:14] for path in reports] == ["checkpoint-one", "checkpoint-two"]
    assert sorted(path.name for path in (tmp_path / "hubs").iterdir()) == ["one", "two"]


def test_an_output_folder_that_cannot_be_made_is_told_before_scoring(
    data: Path, own_runs: Path, unscored: pytest.MonkeyPatch
) -> None:
    result = run(data, own_runs, "--shards", "val", "--out", "/proc/none/here")
    assert result.exit_code == 1 and "/proc/none" in result.output


def test_a_suite_gives_one_report_and_lists_missing_sets(
    data: Path, runs: Path, tmp_path: Path
) -> None:
    result = run(data, runs, "--suite", "generators", "--device", "cpu", "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert list(json.loads((tmp_path / "a" / "report.json").read_text())["sets"]) == ["evalgen"]
    assert result.output.splitlines()[-1].startswith(
        f"Error: suite generators: 7 of 8 sets are not packed in {data}: genimage, tiny-genimage, "
    )
    assert "python -m sharding fetch genimage tiny_genimage_val" in result.output
    none = run(data, runs, "--suite", "camera", "--out", tmp_path / "none")
    assert none.exit_code == 1
    assert "2 of 2 sets are not packed" in none.output
    assert not (tmp_path / "none").exists()
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(
        '[sets]\nevalgen = "test"\ntest = "test"\nmine = "test"\n'
        '[suites]\nboth = ["evalgen", "test"]\nmine = ["mine"]\n[reference]\nevalgen = "val"\n'
    )
    # A set that no source of the catalog feeds cannot be fetched, only packed.
    own = ("--catalog", catalog, "--device", "cpu")
    mine = run(data, runs, "--suite", "mine", *own, "--out", tmp_path / "none")
    build = f"`python -m sharding build --out {data} --catalog {catalog}`"  # below --data
    assert mine.output.rstrip().endswith(f"To get them, run {build}")
    whole = run(data, runs, "--suite", "both", *own, "--out", tmp_path / "b")
    assert whole.exit_code == 0, whole.output
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert list(report["sets"]) == ["evalgen", "test"]
    assert report["sets"]["evalgen"]["reference_reals"]["set"] == "val"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "wlid"], "no suite wlid; the suites are wild, generators"),
        (["--suite", "mine"], "; a suite of your own catalog needs --catalog FILE"),
        (["--suite", "wild", "--shards", "val"], "--suite cannot be combined"),
    ],
)
def test_wrong_suite_options_are_refused(
    data: Path, runs: Path, arguments: list[str], said: str
) -> None:
    result = run(data, runs, *arguments)
    assert result.exit_code != 0
    assert said in result.output
