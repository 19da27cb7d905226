"""Self-distillation (DINO, iBOT; arXiv 2304.07193): a student learns to match a moving average of itself.

Letters in shapes: B images, C channels, H height and W width in pixels, K prototypes, D hidden size, N patches,
M masked patches of all global crops. The host knows M and the number of images of every rank from the batch, so no loss
makes it wait for the device.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.averaging import move_averages
from pretrain.config import PreprocessingConfig, SelfDistillationConfig
from pretrain.data.transforms.batch import Batch, merge_crops
from pretrain.data.transforms.multi_crop import NUM_GLOBAL_CROPS, MultiCropView
from pretrain.data.transforms.views import EvalView, TrainView, View
from pretrain.distributed import gather_rows, rank, sum_over_ranks
from pretrain.model.compiling import graph
from pretrain.model.projection_head import ProjectionHead
from pretrain.model.vit import INITIAL_STD, ViT, take
from pretrain.objectives.objective import Objective

SINKHORN_ITERATIONS = 3
MIN_DISTANCE = 1e-8  # keeps the logarithm of a distance finite
NO_NEIGHBOR_COSINE = -2.0  # below every cosine


class SelfDistillationObjective(Objective):
    """Match student to teacher: the CLS tokens of different crops (DINO) and the masked patches (iBOT).

    The teacher (`encoder` and its two heads) is an exponential moving average of the student in fp32. It is stored in
    buffers, so no gradient or optimizer touches it, and its encoder is the one that is exported. With bf16 training the
    average follows the student's rounded working weights.

    Teacher outputs are balanced over the images of one micro-batch of all ranks, and KoLeo searches for nearest
    neighbors among the same images. The losses therefore do not depend on the number of ranks if the number of
    micro-batches per step stays the same.

    Args:
        config: Crops, masks, heads, temperatures, momentum and augmentation.
        encoder: Vision Transformer to train, which becomes the student.
        class_shares: Not used, because this objective needs no labels.
        preprocessing: Resize ratio, mean and standard deviation of images in evaluation.
    """

    several_sizes = True

    def __init__(
        self,
        config: SelfDistillationConfig,
        encoder: ViT,
        class_shares: Sequence[float],
        preprocessing: PreprocessingConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.preprocessing = preprocessing
        width = encoder.config.hidden_size
        sizes = (config.head_hidden_size, config.head_bottleneck_size, config.num_prototypes)
        without_dropout = {"drop_path": 0.0, "dropout": 0.0, "attention_dropout": 0.0}
        self.student = encoder
        self.student_cls_head = ProjectionHead(width, *sizes)
        self.student_patch_head = ProjectionHead(width, *sizes)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=INITIAL_STD)
        self.encoder = ViT(encoder.config.model_copy(update=without_dropout))
        self.cls_head = ProjectionHead(width, *sizes)
        self.patch_head = ProjectionHead(width, *sizes)
        self._pairs = (
            (self.cls_head, self.student_cls_head),
            (self.patch_head, self.student_patch_head),
            (self.encoder, self.student),
        )
        for teacher, student in self._pairs:
            teacher.load_state_dict(student.state_dict())
            convert_to_buffers(teacher)
        self._progress = 0.0
        self._averaged: tuple[list[Tensor], list[Tensor]] | None = None

    def train_view(self, image_size: int) -> View:
        config = self.config
        local = config.augment.model_copy(update={"crop_scale": config.local_crop_scale})
        return MultiCropView(
            TrainView(config.augment, image_size),
            TrainView(local, config.local_image_size),
            config.num_local_crops,
            image_size // self.student.config.patch_size,
            config.mask_probability,
            config.mask_ratios,
        )

    def evaluation_view(self) -> View:
        return EvalView(self.student.config.image_size, self.preprocessing.resize_ratio)

    def after_warm_start(self) -> None:
        """Copy the teacher's weights, which were just loaded, to the student."""
        for teacher, student in self._pairs:
            student.load_state_dict(teacher.state_dict())

    def before_step(self, progress: float) -> None:
        self._progress = progress

    def after_step(self, skipped: Tensor) -> None:
        """Move the teacher toward the student: teacher <- m * teacher + (1 - m) * student.

        The momentum m grows from `teacher_momentum` to 1 over the run along a cosine.
        """
        if self._averaged is None:  # not before, because moving the module to its device replaces the buffers
            self._averaged = self._list_averages()
        share = (1 - self.config.teacher_momentum) * (1 + math.cos(math.pi * self._progress)) / 2
        move_averages(*self._averaged, share, skipped)

    @property
    def teacher_temperature(self) -> float:
        """Return the current temperature of the teacher's softmax, which rises linearly at the start of the run."""
        first, last = self.config.initial_teacher_temperature, self.config.teacher_temperature
        return first + (last - first) * min(1.0, self._progress / self.config.temperature_warmup_fraction)

    def train_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the DINO, iBOT and KoLeo losses and "loss", their weighted sum."""
        global_crops, local_crops = self._augment(batch["global_crops"]), self._augment(batch["local_crops"])
        positions = batch["position"]
        all_positions = batch.get("all_positions", positions[None])  # a process on its own needs no plan
        weights = sample_weights(positions, all_positions).repeat_interleave(NUM_GLOBAL_CROPS)
        cls_targets, patch_targets = self._teacher_targets(global_crops, batch["masked_tokens"], weights)
        tokens = self.student(global_crops, mask=(batch["mask"].flatten(0, 1), self.mask_token))
        global_cls = tokens[:, 0].reshape(len(positions), NUM_GLOBAL_CROPS, -1)  # [B, 2, D]
        local_cls = self.student(local_crops)[:, 0].reshape(len(positions), -1, tokens.shape[-1])  # [B, crops, D]
        masked = take_tokens(tokens, batch["masked_tokens"])
        losses = {
            "dino": dino_loss(self._student_log_probs(torch.cat([global_cls, local_cls], dim=1)), cls_targets),
            "ibot": self._patch_loss(masked, patch_targets, batch["masked_shares"]) / len(tokens),
            "koleo": koleo_loss(global_cls.float(), positions, all_positions),
        }
        loss = losses["dino"] + losses["ibot"] + self.config.koleo_weight * losses["koleo"]
        return {"loss": loss, **losses}

    def evaluation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy between teacher and student on whole images, at the final teacher temperature."""
        images = self.normalized_images(batch)
        targets = self.cls_head(self.encoder(images)[:, 0], self.config.teacher_temperature).softmax(dim=-1)
        log_probs = self._student_log_probs(self.student(images.to(self.student.cls_token.dtype))[:, 0])
        return {"loss": (-(targets * log_probs).sum(-1) * batch["weight"]).sum()}

    def _list_averages(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the teacher's averages and the student's weights, in the same order."""
        weights = [dict(student.named_parameters()) for _, student in self._pairs]
        averages = [dict(teacher.named_buffers()) for teacher, _ in self._pairs]
        pairs = [(theirs[name], own[name]) for theirs, own in zip(averages, weights, strict=True) for name in own]
        return [average for average, _ in pairs], [weight for _, weight in pairs]

    def _augment(self, crops: Batch) -> Tensor:
        """Return the augmented crops; the crops of an image are adjacent: [B * crops, C, H, W]."""
        return self.augmented_images(merge_crops(crops)).to(self.student.cls_token.dtype)

    @torch.no_grad()
    def _teacher_targets(self, global_crops: Tensor, masked_tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's balanced probabilities for CLS tokens [B, 2, K] and for masked patches [M, K].

        Args:
            global_crops: Global crops, [2 B, C, H, W].
            masked_tokens: Indices of the masked patches among all tokens of the crops, int64 [M].
            weights: Weight of each crop, [2 B].
        """
        is_low_precision = global_crops.dtype != torch.float32
        with torch.autocast(global_crops.device.type, torch.bfloat16) if is_low_precision else nullcontext():
            tokens = self.encoder(global_crops)
            cls_logits = self.cls_head(tokens[:, 0], self.teacher_temperature)
            patch_logits = self.patch_head(take_tokens(tokens, masked_tokens), self.teacher_temperature)
        patch_weights = weights.index_select(0, masked_tokens // tokens.shape[1])
        cls_targets, patch_targets = sinkhorn_knopp((cls_logits, weights), (patch_logits, patch_weights))
        return cls_targets.reshape(-1, NUM_GLOBAL_CROPS, cls_targets.shape[-1]), patch_targets

    @graph()
    def _student_log_probs(self, cls_tokens: Tensor) -> Tensor:
        """Return the student's log-probabilities [..., K] for CLS tokens [..., D]."""
        logits: Tensor = self.student_cls_head(cls_tokens, self.config.student_temperature)
        return logits.log_softmax(dim=-1)

    @graph()
    def _patch_loss(self, patches: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """Return the sum over global crops of each crop's mean cross-entropy over its masked patches.

        Args:
            patches: The student's tokens of masked patches, [M, D].
            targets: The teacher's probabilities for the same patches, [M, K].
            shares: 1 / (number of masked patches of the patch's crop), [M].
        """
        log_probs = self.student_patch_head(patches, self.config.student_temperature).log_softmax(dim=-1)
        losses: Tensor = -(targets * log_probs).sum(-1) * shares
        return losses.sum()


def convert_to_buffers(module: nn.Module) -> None:
    """Replace every parameter of a module by a buffer with the same name and value."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())


def take_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return some tokens of a batch: [B, T, D] at indices [M] into all its B T tokens -> [M, D]."""
    return tokens.flatten(0, 1).index_select(0, indices)


def sample_weights(positions: Tensor, all_positions: Tensor) -> Tensor:
    """Return the weight [B] of each image of this rank: 1 / (number of its copies over all ranks).

    A rank with too few images repeats another rank's image; together the copies count as one.

    Args:
        positions: Position of each image in the run, int [B].
        all_positions: Positions of the images of all ranks, int [ranks, largest B], filled up with -1.
    """
    return 1 / (positions[:, None] == all_positions.flatten()).sum(dim=1)


def dino_loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy -sum_k(target * log p) over all pairs of a crop and a different global crop.

    Args:
        log_probs: The student's log-probabilities for the two global crops and then the local ones, [B, crops, K].
        targets: The teacher's probabilities for global crops, [B, 2, K].
    """
    images, crops, _ = log_probs.shape
    sizes = [NUM_GLOBAL_CROPS, crops - NUM_GLOBAL_CROPS]
    global_log_probs, local_log_probs = torch.split(log_probs, sizes, dim=1)
    from_global = (targets.flip(1) * global_log_probs).sum()
    from_local = (targets.sum(1) * local_log_probs.sum(1)).sum()
    loss: Tensor = -(from_global + from_local) / (images * NUM_GLOBAL_CROPS * (crops - 1))
    return loss


def sinkhorn_knopp(*groups: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Balance the rows of all ranks over the prototypes (arXiv 2006.09882), which prevents a collapse to one prototype.

    Columns and rows are divided by their sums in turn. The matrix [rows, K] is large, so it is divided only at the end;
    until then the divisors of its rows and columns are updated. All groups are balanced independently, but share the
    all-reduces.

    Args:
        groups: Logits of this rank's rows, [rows, K], and the weight of each row, [rows]. Groups have different rows.

    Returns:
        Probabilities [rows, K] of each group. Each row sums to 1; each column sums, over all ranks, to approximately
        rows / K.
    """
    shares = [logits.exp() for logits, _ in groups]
    weights = row_weights = [each for _, each in groups]
    for _ in range(SINKHORN_ITERATIONS):
        column_sums = torch.stack([each @ matrix for each, matrix in zip(row_weights, shares, strict=True)])
        factors = sum_over_ranks(column_sums).reciprocal()  # [groups, K]
        row_sums = [matrix @ factor for matrix, factor in zip(shares, factors, strict=True)]
        row_weights = [weight / row_sum for weight, row_sum in zip(weights, row_sums, strict=True)]
    return tuple(
        matrix.mul_(factor).div_(row_sum[:, None])
        for matrix, factor, row_sum in zip(shares, factors, row_sums, strict=True)
    )


def koleo_loss(features: Tensor, positions: Tensor, all_positions: Tensor) -> Tensor:
    """Return the mean of -log(distance to the nearest other image) on the unit sphere (KoLeo, arXiv 1806.03198).

    Neighbors are searched on all ranks, separately for each crop index, and gradients also flow to the neighbors. The
    means of the crop indices are summed.

    Args:
        features: Features of this rank's crops, [B, crops, D].
        positions: Position of each image in the run, int [B]. Images with equal positions are copies (see
            `sample_weights`) and are not neighbors of each other.
        all_positions: Positions of the images of all ranks, int [ranks, largest B], filled up with -1.
    """
    rows = F.normalize(features, dim=-1)
    largest = all_positions.shape[1]
    # [crops, images, D] of this rank and of all ranks
    own, everyone = rows.transpose(0, 1), gather_rows(rows, largest).transpose(0, 1)
    first, candidates = rank() * largest, all_positions.flatten()
    itself = torch.arange(first, first + len(rows), device=rows.device)
    with torch.no_grad():
        is_excluded = (positions[:, None] == candidates) | (candidates < 0)
        cosine, nearest = (own @ everyone.transpose(1, 2)).masked_fill_(is_excluded, NO_NEIGHBOR_COSINE).max(dim=2)
        # An image without any other is its own neighbor, at a distance without a gradient.
        nearest = torch.where(cosine > NO_NEIGHBOR_COSINE, nearest, itself)
    distances: Tensor = torch.linalg.vector_norm(own - take(everyone, nearest) + MIN_DISTANCE, dim=2)
    return -(distances + MIN_DISTANCE).log().mean(dim=1).sum()
