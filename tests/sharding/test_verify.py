"""Tests of the commands verify, diff, list and describe: faults are named and set the exit code."""

import io
import json
import os
import shlex
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from sharding.__main__ import main
from sharding.format import SAMPLES_SCHEMA, ShardError, open_shards
from sharding.verify import _copied, _repeated, sets_in, verify
from tests.builders import build_all, encode, photo


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data, tmp_path / "copy")


def rewrite(folder: Path, change) -> None:
    """Change the samples table of a set, and write its new hash to the index."""
    import hashlib

    table = pq.read_table(folder / "samples.parquet", schema=SAMPLES_SCHEMA)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, SAMPLES_SCHEMA), folder / "samples.parquet")
    index = json.loads((folder / "index.json").read_text())
    digest = hashlib.sha256((folder / "samples.parquet").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index | {"samples_sha256": digest}))


def test_a_new_build_has_no_faults(data: Path) -> None:
    assert verify(sets_in(data), jobs=1) == []
    status, output = run("verify", data, "--jobs", 2)
    assert status == 0
    assert "new, old, val: 200 images match the index, no image is in two splits" in output


def test_a_flipped_bit_is_found_in_its_shard_and_its_image(copy: Path) -> None:
    tar = copy / "old/alpha-train-00000.tar"
    row = open_shards([copy / "old"]).table.to_pylist()[3]
    data = bytearray(tar.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 4
    tar.write_bytes(data)
    status, output = run("verify", copy, "--jobs", 1)
    assert status == 1
    assert "old/alpha-train-00000.tar: its sha256 is not the one in the index" in output
    assert f"{row['key']}" in output and "the bytes do not match the sha256" in output
    assert "Delete the damaged shards, if any, and build all sets again" in output


def test_missing_short_and_unlisted_files_are_found(copy: Path) -> None:
    (copy / "old/alpha-train-00000.tar").unlink()
    (copy / "old/beta-train-00000.idx").write_text("v1.2 0\n")
    (copy / "old/zeta-train-00000.tar").write_bytes(b"")
    (copy / "val/_info.json").write_text('{"splits": {}}')
    (copy / "new/_info.json").write_bytes(b"\xff{")
    tar = copy / "new/gamma-train-00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    shutil.copy(copy / "val/gamma-val-00000.tar", copy / "old/dummy-train-00000.tar")
    faults = "\n".join(verify(sets_in(copy), jobs=1))
    assert "old/alpha-train-00000.tar: missing" in faults
    assert "old/beta-train-00000.tar: its .idx is missing or has wrong pos" in faults
    assert "old/zeta-train-00000.tar: a file that the index does not list" in faults
    assert "val/_info.json: missing, or not as the index requires" in faults
    assert "new/_info.json: missing, or not as the index requires" in faults
    assert "new/gamma-train-00000.tar: incomplete or damaged tar" in faults
    assert "in the index but not in the tar" in faults


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[0].update(label=1 - rows[0]["label"]), "label is 'fake', the index"),
        (lambda rows: rows[0].update(width=rows[0]["width"] + 1), "pixels, the index says"),
        (lambda rows: rows[0].update(offset=rows[0]["offset"] + 512), "another offset or size"),
        (lambda rows: rows[0].update(phash=1), "another perceptual hash"),
        (lambda rows: rows[0].update(generator="other"), "generator is 'gan', the index says"),
        (lambda rows: rows.pop(), "a member that is not in the index"),
        (lambda rows: rows[1].update(key=rows[0]["key"]), "2 samples have this key"),
    ],
)  # fmt: skip
def test_a_table_that_contradicts_the_shards_is_found(copy: Path, change, said: str) -> None:
    rewrite(copy / "old", change)
    assert said in "\n".join(verify([copy / "old"], jobs=1))


