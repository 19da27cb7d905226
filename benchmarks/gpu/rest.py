"""Check checkpoints, JPEG decoding, fine-tuning, export and compilation on the GPU.

- Training stalls at least ten times shorter for our checkpoint than for `engine.save_checkpoint`.
- Pixels that the GPU decodes equal those of the CPU within a tolerance.
- Ten steps of fine-tuning in bf16 end with a finite loss, from a folder whose export is proved.
- Each objective compiles to few graphs without breaks.
"""

import math
import re
from functools import partial
from pathlib import Path

import torch
import torch._dynamo

from benchmarks.gpu import runs
from benchmarks.gpu.checks import SKIPPED, Check, Task, judge, judge_speed
from benchmarks.gpu.group import Place, run_group
from benchmarks.gpu.photos import make_photo_shards
from pretrain import distributed
from pretrain.config import AugmentConfig
from pretrain.data.dataset.open import open_dataset
from pretrain.data.loading.loader import BatchPlan, training_batches
from pretrain.data.transforms.device_decode import decode_on_device, torchvision_decoder
from pretrain.data.transforms.views import TrainView
from pretrain.engine.deepspeed import start_distributed
from pretrain.errors import DataError
from pretrain.export.folder import export
from pretrain.export.proof import TOLERANCE
from pretrain.journal import read_rows

STALL_BAR = 10.0
# Mean difference in levels of 255; torchvision's own tests allow as much. nvJPEG rounds and interpolates in another way
# than libjpeg-turbo. A shifted crop or swapped channels differ by tens of levels.
PIXEL_TOLERANCE = 2.0
NUM_PHOTOS, IMAGE_SIZE = 32, 224
MAX_GRAPHS = 12
FINETUNE_STEPS = 10
FINETUNE = """
run_dir: unused
model: {model}
data: {{train: {shards}/train, validation: {shards}/validation, num_workers: 0, labels_per_class: 8}}
optimizer: {{learning_rate: 1e-3}}
schedule: {{epochs: 5}}
engine: {{precision: bf16, global_batch_size: 12, micro_batch_size: 12}}
evaluation: {{every_epochs: 5}}
logging: {{every_steps: 1}}
tracking: {{uri: "off"}}
"""  # 3 classes with 8 images each are 2 steps per epoch


def tasks(place: Place) -> dict[str, Task]:
    """Return all checks of the group by name."""
    start_distributed()
    recipe = runs.make_recipe(place.work)
    exported = place.work / "exported"
    return {
        "pixels of decode=gpu": Task(partial(compare_pixels, place), 5),
        "export": Task(partial(prove_export, place, recipe, exported), 10),
        "fine-tuning in bf16": Task(partial(fine_tune, place, exported), 20),
        **{
            f"graphs, {name}": Task(partial(count_graphs, place, recipe, name, overrides), 15)
            for name, overrides in runs.OBJECTIVES.items()
            if place.on_gpu or name == "supervised"  # a CPU compiles for minutes
        },
        "checkpoint": Task(partial(compare_stalls, place), 30),
    }


def compare_pixels(place: Place) -> Check:
    """Decode, crop and resize photos on the device and in the data workers; compare the pixels."""
    device = distributed.device()
    try:
        decoder = torchvision_decoder(device)
    except DataError as error:
        return Check(SKIPPED, reason=str(error))
    samples = open_dataset(make_photo_shards(place.work, NUM_PHOTOS))
    view = TrainView(AugmentConfig(), IMAGE_SIZE)
    plans = (
        BatchPlan(seed=0, shuffle_window=4, global_batch_size=8, decodes_jpegs=decodes) for decodes in (True, False)
    )
    here, later = (list(training_batches(samples, view, plan, start=0, stop=NUM_PHOTOS)) for plan in plans)
    means = []
    for one, other in zip(here, later, strict=True):
        if "jpegs" not in other.tensors:
            return judge(False, "the workers have decoded", "the device decodes")
        images = decode_on_device(other.tensors, IMAGE_SIZE, device, decoder)["image"]
        means.append(float((images.cpu().float() - one.tensors["image"].float()).abs().mean()))
    return judge(max(means) < PIXEL_TOLERANCE, f"{max(means):.2f} of 255", f"below {PIXEL_TOLERANCE:g} on average")


def prove_export(place: Place, recipe: Path, exported: Path) -> Check:
    """Train in bf16 and export the run; transformers must compute what our model computes."""
    run_dir = place.work / "to-export"
    runs.train(runs.load(recipe, run_dir, *runs.OBJECTIVES["supervised"], "engine.precision=bf16"))
    proof = export(run_dir, exported)
    return judge(proof.has_classifier, f"differs by {proof}", f"at most {TOLERANCE:.0e}")


def fine_tune(place: Place, exported: Path) -> Check:
    """Fine-tune the exported model in bf16 with the launch script."""
    recipe, run_dir = place.work / "finetune.yaml", place.work / "finetuned"
    recipe.write_text(FINETUNE.format(model=exported, shards=place.work / "shards"), encoding="utf-8")
    place.run(["launch/finetune.py", "--config", recipe, f"run_dir={run_dir}"])
    losses = runs.losses(read_rows(run_dir / "metrics.jsonl"))
    holds = len(losses) == FINETUNE_STEPS and all(math.isfinite(loss) for loss in losses)
    return judge(holds, f"{len(losses)} steps, last loss {losses[-1]:.3f}", f"{FINETUNE_STEPS} steps, finite")


def count_graphs(place: Place, recipe: Path, name: str, overrides: list[str]) -> Check:
    """Train a compiled objective; count its graphs and graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_dir = place.work / f"compiled-{name}"
    runs.train(runs.load(recipe, run_dir, *overrides, "engine.compile=true", "engine.precision=bf16"))
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    reason = next(iter(counters["graph_break"]), "").splitlines()[0:1]
    holds = 0 < graphs <= MAX_GRAPHS and not breaks
    return judge(holds, f"{graphs} graphs, {breaks} breaks", f"at most {MAX_GRAPHS}, 0 breaks", "".join(reason))


def compare_stalls(place: Place) -> Check:
    """Measure how long training stalls for our checkpoint and for DeepSpeed's, in turns."""
    sizes = ["--hidden-size", "384", "--rounds", "3"] if place.on_gpu else ["--hidden-size", "64", "--rounds", "1"]
    printed = place.run(["benchmarks/save_stall.py", *sizes])
    found = dict(re.findall(r"^\| (.+?) \| (?:\d+) ms \| ([\d.]+)x \|", printed, re.MULTILINE))
    [milliseconds] = re.findall(r"^\| ours \| (\d+) ms", printed, re.MULTILINE)
    return judge_speed(float(found["engine.save_checkpoint"]), STALL_BAR, f"ours stalls for {milliseconds} ms")


if __name__ == "__main__":
    run_group(__doc__, tasks)
