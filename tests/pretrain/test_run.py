"""A run folder belongs to one run and is shared by its ranks; a run resumes from the newest intact checkpoint."""

from pathlib import Path

import pytest
import torch

import pretrain.machine
from pretrain.config import DataConfig, EngineConfig, ModelConfig, PretrainConfig, ScheduleConfig
from pretrain.data.loading.limits import Limits, batch_size_of
from pretrain.errors import CheckpointError, UserError
from pretrain.heartbeat.beats import read_beats
from pretrain.heartbeat.watch import Watch
from pretrain.machine import fit_to_machine
from pretrain.model.vit import ViT
from pretrain.objectives import build_objective
from pretrain.outcome import Outcome
from pretrain.run import find_resumable_checkpoint, views_of
from pretrain.run_folder import check_shared, claim_run_dir
from tests.support.checkpoints import MANIFEST, write_checkpoint


@pytest.mark.slow
def test_a_folder_that_another_run_is_using_is_refused(tmp_path: Path) -> None:
    claim_run_dir(tmp_path / "run")
    with Watch(tmp_path / "run", 0, 1) as watch:
        with pytest.raises(
            UserError, match=r"run: rank 0 \(process \d+ on .*\) is training into this folder; end that run"
        ):
            claim_run_dir(tmp_path / "run")
        watch.finish(Outcome.STOPPED)
    assert [beat.outcome for beat in read_beats(tmp_path / "run")] == ["stopped"]
    claim_run_dir(tmp_path / "run")
    assert not read_beats(tmp_path / "run")


@pytest.mark.slow
def test_a_crashed_run_does_not_block_its_folder(tmp_path: Path) -> None:
    claim_run_dir(tmp_path)
    with Watch(tmp_path, 0, 1):
        beat = (tmp_path / "ranks" / "rank-00000.json").read_text()
    (tmp_path / "ranks" / "rank-00000.json").write_text(beat)  # as it was before the process ended
    claim_run_dir(tmp_path)
    assert not read_beats(tmp_path)


def test_a_folder_that_differs_between_machines_is_refused(tmp_path: Path) -> None:
    claim_run_dir(tmp_path)
    sentence = r"rank 0 on .* cannot see files written by rank 0; run_dir must be on a file system shared by all nodes"
    with pytest.raises(UserError, match=sentence):
        check_shared(tmp_path, ["node-1 4711 machine"])
    with pytest.raises(UserError, match="cannot see files written by rank 0"):
        check_shared(tmp_path / "elsewhere", ["node-1 4711 machine"])


def test_a_run_resumes_from_the_newest_intact_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_resumable_checkpoint(tmp_path, must_resume=False) is None
    older, newer = (tmp_path / "checkpoints" / f"step-0000000{step}" for step in (4, 8))
    for folder in (older, newer):
        write_checkpoint(folder, MANIFEST, {"weight": torch.ones(3)})
    assert find_resumable_checkpoint(tmp_path, must_resume=True) == newer
    [file] = newer.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert find_resumable_checkpoint(tmp_path, must_resume=True) == older
    error = capsys.readouterr().err
    assert error.startswith(f"{newer}")
    assert error.endswith("; the checkpoint was renamed to *.damaged and an older one is used\n")


def test_a_run_without_a_checkpoint_cannot_be_forced_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot resume because the run has no checkpoint; start it without"):
        find_resumable_checkpoint(tmp_path, must_resume=True)


@pytest.mark.parametrize(("validation", "num_workers"), [("shards", 2), (None, 4)])
def test_data_workers_are_fitted_to_the_largest_images(
    validation: str | None, num_workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the training loader, and of that of the validation data if there are any."""
    config = PretrainConfig(
        run_dir=Path("run"),
        data=DataConfig(train="shards", validation=validation, num_workers=4),
        model=ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32),
        schedule=ScheduleConfig(total_steps=9, image_sizes=[(0.5, 64)]),
        engine=EngineConfig(global_batch_size=16, micro_batch_size=16),
    )
    objective = build_objective(config.objective, ViT(config.model, False), [0.5, 0.5], config.preprocessing)
    largest = batch_size_of(objective.train_view(64), 16).num_bytes
    evaluated = batch_size_of(objective.evaluation_view(), 16).num_bytes
    room = 3 * (largest + evaluated) if validation else 5 * largest
    monkeypatch.setattr(pretrain.machine, "machine_limits", lambda: Limits(room, 999))
    fitted = fit_to_machine(config.data, views_of(config, objective), 16)
    assert (fitted.num_workers, fitted.batches_ahead) == (num_workers, 1)
    assert f"; this run uses data.num_workers={num_workers} and data.batches_ahead=1\n" in capsys.readouterr().out
