"""Local tars are indexed before a run opens them: by rank 0, and again on machines that do not see its index."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain import distributed
from pretrain.config import SourceConfig
from pretrain.data.dataset.open import open_cache, open_dataset
from pretrain.errors import UserError
from pretrain.indexing import index_new_tars

MAIN_RANK_TARS, OTHER_TARS = 3, 2


def copy_tars(source: Path, folder: Path, count: int) -> Path:
    """Copy some tars, but no index."""
    folder.mkdir(parents=True)
    for tar in sorted(source.glob("*.tar"))[:count]:
        (folder / tar.name).write_bytes(tar.read_bytes())
    return folder


def test_new_tars_are_indexed_once_with_a_progress_bar(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation = (copy_tars(digits / "train", tmp_path / name, 3) for name in ("train", "validation"))
    config = SourceConfig(train=[str(train)], cache_dir=tmp_path / "cache")
    calls: list[int] = []
    index_new_tars(
        config, config.train, str(validation), None, labels_required=True, on_progress=lambda: calls.append(1)
    )
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err
    assert f"{train}: indexed" in shown.err.replace("\n", "")
    assert f"{validation}: indexed" in shown.err.replace("\n", "")
    num_calls = len(calls)
    assert num_calls >= 2 * (1 + 3)
    assert open_dataset(config.train, cache=open_cache(config)).class_names == ["0", "1", "2"]
    index_new_tars(config, config.train, str(validation), labels_required=True, on_progress=lambda: calls.append(1))
    assert (capsys.readouterr().err, len(calls)) == ("", num_calls)


def run_rank(rank: int, folder: str, digits: str, local_rank: Callable[[int], int]) -> None:
    """Index new tars on one of two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank(rank)), "WORLD_SIZE": "2"}
    os.dup2(os.open(Path(folder, f"stderr-{rank}"), os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls: list[int] = []

    def index(train: Path) -> None:
        config = SourceConfig(train=str(train), cache_dir=Path(folder, "cache"))
        index_new_tars(config, config.train, labels_required=True, on_progress=lambda: calls.append(1))

    shared = Path(folder, "shared")
    index(shared)
    assert len(calls) >= 1 + MAIN_RANK_TARS  # on both ranks
    assert sum(open_dataset(shared).shard_sizes) > 0
    if local_rank(1) == 0:
        local = Path(folder, f"local-{rank}")  # another folder on each machine
        copy_tars(Path(digits), local, (MAIN_RANK_TARS, OTHER_TARS)[rank])
        index(local)
        assert len(calls) >= 2 * (1 + MAIN_RANK_TARS) + 1 + OTHER_TARS
        assert len(open_dataset(local).shard_sizes) == (MAIN_RANK_TARS, OTHER_TARS)[rank]
    with pytest.raises(UserError, match=r"damaged/shard-000000\.tar: (truncated|not a readable tar)"):
        index(Path(folder, "damaged"))
    Path(folder, f"rank{rank}").write_text(str(len(calls)))
    distributed.leave_process_group()


def one_machine(rank: int) -> int:
    return rank


def two_machines(rank: int) -> int:
    return 0


@pytest.mark.processes
@pytest.mark.parametrize("local_rank", [one_machine, two_machines])
def test_two_ranks_see_the_index(digits: Path, tmp_path: Path, local_rank: Callable[[int], int]) -> None:
    copy_tars(digits / "train", tmp_path / "shared", MAIN_RANK_TARS)
    damaged = copy_tars(digits / "train", tmp_path / "damaged", 1) / "shard-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    mp.spawn(run_rank, args=(str(tmp_path), str(digits / "train"), local_rank), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert first == second  # both ranks have seen every report of progress
    assert "indexed" in (tmp_path / "stderr-0").read_text()
    assert ("indexed" in (tmp_path / "stderr-1").read_text()) == (local_rank is two_machines)
