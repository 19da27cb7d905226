"""JPEGs decoded where the model is, by torchvision (nvJPEG on CUDA): workers only read them and draw the crops.

A worker decodes what the device would not decode as we do (EXIF, CMYK, other formats), so a batch may hold both kinds.
nvJPEG's pixels differ a little from libjpeg-turbo's; evaluation and export stay on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from pretrain.data.transforms.decode import decode
from pretrain.errors import DataError

Decoder = Callable[[list[Tensor]], Sequence[Tensor]]  # JPEGs, uint8 [bytes] on the CPU -> uint8 [3, H, W]


def collate(fields: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of samples, some of which may be JPEGs still.

    Of B samples: "jpegs" uint8 [all bytes], "jpeg_sizes" [B], 0 where there is none; "crop_box" [B, 4]; and "image" of
    those that are decoded.
    """
    if not any("jpeg" in sample for sample in fields):
        batch: dict[str, Any] = default_collate(fields)
        return batch
    jpegs = [sample.pop("jpeg", b"") for sample in fields]
    boxes = [sample.pop("crop_box", np.zeros(4, np.int64)) for sample in fields]
    images = [sample.pop("image") for sample in fields if "image" in sample]
    return {
        **default_collate(fields),
        "jpegs": torch.from_numpy(np.frombuffer(b"".join(jpegs), np.uint8).copy()),
        "jpeg_sizes": torch.tensor([len(jpeg) for jpeg in jpegs]),
        "crop_box": default_collate(boxes),
        **({"image": torch.stack(images)} if images else {}),
    }


def unpack(batch: dict[str, Tensor], image_size: int, device: torch.device, decoder: Decoder) -> dict[str, Tensor]:
    """Decode a batch's JPEGs on the device, crop and resize them; a batch without any comes back as it is.

    Returns:
        The batch with "image" uint8 [B, 3, image_size, image_size] on the device.
    """
    if "jpegs" not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name not in ("jpegs", "jpeg_sizes", "crop_box", "image")}
    sizes: list[int] = batch["jpeg_sizes"].tolist()
    jpegs = list(torch.split(batch["jpegs"], [size for size in sizes if size]))
    images = torch.empty(len(sizes), 3, image_size, image_size, dtype=torch.uint8, device=device)
    if "image" in batch:
        images[(batch["jpeg_sizes"] == 0).to(device)] = batch["image"].to(device)
    places = [i for i, size in enumerate(sizes) if size]
    for i, pixels in zip(places, _decode(jpegs, device, decoder), strict=True):
        top, left, bottom, right = batch["crop_box"][i].tolist()
        crop = pixels[None, :, top:bottom, left:right].float()
        resized = F.interpolate(crop, (image_size, image_size), mode="bicubic", antialias=True)
        images[i] = resized[0].round().clamp(0, 255).to(torch.uint8)
    return {**rest, "image": images}


def build_decoder(device: torch.device) -> Decoder:
    """Return torchvision's decoder for a device.

    Raises:
        DataError: torchvision is not installed, or there is no GPU.
    """
    if device.type != "cuda":
        raise DataError(f"data.decode: gpu needs a CUDA device, this run is on {device.type}; leave it at cpu")
    return torchvision_decoder(device)


def torchvision_decoder(device: torch.device) -> Decoder:
    """Return torchvision's `decode_jpeg`, for any device.

    Raises:
        DataError: torchvision is not installed, or does not fit torch.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"data.decode: gpu needs a torchvision that fits torch {torch.__version__} ({error}): "
            "pip install 'vitrail[gpu-decode]'"
        ) from None
    return lambda jpegs: decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)


def _decode(jpegs: list[Tensor], device: torch.device, decoder: Decoder) -> Sequence[Tensor]:
    """Decode JPEGs; where the device cannot read one of them, all are read on the CPU, which has proved that it can."""
    try:
        return decoder(jpegs)
    except RuntimeError:
        arrays = [decode(jpeg.numpy().tobytes()) for jpeg in jpegs]
        return [torch.from_numpy(array).permute(2, 0, 1).to(device) for array in arrays]
