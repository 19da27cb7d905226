"""Faults in tars and indexes: every changed sample is reported and replaced; all others are unchanged.

`benchmarks/input.py` does the same with a thousand.
"""

import tarfile
from pathlib import Path

import pytest

from benchmarks.damage import epoch, make_small_set, trials, webdataset_images

FAULTS = 300


@pytest.mark.processes
def test_every_fault_is_reported_and_other_samples_are_unchanged(tmp_path: Path) -> None:
    small = make_small_set(tmp_path / "small")
    whole, none = epoch(small)
    assert not none
    images = webdataset_images(small)
    assert images is not None
    harmless, tried, silent = 0, 0, 0
    for number, trial in enumerate(trials(small, tmp_path, FAULTS)):
        seen, faults, victim = trial.seen, trial.faults, trial.victim
        assert seen.keys() == whole.keys()  # as many steps, with as many samples
        named = {fault.position for fault in faults}
        assert {p for p in seen if seen[p] != whole[p]} <= named, (trial.kind, victim)
        assert {Path(fault.shard).stem for fault in faults} <= {victim.name.split(".")[0]}
        if not faults:  # no sample was touched: padding, a header, a label's own member, zeros over zeros
            spared = victim.suffix == ".tar" and _images_are_whole(victim, small / victim.name)
            assert not trial.changed or spared, trial.kind
            harmless += 1
        if number % 10 == 0:
            assert epoch(victim.parent) == (seen, faults)  # a second run meets the same
        if trial.changed and victim.suffix == ".tar" and faults:
            tried += 1
            silent += webdataset_images(victim.parent) not in (None, images)
    assert harmless < FAULTS / 2
    print(f"{tried} damaged tars, all named by us; webdataset lost or changed samples of {silent} without a word")
    assert silent > tried / 4


def _images_are_whole(damaged: Path, whole: Path) -> bool:
    """Return whether the bytes of every image are unchanged."""
    before, after = whole.read_bytes(), damaged.read_bytes()
    with tarfile.open(whole) as archive:
        places = [(m.offset_data, m.offset_data + m.size) for m in archive if m.name.endswith(".png")]
    return all(before[start:stop] == after[start:stop] for start, stop in places)