def test_an_image_in_two_splits_is_found(copy: Path) -> None:
    old = open_shards([copy / "old"]).table.to_pylist()[0]

    def leak(rows: list[dict]) -> None:
        rows[0].update(group=old["group"])
        rows[1].update(phash=old["phash"])
        rows[2].update(sha256=old["sha256"])

    rewrite(copy / "val", leak)
    faults = "\n".join(verify(sets_in(copy), jobs=1))
    assert "in another split than an image of the same group" in faults
    assert "in another split than an image with the same perceptual hash" in faults
    assert "the same bytes as old:" in faults


@pytest.mark.parametrize("rows", [range(1500, 2500), [2003, 1, 2001], []])
def test_rows_of_a_shard_are_copied_without_the_rest_of_the_table(rows: Sequence[int]) -> None:
    """A `take` of a table of many chunks first copies all of it: once per shard, this was quadratic
    in the number of images.
    """
    chunk = pa.table({"key": [f"key-{number:04}" for number in range(1000)]})
    table = pa.concat_tables([chunk] * 64)
    pool = pa.proxy_memory_pool(default := pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        keys = _copied(table, np.array(rows, np.int64)).column("key").to_pylist()
    finally:
        pa.set_memory_pool(default)
    assert keys == [f"key-{row % 1000:04}" for row in rows]
    assert (pool.max_memory() or 0) < table.nbytes / 8


def test_repeated_values_are_found_with_few_bytes_for_each_row() -> None:
    """Python's objects of all rows were 2 kB for each image, and minutes after the last shard."""
    count = 20_000
    texts = [f"text-{number}" for number in range(count)]
    texts[7], texts[-1], texts[-2] = "text-5", "text-5", "text-100"
    column = pa.chunked_array([texts[:6000], texts[6000:]])
    tracemalloc.start()
    try:
        repeated = [*_repeated(column)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert repeated == [(7, 5), (count - 2, 100), (count - 1, 5)]
    assert peak < 100 * count
    numbers = pa.chunked_array([[3, 4], [4, 3, 3]], pa.uint64())
    assert [*_repeated(numbers)] == [(2, 1), (3, 0), (4, 0)]
    assert [*_repeated(column[:0])] == []


def test_a_foreign_member_is_found(copy: Path, tmp_path: Path) -> None:
    with tarfile.open(copy / "old/dummy-train-00000.tar", "a") as tar:
        (tmp_path / "extra.jpg").write_bytes(b"x")
        tar.add(tmp_path / "extra.jpg", "extra.jpg")
    assert "extra.jpg: a member that is not in the index" in "\n".join(
        verify([copy / "old"], jobs=1)
    )


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON: Expecting"), (b"\xff{}", "not JSON: "),
        (b"[1]", "not the facts of an image: list, expected a JSON object"),
        (b"null", "not the facts of an image: NoneType, expected a JSON object"),
        pytest.param(DEEP, "not JSON: it is nested too deeply", id="deep"),
    ],
)  # fmt: skip
def test_facts_that_are_no_object_are_found(copy: Path, content: bytes, said: str) -> None:
    path = copy / "old/dummy-train-00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    changed = next(member.name for member, _ in members if member.name.endswith(".json"))
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            new = content if member.name == changed else data
            member.size = len(new)
            tar.addfile(member, io.BytesIO(new))
    faults = "\n".join(verify([copy / "old"], jobs=1))
    assert f"{path.name}:{changed}: {said}" in faults


def test_deep_json_and_endless_fields_are_found(copy: Path) -> None:
    (copy / "old/_info.json").write_bytes(DEEP)
    (copy / "old/excluded.csv").write_text("source,path,reason,detail\n" + "x" * 200_000)
    faults = "\n".join(verify([copy / "old"], jobs=1))
    assert "old/_info.json: missing, or not as the index requires" in faults
    assert "old/excluded.csv: not a table: field larger than field limit" in faults
    (copy / "old/index.json").write_bytes(DEEP)
    with pytest.raises(ShardError, match=r"index\.json is not JSON .*copy the set again"):
        verify([copy / "old"], jobs=1)


