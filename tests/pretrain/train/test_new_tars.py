"""A run that starts from tars without an index indexes them, and trains as on the indexed shards."""

from tests.support.training import NEW_TARS, NEW_TARS_SETTING, Trained


def test_losses_equal_those_of_indexed_shards(trained: Trained) -> None:
    seen = trained(2, NEW_TARS)
    assert seen["rows"] == trained(2, NEW_TARS_SETTING)["rows"]
    assert {"dataset.json", "shard-000000.index.json", "shard-000000.tar"} <= set(seen["files"])
