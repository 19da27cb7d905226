"""`vitrail shards`, run as a command: tables, tars, interrupted commands, a full disk."""

import csv
import random
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.commands.shards import find_tars_to_index
from pretrain.data.storage.index import DatasetInfo
from pretrain.errors import UserError
from tests.support.launching import Shell, Vitrail, run_vitrail


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_make_from_a_table_and_again_from_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vitrail: Vitrail
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["where", "species", "note"])
        for i in range(12):
            Image.new("RGB", (60, 40 + i), (20 * i, 0, 0)).save(tmp_path / "in" / f"{i}.bmp")
            rows.writerow([f"in/{i}.bmp", ["ibis", "heron"][i % 2], f"number {i}"])
        rows.writerow(["in/gone.jpg", "ibis", ""])
    make = ["shards", "make", "t.csv", "out", "--resize", "32", "--format", "jpg"]
    refused = vitrail(*make)
    assert refused.code == 2
    assert "t.csv: no column path or url or image or" in refused.err
    assert "name one of its columns with --image-column: where, species, note" in refused.err
    done = vitrail(*make, "--image-column", "where", "--label-column", "species", "--skip-bad")
    assert done.code == 0, done.err
    assert "left out: in/gone.jpg: [Errno 2] No such file or directory" in done.out
    info = DatasetInfo.load(tmp_path / "out" / "train")
    assert info.class_names == ["heron", "ibis"]
    again = vitrail("shards", "make", "out/train", "again", "--validation", "0", "--unlabeled")
    assert again.code == 0, again.err
    assert f"again/train: {info.num_samples} images, 1 shard" in again.out
    checked = vitrail("shards", "check", "again/train")
    assert checked.code == 0, checked.err


@pytest.mark.slow
def test_make_keeps_only_the_named_classes(tmp_path: Path) -> None:
    done = run_vitrail("shards", "make", "digits", tmp_path / "out", "--classes", "4,5")
    assert done.code == 0, done.err
    assert DatasetInfo.load(tmp_path / "out" / "train").class_names == ["4", "5"]


@pytest.mark.parametrize(("how", "times"), [(signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_interrupted_command_continues(
    tmp_path: Path, shell: Shell, tool: Callable[[str], str], how: signal.Signals, times: int
) -> None:
    """Interrupted at random moments while workers write, the same command produces identical files in the end."""
    make = [tool("vitrail"), "shards", "make", "digits", "--shard-size", "60kB", "--workers", "2"]
    whole = shell([*make, "whole", "--workers", "1"])
    assert whole.code == 0, whole.err
    chance, stopped = random.Random(0), 0
    begun = tmp_path / "out.partial" / "out" / "train"
    for _ in range(times):
        before = len(list(begun.glob("*.tar")))
        with shell.start([*make, "out"]) as running:
            process = running.process
            running.wait_until(lambda n=before, p=process: len(list(begun.glob("*.tar"))) != n or p.poll() is not None)
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(how)
            done = running.finish()
        if (tmp_path / "out").exists():  # it finished before the signal
            break
        stopped += 1
        if how == signal.SIGINT:
            assert done.code == 75, done.err
            assert "out: interrupted; the same command continues from here" in done.err
    assert stopped
    if not (tmp_path / "out").exists():
        assert shell([*make, "out"]).code == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_full_disk_is_reported_and_leaves_no_partial_shard(
    tmp_path: Path, shell: Shell, tool: Callable[[str], str]
) -> None:
    """A limit on file sizes simulates the full disk; without the limit, the same command continues."""
    make = [tool("vitrail"), "shards", "make", "digits", "out", "--shard-size", "2MB", "--workers", "2"]
    full = shell(["bash", "-c", f"ulimit -f 1000; exec {' '.join(make)}"])
    assert full.code == 1
    assert "File too large" in full.err
    assert "Traceback" not in full.err
    assert not list((tmp_path / "out.partial").rglob("*.tar"))
    assert shell(make).code == 0


def test_find_tars_lists_local_names_or_urls(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    assert find_tars_to_index(str(tmp_path / "in"), None) == (tmp_path / "in", ["a.tar", "b.tar"], tmp_path / "in")
    urls = ["http://host/0.tar", "http://host/1.tar"]
    assert find_tars_to_index("http://host/{0..1}.tar", tmp_path / "out") == (tmp_path / "out", urls, None)
    assert (tmp_path / "out").is_dir()
    with pytest.raises(UserError, match=r"indexes cannot be written to a URL; choose a local folder with --out"):
        find_tars_to_index("http://host/{0..1}.tar", None)
    tars, out = str(tmp_path / "in" / "{a,b}.tar"), tmp_path / "new" / "out"
    assert find_tars_to_index(tars, out) == (out, ["a.tar", "b.tar"], tmp_path / "in")
    with pytest.raises(UserError, match=r"names a part of a folder's tars; choose a folder for their indexes with"):
        find_tars_to_index(tars, None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.tar").touch()
    with pytest.raises(UserError, match=r"other: contains tars, whose indexes belong there; choose another folder"):
        find_tars_to_index(tars, tmp_path / "other")
    with pytest.raises(UserError, match=r"file: cannot be created .*; choose a folder for the indexes with --out"):
        (tmp_path / "file").touch()
        find_tars_to_index(tars, tmp_path / "file")


def test_tars_that_cannot_have_an_index_beside_them(tmp_path: Path, digits: Path, vitrail: Vitrail) -> None:
    """Every verb that opens a set takes the folder of the index; what is bad is left out on request."""
    tars, index = tmp_path / "tars", tmp_path / "index"
    tars.mkdir()
    for tar in (digits / "validation").glob("*.tar"):
        shutil.copy(tar, tars)
    (tars / "image.png").touch()
    with tarfile.open(tars / "z.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x.png"))
    command = ["shards", "index", tars, "--out", index, "--workers", "1"]
    refused = vitrail(*command)
    assert refused.code == 2
    assert refused.err.endswith("beside the tars: image.png; move them away, or leave them out with --skip-bad\n")
    done = vitrail(*command, "--skip-bad")
    assert done.code == 0, done.err
    assert "left out: 1 image, archive or folder beside the tars: image.png" in done.out
    assert f"left out: {tars}/z.tar: sample x is not a usable image" in done.out
    assert {path.suffix for path in tars.iterdir()} == {".tar", ".png"}
    num_samples = DatasetInfo.load(digits / "validation").num_samples
    assert vitrail("shards", "simulate", index, "--global-batch-size", "4").code == 0
    assert vitrail("shards", "check", index, "--workers", "1").out == "z.tar  x  is in the tar but not in the index\n"
    assert str(num_samples) in vitrail("shards", "stats", index).out.splitlines()[0]
    made = vitrail("shards", "make", index, tmp_path / "made", "--validation", "0", "--skip-bad", "--workers", "1")
    assert f"{num_samples} images" in made.out


def test_scaled_grayscale_is_said(tmp_path: Path, vitrail: Vitrail) -> None:
    (tmp_path / "in" / "x").mkdir(parents=True)
    for name, highest in (("a", 4095), ("b", 4000), ("c", 65535)):
        values = np.full((8, 8), highest, np.uint16)
        Image.fromarray(values).save(tmp_path / "in" / "x" / f"{name}.png")
    done = vitrail("shards", "make", tmp_path / "in", tmp_path / "out", "--validation", "0")
    assert done.code == 0, done.err
    assert "2 images of 16-bit values that use 12 bits: scaled from 12 to 8 bits" in done.out
    assert "1 image of 16-bit values that use 16 bits: scaled from 16 to 8 bits" in done.out