def sparse_header(name: str) -> bytes:
    """Return the header of a member that has no bytes and claims a MiB, in the form of GNU tar."""
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % 2**20 + b"%011o\0" % 0  # its map: no bytes from 1 MiB on
    header[483:495] = b"%011o\0" % 2**20
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_member(name: str, headers: dict[str, str]) -> bytes:
    member = tarfile.TarInfo(name)
    member.pax_headers = headers
    return member.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (sparse_header, "a sparse file, which is not read"),
        (lambda name: pax_member(name, {"GNU.sparse.map": "a,b"}), "a sparse file, which is not"),
        (lambda name: pax_member(name, {"GNU.sparse.size": "x"}), "damaged tar: damaged or cut of"),
        (lambda name: pax_member(name, {"size": str(2**29 + 1)}), "more than the limit of 536,870"),
    ],
)  # fmt: skip
def test_members_that_no_build_writes_are_faults_of_their_shard(
    copy: Path, make: Callable[[str], bytes], said: str
) -> None:
    """A set may come from a stranger. None of these is read, whatever size it claims."""
    row = open_shards([copy / "old"]).table.to_pylist()[0]
    path = copy / "old/alpha-train-00000.tar"
    path.write_bytes(make(f"{row['key']}.jpg") + bytes(1024))
    faults = verify(sets_in(copy), jobs=1)
    assert any(fault.startswith("old/alpha-train-00000.tar") and said in fault for fault in faults)
    assert not any("beta" in fault or "gamma" in fault for fault in faults)


def test_a_named_pipe_in_place_of_a_shard_is_a_fault(copy: Path) -> None:
    path = copy / "old/alpha-train-00000.tar"
    path.unlink()
    os.mkfifo(path)
    assert "old/alpha-train-00000.tar: missing" in verify(sets_in(copy), jobs=1)


def test_verify_of_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    status, output = run("verify", tmp_path)
    assert status == 1
    assert "no shard set at" in output


def test_diff_lists_the_changes(data: Path, copy: Path) -> None:
    assert run("diff", data / "old", copy / "old")[0] == 0
    rewrite(copy / "old", lambda rows: (rows.pop(), rows[0].update(label=1 - rows[0]["label"])))
    status, output = run("diff", data / "old", copy / "old")
    assert status == 1
    assert "0 added, 1 removed, 1 changed" in output
    assert "label: " in output
    status, output = run("diff", data / "old", data / "val")
    assert status == 1
    assert "80 removed" in output


def test_list_shows_what_is_known_and_packed(raw: Path, data: Path) -> None:
    status, output = run("list", "--raw", raw, "--out", data, "--catalog", raw / "catalog.toml")
    assert status == 0
    (line,) = [line for line in output.splitlines() if line.startswith("│ gamma")]
    assert "new" in line and "yes" in line and "test" in line
    assert "CC BY-NC-SA 4.0 (GenImage)" in output


def test_list_shows_the_other_sets_and_names_those_that_it_cannot_read(copy: Path) -> None:
    edit_index(copy / "new", lambda index: index.pop("samples"))
    (copy / "old/index.json").write_bytes(b"\xff")
    (copy / "val/index.json").unlink()
    (copy / "val/index.json").mkdir()
    status, output = run("list", "--out", copy)
    assert status == 1
    lines = output.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert {row[0]: row[1] for row in rows if row[0] in ("new", "old", "val")} == dict.fromkeys(
        ("new", "old", "val"), "cannot be read"
    )
    assert sum(row[-1].isdigit() and row[-2].isdigit() for row in rows) == len(sets_in(copy)) - 3
    last = lines[-1]
    assert last.startswith(f"Error: 3 of {len(sets_in(copy))} sets cannot be read: new (")
    assert "new/index.json: samples is missing, expected a whole number" in last
    assert f"; old ({copy}/old/index.json is not JSON (" in last and "; val (" in last


def test_list_prints_every_fact_of_a_source() -> None:
    status, output = run("list", "openfake", "chameleon")
    assert status == 0
    assert output.startswith(
        "openfake\n    page: huggingface.co/datasets/ComplexDataLab/OpenFake\n"
    )
    assert "    goes to: openfake (test)\n" in output
    assert "    get it: python -m sharding fetch openfake\n" in output
    assert "    images: 14,863 real, 11,170 fake\n" in output
    assert "    suites: wild, all\n" in output
    assert "    get it: Chameleon is sent on request" in output
    assert "    - not verified: the size\n" in output
    status, output = run("list", "opnfake")
    assert status == 1
    assert "no source opnfake; the catalog has dda," in output


