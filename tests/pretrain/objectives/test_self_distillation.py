"""Self-distillation: its losses equal their definitions, the teacher follows the student, and the student learns."""

import math
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor

from pretrain import distributed
from pretrain.data.loading.loader import BatchPlan, LoadedBatch, LoadingStats, complete_batch
from pretrain.data.transforms.batch import Batch, augment, to_device
from pretrain.data.transforms.multi_crop import sample_block_mask
from pretrain.objectives import self_distillation
from pretrain.objectives.self_distillation import (
    SelfDistillationObjective,
    dino_loss,
    koleo_loss,
    sample_weights,
    sinkhorn_knopp,
)
from pretrain.startup import join_process_group
from tests.support.launching import free_port
from tests.support.overfitting import overfit
from tests.support.self_distillation import (
    OperationCounter,
    build_self_distillation,
    crop_images,
    losses_with_boolean_masks,
    move_apart,
)


def batch(objective: SelfDistillationObjective, size: int) -> Batch:
    return crop_images(objective, range(size))


def test_the_initial_losses_are_those_of_a_uniform_prediction() -> None:
    objective = build_self_distillation(num_prototypes=4096, head_bottleneck_size=256)
    losses = objective(batch(objective, 8))
    for name in ("dino", "ibot"):
        assert float(losses[name]) == pytest.approx(math.log(4096), rel=0.05)
    assert float(losses["loss"]) == pytest.approx(float(losses["dino"] + losses["ibot"] + 0.1 * losses["koleo"]))


def test_the_dino_loss_is_the_mean_over_pairs_of_different_crops() -> None:
    torch.manual_seed(0)
    said = torch.randn(5, 6, 7).log_softmax(-1)  # two global crops and four local ones
    targets = torch.rand(5, 2, 7).softmax(-1)
    pairs = [-(targets[:, t] * said[:, s]).sum(-1).mean() for t in range(2) for s in range(6) if s != t]
    torch.testing.assert_close(dino_loss(said, targets), torch.stack(pairs).mean())


def test_sinkhorn_knopp_equals_its_form_in_log_space() -> None:
    logits = torch.randn(12, 5, dtype=torch.float64) / 0.3
    expected = logits.numpy().copy()
    for _ in range(3):
        expected -= logsumexp(expected, axis=0, keepdims=True) - np.log(12 / 5)
        expected -= logsumexp(expected, axis=1, keepdims=True)
    others = torch.randn(7, 5, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    shares, balanced_others = sinkhorn_knopp((logits, torch.ones(12, dtype=torch.float64)), others)
    np.testing.assert_allclose(shares.numpy(), np.exp(expected), rtol=1e-10)
    assert (shares.sum(0) - 12 / 5).abs().max() < (logits.softmax(1).sum(0) - 12 / 5).abs().max() / 2
    torch.testing.assert_close(balanced_others, sinkhorn_knopp(others)[0])
    [nothing] = sinkhorn_knopp((torch.empty(0, 5), torch.empty(0)))
    assert nothing.shape == (0, 5)
    copied = torch.cat([logits, logits[:1]])  # as on a rank that repeats the image of another
    positions = torch.tensor([*range(12), 0])
    counts = sample_weights(positions, positions[None]).double()
    assert counts.tolist() == [0.5] + 11 * [1.0] + [0.5]
    torch.testing.assert_close(sinkhorn_knopp((copied, counts))[0][:12], shares)


def test_koleo_is_the_log_distance_to_the_nearest_neighbor() -> None:
    torch.manual_seed(0)
    features = torch.randn(9, 2, 4, requires_grad=True)
    expected = torch.zeros(())
    for crop in F.normalize(features, dim=-1).unbind(1):
        distances = torch.cdist(crop, crop) + 10 * torch.eye(9)
        expected = expected - distances.min(dim=1).values.log().mean()
    loss = koleo_loss(features, torch.arange(9), torch.arange(9)[None])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    [ours] = torch.autograd.grad(loss, features)
    [theirs] = torch.autograd.grad(expected, features)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_koleo_ignores_copies_of_the_same_image() -> None:
    torch.manual_seed(0)
    once = torch.randn(4, 2, 8)
    twice = torch.cat([once[:1], once]).requires_grad_()
    positions = torch.tensor([5, 5, 6, 7, 8])
    loss = koleo_loss(twice, positions, positions[None])
    expected = torch.zeros(())
    for crop in F.normalize(once, dim=-1).unbind(1):
        least = (torch.cdist(crop, crop) + 10 * torch.eye(4)).min(dim=1).values.log()
        expected = expected - torch.cat([least[:1], least]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    [gradient] = torch.autograd.grad(loss, twice)
    assert gradient.abs().max() < 10

    alone = torch.randn(1, 2, 8).expand(2, -1, -1).clone().requires_grad_()
    [gradient] = torch.autograd.grad(koleo_loss(alone, positions[:2], positions[None, :2]), alone)
    assert not gradient.any()


def test_koleo_ignores_the_rows_that_fill_up_a_smaller_rank() -> None:
    """A row of zeros would be nearer to an image than the only other image, which is opposite."""
    features = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])
    all_positions = torch.tensor([[3, 4, -1]])
    with mock.patch.object(self_distillation, "gather_rows", lambda rows, largest: F.pad(rows, (0, 0, 0, 0, 0, 1))):
        loss = koleo_loss(features, torch.tensor([3, 4]), all_positions)
    assert float(loss) == pytest.approx(-math.log(2))


