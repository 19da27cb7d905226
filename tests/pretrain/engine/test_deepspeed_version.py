"""The installed DeepSpeed has every attribute that `pretrain/engine` relies on, and its version has an upper bound.

DeepSpeed's public API can neither save one rank's partition, nor load it at another ZeRO stage, nor tell an optimizer
which parameters its flat tensors hold. `pretrain/engine` reads private attributes for that, and they may change in any
minor release. So pyproject.toml allows DeepSpeed up to the minor release that these tests have run with. To allow a
newer one: install it, run the tests of `tests/pretrain`, correct `pretrain/engine` if needed, and raise the bound.
"""

import ast
import json
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pretrain.engine.protocol import TrainingEngine
from tests.support.launching import ROOT, Shell

ENGINE = ROOT / "pretrain" / "engine"
MEMBERS = [f"engine.{name}" for name in vars(TrainingEngine) if not name.startswith("_")]
MEMBERS += [f"engine.{name}" for name in TrainingEngine.__annotations__]
STAGES_1_AND_2 = [
    "engine.optimizer.optimizer",
    "engine.gradient_accumulation_steps",
    "engine.optimizer.params_in_partition.[0].[0]",
    "engine.optimizer.averaged_gradients",
    "engine.optimizer.gradient_accumulation_dtype",
    "engine.optimizer.use_separate_grad_accum",
    "engine.optimizer.use_grad_accum_attribute",
    "engine.optimizer.independent_gradient_partition_epilogue",
    "engine.optimizer.overlap_comm",
    "engine.optimizer.single_partition_of_fp32_groups.[0]",
    "engine.optimizer.update_lp_params",
    "parameter._hp_mapping.param_group_index",
    "parameter._hp_mapping.lp_fragment_address.start",
    "parameter._hp_mapping.lp_fragment_address.numel",
    "parameter._hp_mapping.hp_fragment_address.start",
]
STAGE_3 = [
    "engine.optimizer.optimizer",
    "engine.optimizer.averaged_gradients",
    "engine.optimizer.__class__._get_norm_groups",  # the class's, because `build_engine` replaces the optimizer's
    "engine.optimizer.fp16_partitioned_groups_flat.[0]",
    "engine.optimizer.fp32_partitioned_groups_flat.[0]",
    "engine.optimizer.grad_position.[0].[0]",
    "engine.optimizer.get_param_id",
    "engine.optimizer.persistent_parameters.[0].partition",
    "engine.optimizer.persistent_parameters.[0].all_gather",
    "parameter.ds_tensor.ds_numel",
    "parameter.ds_numel",
    "parameter.ds_shape",
]
# ZeRO stage and precision -> the attributes that we use there.
ATTRIBUTES = {
    "0 fp32": MEMBERS,
    "0 bf16": [
        "engine.optimizer.optimizer",
        "engine.optimizer.fp16_groups.[0].[0]",
        "engine.optimizer.fp32_groups.[0].[0]",
    ],
    "1 fp32": STAGES_1_AND_2,
    "1 bf16": STAGES_1_AND_2,
    "2 fp32": STAGES_1_AND_2,
    "2 bf16": STAGES_1_AND_2,
    "3 fp32": STAGE_3,
    "3 bf16": STAGE_3,
    "1 bf16 offload": ["engine.optimizer.cpu_offload", "engine.optimizer.single_partition_of_fp32_groups.[0].grad"],
    "3 bf16 offload": ["engine.optimizer.offload_optimizer", "engine.optimizer.fp32_partitioned_groups_flat.[0].grad"],
}
# Attributes of the same objects that belong to torch's public API, or to this project.
PUBLIC = {"param_groups", "state", "numel", "shape", "data", "requires_grad", "step", "found_inf", "bind", "module"}
PUBLIC |= {"device", "optimizer", "register_step_pre_hook", "grad", "grad_scale", "dtype", "update"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bool]]:
    """Return which attributes exist after one step, for each setting."""
    script = Path(__file__).with_name("private_attributes.py")
    shell = Shell(tmp_path_factory.mktemp("engines"))
    done = shell([sys.executable, script, json.dumps(ATTRIBUTES)], PYTHONPATH=str(ROOT))
    assert done.code == 0, done.err[-3000:]
    result: dict[str, dict[str, bool]] = json.loads(done.out.splitlines()[-1])
    return result


@pytest.mark.processes
@pytest.mark.parametrize("setting", ATTRIBUTES)
def test_the_installed_deepspeed_has_the_attributes(found: dict[str, dict[str, bool]], setting: str) -> None:
    missing = [path for path, exists in found[setting].items() if not exists]
    assert not missing, f"DeepSpeed {version('deepspeed')} at ZeRO stage {setting}: {missing}"
    assert found[setting].keys() == {*ATTRIBUTES[setting]}


def test_deepspeed_builds_its_shared_memory_reductions_in_the_function_that_we_replace() -> None:
    source = source_of_deepspeed("comm", "torch.py")
    assert "def build_shm_op():" in source
    assert "= build_shm_op()" in source


def test_deepspeed_synchronizes_where_we_order_streams_on_the_device() -> None:
    """Without a GPU there is no stream, so that its attribute is None in the engines of the other test."""
    source = source_of_deepspeed("runtime", "zero", "stage_1_and_2.py")
    epilogue = source.partition("def independent_gradient_partition_epilogue(self):")[2].partition("\n    def ")[0]
    assert "get_accelerator().synchronize()" in epilogue
    assert "self.reduction_stream = " in source


def source_of_deepspeed(*path: str) -> str:
    deepspeed = find_spec("deepspeed")
    assert deepspeed is not None
    [folder] = deepspeed.submodule_search_locations or []
    return Path(folder, *path).read_text()


def test_every_private_attribute_in_the_source_is_listed() -> None:
    listed = {"reduction_stream"} | {
        name for paths in ATTRIBUTES.values() for path in paths for name in path.split(".")
    }
    used = set()
    for path in ENGINE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if owner in ("engine", "optimizer", "parameter", "mapping", "address", "p", "ds_tensor"):
                    used.add(node.attr)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                used.add(ast.literal_eval(node.args[1]))
    assert {"_hp_mapping", "ds_tensor", "averaged_gradients", "fp16_groups", "grad_position"} <= used
    assert used - PUBLIC <= listed


def test_the_protocol_has_the_members_that_training_needs() -> None:
    assert {"engine.module", "engine.device", "engine.optimizer", "engine.backward", "engine.step"} <= {*MEMBERS}


def test_the_upper_bound_is_the_minor_release_after_the_tested_one() -> None:
    [text] = re.findall(r'^    "(deepspeed[^"]*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    requirement, installed = Requirement(text), Version(version("deepspeed"))
    bounds = {each.operator: each.version for each in requirement.specifier}
    assert bounds["<"] == f"{installed.major}.{installed.minor + 1}"
    assert installed in requirement.specifier