def test_describe_then_build(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for n, name in enumerate(
        ["My Photos/2019/a.jpg", "My Photos/b.JPG", "ai art/flux/c.png", "ai art/sdxl/d.png",
         "misc/e.jpg"]
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(n), "PNG" if name.endswith("png") else "JPEG"))
    out = tmp_path / "mine.toml"
    status, output = run("describe", folder, "--out", out)
    assert status == 0, output
    assert "1 rule without a class" in output
    assert '# { folder = "misc" }' in out.read_text()
    status, output = run(
        "build", "--raw", tmp_path, "--catalog", out, "--out", tmp_path / "out", "--jobs", 1
    )  # fmt: skip
    assert status == 0, output
    rows = [
        row for path in sets_in(tmp_path / "out") for row in open_shards([path]).table.to_pylist()
    ]
    assert {(row["label"], row["generator"]) for row in rows} == {
        (0, "camera"), (1, "flux"), (1, "sdxl"),
    }  # fmt: skip
    assert len(rows) == 4
    assert "in no folder the catalog names" in output
    assert run("describe", folder, "--out", out)[0] == 1  # never overwrites


def test_the_command_that_describe_prints_runs(tmp_path: Path) -> None:
    folder = tmp_path / "sp ace" / "my [x] photos"
    for number, name in enumerate(("real", "fake")):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(encode(photo(number)))
    status, output = run("describe", folder, "--out", tmp_path / "my catalog.toml")
    assert status == 0, output
    words = shlex.split(output.partition("then: python -m sharding ")[2])
    status, output = run(*words, "--out", tmp_path / "out", "--jobs", 1, "--allow-incomplete")
    assert status == 0, output


def test_describe_of_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    status, output = run("describe", tmp_path, "--out", tmp_path / "x.toml")
    assert status == 1
    assert "no image below" in output


def test_a_deleted_shard_is_written_again_by_the_build(
    raw: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "o")
    arguments = ("build", "--raw", raw, "--catalog", raw / "catalog.toml", "--out", tmp_path / "o")
    before = (tmp_path / "o/old/alpha-train-00000.tar").read_bytes()
    (tmp_path / "o/old/alpha-train-00000.tar").unlink()
    assert run("verify", tmp_path / "o", "--jobs", 1)[0] == 1
    assert run(*arguments, "--jobs", 1)[0] == 0
    assert (tmp_path / "o/old/alpha-train-00000.tar").read_bytes() == before
    assert run("verify", tmp_path / "o", "--jobs", 1)[0] == 0


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["sources"]["alpha"].update(license="mine"),
        lambda index: index["sources"]["alpha"].update(policy="dda"),
        lambda index: index["sources"]["dummy"].update(replay=True),
        lambda index: index["sources"]["dummy"].update(homepage="here.org"),
        lambda index: index["quarantined"].append({"path": "x", "source": "alpha", "reason": "y"}),
    ],
)
def test_a_changed_fact_in_the_index_is_found(copy: Path, change) -> None:
    edit_index(copy / "old", change)
    (fault,) = verify([copy / "old"], jobs=1)
    assert "old/index.json: changed after the build" in fault


def test_the_list_of_excluded_images_is_checked(copy: Path) -> None:
    with (copy / "old/excluded.csv").open("a") as stream:
        stream.write("alpha,alpha/real/x.jpg,no reason,\n")
    faults = "\n".join(verify([copy / "old"], jobs=1))
    assert "old/excluded.csv: its sha256 is not" in faults
    assert "old/excluded.csv: its counts by reason differ" in faults
    (copy / "old/excluded.csv").unlink()
    assert "old/excluded.csv: missing" in verify([copy / "old"], jobs=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("chroma", "411"), ("jpeg_quality", 3), ("jpeg_tables", "x"), ("exif", True),
     ("split", "test"), ("source", "beta")],
)  # fmt: skip
def test_a_fact_that_differs_from_the_image_is_found(copy: Path, name: str, value: object) -> None:
    rewrite(copy / "old", lambda rows: rows[0].update({name: value}))
    faults = "\n".join(verify([copy / "old"], jobs=1))
    said = {"split": "splits are", "source": "source is 'alpha', the index says 'beta'"}
    assert said.get(name, f"{name} is ") in faults


