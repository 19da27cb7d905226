"""Training with real ranks: the same losses at every ZeRO stage and world size, and after every resume."""

import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from pretrain.checkpoint.history import list_checkpoints
from pretrain.data.storage.index import DatasetInfo
from pretrain.tracking.pictures import GAP
from pretrain.tracking.tracker import picture_name
from tests.pretrain.ranks_train import COMPILED_ELSEWHERE, IN_MLFLOW, RESHARDED
from tests.support.launching import ROOT, TINY, Shell, free_port

SCRIPT = ROOT / "tests" / "pretrain" / "ranks_train.py"
STAGES = ["stage0", "stage1", "stage2", "stage3"]
MAE = ["mae0", "mae1", "mae2", "mae3"]
EVERY = [
    *STAGES,
    "mae0",
    "mae3",
    "distil2",
    "distil-bf16",
    "lamb3",
    "muon3",
    "decayed-bf16",
    "muon-bf16",
    "muon-bf16-stage0",
    "recipe",
    "dropout",
    "dropout3",
    "bf16-stage0",
    "bf16-stage1",
    "bf16-stage3",
    "bf16-noisy",
    "offload",
    "compiled",
    "compiled3",
    "ten",
    "uneven",
    "uneven3",
    "unclipped",
]
DECAYED = ["decayed0", "decayed1", "decayed2", "decayed3"]
LAMB = ["lamb0", "lamb1", "lamb2", "lamb3"]
MUON = ["muon0", "muon1", "muon2", "muon3"]
DISTIL = ["distil0", "distil1", "distil2"]
IN_BF16 = {  # beside which plain loop
    "bf16-stage0": "reference",
    "bf16-stage1": "reference",
    "bf16-stage3": "reference",
    "decayed-bf16": "decayed-reference",
    "lamb-bf16": "lamb-reference",
    "muon-bf16": "muon-reference",
    "muon-bf16-stage0": "muon-reference",
}
TEN = ["ten", "uneven", "uneven3"]
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Seen]:
    """What one rank and what two ranks saw; each continues, too, what the other saved."""
    one, two = (tmp_path_factory.mktemp(f"world{world_size}") for world_size in (1, 2))
    results = {1: look(digits, one, 1), 2: look(digits, two, 2, source=one)}
    (one / "resharded").mkdir()
    results[1]["resharded"] = look(digits, one / "resharded", 1, source=two)["resharded"]
    return results