@pytest.mark.slow
def test_one_batch_can_be_overfitted_and_every_parameter_is_trained() -> None:
    objective = build_self_distillation(koleo_weight=0.0)
    data = batch(objective, 6)
    first = float(objective(data)["loss"])
    last = overfit(objective, data, steps=150)
    crops = objective._augment(data["global_crops"])
    cls, patches = objective._teacher_targets(crops, data["masked_tokens"], torch.ones(12))
    least = sum(float(-(t * t.clamp_min(1e-30).log()).sum(-1).mean()) for t in (cls, patches))  # entropy of the targets
    assert last - least < 0.35 * (first - least)


def test_losses_equal_a_loop_over_crops_and_patches() -> None:
    """Some crops have no masked patches, and the weights of student and teacher differ."""
    objective = build_self_distillation(mask_probability=0.5)
    data = batch(objective, 6)
    move_apart(objective)
    objective.before_step(0.5)
    mean, std = objective.preprocessing.image_mean, objective.preprocessing.image_std

    def crops(fields: Batch) -> list[torch.Tensor]:
        each_crop = ({name: field[:, i] for name, field in fields.items()} for i in range(fields["image"].shape[1]))
        return [augment(each, mean, std) for each in each_crop]

    def balanced(cosines: torch.Tensor) -> torch.Tensor:
        """Sinkhorn-Knopp as in arXiv 2006.09882: prototypes in rows, all entries sum to 1."""
        shares = (cosines / objective.teacher_temperature).exp().T
        shares = shares / shares.sum()
        for _ in range(3):
            shares = shares / shares.sum(dim=1, keepdim=True) / shares.shape[0]
            shares = shares / shares.sum(dim=0, keepdim=True) / shares.shape[1]
        return (shares * shares.shape[1]).T

    def cross(targets: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
        return -(targets * F.log_softmax(cosines / 0.1, dim=-1)).sum(-1)

    global_crops, local_crops = crops(data["global_crops"]), crops(data["local_crops"])
    masks = data["mask"].unbind(1)
    num_masked = data["mask"].sum(2).flatten().tolist()
    assert 0 in num_masked
    assert len(set(num_masked)) > 2
    with torch.no_grad():
        teacher_tokens = [objective.encoder(crop) for crop in global_crops]
        cls = balanced(torch.cat([objective.cls_head(tokens[:, 0]) for tokens in teacher_tokens])).chunk(2)
        masked_patches = [(i, b, n) for i in range(2) for b in range(6) for n in range(16) if masks[i][b, n]]
        patches = balanced(
            torch.stack([objective.patch_head(teacher_tokens[i][b, 1 + n]) for i, b, n in masked_patches])
        )
    global_tokens = [
        objective.student(crop, mask=(mask, objective.mask_token))
        for crop, mask in zip(global_crops, masks, strict=True)
    ]
    logits = [
        objective.student_cls_head(tokens[:, 0]) for tokens in [*global_tokens, *map(objective.student, local_crops)]
    ]
    pairs = [cross(cls[t], logits[s]).mean() for t in range(2) for s in range(len(logits)) if s != t]
    patch_losses = [
        cross(target, objective.student_patch_head(global_tokens[i][b, 1 + n])) / masks[i][b].sum()
        for (i, b, n), target in zip(masked_patches, patches, strict=True)
    ]
    losses = objective(data)
    torch.testing.assert_close(losses["dino"], torch.stack(pairs).mean())
    torch.testing.assert_close(losses["ibot"], torch.stack(patch_losses).sum() / 12)


def test_losses_and_gradients_equal_those_with_boolean_masks() -> None:
    objective = build_self_distillation(mask_probability=0.5)
    move_apart(objective)
    objective.before_step(0.5)
    for size in (6, 1):
        data = batch(objective, size)
        losses, expected = objective(data), losses_with_boolean_masks(objective, data)
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
        found, theirs = (
            torch.autograd.grad(each["loss"], list(objective.parameters()), allow_unused=True)
            for each in (losses, expected)
        )
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-6)


