"""The `tracking` section."""

from pydantic import Field

from pretrain.config.section import Location, Section


class TrackingConfig(Section):
    """MLflow tracking. By default runs go to an SQLite database next to the run folder, without a server."""

    uri: Location | None = Field(
        None,
        description="MLflow tracking URI; null uses the environment variable MLFLOW_TRACKING_URI, or else an SQLite "
        "database next to the run folder; off writes only metrics.jsonl.",
    )
    experiment: str | None = Field(
        None,
        description="MLflow experiment of the run; null uses the environment variable MLFLOW_EXPERIMENT_NAME, or else "
        "vitrail.",
    )
