"""Which folders count as checkpoints, and which runs may resume from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.checkpoint import manifest as manifest_module
from pretrain.checkpoint.history import find_checkpoint, list_checkpoints, list_damaged
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.restore import newest_intact, restore
from pretrain.errors import CheckpointError, VersionError
from tests.support.checkpoints import MANIFEST


def saved(folder: Path, step: int = 4) -> Path:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    MANIFEST.save(path)
    return path


def test_only_complete_checkpoints_are_listed(tmp_path: Path) -> None:
    for step in (20, 4):
        saved(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000030").mkdir()  # no manifest
    saved(tmp_path, 50).rename(tmp_path / "checkpoints" / "step-best")  # a copy that a user has made
    partial = saved(tmp_path, 40)
    partial.rename(partial.with_name(partial.name + ".partial"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000020"]
    assert find_checkpoint(tmp_path).name == "step-00000020"
    assert find_checkpoint(tmp_path / "checkpoints" / "step-00000004").name == "step-00000004"
    with pytest.raises(CheckpointError, match="no checkpoint here; expected a run folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_a_manifest_reads_back_or_names_its_fault(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert Manifest.load(path) == MANIFEST
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.load(path)
    for here, there in (('"position": 64', '"position": 65'), ('"version": 4', '"version": 3')):
        (path / "manifest.json").write_text(text.replace(here, there))
        with pytest.raises(CheckpointError, match="damaged"):
            Manifest.load(path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint \(it has no manifest.json\)"):
        Manifest.load(tmp_path)


def test_a_checkpoint_of_another_version_is_an_error_and_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "VERSION", 99)
        saved(tmp_path, 8)
    sentence = r"step-00000008: checkpoint format 99 is not supported, this version of Vitrail reads format 4; use the"
    for find in (find_checkpoint, newest_intact):
        with pytest.raises(VersionError, match=sentence):
            find(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2


def test_find_checkpoint_returns_the_newest_with_a_valid_manifest(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    (saved(tmp_path, 8) / "manifest.json").write_text("{")
    assert find_checkpoint(tmp_path).name == "step-00000004"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path: Path) -> None:
    for step in (4, 8):
        (saved(tmp_path, step) / "manifest.json").write_text("{")
    for _ in range(2):  # also the second time, because nothing was renamed
        with pytest.raises(
            CheckpointError,
            match=r"all checkpoints are damaged; .* or delete .*/checkpoints to start again",
        ) as caught:
            newest_intact(tmp_path)
        assert len(str(caught.value).splitlines()) == 3


def test_a_damaged_checkpoint_is_renamed_even_if_one_of_its_step_was_before(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    for _ in range(2):
        (saved(tmp_path, 8) / "manifest.json").write_text("{")
        found, faults = newest_intact(tmp_path)
        assert found == tmp_path / "checkpoints" / "step-00000004"
        assert len(faults) == 1
        assert [path.name for path in list_damaged(tmp_path)] == ["step-00000008.damaged"]


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        ("model", {"hidden_size": 64}, "model.hidden_size was 32, is 64"),
        ("engine", {"global_batch_size": 32}, "engine.global_batch_size was 16, is 32"),
    ],
)
def test_a_changed_run_is_refused(tmp_path: Path, section: str, change: dict[str, int], sentence: str) -> None:
    config = {**MANIFEST.config, section: {**MANIFEST.config[section], **change}}
    with pytest.raises(CheckpointError) as caught:
        restore(None, saved(tmp_path), replace(MANIFEST, config=config))
    assert caught.value.args[0].splitlines()[1:] == [
        f"  {sentence}",
        "undo these changes, or choose another run_dir",
    ]


def test_all_changes_are_listed_at_once(tmp_path: Path) -> None:
    other = replace(MANIFEST, world_size=4, data_digests={"training": "xyz"}, config={**MANIFEST.config, "seed": 1})
    with pytest.raises(CheckpointError) as caught:
        restore(None, saved(tmp_path), other)
    assert caught.value.args[0].splitlines()[1:-1] == [
        "  seed was 0, is 1",
        "  the training data changed (its digest differs)",
    ]


def test_schedule_and_topology_may_change(tmp_path: Path) -> None:
    """The comparison passes, and then the engine is needed, which is None here."""
    engine = {"zero_stage": 3, "precision": "bf16", "global_batch_size": 16}
    config = {**MANIFEST.config, "schedule": {"total_steps": 99}, "engine": engine}
    with pytest.raises(AttributeError, match="module"):
        restore(None, saved(tmp_path), replace(MANIFEST, world_size=5, config=config))