KEYS = ["set", "split", "classes", "samples", "samples_sha256", "shards", "totals", "sources",
        "quarantined", "excluded", "excluded_sha256", "content_sha256",
        "format_version"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_of_the_index_is_a_one_line_error(copy: Path, key: str) -> None:
    edit_index(copy / "old", lambda index: index.pop(key))
    for command in ("verify", "show", "list"):
        arguments = ("--out", copy) if command == "list" else (copy / "old",)
        status, output = run(command, *arguments)
        assert status == 1
        (line,) = [line for line in output.splitlines() if "rror" in line]
        assert f"index.json: {key} is missing, expected" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.update(samples="80"), "samples is '80', expected a whole"),
        (lambda index: index["totals"].pop("label"), "totals.label is missing, expected an"),
        (lambda index: index["shards"][1].pop("bytes"), "shards.1.bytes is missing"),
        (
            lambda index: index["shards"][0].update(name="../x.tar"),
            "shards.0.name is '../x.tar'",
        ),
        (lambda index: index["sources"]["alpha"].pop("policy"), "sources.alpha.policy is missing"),
        (lambda index: index["shards"].pop(0), "is not a samples table"),
    ],
)
def test_a_damaged_index_is_a_one_line_error(copy: Path, change, said: str) -> None:
    edit_index(copy / "old", change)
    status, output = run("verify", copy / "old", "--jobs", 1)
    assert status == 1
    assert said in output
    assert "copy the set again, or build it again" in output


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_an_unreadable_index_is_a_one_line_error(copy: Path, text: str) -> None:
    (copy / "old/index.json").write_bytes(text.encode("latin-1"))
    status, output = run("verify", copy / "old", "--jobs", 1)
    assert status == 1
    assert "index.json" in output
    assert "copy the set again" in output


def test_a_damaged_table_is_a_one_line_error(copy: Path) -> None:
    import hashlib

    for content in (b"", b"PAR1" + bytes(500) + b"PAR1"):
        (copy / "old/samples.parquet").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        edit_index(copy / "old", lambda index: index.update(samples_sha256=digest))  # noqa: B023
        status, output = run("verify", copy / "old", "--jobs", 1)
        assert status == 1
        assert "samples.parquet is not a samples table" in output


def test_a_set_whose_build_did_not_finish_is_a_fault(copy: Path) -> None:
    (copy / "old/index.json").unlink()
    status, output = run("verify", copy, "--jobs", 1)
    assert status == 1
    assert "old: tar files but no index.json: its build did not finish; run it again" in output
    assert "1 fault (listed above: 1). Run the build again" in output
    assert run("verify", copy / "new", "--jobs", 1)[0] == 0
    (copy / "downloads").mkdir()
    (copy / "downloads/others.tar").write_bytes(b"not of a build")
    assert "downloads" not in run("verify", copy, "--jobs", 1)[1]
    for name in ("new", "val"):
        shutil.rmtree(copy / name)
    status, output = run("verify", copy, "--jobs", 1)
    assert status == 1
    assert "old has tar files but no index.json, so its build did not finish" in output


def test_an_empty_set_has_no_faults(copies: Path, tmp_path: Path) -> None:
    build_all(copies, tmp_path / "out")
    status, output = run("verify", tmp_path / "out", "--jobs", 1)
    assert status == 0, output
    assert "mine, tests: 2 images match the index" in output


def test_a_set_may_be_the_current_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy / "old")
    here = run("verify", ".", "--jobs", 1)
    assert here[0] == 0
    assert here == run("verify", copy / "old", "--jobs", 1)
