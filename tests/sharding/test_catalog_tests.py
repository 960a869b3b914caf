"""Tests of `catalog-tests.toml`: a small copy of each test set is packed and read back."""

import zipfile
from collections import Counter
from pathlib import Path

import pytest

from sharding.build import Tolerance, build
from sharding.catalog import BUILT_IN, SHIPPED, CatalogError, Fetch, read_catalog
from sharding.format import CLASSES, open_shards, read_index
from tests.builders import encode, photo
from tests.raw_copies import Row, image, parquet, put

CATALOG = read_catalog(SHIPPED)
TEST_SETS = CATALOG.sources.keys() - read_catalog([BUILT_IN]).sources.keys()


def write_genimage(raw: Path) -> None:
    names = {
        "BigGAN/imagenet_ai_0419_biggan": "biggan", "VQDM/imagenet_ai_0419_vqdm": "vqdm",
        "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4": "sd1.4",
        "stable_diffusion_v_1_5/imagenet_ai_0424_sdv5": "sd1.5",
        "wukong/imagenet_ai_0424_wukong": "wukong", "ADM/imagenet_ai_0508_adm": "adm",
        "glide/imagenet_glide": "glide", "Midjourney": "midjourney",  # as in its README
    }  # fmt: skip
    for number, folder in enumerate(names):
        put(raw / "genimage" / folder / "val/ai", f"{number}_fake.png", kind="PNG")
        put(raw / "genimage" / folder / "val/nature", f"ILSVRC2012_val_{number:08d}.JPEG")
        put(raw / "genimage" / folder / "train/ai", f"{number}_train.png", kind="PNG")


def write_tables(raw: Path) -> None:
    """Write the four test sets that are parquet tables on the hub."""
    parquet(
        raw / "tiny_genimage_val/data/validation-00000-of-00002.parquet",
        {"image": [image() for _ in range(3)], "label": [0, 1, 1], "generator": [0, 2, 6]},
        {
            "label": ["real", "fake"],
            "generator": ["Real", "ADM", "BigGAN", "GLIDE", "Midjourney", "SD14", "SD15", "VQDM"],
        },
    )
    parquet(
        raw / "communityforensics_eval/data/CompEval-00000-of-00413.parquet",
        {
            "image_data": [image() for _ in range(4)],
            "model_name": ["MidjourneyV6_1", "DFGAN", "", "FLUX-dev"],
            "real_source": ["", "", "RAISE", ""],
            "prompt": ["a cat", "", "", "a cat"],
            "label": [1, 1, 0, 1],
        },
    )
    for config in ("core", "reddit"):
        parquet(
            raw / ("openfake" if config == "core" else "openfake_reddit") / config
            / "test-00000-of-00005.parquet",
            {
                "image": [image() for _ in range(3)],
                "prompt": ["a bridge", "a bridge", "a protest"],
                "label": ["real", "fake", "fake"],
                "model": ["docci", "Flux.2-pro", "nano-banana"],
            },
        )  # fmt: skip


