"""With engine.compile, an objective is compiled to a few graphs without breaks, whatever the config switches on."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.testing import CompileCounter

from pretrain.config import MAEConfig, ModelConfig, PreprocessingConfig, SelfDistillationConfig, SupervisedConfig
from pretrain.data.transforms.batch import augment
from pretrain.data.transforms.device_decode import collate
from pretrain.data.transforms.views import TrainView
from pretrain.model.compiling import MOST_GRAPHS, compile_graphs
from pretrain.model.vit import Block, Output, ViT
from pretrain.objectives import build_objective
from pretrain.objectives.objective import Objective

pytestmark = pytest.mark.slow
COLORS = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1, "grayscale": 0.1, "solarize": 0.1}
AUGMENT = {**COLORS, "blur": 0.3, "erasing": 0.2}
MIXED = {**AUGMENT, "mixup": 0.8, "cutmix": 1.0}
MAE = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
CROPS = {"num_local_crops": 3, "local_image_size": 16, "num_prototypes": 32}
CROPS |= {"head_hidden_size": 16, "head_bottleneck_size": 8}
DROP_PATH = {"drop_path": 0.3, "layer_scale": 0.1}
CHANNELS = (0.5, 0.4, 0.3)


def supervised(model: dict[str, Any], **config: Any) -> Objective:
    return build(SupervisedConfig.model_validate(config), model)


def build(config: Any, model: dict[str, Any], *, activation_checkpointing: bool = False) -> Objective:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    encoder = ViT(ModelConfig.model_validate({**sizes, **model}), activation_checkpointing)
    return build_objective(config, encoder, [0.1] * 10, PreprocessingConfig()).train()


def batch_of(objective: Objective, size: int, image_size: int = 32) -> Any:
    random, view = np.random.default_rng(0), objective.train_view(image_size)
    batch = collate([view(random.integers(0, 256, (60, 50, 3), dtype=np.uint8), random) for _ in range(size)])
    return {**batch, "label": torch.arange(size) % 10, "position": torch.arange(size)}


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


SCENARIOS: dict[str, tuple[Callable[[], Objective], list[tuple[int, int]]]] = {  # objective; batches and image sizes
    "plain": (lambda: supervised({}), [(8, 32)]),
    "low drop path": (lambda: supervised({"drop_path": 0.1}), [(8, 32)]),
    "drop path and mixup": (lambda: supervised(DROP_PATH, augment=MIXED), [(8, 32)]),
    "uneven ranks": (lambda: supervised(DROP_PATH, augment=MIXED), [(8, 32), (6, 32)]),
    "growing images": (
        lambda: supervised(DROP_PATH, augment={"rand_augment_ops": 2}, patch_dropout=0.25),
        [(10, 24), (10, 32), (10, 48)],
    ),
    "activation checkpointing": (
        lambda: build(SupervisedConfig(), DROP_PATH, activation_checkpointing=True),
        [(8, 32)],
    ),
    "mae": (
        lambda: build(MAEConfig.model_validate({**MAE, "augment": AUGMENT}), {"position_embedding": "sincos"}),
        [(8, 32), (7, 32)],
    ),
    "self-distillation": (
        lambda: build(SelfDistillationConfig.model_validate({**CROPS, "augment": AUGMENT}), DROP_PATH),
        [(8, 32), (7, 32)],
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_has_few_graphs_without_breaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build_one, batches = SCENARIOS[name]
    objective, counter, eager_calls = build_one(), CompileCounter(), []
    forward = Block.forward

    def note_eager(block: Block, tokens: torch.Tensor, output: Output = "tokens") -> torch.Tensor:
        if not torch.compiler.is_compiling():
            eager_calls.append(block)
        return forward(block, tokens, output)

    note_eager.graph_uses_parameters = True  # type: ignore[attr-defined]
    monkeypatch.setattr(Block, "forward", note_eager)
    compile_graphs(objective, several_shapes=len(batches) > 1 or objective.several_sizes, backend=counter)
    for size, image_size in batches:
        for _ in range(2):
            objective(batch_of(objective, size, image_size))["loss"].backward()
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    assert 5 <= counter.frame_count <= MOST_GRAPHS
    assert not eager_calls


def test_evaluation_does_not_use_graphs() -> None:
    objective, counter = supervised({}), CompileCounter()
    compile_graphs(objective, backend=counter)
    with torch.no_grad():
        objective.eval()({"image": torch.zeros(8, 3, 32, 32, dtype=torch.uint8)}, "features")
    assert counter.frame_count == 0


def test_zero_3_compiles_blocks_and_what_has_no_parameters() -> None:
    objective = supervised({}, augment=MIXED)
    compile_graphs(objective, partitioned=True, backend=CompileCounter())
    assert {"mixed_images", "mean_loss", "augmented_images"} <= vars(objective).keys()
    assert "embed" not in vars(objective.encoder)
    assert "forward" in vars(objective.encoder.layers[0])


@pytest.mark.processes
@pytest.mark.parametrize(
    "config",
    [{**AUGMENT, "grayscale": 0.5, "blur": 0.5}, {"rand_augment_ops": 2}, {"three_augment": True, "hue": 0.1}],
    ids=["colors", "rand_augment", "three_augment"],
)
def test_compiled_augmentation_equals_the_eager_one_and_is_one_graph(config: dict[str, Any]) -> None:
    view = TrainView(SupervisedConfig.model_validate({"augment": config}).augment, 32)
    random = np.random.default_rng(0)
    batch = collate([view(random.integers(0, 256, (60, 50, 3), dtype=np.uint8), random) for _ in range(16)])
    compiled = torch.compile(augment, fullgraph=True)
    # The values are fp32 and up to 3; the compiled graph rounds in another order.
    torch.testing.assert_close(
        compiled(batch, CHANNELS, CHANNELS), augment(batch, CHANNELS, CHANNELS), rtol=0, atol=2e-5
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.processes
def test_compiled_model_equals_the_eager_one() -> None:
    objective, compiled = (supervised(DROP_PATH | {"num_hidden_layers": 2}, augment=MIXED) for _ in range(2))
    compile_graphs(compiled)
    losses = []
    for each in (objective, compiled):
        torch.manual_seed(1)
        losses.append(each(batch_of(each, 8))["loss"])
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(objective.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)
