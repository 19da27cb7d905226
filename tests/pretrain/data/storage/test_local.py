"""Range reads of local files, from many threads at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.data.storage.local import MAX_OPEN_FILES, read_range


def test_file_is_not_closed_while_a_thread_reads_it(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(2 * MAX_OPEN_FILES)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)

    def read(number: int) -> bool:
        i = number * 37 % len(paths)
        return read_range(paths[i], i % 90, 10) == bytes([i]) * 10

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(20_000)))


def test_read_past_the_end_is_short(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_range(tmp_path / "a", 1, 10) == b"bc"