def write_folders(raw: Path) -> None:
    """Write the test sets that are folders or zip archives."""
    for label in ("0_real", "1_fake"):
        put(raw / "chameleon/Chameleon/test" / label, f"{label}.jpg")
        put(raw / "aigibench/test/R3GAN" / label, f"{label}.png", kind="PNG")
        with zipfile.ZipFile(raw / "aigibench/test/SocialRF.zip", "a") as archive:
            archive.writestr(f"SocialRF/{label}/a.jpg", image())
        for platform in ("reddit", "twitter", "facebook"):
            put(raw / "wildrf/WildRF/test" / platform / label, f"{platform}.jpg")
        put(raw / "wildrf/WildRF/train" / label, "t.jpg")
    with zipfile.ZipFile(_made(raw / "synthbuster/synthbuster.zip"), "w") as archive:
        for folder in ("dalle2", "dalle3", "firefly", "glide", "midjourney-v5",
                       "stable-diffusion-1-3", "stable-diffusion-1-4", "stable-diffusion-2",
                       "stable-diffusion-xl"):  # fmt: skip
            archive.writestr(f"synthbuster/{folder}/r000da54ft.png", image("PNG"))
        archive.writestr("synthbuster/prompts.csv", b"image name (matching Raise-1k),Prompt\n")
    _made(raw / "raise_1k/r000da54ft.TIF").write_bytes(encode(photo(70_001), "TIFF"))
    for device in ("D01_Motorola_E3_1", "D02_LG_1"):
        for way in ("orig", "facebook", "instagram", "telegram", "twitter", "whatsapp"):
            put(raw / "fodb" / device / way, f"{device[:3]}_img_{way}_0001.jpg")
    for place in ("PreSocial", "Facebook", "Telegram", "Twitter"):
        put(raw / "truefake" / place / "Real/FFHQ", "00001.jpg")
        put(raw / "truefake" / place / "Fake/StyleGAN2/conf-f-psi-1", "seed1.png", kind="PNG")
    for attack in ("original", "epsilon32"):
        for part in ("real", "gen_0", "gen_1", "gen_2", "gen_3"):
            put(raw / "raid" / attack / part, "0001.png", kind="PNG")
    frames = ["000.png", "030.png"]
    put(raw / "df40_test/DF40/simswap/ff/000_003", *frames, kind="PNG")
    put(raw / "df40_test/DF40/heygen/fake/clip1", *frames, kind="PNG")
    put(raw / "df40_test/DF40/heygen/real/clip2", *frames, kind="PNG")
    put(raw / "df40_test/original_sequences/youtube/c23/frames/000", *frames, kind="PNG")


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Row]]:
    """Pack all test sets; return source -> origin below the source -> packed row."""
    folder = tmp_path_factory.mktemp("tests")
    raw = folder / "raw"
    write_genimage(raw)
    write_tables(raw)
    write_folders(raw)
    counts = "".join(f"[sources.{name}]\nexpected = {{}}\n" for name in CATALOG.sources)
    (folder / "small.toml").write_text(counts)
    catalog = read_catalog([*SHIPPED, folder / "small.toml"])
    scan, built = build(
        catalog, raw, folder / "out", jobs=1, tolerance=Tolerance(allow_incomplete=True)
    )
    assert scan.listings.keys() == TEST_SETS
    rows: dict[str, dict[str, Row]] = {name: {} for name in scan.listings}
    for one in built:
        assert read_index(folder / "out" / one.name)["split"] == "test"
        for row in open_shards([folder / "out" / one.name]).table.to_pylist():
            rows[row["source"]][row["origin"].partition("/")[2]] = Row(
                one.name, CLASSES[row["label"]], row["generator"], row["group"]
            )
    return rows


Packed = dict[str, dict[str, Row]]


def kinds(rows: dict[str, Row]) -> Counter[tuple[str, str, str]]:
    return Counter((row.set, row.label, row.generator) for row in rows.values())


def test_genimage_is_read_in_both_layouts_and_its_training_half_is_not(packed: Packed) -> None:
    fakes = ("biggan", "vqdm", "sd1.4", "sd1.5", "wukong", "adm", "glide", "midjourney")
    assert kinds(packed["genimage"]) == {
        ("genimage", "real", "imagenet"): 8,
        **{("genimage", "fake", name): 1 for name in fakes},
    }
    assert len({row.group for row in packed["genimage"].values()}) == 16


def test_generators_come_from_columns_of_tables(packed: Packed) -> None:
    assert kinds(packed["tiny_genimage_val"]) == {
        ("tiny-genimage", "real", "imagenet"): 1, ("tiny-genimage", "fake", "biggan"): 1,
        ("tiny-genimage", "fake", "sd15"): 1,
    }  # fmt: skip
    community = packed["communityforensics_eval"]
    assert kinds(community) == {
        ("communityforensics", "fake", "midjourneyv6_1"): 1,
        ("communityforensics", "fake", "dfgan"): 1, ("communityforensics", "fake", "flux-dev"): 1,
        ("communityforensics", "real", "raise"): 1,
    }  # fmt: skip
    groups = {row.generator: row.group for row in community.values()}
    assert groups["midjourneyv6_1"] == groups["flux-dev"]  # one prompt
    assert len(set(groups.values())) == 3
    for source, name, real in (("openfake", "openfake", "photo"),
                               ("openfake_reddit", "openfake-reddit", "reddit")):  # fmt: skip
        assert kinds(packed[source]) == {
            (name, "real", real): 1, (name, "fake", "flux.2-pro"): 1,
            (name, "fake", "nano-banana"): 1,
        }  # fmt: skip
        assert len({row.group for row in packed[source].values()}) == (
            2 if source == "openfake" else 3
        )


