"""Self-distillation (DINO, iBOT; arXiv 2304.07193): a student learns what its own slow average says of other views.

The letters: B images, K prototypes, D hidden size, M hidden patches of all large crops.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import PreprocessingConfig, SelfDistillationConfig
from pretrain.data.transforms.multi_crop import NUM_LARGE, CropsView
from pretrain.data.transforms.views import EvalView, TrainView, View, augment
from pretrain.distributed import gather_rows, sum_over_ranks
from pretrain.model.projection_head import ProjectionHead
from pretrain.model.vit import INITIAL_STD, ViT, take
from pretrain.objectives.objective import Objective

SINKHORN_ROUNDS = 3
LEAST_DISTANCE = 1e-8


class SelfDistillationObjective(Objective):
    """CLS of every crop says what the teacher's CLS of another large crop says; hidden patches say what it sees there.

    The teacher, `encoder` and its heads, is an average of the student in fp32 that no gradient reaches; it lies in
    buffers, so an optimizer never sees it, and it is what leaves the run. In bf16 it follows the student's working
    weights, rounded as they are. Its answers are balanced over all images of a micro-step and all ranks, and so does
    KoLeo look for neighbors there: the losses are the same on any number of ranks that takes as many micro-steps.
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
        sizes = (config.head_hidden_size, config.head_bottleneck_size, config.prototypes)
        calm = {"drop_path": 0.0, "dropout": 0.0, "attention_dropout": 0.0}
        self.student = encoder
        self.student_cls_head = ProjectionHead(width, *sizes)
        self.student_patch_head = ProjectionHead(width, *sizes)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=INITIAL_STD)
        self.encoder = ViT(encoder.config.model_copy(update=calm))
        self.cls_head = ProjectionHead(width, *sizes)
        self.patch_head = ProjectionHead(width, *sizes)
        self._pairs = (
            (self.cls_head, self.student_cls_head),
            (self.patch_head, self.student_patch_head),
            (self.encoder, self.student),
        )
        for teacher, student in self._pairs:
            teacher.load_state_dict(student.state_dict())
            turn_into_buffers(teacher)
        self._progress = 0.0

    def train_view(self, image_size: int) -> View:
        config = self.config
        small = config.augment.model_copy(update={"crop_scale": config.local_crop_scale})
        return CropsView(
            TrainView(config.augment, image_size),
            TrainView(small, config.local_image_size),
            config.local_crops,
            image_size // self.student.config.patch_size,
            config.mask_probability,
            config.mask_ratios,
        )

    def evaluation_view(self) -> View:
        return EvalView(self.student.config.image_size, self.preprocessing.resize_ratio)

    def after_warm_start(self) -> None:
        """Let the student begin where the teacher does."""
        for teacher, student in self._pairs:
            student.load_state_dict(teacher.state_dict())

    def before_step(self, progress: float) -> None:
        self._progress = progress

    @torch.no_grad()
    def after_step(self, bad: Tensor) -> None:
        """Move the teacher toward the student, by less and less as the run goes on."""
        share = (1 - self.config.teacher_momentum) * (1 + math.cos(math.pi * self._progress)) / 2 * (1 - bad.float())
        for teacher, student in self._pairs:
            averages = dict(teacher.named_buffers())
            for name, weight in student.named_parameters():
                averages[name].lerp_(weight.float(), share)

    @property
    def teacher_temperature(self) -> float:
        """Return what the teacher's cosines are divided by; it grows over the first part of the run."""
        first, last = self.config.first_teacher_temperature, self.config.teacher_temperature
        return first + (last - first) * min(1.0, self._progress / self.config.temperature_warmup)

    def train_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = batch["hidden"].flatten(0, 1)  # [2 B, N]
        large, small = (self._crops(batch, size) for size in ("large", "small"))
        counts = counts_of(batch["position"]).repeat_interleave(NUM_LARGE)
        cls_targets, patch_targets = self._targets(large, hidden, counts)
        tokens = self.student(large, instead=(hidden, self.mask_token))
        own = tokens[:, 0].reshape(-1, NUM_LARGE, tokens.shape[-1])  # [B, 2, D]
        of_small = self.student(small)[:, 0].reshape(len(own), -1, tokens.shape[-1])
        losses = {
            "dino": dino_loss(self._say(own), self._say(of_small), cls_targets.reshape(len(own), NUM_LARGE, -1)),
            "ibot": self._patch_loss(tokens[:, 1:][hidden], patch_targets, hidden),
            "koleo": koleo_loss(own.float(), batch["position"]),
        }
        loss = losses["dino"] + losses["ibot"] + self.config.koleo_weight * losses["koleo"]
        return {"loss": loss, **losses}

    def evaluation_sums(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """How well the student, shown the whole image, says what the teacher says of it, always at one temperature."""
        images = self.normalized(batch)
        targets = (self.cls_head(self.encoder(images)[:, 0]) / self.config.teacher_temperature).softmax(dim=-1)
        said = self._say(self.student(images.to(self.student.cls_token.dtype))[:, 0])
        return {"loss": (-(targets * said).sum(-1) * batch["weight"]).sum()}

    def _crops(self, batch: dict[str, Tensor], size: str) -> Tensor:
        """Return all crops of a size, augmented, a sample's own one after the other: [B crops, C, H, W]."""
        prefix = f"{size}."
        fields = {name.removeprefix(prefix): batch[name].flatten(0, 1) for name in batch if name.startswith(prefix)}
        images = augment(fields, self.preprocessing.image_mean, self.preprocessing.image_std)
        return images.to(self.student.cls_token.dtype)

    @torch.no_grad()
    def _targets(self, large: Tensor, hidden: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the teacher says of CLS [2 B, K] and of the patches that are hidden from the student [M, K].

        `counts` [2 B] says how much each crop does.
        """
        low = large.dtype != torch.float32
        with torch.autocast(large.device.type, torch.bfloat16, enabled=low):
            tokens = self.encoder(large)
            of_cls, of_patches = self.cls_head(tokens[:, 0]), self.patch_head(tokens[:, 1:][hidden])
        patch_counts = counts[:, None].expand_as(hidden)[hidden]
        return (
            sinkhorn_knopp(of_cls / self.teacher_temperature, counts),
            sinkhorn_knopp(of_patches / self.teacher_temperature, patch_counts),
        )

    def _say(self, cls: Tensor) -> Tensor:
        """Return what the student says of CLS, as logarithms: [..., D] -> [..., K]."""
        said: Tensor = (self.student_cls_head(cls) / self.config.student_temperature).log_softmax(dim=-1)
        return said

    def _patch_loss(self, patches: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
        """Return the mean over large crops of the mean cross-entropy of each one's hidden patches, [M, D], [M, K]."""
        said = (self.student_patch_head(patches) / self.config.student_temperature).log_softmax(dim=-1)
        counts = hidden.sum(dim=1, keepdim=True).clamp_min(1).expand_as(hidden)[hidden]
        losses: Tensor = -(targets * said).sum(-1) / counts
        return losses.sum() / len(hidden)


def turn_into_buffers(module: nn.Module) -> None:
    """Make every parameter a buffer of the same name."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())


def counts_of(positions: Tensor) -> Tensor:
    """Return how much each of this rank's images counts, [B]: a rank without any has a copy, and both count half."""
    all_positions, _ = gather_rows(positions)
    return 1 / (positions[:, None] == all_positions).sum(dim=1)


def dino_loss(said_of_large: Tensor, said_of_small: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of all pairs of a crop and another, large one.

    Args:
        said_of_large: by the student, logarithms, [B, 2, K].
        said_of_small: the same, [B, crops, K].
        targets: what the teacher says of the large crops, [B, 2, K].
    """
    of_large = (targets.flip(1) * said_of_large).sum(-1).sum(1)
    of_small = (targets.sum(1, keepdim=True) * said_of_small).sum(-1).sum(1)
    pairs = NUM_LARGE * (NUM_LARGE - 1 + said_of_small.shape[1])
    return -(of_large + of_small).mean() / pairs


def sinkhorn_knopp(logits: Tensor, counts: Tensor) -> Tensor:
    """Balance the rows of all ranks over the prototypes (arXiv 2006.09882), so that no answer is the same for all.

    Args:
        logits: of this rank's rows, [rows, K].
        counts: how much each row does, [rows].

    Returns:
        [rows, K]; each row adds up to 1, and each column, over all ranks, nearly to rows / K.
    """
    shares = logits.exp()
    rows = sum_over_ranks(counts.sum())
    for _ in range(SINKHORN_ROUNDS):
        shares = shares / sum_over_ranks(counts @ shares) * rows / shares.shape[1]
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


def koleo_loss(features: Tensor, positions: Tensor) -> Tensor:
    """Return the mean of -log of the distance to the nearest other image, on the unit sphere (arXiv 1806.03198).

    Args:
        features: of this rank's crops, [B, crops, D]; for each of the crops by itself, neighbors are looked for on all
            ranks, and are moved as well. The crops' means are added up.
        positions: of the images in the run, [B]. A rank without images of its own has a copy of another's, which is
            no neighbor of it.
    """
    rows = F.normalize(features, dim=-1)
    all_rows, first = gather_rows(rows)
    all_positions, _ = gather_rows(positions)
    own, everyone = rows.transpose(0, 1), all_rows.transpose(0, 1)  # [crops, B, D], of this rank and of all
    places = torch.arange(len(rows), device=rows.device)
    with torch.no_grad():
        cosines = own @ everyone.transpose(1, 2)
        cosines.masked_fill_(positions[:, None] == all_positions, -3)
        cosines[:, places, first + places] = -2  # an image alone is its own: a distance without a gradient
        nearest = cosines.argmax(dim=2)
    distances: Tensor = torch.linalg.vector_norm(own - take(everyone, nearest) + LEAST_DISTANCE, dim=2)
    return -(distances + LEAST_DISTANCE).log().mean(dim=1).sum()
