"""Decode JPEGs on the training device with torchvision (nvJPEG on CUDA); the workers only read them and sample crops.

The workers decode what the device would decode differently (EXIF orientation, CMYK, other formats), so a batch may
contain both kinds. The pixels of nvJPEG differ slightly from those of libjpeg-turbo; evaluation and export stay on the
CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from pretrain.data.transforms.batch import Batch
from pretrain.data.transforms.decode import decode
from pretrain.data.transforms.multi_crop import index_masked_patches
from pretrain.errors import DataError

Decoder = Callable[[list[Tensor]], Sequence[Tensor]]  # JPEGs, uint8 [bytes] on the CPU -> images, uint8 [3, H, W]


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Make a batch of the fields of B samples, some of which may still be JPEGs.

    Returns:
        The fields, stacked, and the indices of masked patches if there are masks. If any sample is a JPEG, there are
        "jpegs", "jpeg_sizes" [B] and "crop_box" [B, 4], and "image" only for the samples that are already decoded.
    """
    if not any("jpeg" in sample for sample in samples):
        batch = default_collate(samples)
        return cast(Batch, {**batch, **index_masked_patches(batch["mask"])} if "mask" in batch else batch)
    jpegs = [sample.pop("jpeg", b"") for sample in samples]
    boxes = [sample.pop("crop_box", np.zeros(4, np.int64)) for sample in samples]
    images = [sample.pop("image") for sample in samples if "image" in sample]
    batch = cast(Batch, default_collate(samples))
    batch["jpegs"] = torch.from_numpy(np.frombuffer(b"".join(jpegs), np.uint8).copy())
    batch["jpeg_sizes"] = torch.tensor([len(jpeg) for jpeg in jpegs])
    batch["crop_box"] = default_collate(boxes)
    if images:
        batch["image"] = torch.stack(images)
    return batch


def decode_on_device(batch: Batch, image_size: int, device: torch.device, decoder: Decoder) -> Batch:
    """Decode the JPEGs of a batch on the device, crop and resize them; return a batch without JPEGs unchanged.

    Args:
        batch: Batch from `collate`, on the CPU.
        image_size: Side of the resized images in pixels.
        device: Device that decodes.
        decoder: Function that decodes a list of JPEGs, see `build_decoder`.

    Returns:
        The batch with "image" uint8 [B, 3, image_size, image_size] on the device, and without JPEGs.
    """
    if "jpegs" not in batch:
        return batch
    sizes: list[int] = batch["jpeg_sizes"].tolist()
    jpegs = list(torch.split(batch["jpegs"], [size for size in sizes if size]))
    images = torch.empty(len(sizes), 3, image_size, image_size, dtype=torch.uint8, device=device)
    if "image" in batch:
        decoded = [row for row, size in enumerate(sizes) if not size]  # a mask on the device would make the host wait
        for row, image in zip(decoded, batch["image"], strict=True):
            images[row].copy_(image, non_blocking=True)
    rows = [row for row, size in enumerate(sizes) if size]
    for row, pixels in zip(rows, _decode(jpegs, device, decoder), strict=True):
        top, left, bottom, right = batch["crop_box"][row].tolist()
        crop = pixels[None, :, top:bottom, left:right].float()
        resized = F.interpolate(crop, (image_size, image_size), mode="bicubic", antialias=True)
        images[row] = resized[0].round().clamp(0, 255).to(torch.uint8)
    left_out = ("jpegs", "jpeg_sizes", "crop_box", "image")
    rest = {name: value for name, value in batch.items() if name not in left_out}
    return cast(Batch, {**rest, "image": images})


def build_decoder(device: torch.device) -> Decoder:
    """Return torchvision's decoder for a CUDA device.

    Raises:
        DataError: If the device is not a CUDA device.
    """
    if device.type != "cuda":
        raise DataError(f"data.decode: gpu needs a CUDA device, but this run uses {device.type}; set data.decode=cpu")
    return torchvision_decoder(device)


def torchvision_decoder(device: torch.device) -> Decoder:
    """Return torchvision's `decode_jpeg` for any device.

    Raises:
        DataError: If torchvision is missing or does not match the installed torch.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"data.decode: gpu needs a torchvision that matches torch {torch.__version__} ({error}); "
            "run pip install 'vitrail[gpu-decode]'"
        ) from None
    return lambda jpegs: decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)


def _decode(jpegs: list[Tensor], device: torch.device, decoder: Decoder) -> Sequence[Tensor]:
    """Decode JPEGs; if the device cannot decode one of them, decode all on the CPU, whose decoder accepts more."""
    try:
        return decoder(jpegs)
    except RuntimeError:
        arrays = [decode(jpeg.numpy().tobytes()) for jpeg in jpegs]
        return [torch.from_numpy(array).permute(2, 0, 1).to(device) for array in arrays]