def test_collections_from_the_web_have_the_right_labels(packed: Packed) -> None:
    assert kinds(packed["chameleon"]) == {
        ("chameleon", "real", "web"): 1, ("chameleon", "fake", "unknown"): 1,
    }  # fmt: skip
    assert kinds(packed["wildrf"]) == {
        ("wildrf", label, platform): 1
        for label in ("real", "fake") for platform in ("reddit", "twitter", "facebook")
    }  # fmt: skip
    shared = packed["truefake"]
    assert kinds(shared) == {
        ("truefake", "real", "ffhq"): 1, ("truefake", "fake", "stylegan2"): 1,
        ("truefake-shared", "real", "ffhq"): 3, ("truefake-shared", "fake", "stylegan2"): 3,
    }  # fmt: skip
    assert len({row.group for row in shared.values()}) == 2  # an image and its shared copies


def test_aigibench_is_read_from_folders_and_archives(packed: Packed) -> None:
    assert kinds(packed["aigibench"]) == {
        ("aigibench", "real", "mixed"): 2, ("aigibench", "fake", "r3gan"): 1,
        ("aigibench", "fake", "socialrf"): 1,
    }  # fmt: skip


def test_camera_photographs_and_copies_made_from_them_are_grouped(packed: Packed) -> None:
    assert kinds(packed["raise_1k"]) == {("raise", "real", "nikon"): 1}
    names = ("dalle2", "dalle3", "firefly", "glide", "midjourney5", "sd1.3", "sd1.4", "sd2", "sdxl")
    assert kinds(packed["synthbuster"]) == {("synthbuster", "fake", name): 1 for name in names}
    assert {row.group for row in packed["synthbuster"].values()} == {"synthbuster/r000da54ft"}
    assert CATALOG.reference["synthbuster"] == "raise"
    ways = ("orig", "facebook", "instagram", "telegram", "twitter", "whatsapp")
    assert kinds(packed["fodb"]) == {("fodb", "real", way): 2 for way in ways}
    assert {row.group for row in packed["fodb"].values()} == {"fodb/0001"}  # one scene


def test_attacked_images_share_the_group_of_their_original(packed: Packed) -> None:
    parts = [("real", "real"), *(("fake", f"gen_{n}") for n in range(4))]
    assert kinds(packed["raid"]) == {
        (name, *part): 1 for name in ("raid", "raid-original") for part in parts
    }
    assert {row.group for row in packed["raid"].values()} == {"raid/0001"}


def test_frames_of_one_video_share_a_group(packed: Packed) -> None:
    groups: dict[str, Counter[str]] = {}
    for row in packed["df40_test"].values():
        groups.setdefault(row.group, Counter())[f"{row.label} {row.generator}"] += 1
    assert sorted(map(dict, groups.values()), key=str) == [
        {"fake heygen": 2}, {"fake simswap": 2, "real ff++": 2}, {"real unknown": 2},
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted([*TEST_SETS, "evalgen"]))
def test_every_fact_has_a_reference(name: str) -> None:
    source = CATALOG.sources[name]
    assert source.test_only
    assert source.license and source.homepage and isinstance(source.fetch, Fetch)
    assert any("group" in fact for fact in source.facts)
    for fact in source.facts:
        ours = (
            fact.startswith(("not verified: ", "a group is ", "no groups")) or "stands as" in fact
        )
        assert ours or "(" in fact or "reference" in fact or "set of its own" in fact, fact
    if source.expected:
        assert any(f"{max(source.expected.values()):,}" in f or "1,000" in f for f in source.facts)


def test_the_suite_all_contains_every_test_set() -> None:
    sets = {set_name for name in [*TEST_SETS, "evalgen"]
            for shares in CATALOG.sources[name].destinations() for set_name in shares}  # fmt: skip
    assert sets == set(CATALOG.suites["all"])
    assert sets >= {set_name for listed in CATALOG.suites.values() for set_name in listed}
    assert {CATALOG.sets[set_name] for set_name in sets} == {"test"}


def test_a_test_only_source_cannot_go_to_a_training_set(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("[sources.chameleon]\nset = { chameleon = 0.5, phase1 = 0.5 }\n")
    with pytest.raises(CatalogError, match="chameleon is test_only and may not go to set p"):
        read_catalog([*SHIPPED, mine])
    mine.write_text('[sources.chameleon]\nset = "phase1"\ntest_only = false\n')
    assert read_catalog([*SHIPPED, mine]).sources["chameleon"].set == "phase1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[suites]\nmine = ["nowhere"]\n',
            r"\[suites\] names set 'nowhere', which is not in \[sets\]",
        ),
        (
            '[sources.raise_1k]\nreal = [{ generator = "<camera>" }]\n',
            "has generator <camera>, a column of a parquet table, but reads no",
        ),
    ],
)
def test_unknown_sets_and_columns_without_a_table_are_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(CatalogError, match=said):
        read_catalog([*SHIPPED, tmp_path / "mine.toml"])