def look(digits: Path, folder: Path, world_size: int, source: Path | None = None) -> Seen:
    """Run the script on so many ranks; return what it wrote."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY.format(run_dir="unused", shards=digits))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command = [
        sys.executable,
        *(launcher if world_size == 2 else []),
        SCRIPT,
        recipe,
        folder,
        *([source] * bool(source)),
    ]
    done = Shell(folder)(command, timeout=400, PYTHONPATH=str(ROOT))
    assert (folder / "seen.json").exists(), done.err[-3000:]
    assert (done.code == 0) == (folder.name == "resharded"), done.err[-3000:]  # else a rank dies at the end, on purpose
    return {**json.loads((folder / "seen.json").read_text()), "folder": folder, "said": done.out}


def column(seen: Seen, name: str) -> list[float]:
    return [row[name] for row in seen["rows"] if name in row]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_equal_a_plain_torch_loop(seen: dict[int, Seen], world_size: int, stage: str) -> None:
    assert column(seen[world_size][stage], "train/loss") == pytest.approx(seen[1]["reference"]["losses"], abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [*DECAYED, *LAMB, *MUON, "lamb-offload", "muon-offload"])
def test_optimizers_and_schedules_are_the_same_wherever_zero_has_cut_the_parameters(
    seen: dict[int, Seen], world_size: int, stage: str
) -> None:
    """AdamW by cosine, LAMB linear, Muon by wsd; the plain loop has layer-wise decay by a group for each parameter."""
    expected, found = seen[1][f"{stage.rstrip('0123').split('-')[0]}-reference"], seen[world_size][stage]
    assert column(found, "train/loss") == pytest.approx(expected["losses"], abs=1e-5)
    for name in expected["weights"]:
        assert found["weights"][name] == pytest.approx(expected["weights"][name], abs=2e-4), name
    assert expected["losses"][-1] != pytest.approx(seen[1]["reference"]["losses"][-1], abs=1e-3)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [*STAGES, "offload"])
@pytest.mark.parametrize("kind", ["weights", "averages"])
def test_what_a_checkpoint_holds_is_what_a_plain_torch_loop_has(
    seen: dict[int, Seen], world_size: int, stage: str, kind: str
) -> None:
    expected, found = seen[1]["reference"][kind], seen[world_size][stage][kind]
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=2e-4), name


@pytest.mark.parametrize("name", ["optim/grad_norm", "validation/loss", "validation/top1", "data/samples"])
def test_whatever_is_measured_is_the_same_on_any_topology(seen: dict[int, Seen], name: str) -> None:
    expected = column(seen[1]["stage0"], name)
    assert expected
    for world_size in (1, 2):
        for stage in [*STAGES, "offload"]:
            assert column(seen[world_size][stage], name) == pytest.approx(expected, rel=1e-4), (world_size, stage)


@pytest.mark.parametrize("name", ["train/loss", "optim/grad_norm", "validation/loss"])
def test_a_masked_autoencoder_learns_the_same_on_any_topology(seen: dict[int, Seen], name: str) -> None:
    expected = column(seen[1]["mae0"], name)
    for world_size in (1, 2):
        for stage in MAE:
            assert column(seen[world_size][stage], name) == pytest.approx(expected, rel=1e-4), (world_size, stage)


@pytest.mark.parametrize("name", ["train/loss", "train/koleo", "optim/grad_norm", "validation/loss"])
def test_self_distillation_learns_the_same_on_any_topology(seen: dict[int, Seen], name: str) -> None:
    expected = column(seen[1]["distil0"], name)
    for world_size in (1, 2):
        for stage in DISTIL:
            assert column(seen[world_size][stage], name) == pytest.approx(expected, rel=1e-4), (world_size, stage)
    assert column(seen[2]["distil-one"], name) == pytest.approx(column(seen[1]["distil-one"], name), rel=1e-4)


@pytest.mark.parametrize("name", ["train/loss", "optim/grad_norm", "validation/loss", "optim/learning_rate"])
def test_a_whole_recipe_learns_the_same_on_any_topology(seen: dict[int, Seen], name: str) -> None:
    expected = column(seen[1]["recipe"], name)
    assert column(seen[2]["recipe"], name) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(column(seen[1]["stage1"], name), rel=1e-2)
    assert max(column(seen[1]["recipe"], "optim/learning_rate")) == pytest.approx(1e-3)  # scaled to the batch
    assert [size for size, _ in groupby(seen[1]["recipe"]["image_sizes"])] == [16, 24, 32]
    assert "learning rate 0.001 (0.016 x 16 / 256)" in seen[1]["said"]


@pytest.mark.parametrize("name", ["knn_top1", "linear_top1", "feature_rank", "feature_spread"])
@pytest.mark.parametrize("settings", [STAGES, MAE], ids=["supervised", "mae"])
def test_probes_say_the_same_on_any_topology(seen: dict[int, Seen], settings: list[str], name: str) -> None:
    expected = column(seen[1][settings[0]], f"probe/{name}")
    assert len(expected) == 2
    assert all(0 < value < (1.01 if name.endswith("1") else 50) for value in expected)
    for world_size in (1, 2):
        for stage in settings:
            near = {"abs": 0.02} if name.endswith("top1") else {"rel": 1e-2}
            assert column(seen[world_size][stage], f"probe/{name}") == pytest.approx(expected, **near)


def test_a_masked_autoencoder_shows_what_it_rebuilds(seen: dict[int, Seen]) -> None:
    for stage in MAE:
        pictures = Path(seen[2]["folder"]) / stage / "whole" / "pictures"
        assert sorted(path.name for path in pictures.iterdir()) == ["step-00000004.png", "step-00000008.png"]
        (image, seen_patches, _, *_), (*now, rebuilt, _, _) = (cut(path) for path in sorted(pictures.iterdir()))
        assert np.array_equal([image, seen_patches], now)  # the same images, of which the same is hidden
        changed, filled = (np.abs(image - other).reshape(8, 4, 8, 4, 8, 3) for other in (seen_patches, rebuilt))
        hidden = changed.max(axis=(2, 4, 5)) > 1
        assert hidden.mean() == 0.5
        assert filled.max(axis=(2, 4, 5))[~hidden].max() <= 1
        assert np.median(filled.max(axis=(2, 4, 5))[hidden]) > 10  # not the image itself
    picture, *heads = cut(Path(seen[2]["folder"]) / "stage0" / "whole" / "pictures" / "step-00000008.png")
    assert np.abs(picture - image).max() <= 1
    assert len(heads) == 2
    assert all(head.max() == 255 for head in heads)


def test_mlflow_shows_all_that_is_probed_and_drawn(seen: dict[int, Seen]) -> None:
    client = MlflowClient(f"sqlite:///{seen[2]['folder']}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    [run] = [run for run in runs if run.info.run_name == "whole"]
    for name in ("knn_top1", "linear_top1", "feature_rank", "feature_spread", "seconds"):
        points = client.get_metric_history(run.info.run_id, f"probe/{name}")
        assert [point.step for point in points] == [4, 8]
    sent = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in sent) == [4, 8]
    for path in sent:
        picture = Path(seen[2]["folder"]) / IN_MLFLOW / "whole" / "pictures" / picture_name(int(path.split("+")[2]))
        assert np.array_equal(
            np.asarray(Image.open(client.download_artifacts(run.info.run_id, path))), np.asarray(Image.open(picture))
        )


def cut(page: Path) -> list[NDArray[np.int64]]:
    """Return the columns of a page, [8 images, 32, 32, 3] each; both their size and the gaps are known."""
    pixels = np.asarray(Image.open(page)).astype(int)
    padded = np.pad(pixels, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)
    tiles = padded.reshape(8, 96 + GAP, -1, 96 + GAP, 3).swapaxes(1, 2)
    assert (tiles[:, :, 96:] == 255).all()
    assert (tiles[:, :, :, 96:] == 255).all()
    return [*tiles[:, :, :96:3, :96:3].swapaxes(0, 1)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", TEN)
def test_ranks_that_do_not_divide_the_batch_train_as_one_rank_does(
    seen: dict[int, Seen], world_size: int, name: str
) -> None:
    for metric in ("train/loss", "optim/grad_norm", "validation/loss"):
        assert column(seen[world_size][name], metric) == pytest.approx(column(seen[1]["ten"], metric), abs=1e-5)


@pytest.mark.parametrize(
    ("world_size", "setting"),
    [(size, name) for size in (1, 2) for name in EVERY if name != COMPILED_ELSEWHERE[size]],
)
def test_a_resumed_run_repeats_every_row_and_weight_exactly(
    seen: dict[int, Seen], world_size: int, setting: str
) -> None:
    result = seen[world_size][setting]
    assert result["resumed_at"] == 4
    assert result["same_samples"]
    # Ten samples are five pairs of neighbors: the main rank of two has two of them.
    share = {1: 10, 2: 4}[world_size] if setting in TEN else 16 / world_size
    assert result["distinct_samples"] == 8 * share
    assert result["resumed"] == result["rows"]
    assert [row["step"] for row in result["rows"] if "train/loss" in row] == list(range(1, 9))
    assert result["same_weights"]
    assert result["finite"]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("saved", RESHARDED)
def test_what_one_topology_saved_another_continues(seen: dict[int, Seen], world_size: int, saved: str) -> None:
    before, after = seen[3 - world_size][saved], seen[world_size]["resharded"][saved]
    whole = {row["step"]: row for row in before["rows"] if "train/loss" in row}
    continued = [row for row in after["rows"] if "train/loss" in row]
    assert [row["step"] for row in continued] == [5, 6, 7, 8]
    in_bf16 = "bf16" in saved + RESHARDED[saved][0]
    for row in continued:
        near = {"abs": 0.02} if in_bf16 or saved == "dropout" else {"rel": 1e-5}  # each rank drops others
        assert row["train/loss"] == pytest.approx(whole[row["step"]]["train/loss"], **near)
        assert row["data/samples"] == whole[row["step"]]["data/samples"]
    if not in_bf16 and saved != "dropout":
        for name, average in before["averages"].items():
            assert after["averages"][name] == pytest.approx(average, abs=2e-4), name


@pytest.mark.parametrize("saved", ["stage0", "stage2", "stage3", "offload"])
def test_no_rank_reads_more_of_the_optimizer_than_it_holds(seen: dict[int, Seen], saved: str) -> None:
    shares = seen[2]["resharded"][saved]["shares"]
    assert shares.keys() == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert all(0.4 < share < 0.52 for share in shares.values())  # stage 3 pads each parameter


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_that_fails_on_one_rank_costs_that_checkpoint_alone(seen: dict[int, Seen], world_size: int) -> None:
    full = seen[world_size]["full"]
    assert full["outcome"] == "DONE"
    assert full["steps"] == list(range(1, 9))
    assert full["checkpoints"] == ["step-00000008"]
    assert (full["newest"], full["faults"]) == ("step-00000008", [])
    assert full["seen"]["5"] == ["step-00000004.partial"]
    assert full["seen"]["6"] == []  # cleared away when the ranks had heard, not at the next save


def test_a_run_that_was_killed_in_its_last_evaluation_makes_up_for_it(seen: dict[int, Seen]) -> None:
    for world_size in (1, 2):
        for name, [late] in seen[world_size]["killed"].items():
            [usual] = [row for row in seen[world_size][name]["rows"] if row["step"] == 8 and "validation/loss" in row]
            assert late == usual


def test_dropout_acts_and_bf16_is_near(seen: dict[int, Seen]) -> None:
    reference = seen[1]["reference"]["losses"]
    assert column(seen[1]["dropout"], "train/loss") != pytest.approx(reference, abs=1e-4)
    assert column(seen[2]["mae-bf16"], "train/loss") == pytest.approx(column(seen[2]["mae0"], "train/loss"), abs=0.02)
    assert column(seen[1]["unclipped"], "train/loss") != pytest.approx(reference, abs=1e-4)
    assert column(seen[1]["unclipped"], "optim/grad_norm")[0] == column(seen[1]["stage2"], "optim/grad_norm")[0]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("setting", IN_BF16)
def test_bf16_moves_the_masters_as_the_optimizer_says(seen: dict[int, Seen], world_size: int, setting: str) -> None:
    """DeepSpeed itself would take a step before the first one at stage 0."""
    start, expected, found = seen[1]["start"], seen[1][IN_BF16[setting]], seen[world_size][setting]
    assert column(found, "train/loss") == pytest.approx(expected["losses"], abs=0.01)
    share = 0.3 if setting.startswith("lamb") else 0.1  # a factor of its whole parameters moves with the rounding
    for kind in ("weights", "averages"):
        assert distance(found[kind], expected[kind]) < share * distance(start[kind], expected[kind]), kind


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_teacher_moves_in_bf16_by_less_than_bf16_can_tell(seen: dict[int, Seen], world_size: int) -> None:
    start, exact = seen[1]["distil-start"]["weights"], seen[1]["distil2"]["weights"]
    found = seen[world_size]["distil-bf16"]["weights"]
    matrices = [name for name in start if name.startswith("encoder.") and "norm" not in name and "bias" not in name]
    for name in matrices:
        first, fp32, bf16 = ({name: weights[name]} for weights in (start, exact, found))
        assert distance(bf16, fp32) < 0.5 * distance(fp32, first), name


def distance(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """How far two sets of weights are from each other, by their digests."""
    return float(np.linalg.norm([np.subtract(one[name], other[name]) for name in one]))


def test_a_stop_does_not_wait_for_an_evaluation(seen: dict[int, Seen]) -> None:
    for world_size in (1, 2):
        stopped = seen[world_size]["stopped"]
        assert (stopped["outcome"], stopped["evaluated"]) == ("STOPPED", 2)
        assert [row["step"] for row in stopped["rows"] if "train/loss" in row] == [1, 2, 3, 4, 5]
        assert not column(stopped, "validation/loss")
        checkpoints = list_checkpoints(Path(seen[world_size]["folder"]) / "stopped")
        assert [path.name for path in checkpoints] == ["step-00000004", "step-00000005"]


def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(seen: dict[int, Seen]) -> None:
    for world_size in (1, 2):
        checkpoints = Path(seen[world_size]["folder"]) / "torn" / "checkpoints"
        assert (checkpoints / "step-00000008.partial").exists()
        assert [path.name for path in list_checkpoints(checkpoints.parent)] == ["step-00000004"]


def test_exported_weights_are_the_fp32_masters(seen: dict[int, Seen]) -> None:
    for setting in {*EVERY} & seen[2].keys():
        assert not seen[2][setting]["rounded"], setting


def test_each_published_recipe_takes_its_first_steps(seen: dict[int, Seen]) -> None:
    expected = {
        "dinov2_l16_in1k",
        "mae_b16",
        "mae_l16",
        "vit_b16_in1k_deit3",
        "vit_l16_in21k_augreg",
        "vit_s16_in1k_90ep",
    }
    assert expected <= seen[1]["recipes"].keys()
    for name in expected:
        header = (ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text().split("\nrun_dir")[0]
        for word in ("launch/pretrain.py --config", "arXiv", "Published: ", "Images seen: ", "FLOPs: ", "not yet run"):
            assert word in header, (name, word)
    for name, losses in seen[1]["recipes"].items():
        assert len(losses) == 3, name
        max_samples = (
            12 if name.startswith(("dinov2", "vit_l16_in21k")) else 3
        )  # two over 64 prototypes; a sum over classes
        assert all(0 < loss < max_samples for loss in losses), name


def test_compiled_blocks_learn_the_same(seen: dict[int, Seen]) -> None:
    for world_size, setting in ((1, "compiled"), (2, "compiled3")):
        assert column(seen[world_size][setting], "train/loss") == pytest.approx(
            seen[1]["reference"]["losses"], abs=1e-4
        )


def test_several_shard_sets_of_other_classes_are_refused(
    tiny: Path, digits: Path, shell: Shell, tool: Callable[[str], str]
) -> None:
    other = shell.folder / "other"
    made = shell([tool("vitrail"), "shards", "make", "digits", other, "--classes", "4,5"])
    assert made.code == 0, made.err
    assert DatasetInfo.load(other / "train").class_names == ["4", "5"]
    run = [sys.executable, ROOT / "launch" / "pretrain.py", "--config", tiny, f"data.validation={other}/train"]
    done = shell(run)
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        f"{other}/train: validation classes differ from training classes: "
        "only in training: 0, 1, 2; only in validation: 4, 5"
    )
