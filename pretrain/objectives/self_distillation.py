"""Self-distillation (DINO, iBOT; arXiv 2304.07193): a student learns to match a moving average of itself.

Letters in shapes: B images, C channels, H height and W width in pixels, K prototypes, D hidden size, N patches,
M masked patches of all global crops.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import PreprocessingConfig, SelfDistillationConfig
from pretrain.data.transforms.batch import Batch, augment, merge_crops
from pretrain.data.transforms.multi_crop import NUM_GLOBAL_CROPS, MultiCropView
from pretrain.data.transforms.views import EvalView, TrainView, View
from pretrain.distributed import gather_rows, sum_over_ranks
from pretrain.model.projection_head import ProjectionHead
from pretrain.model.vit import INITIAL_STD, ViT, take
from pretrain.objectives.objective import Objective

SINKHORN_ITERATIONS = 3
MIN_DISTANCE = 1e-8  # keeps the logarithm of a distance finite
SAME_IMAGE_COSINE = -3.0  # below every cosine, so a copy of the same image is never the nearest neighbor
OWN_COSINE = -2.0  # below every cosine, but above SAME_IMAGE_COSINE


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

    @torch.no_grad()
    def after_step(self, skipped: Tensor) -> None:
        """Move the teacher toward the student: teacher <- m * teacher + (1 - m) * student.

        The momentum m grows from `teacher_momentum` to 1 over the run along a cosine.
        """
        share = (1 - self.config.teacher_momentum) * (1 + math.cos(math.pi * self._progress)) / 2
        share_on_device = share * (1 - skipped.float())
        for teacher, student in self._pairs:
            averages = dict(teacher.named_buffers())
            for name, weight in student.named_parameters():
                averages[name].lerp_(weight.float(), share_on_device)

    @property
    def teacher_temperature(self) -> float:
        """Return the current temperature of the teacher's softmax, which rises linearly at the start of the run."""
        first, last = self.config.initial_teacher_temperature, self.config.teacher_temperature
        return first + (last - first) * min(1.0, self._progress / self.config.temperature_warmup_fraction)

    def train_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the DINO, iBOT and KoLeo losses and "loss", their weighted sum."""
        masked = batch["mask"].flatten(0, 1)  # [2 B, N]
        global_crops, local_crops = self._augment(batch["global_crops"]), self._augment(batch["local_crops"])
        weights = sample_weights(batch["position"]).repeat_interleave(NUM_GLOBAL_CROPS)
        cls_targets, patch_targets = self._teacher_targets(global_crops, masked, weights)
        tokens = self.student(global_crops, mask=(masked, self.mask_token))
        global_cls = tokens[:, 0].reshape(-1, NUM_GLOBAL_CROPS, tokens.shape[-1])  # [B, 2, D]
        local_cls = self.student(local_crops)[:, 0].reshape(len(global_cls), -1, tokens.shape[-1])  # [B, crops, D]
        losses = {
            "dino": dino_loss(
                self._student_log_probs(global_cls),
                self._student_log_probs(local_cls),
                cls_targets.reshape(len(global_cls), NUM_GLOBAL_CROPS, -1),
            ),
            "ibot": self._patch_loss(tokens[:, 1:][masked], patch_targets, masked),
            "koleo": koleo_loss(global_cls.float(), batch["position"]),
        }
        loss = losses["dino"] + losses["ibot"] + self.config.koleo_weight * losses["koleo"]
        return {"loss": loss, **losses}

    def evaluation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy between teacher and student on whole images, at the final teacher temperature."""
        images = self.normalized_images(batch)
        targets = (self.cls_head(self.encoder(images)[:, 0]) / self.config.teacher_temperature).softmax(dim=-1)
        log_probs = self._student_log_probs(self.student(images.to(self.student.cls_token.dtype))[:, 0])
        return {"loss": (-(targets * log_probs).sum(-1) * batch["weight"]).sum()}

    def _augment(self, crops: Batch) -> Tensor:
        """Return the augmented crops; the crops of an image are adjacent: [B * crops, C, H, W]."""
        images = augment(merge_crops(crops), self.preprocessing.image_mean, self.preprocessing.image_std)
        return images.to(self.student.cls_token.dtype)

    @torch.no_grad()
    def _teacher_targets(self, global_crops: Tensor, masked: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's balanced probabilities for CLS tokens [2 B, K] and for masked patches [M, K].

        Args:
            global_crops: Global crops, [2 B, C, H, W].
            masked: Whether a patch is masked for the student, bool [2 B, N].
            weights: Weight of each crop, [2 B].
        """
        is_low_precision = global_crops.dtype != torch.float32
        with torch.autocast(global_crops.device.type, torch.bfloat16, enabled=is_low_precision):
            tokens = self.encoder(global_crops)
            cls_logits, patch_logits = self.cls_head(tokens[:, 0]), self.patch_head(tokens[:, 1:][masked])
        patch_weights = weights[:, None].expand_as(masked)[masked]
        return (
            sinkhorn_knopp(cls_logits / self.teacher_temperature, weights),
            sinkhorn_knopp(patch_logits / self.teacher_temperature, patch_weights),
        )

    def _student_log_probs(self, cls_tokens: Tensor) -> Tensor:
        """Return the student's log-probabilities [..., K] for CLS tokens [..., D]."""
        logits: Tensor = self.student_cls_head(cls_tokens) / self.config.student_temperature
        return logits.log_softmax(dim=-1)

    def _patch_loss(self, patches: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return the mean over global crops of each crop's mean cross-entropy over its masked patches.

        Args:
            patches: The student's tokens of masked patches, [M, D].
            targets: The teacher's probabilities for the same patches, [M, K].
            masked: Whether a patch is masked, bool [2 B, N].
        """
        log_probs = (self.student_patch_head(patches) / self.config.student_temperature).log_softmax(dim=-1)
        num_masked = masked.sum(dim=1, keepdim=True).clamp_min(1).expand_as(masked)[masked]
        losses: Tensor = -(targets * log_probs).sum(-1) / num_masked
        return losses.sum() / len(masked)


def convert_to_buffers(module: nn.Module) -> None:
    """Replace every parameter of a module by a buffer with the same name and value."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())


def sample_weights(positions: Tensor) -> Tensor:
    """Return the weight [B] of each image of this rank: 1 / (number of its copies over all ranks).

    A rank with too few images repeats another rank's image; together the copies count as one.

    Args:
        positions: Position of each image in the run, int [B].
    """
    all_positions, _ = gather_rows(positions)
    return 1 / (positions[:, None] == all_positions).sum(dim=1)


def dino_loss(global_log_probs: Tensor, local_log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy -sum_k(target * log p) over all pairs of a crop and a different global crop.

    Args:
        global_log_probs: The student's log-probabilities for global crops, [B, 2, K].
        local_log_probs: The student's log-probabilities for local crops, [B, crops, K].
        targets: The teacher's probabilities for global crops, [B, 2, K].
    """
    from_global = (targets.flip(1) * global_log_probs).sum(-1).sum(1)
    from_local = (targets.sum(1, keepdim=True) * local_log_probs).sum(-1).sum(1)
    pairs = NUM_GLOBAL_CROPS * (NUM_GLOBAL_CROPS - 1 + local_log_probs.shape[1])
    return -(from_global + from_local).mean() / pairs


def sinkhorn_knopp(logits: Tensor, weights: Tensor) -> Tensor:
    """Balance the rows of all ranks over the prototypes (arXiv 2006.09882), which prevents a collapse to one prototype.

    Args:
        logits: Logits of this rank's rows, [rows, K].
        weights: Weight of each row, [rows].

    Returns:
        Probabilities [rows, K]. Each row sums to 1; each column sums, over all ranks, to approximately rows / K.
    """
    shares = logits.exp()
    rows = sum_over_ranks(weights.sum())
    for _ in range(SINKHORN_ITERATIONS):
        shares = shares / sum_over_ranks(weights @ shares) * rows / shares.shape[1]
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


def koleo_loss(features: Tensor, positions: Tensor) -> Tensor:
    """Return the mean of -log(distance to the nearest other image) on the unit sphere (KoLeo, arXiv 1806.03198).

    Neighbors are searched on all ranks, separately for each crop index, and gradients also flow to the neighbors. The
    means of the crop indices are summed.

    Args:
        features: Features of this rank's crops, [B, crops, D].
        positions: Position of each image in the run, int [B]. Images with equal positions are copies (see
            `sample_weights`) and are not neighbors of each other.
    """
    rows = F.normalize(features, dim=-1)
    all_rows, first = gather_rows(rows)
    all_positions, _ = gather_rows(positions)
    own, everyone = rows.transpose(0, 1), all_rows.transpose(0, 1)  # [crops, B, D] of this rank and of all ranks
    indices = torch.arange(len(rows), device=rows.device)
    with torch.no_grad():
        cosines = own @ everyone.transpose(1, 2)
        cosines.masked_fill_(positions[:, None] == all_positions, SAME_IMAGE_COSINE)
        # An image without any other is its own neighbor, at a distance without a gradient.
        cosines[:, indices, first + indices] = OWN_COSINE
        nearest = cosines.argmax(dim=2)
    distances: Tensor = torch.linalg.vector_norm(own - take(everyone, nearest) + MIN_DISTANCE, dim=2)
    return -(distances + MIN_DISTANCE).log().mean(dim=1).sum()
