"""The published recipes: each trains at a thousandth of its scale, and its header has what a reader looks for."""

import pytest

from tests.support.training import RECIPE, RECIPES, Trained

DOCUMENTED = [
    "dinov2_l16_in1k",
    "mae_b16",
    "mae_l16",
    "vit_b16_in1k_deit3",
    "vit_l16_in21k_augreg",
    "vit_s16_in1k_90ep",
]


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_takes_its_first_steps(trained: Trained, name: str) -> None:
    losses = trained(1, RECIPE + name)["losses"]
    assert len(losses) == 3
    at_most = 12 if name.startswith(("dinov2", "vit_l16_in21k")) else 3  # 64 prototypes twice; a sum over the classes
    assert all(0 < loss < at_most for loss in losses)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_header_of_a_published_recipe_is_complete(name: str) -> None:
    header = RECIPES[name].read_text().split("\nrun_dir")[0]
    for word in ("launch/pretrain.py --config", "arXiv", "Published: ", "Images seen: ", "FLOPs: ", "not yet run"):
        assert word in header, word