def test_a_batch_without_masked_patches_has_no_patch_loss() -> None:
    objective = build_self_distillation(mask_probability=0.0)
    losses = objective(batch(objective, 3))
    losses["loss"].backward()
    assert losses["ibot"] == 0
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in objective.parameters())


def test_the_host_never_waits_and_the_teacher_moves_in_few_operations() -> None:
    objective = build_self_distillation(mask_probability=0.5)
    data, skipped = batch(objective, 4), torch.zeros(())
    objective(data)  # fills the cache of constants on the device
    with OperationCounter() as step:
        objective(data)["loss"].backward()
        objective.after_step(skipped)
    assert not step.waits
    assert step.operations["mm"]  # the backward pass was seen
    with OperationCounter() as average:
        objective.after_step(skipped)
    assert average.operations.total() < 10


def test_a_step_works_without_any_value_on_the_host() -> None:
    """On the meta device, an operation raises if the host needs a value."""
    objective = build_self_distillation(mask_probability=0.5)
    data = to_device(batch(objective, 4), torch.device("meta"))
    losses = objective.to("meta")(data)
    losses["loss"].backward()
    assert losses["loss"].is_meta


def mean_losses_and_gradients(
    objective: SelfDistillationObjective, losses: dict[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """Return the means of losses and gradients over the ranks (collective)."""
    parameters = dict(objective.named_parameters())
    gradients = torch.autograd.grad(losses["loss"] * weight, list(parameters.values()), allow_unused=True)
    named = {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    values = {**{name: loss.detach() * weight for name, loss in losses.items()}, **named}
    return {name: distributed.sum_over_ranks(value) / 2 for name, value in values.items()}


def compare_ranks(rank: int, folder: str, port: str) -> None:
    """Compare two ranks with one process that has the images of both."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assert join_process_group()
    objective = build_self_distillation(mask_probability=0.5)
    move_apart(objective)
    objective.before_step(0.5)
    for size in (6, 5, 1):  # equal ranks; one with fewer images; one with a copy of the only image
        plan = BatchPlan(0, 1, global_batch_size=size, rank=rank, world_size=2)
        [micro_batches] = plan.concurrent_micro_batches(0, size)
        own = crop_images(objective, micro_batches[rank].positions)
        loaded = complete_batch(LoadedBatch(own, 1.0, [], LoadingStats(), 0.0), micro_batches, rank)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            losses = objective(loaded.tensors)
        assert all_reduce.call_count == 4  # three for Sinkhorn-Knopp, one for the neighbors
        found = mean_losses_and_gradients(objective, losses, loaded.weight)
        whole = losses_with_boolean_masks(objective, batch(objective, size))
        expected = mean_losses_and_gradients(objective, whole, 1.0)
        assert found.keys() == expected.keys()
        for name in found:
            rtol, atol = (1e-6, 0.0) if name in whole else (1e-4, 1e-6)
            torch.testing.assert_close(
                found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    Path(folder, f"rank{rank}").touch()
    distributed.leave_process_group()


@pytest.mark.processes
def test_two_ranks_have_the_losses_and_gradients_of_one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(compare_ranks, args=(folder, free_port()), nprocs=2)  # type: ignore[no-untyped-call]
        assert len(list(Path(folder).glob("rank*"))) == 2


def test_the_teacher_is_a_moving_average_without_gradients() -> None:
    objective = build_self_distillation(teacher_momentum=0.9)
    assert not any(
        name.startswith(("encoder.", "cls_head.", "patch_head.")) for name, _ in objective.named_parameters()
    )
    began = {name: tensor.clone() for name, tensor in objective.encoder.state_dict().items()}
    assert all(torch.equal(tensor, began[name]) for name, tensor in objective.student.state_dict().items())
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1.0)
    expected = 0.0
    for progress, bad in ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (1.0, 0.0)):
        objective.before_step(progress)
        objective.after_step(torch.tensor(bad))
        momentum = {0.0: 0.9, 0.5: 0.95, 1.0: 1.0}[progress] if not bad else 1.0
        expected = momentum * expected + (1 - momentum) * 1.0
    for name, tensor in objective.encoder.state_dict().items():
        torch.testing.assert_close(tensor, began[name] + expected)
    objective.after_warm_start()
    assert all(
        torch.equal(tensor, objective.encoder.state_dict()[name])
        for name, tensor in objective.student.state_dict().items()
    )


def test_the_temperature_of_the_teacher_rises_to_its_final_value() -> None:
    objective = build_self_distillation()
    found = []
    for progress in (0.0, 0.15, 0.3, 1.0):
        objective.before_step(progress)
        found.append(objective.teacher_temperature)
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_crops_depend_on_the_random_generator_only() -> None:
    objective = build_self_distillation(mask_probability=0.5)
    view, image = objective.train_view(32), np.random.default_rng(3).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    first, again, other = (view(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first["mask"], again["mask"])
    for crops in ("global_crops", "local_crops"):
        assert all(np.array_equal(first[crops][name], again[crops][name]) for name in first[crops])
    assert not np.array_equal(first["global_crops"]["image"], other["global_crops"]["image"])
    assert first["global_crops"]["image"].shape == (2, 3, 32, 32)
    assert first["local_crops"]["image"].shape == (3, 3, 16, 16)
    counts = np.stack([view(image, np.random.default_rng(seed))["mask"].sum(1) for seed in range(200)]).ravel()
    assert 0.4 < (counts > 0).mean() < 0.6
    assert set(counts[counts > 0]) <= set(range(2, 9))  # from 0.1 to 0.5 of 16


@given(st.integers(1, 14), st.floats(0, 1), st.integers(0, 2**32))
def test_exactly_the_requested_number_of_patches_is_masked(side: int, share: float, seed: int) -> None:
    count = round(share * side * side)
    hidden = sample_block_mask(side, count, np.random.default_rng(seed))
    assert hidden.shape == (side, side)
    assert hidden.sum() == count


def test_evaluation_sums_ignore_samples_with_weight_zero() -> None:
    objective = build_self_distillation().eval()
    data = {"image": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)}
    sums = objective({**data, "weight": torch.tensor([1.0] * 5 + [0.0] * 3)})
    first = objective({"image": data["image"][:5], "weight": torch.ones(5)})
    torch.testing.assert_close(sums["loss"], first["loss"])
