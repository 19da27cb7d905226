"""Launch scripts, a fine-tuning recipe that takes seconds, and what runs have logged."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from pretrain.journal import read_rows
from tests.support.launching import ROOT

PRETRAIN, FINETUNE = ROOT / "launch" / "pretrain.py", ROOT / "launch" / "finetune.py"
FINETUNE_YAML = """
run_dir: {folder}/runs/finetune
model: {folder}/runs/tiny/export
data: {{train: {digits}/train, validation: {digits}/validation, num_workers: 1}}
augment: {{crop_scale: [0.6, 1.0], flip: 0.0, mixup: 0.2}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{epochs: 2, warmup_epochs: 0.5}}
engine: {{global_batch_size: 32, micro_batch_size: 8}}
logging: {{every_steps: 5}}
tracking: {{experiment: tests}}
"""


def logged(run_dir: Path, name: str) -> list[float]:
    """Return the values of a metric in a run's metrics.jsonl."""
    return [row[name] for row in read_rows(run_dir / "metrics.jsonl") if name in row]


def losses(run_dir: Path) -> list[float]:
    """Return the training loss of each logged step."""
    return logged(run_dir, "train/loss")


def mlflow_runs(folder: Path) -> dict[str, Run]:
    """Return the runs in the MLflow store below a folder, by name."""
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}
