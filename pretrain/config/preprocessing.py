"""The `preprocessing` section: how an image becomes the model's input."""

from typing import Annotated

from pydantic import Field

from pretrain.config.section import Positive, Section


class PreprocessingConfig(Section):
    """Preprocessing in validation, which the exported image processor repeats. Training shares the normalization."""

    image_mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="Mean of each color channel for normalization; pixels are in [0, 1]."
    )
    image_std: tuple[Positive, Positive, Positive] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation of each color channel for normalization."
    )
    resize_ratio: Annotated[float, Field(ge=1)] = Field(
        1.0,
        description="Shorter edge before the center crop, relative to image_size; 1.143 crops 224 pixels from 256.",
    )
