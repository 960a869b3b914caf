"""`evaluate.py --subset` scores exactly the listed samples, each once."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import evaluate
from model.checkpoint import find, load_network
from model.score import score_set
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.subset import choose_samples, read_subset
from sharding.__main__ import main as sharding
from sharding.format import ShardSet, open_shards
from tests.builders import partly, write_shards

# TensorBoard's use of protobuf and numpy causes these warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]


def keys_of(shards: ShardSet) -> list[str]:
    return shards.table.column("key").to_pylist()


def write_list(path: Path, rows: list[tuple[str, str]], header: str = "set,key") -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return path


def run(data: Path, runs: Path, *arguments: object) -> Result:
    arguments = [*arguments, "--data", data, "--runs", runs]
    return CliRunner().invoke(evaluate.main, [str(argument) for argument in arguments])


def test_a_part_of_a_set_is_a_set(old: ShardSet) -> None:
    rows = np.array([7, 3, 41])
    part = old.take(rows)
    assert len(part) == 3
    assert keys_of(part) == [keys_of(old)[row] for row in rows]
    assert part.names("source", np.arange(3)) == old.names("source", rows)
    assert part.column("offset").tolist() == old.column("offset")[rows].tolist()
    assert [part.shard_path(i) for i in range(3)] == [old.shard_path(row) for row in rows]
    assert len({part.sha256, old.sha256, old.take(rows[::-1]).sha256}) == 3


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_the_listed_samples_score_as_in_the_whole_set(
    old: ShardSet, data: Path, small_runs: Path, tmp_path: Path, backend: str
) -> None:
    wanted = [("old", key) for key in keys_of(old)[60:5:-3]]
    subset = read_subset(write_list(tmp_path / "some.csv", wanted))
    part = choose_samples(old, "old", subset)
    assert sorted(keys_of(part)) == sorted(key for _set, key in wanted)
    net, preprocess, _meta = load_network(find(small_runs, None))
    logits = []
    for shards in (old, part):
        loader = open_loader(
            shards, preprocess=preprocess, loading=Loading(backend=backend, num_workers=0),
            device=torch.device("cpu"),
        )  # fmt: skip
        scores = score_set(net, loader)
        keys = np.array(keys_of(shards))[scores.samples]
        logits.append(dict(zip(keys, scores.logits.tolist(), strict=True)))
    assert len(logits[1]) == len(wanted)
    for _set, key in wanted:
        assert logits[1][key] == pytest.approx(logits[0][key], abs=1e-5)


def test_a_set_may_be_listed_by_the_last_part_of_its_name(old: ShardSet, tmp_path: Path) -> None:
    subset = read_subset(write_list(tmp_path / "some.csv", [("old", keys_of(old)[3])]))
    assert keys_of(choose_samples(old, "folders/old", subset)) == [keys_of(old)[3]]
    with pytest.raises(ValueError, match="lists no sample of folders/new"):
        choose_samples(old, "folders/new", subset)


def test_the_report_names_the_list(
    data: Path, small_runs: Path, old: ShardSet, tmp_path: Path
) -> None:
    val = open_shards([data / "val"])
    rows = [("old", key) for key in keys_of(old)[::4]] + [("val", key) for key in keys_of(val)[:5]]
    listed = write_list(tmp_path / "few.csv", rows)
    result = run(data, small_runs, "--subset", listed)
    assert result.exit_code == 0, result.output
    assert f"Only the {len(rows)} samples listed in few.csv were scored." in result.output
    path = Path(result.output.split("report: ")[1].splitlines()[0])
    assert path.parent.name == "old+val-few"
    report = json.loads(path.read_text())
    assert report["subset"] == {
        "file": "few.csv",
        "sha256": hashlib.sha256(listed.read_bytes()).hexdigest(),
        "samples": len(rows),
    }
    assert report["sets"]["old"]["overall"]["count"] == len(rows) - 5
    assert report["sets"]["old"]["index_sha256"] == old.sha256
    only = run(data, small_runs, "--subset", listed, "--shards", "val", "--out", tmp_path / "val")
    assert only.exit_code == 0, only.output
    report = json.loads((tmp_path / "val" / "report.json").read_text())
    assert report["subset"]["samples"] == report["sets"]["val"]["overall"]["count"] == 5
    assert list(report["sets"]) == ["val"]
    whole = run(data, small_runs, "--shards", "val", "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    reports = [tmp_path / name / "report.json" for name in ("val", "whole")]
    assert json.loads(reports[1].read_text())["subset"] is None
    compared = CliRunner().invoke(evaluate.main, ["compare", *map(str, reports)])
    assert compared.exit_code == 1
    assert (
        "on different samples: 5 and" in compared.output and "5 of them in both" in compared.output
    )
    flips = tmp_path / "flips.csv"
    arguments = ["compare", *map(str, reports), "--intersection", "--flips", str(flips)]
    compared = CliRunner().invoke(evaluate.main, arguments)
    assert compared.exit_code == 0, compared.output
    assert f"excluded: 0 of {reports[0]}" in compared.output
    assert flips.read_text() == "set,key,source,generator,label,before,after,fixed\n"
    compared = CliRunner().invoke(evaluate.main, ["compare", *[str(reports[0].parent)] * 2])
    assert compared.exit_code == 0 and "left out" not in compared.output


@pytest.mark.parametrize(
    ("rows", "header", "arguments", "said"),
    [
        ([], "set,key", [], "lists no sample; write the list again"),
        ([("val", "a")], "key,set", [], "begins with 'key,set', expected the header set,key"),
        ([("val", "a", "b")], "set,key", [], "list.csv:2 has 3 values, expected set,key"),
        ([("val", "a")] * 3, "set,key", [], "lists 3 samples, but 2 repeated"),
        ([("val", "a"), ("val", "b")], "set,key", [],
         "list.csv lists 2 samples of val, but 2 of them are not in that set of"),
        ([("val", "a")], "set,key", ["--shards", "old"], "lists no sample of old, only of val"),
        ([("nope", "a")], "set,key", [], "no shard set at"),
    ],
)  # fmt: skip
def test_a_list_that_does_not_fit_the_sets_is_one_clear_error(
    data: Path, small_runs: Path, tmp_path: Path, rows: list[tuple[str, str]], header: str,
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    listed = write_list(tmp_path / "list.csv", rows, header)
    result = run(data, small_runs, "--subset", listed, *arguments)
    assert result.exit_code == 1
    assert said in result.output
    assert len([line for line in result.output.splitlines() if "Error" in line]) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty, expected the header set,key"),
        (b"\xff\xfe", "byte 0 is 0xff, which is not UTF-8; save it as UTF-8"),
    ],
)
def test_a_file_that_is_no_list_is_an_error_with_the_cause(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"list.csv:? {said}"):
        read_subset(path)


@pytest.mark.slow
def test_evaluate_takes_the_list_of_audit_match(small_runs: Path, tmp_path: Path) -> None:
    sets = write_shards(tmp_path, {"half": {"half": (partly, 150, 150)}})
    listed = tmp_path / "matched.csv"
    out = tmp_path / "audit"
    made = CliRunner().invoke(
        sharding, ["audit", str(sets), "--match", str(listed), "--out", str(out)]
    )
    assert made.exit_code == 0, made.output
    matched = json.loads((out / "report.json").read_text())["sets"]["half"]["match"]
    assert matched["auroc_after"]["low"] <= 0.5 < 0.6 < matched["auroc_before"]["low"]
    result = run(sets, small_runs, "--subset", listed, "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    overall = json.loads((tmp_path / "report/report.json").read_text())["sets"]["half"]["overall"]
    assert overall["reals"] == overall["fakes"] == matched["per_class"]
    assert overall["count"] == len(listed.read_text().splitlines()) - 1
