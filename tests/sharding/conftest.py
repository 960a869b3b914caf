"""Raw images that several test modules of sharding build."""

from pathlib import Path

import pytest

from tests.builders import encode, photo


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Folder of raw images and `catalog.toml`: all images of the training set `mine` are copies of
    those of the test set `tests`, so `mine` gets none.
    """
    folder = tmp_path / "copies"
    catalog = '[sets]\nmine = "train"\ntests = "test"\n'
    for source, name in (("ours", "mine"), ("theirs", "tests")):
        catalog += f'[sources.{source}]\nlicense = "x"\nset = "{name}"\n'
        for seed, label in enumerate(("real", "fake")):
            catalog += f'{label} = ["{label}"]\n'
            (folder / source / label).mkdir(parents=True)
            (folder / source / label / "0.png").write_bytes(encode(photo(seed), "PNG"))
    (folder / "catalog.toml").write_text(catalog)
    return folder
