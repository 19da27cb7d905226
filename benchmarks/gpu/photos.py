"""Shards of photos, whose decoding costs as much as that of real ones."""

from pathlib import Path

from benchmarks.input import make_photos
from pretrain.data.shards.make import make_shards
from pretrain.data.shards.plan import ShardOptions
from pretrain.data.sources.folder import list_folder


def make_photo_shards(work: Path, num_photos: int) -> Path:
    """Write shards of photos of 500 x 375 pixels in two classes, without validation data; return their folder."""
    make_photos(work / "photos", num_photos)
    make_shards(list_folder(work / "photos"), work / "photo-shards", ShardOptions(validation_fraction=0.0))
    return work / "photo-shards" / "train"
