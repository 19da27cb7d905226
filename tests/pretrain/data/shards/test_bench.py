"""The comparison uses the same crops for all and prints every line; the values are left to benchmarks/."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.dataset.open import open_dataset
from pretrain.data.shards.bench import NUM_ROWS, by_pillow, by_us, compare
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.digits import list_digits
from pretrain.data.sources.folder import list_folder
from pretrain.errors import DataError
from tests.support.launching import Shell


def test_both_make_the_same_crops(digits: Path) -> None:
    samples = open_dataset(digits / "train")
    encoded = [samples.fetch(0, row).data for row in range(8)]
    for ours, theirs in zip(by_us(encoded), by_pillow(encoded), strict=True):
        assert np.abs(ours.numpy().transpose(1, 2, 0).astype(int) - theirs).max() <= 2


def test_command_measures_the_users_shards(digits: Path, shell: Shell, tool: Callable[[str], str]) -> None:
    command = [tool("vitrail"), "shards", "bench", digits / "train", "--samples", "64", "--rounds", "1", "--json"]
    done = shell(command)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["what"].strip().partition(",")[0] for row in rows] == [
        "read a sample",
        "webdataset",
        "tarfile",
        "decode and crop to 224",
        "Pillow",
        "Pillow",
        "write a tar",
        "webdataset.TarWriter",
        "whole loader",
        "ours as a stream",
        "webdataset",
        "torch DataLoader over a folder",
    ]
    assert all(row["value"][0].isdigit() for row in rows)


@pytest.mark.processes
def test_folder_of_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.png").write_bytes(list_digits().image(0).read().image)
    with pytest.raises(DataError, match="is a folder of images; create shards from it"):
        list(compare(tmp_path / "in", 64, 1, 1))
    make_shards(list_folder(tmp_path / "in", labeled=False), tmp_path / "out", ShardOptions(validation_fraction=0.0))
    assert len(list(compare(tmp_path / "out" / "train", 64, 1, 1))) == NUM_ROWS  # one unlabeled sample
