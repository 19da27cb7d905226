"""Every mistake in a config is explained with file, line, key and the likely fix, all at once and without torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune.config import FinetuneConfig
from pretrain.config import MAEConfig, PretrainConfig, ScheduleConfig, Section
from pretrain.config.schema import default_text, dotted, leaves
from pretrain.config.section import expand
from pretrain.configfile import ConfigError, flatten, load_config, read_command_line

ROOT = Path(__file__).resolve().parents[2]
GOOD = "run_dir: runs/x\ndata: {train: shards}\nschedule: {total_steps: 100}\n"

DISTIL = "objective: {{name: self_distillation, {}}}"

# YAML after GOOD, overrides, and a part of the only line of the message
MISTAKES = [
    ("modle: {}", [], "x.yaml:4: modle: unknown key; did you mean model?"),
    ("engine:\n  zero_stag: 2", [], "x.yaml:5: engine.zero_stag: unknown key; did you mean zero_stage?"),
    ("learning_rate: 1e-3", [], "x.yaml:4: learning_rate: unknown key; did you mean optimizer.learning_rate?"),
    ("optimizer: {lr: 1e-3}", [], "x.yaml:4: optimizer.lr: unknown key; did you mean learning_rate?"),
    ("logging: {q: 1}", [], "x.yaml:4: logging.q: unknown key; the valid keys are every_steps"),
    (
        "init_from: ${NO_SUCH_VARIABLE}/x",
        [],
        "x.yaml:4: init_from: the environment variable NO_SUCH_VARIABLE is not set; set it, or write the path out",
    ),
    (
        "init_from: $HOME/x",
        [],
        "x.yaml:4: init_from: $HOME is not a variable that is expanded; write it as ${NAME}",
    ),
    (
        "init_from: '${oc.env:HOME}/x'",
        [],
        "x.yaml:4: init_from: ${oc.env:HOME} is not a variable that is expanded; write it as ${NAME}",
    ),
    (
        "init_from: ~no_such_user/x",
        [],
        "x.yaml:4: init_from: ~no_such_user is not the home folder of a user here; write the path out",
    ),
    (
        "",
        ["data.train=[a, '${NO_SUCH_VARIABLE}/x']"],
        "command line: data.train.1: the environment variable NO_SUCH_VARIABLE is not set; set it, or write the path",
    ),
    ("", ["seed=[1]"], "command line: seed: must be a whole number, got [1]; write digits only"),
    ("", ["run_dir=[a]"], 'command line: run_dir: must be text, got ["a"]; put it in quotes'),
    ("seed: x", [], 'x.yaml:4: seed: must be a whole number, got "x"; write digits only'),
    ("seed: 1e-4", [], "x.yaml:4: seed: must be a whole number, got 0.0001; write digits only"),
    ("seed: -1", [], "x.yaml:4: seed: must be greater than or equal to 0, got -1; increase it"),
    ("optimizer: {learning_rate: 0}", [], "optimizer.learning_rate: must be greater than 0, got 0; increase it"),
    (
        "optimizer: {learning_rate: fast}",
        [],
        'optimizer.learning_rate: must be a number, got "fast"; write it like',
    ),
    ("optimizer: {learning_rate: 12:30}", [], 'optimizer.learning_rate: must be a number, got "12:30"; '),
    ("optimizer: {betas: [0.9]}", [], "x.yaml:4: optimizer.betas: has too few values, got [0.9]; add the missing ones"),
    ("optimizer: {betas: 0.9}", [], "x.yaml:4: optimizer.betas: must be a list, got 0.9; write it as [a, b]"),
    (
        "optimizer: {betas: [0.9, 0.9, 0.9]}",
        [],
        "optimizer.betas: must have 2 values, got [0.9, 0.9, 0.9]; remove",
    ),
    ("engine: {compile: no}", [], 'x.yaml:4: engine.compile: must be true or false, got "no"; write false'),
    ("engine: {precision: bf61}", [], 'engine.precision: must be fp32 or bf16, got "bf61"; did you mean bf16?'),
    ("engine: {zero_stage: 4}", [], "engine.zero_stage: must be 0, 1, 2 or 3, got 4; choose one of these"),
    ("engine: 3", [], "x.yaml:4: engine: must be a section, got 3; write its keys below it"),
    ("seed: 1\nseed: 2", [], "x.yaml:5: seed: duplicate key, first set on line 4; remove one of the two"),
    ("data: {train: other}", [], "x.yaml:4: data: duplicate key, first set on line 2"),
    ("model: {patch_size: 15}", [], "model.patch_size: 15 does not divide image_size=224; image_size=210 would fit"),
    ("model: {num_attention_heads: 7}", [], "model.num_attention_heads: 7 does not divide hidden_size=768; 6 would"),
    (
        "model: {hidden_size: 90, num_attention_heads: 9, position_embedding: sincos}",
        [],
        "multiple of 4 with position_embedding=sincos, got 90; ",
    ),
    (
        "model: {mlp_ratio: 2, intermediate_size: 9}",
        [],
        "model.mlp_ratio: conflicts with intermediate_size; remove one of the two",
    ),
    ("", ["data.weights=[1, 2]"], "data.weights: has 2 values but data.train has 1; give one weight per training set"),
    (
        "engine: {zero_stage: 0, offload_optimizer: true}",
        [],
        "engine.offload_optimizer: requires zero_stage 1, 2 or 3; raise zero_stage",
    ),
    (
        "objective: {augment: {mixup: 0.8}}\nengine: {global_batch_size: 6, micro_batch_size: 3}",
        [],
        "engine.micro_batch_size: must be even for mixup",
    ),
    (
        "objective: {augment: {crop_scale: [1.0, 0.5]}}",
        [],
        "must be [low, high] with 0 < low <= high, got [1.0, 0.5]; correct",
    ),
    (
        "objective: {name: mea, mask_ratio: 0.5}",
        [],
        'objective.name: must be supervised, mae or self_distillation, got "mea"; did you mean mae?',
    ),
    ("objective: {mask_ratio: 0.5}", [], "unknown key; did you mean mask_ratio, which requires objective.name=mae?"),
    ("objective: {name: mae, label_smoothing: 0.1}", [], "label_smoothing, which requires objective.name=supervised?"),
    ("objective: {name: mae, mask_ratio: 1}", [], "objective.mask_ratio: must be less than 1, got 1; lower it"),
    ("objective: {name: mae, decoder_num_attention_heads: 7}", [], "7 does not divide decoder_hidden_size=512; 8"),
    (
        "objective: {name: mae, augment: {mixup: 0.8}}",
        [],
        "mixup and cutmix mix labels, which mae does not use; set both to 0",
    ),
    (
        "objective: {name: mae, mask_ratio: 0.999}",
        [],
        "objective.mask_ratio: hides all 196 patches of an image; lower it",
    ),
    (
        "objective: {loss_reduction: sum}",
        [],
        "objective.loss_reduction: sum requires loss=binary_cross_entropy; use mean",
    ),
    (
        "objective: {augment: {three_augment: true, blur: 0.1}}",
        [],
        "already applies grayscale, solarize or blur; set these",
    ),
    (
        "objective: {name: mae, decoder_hidden_size: 50, decoder_num_attention_heads: 2}",
        [],
        "objective.decoder_hidden_size: must be a multiple of 4 for its sincos position embedding, got 50; change it",
    ),
    (DISTIL.format("mask_ratios: [0.5, 0.1]"), [], "mask_ratios: must be [low, high] with 0 < low <= high, got [0.5"),
    (
        DISTIL.format("augment: {cutmix: 1}"),
        [],
        "mixup and cutmix mix labels, which self_distillation does not use; set",
    ),
    (
        DISTIL.format("local_image_size: 100"),
        [],
        "local_image_size: model.patch_size=16 does not divide 100; choose a multiple",
    ),
    (
        DISTIL.format(""),
        ["engine.zero_stage=3"],
        "objective.name=self_distillation supports ZeRO stages up to 2; lower it",
    ),
    (
        DISTIL.format(""),
        ["ema.decay=0.9"],
        "ema.decay: objective.name=self_distillation already averages its weights; set it",
    ),
    (
        DISTIL.format(""),
        ["data.decode=gpu"],
        "objective.name=self_distillation does not support decoding on the gpu; use cpu",
    ),
    (
        "",
        ["schedule.image_sizes=[[0.5, 100]]"],
        "schedule.image_sizes: model.patch_size=16 does not divide 100; use a multiple of it",
    ),
    (
        "",
        ["schedule.image_sizes=[[0.9, 192], [0.5, 128]]"],
        "fractions of the run must be in ascending order, got [0.9, 0.5]; sort",
    ),
    ("", ["schedule.image_sizes=[[0.5, 192]]", "data.decode=gpu"], "data.decode: gpu decodes to a single size, but"),
    (
        "objective: {name: mae}",
        ["schedule.image_sizes=[[0.5, 192]]"],
        "objective.name=mae supports only one image size; ",
    ),
    (
        "",
        ["data.stream=true", "data.validation=v", "data.weights=[1]"],
        "data.weights: a stream cannot mix by weight; remove weights",
    ),
    (
        "",
        ["data.stream=true", "data.validation=v", "data.repeats=2"],
        "data.repeats: a stream cannot repeat images; set repeats=1",
    ),
    ("", ["data.class_names=a.txt"], "data.class_names: only a stream uses them, because an index has its own; remove"),
    ("", ["data.stream=true"], "data.class_names: required by data.stream=true with objective.name=supervised but"),
    (
        "",
        ["data.stream=true", "data.validation=v", "evaluation.probe_every_steps=5"],
        "evaluation.probe_every_steps: probes need indexed training data, but data.stream=true; set it to 0",
    ),
    (
        "objective: {class_weights: balanced}",
        ["data.stream=true", "data.validation=v"],
        "objective.class_weights: balanced needs the size of each class, but data.stream=true; use a list",
    ),
    ("", ["data.repeats=3"], "data.repeats: 3 does not divide engine.global_batch_size=256; change"),
    (
        "",
        ["evaluation.probe_every_steps=5"],
        "data.validation: required by evaluation.probe_every_steps but missing; set",
    ),
    (
        "",
        ["schedule.warmup_steps=100"],
        "schedule.warmup_steps: 100 steps of warm-up use up all of total_steps=100; shorten them",
    ),
    ("", ["schedule.name=wsd"], "schedule.cooldown_steps: must be greater than 0 with name=wsd; set it or"),
    (
        "",
        ["schedule.cooldown_steps=9"],
        "schedule.cooldown_steps: must be 0 with name=cosine; remove it or use name=wsd",
    ),
    (
        "",
        ["schedule.name=wsd", "schedule.cooldown_steps=99", "schedule.warmup_steps=1"],
        "1 steps of warm-up and 99 of cool-down use up all of total_steps=100; ",
    ),
    (
        "",
        ["schedule.total_steps=0"],
        "schedule.total_steps: required but missing; set it, or set epochs",
    ),
    ("", ["schedule.epochs=3"], "schedule.epochs: conflicts with total_steps; remove one of the two"),
    ("", ["schedule.warmup_epochs=3"], "schedule.warmup_epochs: requires epochs, not total_steps; set warmup_steps"),
    (
        "",
        ["schedule.total_steps=0", "schedule.epochs=3", "schedule.warmup_epochs=3"],
        "schedule.warmup_epochs: must be less than epochs=3, got 3; shorten the warm-up",
    ),
    (
        "",
        ["schedule.total_steps=0", "schedule.epochs=3", "schedule.warmup_epochs=1", "schedule.warmup_steps=5"],
        "schedule.warmup_epochs: conflicts with warmup_steps; remove one of the two",
    ),
    (
        "objective: mae",
        ["schedule.total_steps=0", "schedule.epochs=3", "data.stream=true"],
        "schedule.epochs: the number of samples of a stream is unknown; set total_steps instead, or index the tars",
    ),
    (
        "objective: mea",
        [],
        'objective.name: must be supervised, mae or self_distillation, got "mea"; did you mean mae?',
    ),
    ("model: tiny", [], 'model: must be a section, got "tiny"; write its keys below it'),
    ("", ["engine.zero_stage=9"], "command line: engine.zero_stage: must be 0, 1, 2 or 3, got 9; "),
    ("", ["seed"], "command line: cannot parse 'seed'; write it as key.path=value"),
    ("", ["seed.x=1", "seed.y.z=1"], "command line: seed: must be a whole number"),
    ("seed: 1", ["seed.x=1"], "command line: seed.x: seed is a value, not a section; set seed itself"),
    ("seed: *a", [], "x.yaml:4: aliases (*name) are not supported; write the value out"),
    (
        "seed: !!python/name:os.system x",
        [],
        "seed: the YAML tag tag:yaml.org,2002:python/name:os.system is not",
    ),
    ("seed: [", [], "x.yaml:4: not valid YAML ("),
    ("seed: !!int abc", [], 'x.yaml:4: seed: "abc" does not match its YAML tag; write the value without'),
    ("model: {drop_path: 1.0}", [], "model.drop_path: must be less than 1, got 1.0; lower it"),
    ("optimizer: {betas: [0.9, 1.0]}", [], "optimizer.betas.1: must be less than 1, got 1.0; lower it"),
    (
        "optimizer: {learning_rate: 1e999}",
        [],
        "optimizer.learning_rate: input should be a finite number, got",
    ),
    ("tracking: {experiment: 5}", [], "x.yaml:4: tracking.experiment: must be text, got 5; put it in quotes"),
    ("", ["engine.zero_stage=["], "command line: engine.zero_stage: not valid YAML ("),
    (
        "model: {mlp_ratio: 1e-4}",
        [],
        "mlp_ratio x hidden_size must be at least 1, got 0.0001 x 768; increase mlp_ratio",
    ),
    (
        "optimizer: {name: lamb, weight_decay: 0}",
        [],
        "optimizer.weight_decay: LAMB needs a value above 0; increase it or use name=adamw",
    ),
]


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


def answer(config_class: type[Section], path: Path, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_class, path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("text", "overrides", "expected"), MISTAKES, ids=[case[2][:60] for case in MISTAKES])
def test_mistake_is_explained(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    message = answer(PretrainConfig, write(tmp_path, GOOD + text), overrides)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_missing_keys_and_files_are_explained(tmp_path: Path) -> None:
    message = answer(PretrainConfig, write(tmp_path, "data: {}\n"), [])
    assert message.splitlines() == [
        f"{tmp_path}/x.yaml: run_dir: required but missing; set it in the file or on the command line",
        f"{tmp_path}/x.yaml: schedule: required but missing; set it in the file or on the command line",
        f"{tmp_path}/x.yaml:1: data.train: required but missing; set it in the file or on the command line",
    ]
    message = answer(PretrainConfig, tmp_path / "no.yaml", [])
    assert message == f"{tmp_path}/no.yaml: cannot read the config file (No such file or directory); check the path"
    message = answer(PretrainConfig, write(tmp_path, "- 1\n"), [])
    assert message == f"{tmp_path}/x.yaml:1: must contain keys and values, got [1]; write key: value"


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD + "seed: x\nsead: 1\nmodel: {patch_size: 15, position_embedding: sine, num_attention_heads: 7}\n"
    text += "logging: {every_steps: 1, every_steps: 2}\n"
    overrides = ["engine.compile=off", "engine.zero_stage=["]
    lines = answer(PretrainConfig, write(tmp_path, text), overrides).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "engine.zero_stage",
        "engine.compile",
        "seed",
        "sead",
        "model.position_embedding",
        "model.patch_size",
        "model.num_attention_heads",
        "logging.every_steps",
    ]


def test_only_the_command_line_may_allow_shell_commands(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD.replace("data: {", "data: {allow_pipe: true, "))
    with pytest.raises(ConfigError, match=r"x\.yaml:\d: data\.allow_pipe: a config file must not set this; remove it"):
        load_config(PretrainConfig, path)
    path.write_text(GOOD.replace("data: {", "data: {allow_pipe: false, "))
    assert not load_config(PretrainConfig, path).config.data.allow_pipe
    assert load_config(PretrainConfig, path, ["data.allow_pipe=true"]).config.data.allow_pipe


def test_learning_rate_has_a_default_for_the_default_batch(tmp_path: Path) -> None:
    config = load_config(PretrainConfig, write(tmp_path, GOOD)).config
    assert (config.optimizer.learning_rate, config.engine.global_batch_size) == (1e-4, 256)
    assert "global batch of 256" in str(type(config.optimizer).model_fields["learning_rate"].description)


def test_wrong_value_is_not_used_to_check_combinations(tmp_path: Path) -> None:
    text = GOOD + "model: {hidden_size: ninety, num_attention_heads: 9}\n"
    assert len(answer(PretrainConfig, write(tmp_path, text), []).splitlines()) == 1


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    text = GOOD + "optimizer: {learning_rate: 1e-4, epsilon: .5}\ntracking: {experiment: no, uri: ~}\nseed: 012\n"
    config = load_config(PretrainConfig, write(tmp_path, text)).config
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.epsilon == 0.5
    assert config.tracking.experiment == "no"
    assert config.tracking.uri is None
    assert config.seed == 12


def test_printed_config_shows_origins_and_can_be_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "model: {image_size: 32}\n")
    loaded = load_config(PretrainConfig, path, ["data.train=[a b, '5']", "optimizer.learning_rate=1e-5"])
    lines = loaded.text.splitlines()
    assert any(line.split() == ["image_size:", "32", "#", f"{path}:4"] for line in lines)
    assert any(line.startswith("  learning_rate: 1e-05") and line.endswith("# command line") for line in lines)
    assert any(line.startswith("seed: 0") and line.endswith("# default") for line in lines)
    assert load_config(PretrainConfig, write(tmp_path, loaded.text)).config == loaded.config


@pytest.mark.slow
@given(st.data())
def test_key_is_suggested_if_one_letter_is_missing(data: st.DataObject) -> None:
    """Remove one letter of any key. The message must suggest the key, unless the rest is a key as well."""
    for config_class in (PretrainConfig, FinetuneConfig):
        keys = [key for key, _ in leaves(config_class) if len(str(key[-1])) > 3]
        key = data.draw(st.sampled_from(keys))
        name = str(key[-1])
        i = data.draw(st.integers(0, len(name) - 1))
        assume(name[:i] + name[i + 1 :] not in {str(other[-1]) for other in keys})  # possibly in another objective
        typo = ".".join([*map(str, key[:-1]), name[:i] + name[i + 1 :]])
        message = answer(config_class, ROOT / "configs" / "quickstart" / _recipe(config_class), [f"{typo}=1"])
        assert f"command line: {typo}: unknown key; did you mean {name}" in message


def _recipe(config_class: type[Section]) -> str:
    return "pretrain.yaml" if config_class is PretrainConfig else "finetune.yaml"


@pytest.mark.parametrize("config_class", [PretrainConfig, FinetuneConfig])
def test_every_key_has_a_description(config_class: type[Section]) -> None:
    assert [dotted(key) for key, field in leaves(config_class) if not field.description] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    is_finetune = "finetune" in str(path.relative_to(ROOT))
    assert flatten(load_config(FinetuneConfig if is_finetune else PretrainConfig, path).config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_begins_with_its_command_hardware_and_result(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\nrun_dir")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    name = path.relative_to(ROOT).as_posix()
    script = "finetune" if "finetune" in name else "pretrain"
    assert f" launch/{script}.py --config {name}" in header or f" vitrail {script} {name}" in header
    assert "\n# Hardware: " in header
    assert "\n# Result: " in header
    if path.name.startswith("photos"):
        assert "\n# Images: " in header
        assert " Epochs: " in header
        assert re.search(r"\n# Time: 2,000 photos take [\d.]+ h on two CPU cores", header)


@pytest.mark.processes
@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_mistakes_and_help_need_no_torch(tmp_path: Path, script: str) -> None:
    path = write(tmp_path, GOOD + "sed: 1\n")
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / f"{script}.py")]
    recipe = ["--config", str(ROOT / "configs" / "quickstart" / f"{script}.yaml")]
    for arguments, code in ((["--config", str(path)], 2), ([*recipe, "--print-config"], 0), (["--help"], 0)):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == code
        assert re.search(r"\|\s+pydantic\b", done.stderr)
        assert not re.search(r"\|\s+(torch|numpy|transformers|deepspeed|mlflow)\b", done.stderr)
        assert ("# default" in done.stdout) == ("--print-config" in arguments)
    assert "keys and defaults:" in done.stdout
    assert "example:" in done.stdout


def test_a_name_stands_for_a_section_that_has_one(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "objective: mae\noptimizer: lamb\n")
    config = load_config(PretrainConfig, path, ["objective.mask_ratio=0.5"]).config
    assert isinstance(config.objective, MAEConfig)
    assert (config.objective.mask_ratio, config.optimizer.name) == (0.5, "lamb")
    loaded = load_config(PretrainConfig, path, ["objective=self_distillation", "optimizer=muon", "schedule=linear"])
    assert (loaded.config.objective.name, loaded.config.optimizer.name) == ("self_distillation", "muon")
    assert (loaded.config.schedule.name, loaded.config.schedule.total_steps) == ("linear", 100)  # the file's
    assert re.search(r"\n  name: muon +# command line\n", loaded.text)


@pytest.mark.parametrize(
    ("epochs", "warmup", "samples", "batch", "expected"),
    [(3, 0.5, 483, 32, (46, 8)), (1, 0, 64, 32, (2, 0)), (1.5, 0, 65, 32, (4, 0)), (400, 20, 1_281_167, 4096, None)],
)
def test_epochs_become_steps(
    epochs: float, warmup: float, samples: int, batch: int, expected: tuple[int, int] | None
) -> None:
    schedule = ScheduleConfig(epochs=float(epochs), warmup_epochs=float(warmup)).in_steps(samples, batch)
    if expected:
        assert (schedule.total_steps, schedule.warmup_steps) == expected
    assert batch * (schedule.total_steps - 1) < epochs * samples <= batch * schedule.total_steps
    assert (schedule.epochs, schedule.warmup_epochs) == (0, 0)
    assert schedule.in_steps(samples, batch) is schedule


def test_variables_and_the_home_folder_are_expanded_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    text = "init_from: ~/old\ntracking: {uri: 'sqlite:///${SCRATCH}/m.db'}\n"
    (tmp_path / "x.yaml").write_text(GOOD.replace("shards", "'${SCRATCH}/train-{000..007}.tar'") + text)
    config = load_config(PretrainConfig, tmp_path / "x.yaml", ["run_dir=${SCRATCH}/runs/x"]).config
    assert config.run_dir == Path("/scratch/me/runs/x")
    assert config.data.train == "/scratch/me/train-{000..007}.tar"
    assert config.init_from == Path("/home/me/old")
    assert config.tracking.uri == "sqlite:////scratch/me/m.db"
    assert expand("pipe:cat ${HERE}/x.tar") == "pipe:cat ${HERE}/x.tar"  # its shell expands it


def test_without_a_home_folder_paths_keep_their_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert expand("~/.cache/vitrail") == "~/.cache/vitrail"
    assert default_text(PretrainConfig.model_fields["run_dir"]) == "required"


def test_a_mistake_is_not_silent_under_a_stale_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other ranks than the first keep silent about mistakes, but without a launcher there is no other rank."""
    path = write(tmp_path, GOOD + "sed: 1\n")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(path)])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match=r"^2$"):
        read_command_line(PretrainConfig, "", "", resumable=True)
    assert capsys.readouterr().err.startswith("RANK=1: is set but WORLD_SIZE is not; unset RANK to train alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(SystemExit, match=r"^2$"):
        read_command_line(PretrainConfig, "", "", resumable=True)
    assert capsys.readouterr().err == ""
