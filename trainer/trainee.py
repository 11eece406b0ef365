"""One step's losses, as a module: what an optimiser, autocast and DistributedDataParallel see of a model."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.heads import surest
from models.mlrl import Mlrl, MlrlLoss
from models.r2 import R2
from models.r2_types import CausalOutputs, ClipOutputs, QueryMaps, VideoMaps
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.losses import TEMPERATURE, causal_losses, clip_losses, contrasts, weighted

Phase = Literal["align", "refine", "train"]


class Trainee(nn.Module):
    """The model, and what is trained along with it.

    `teacher`, of mode `clip`, sees whole crops and so knows what comes after a window: the student learns to say what
    it would. It is kept out of the module's parameters.
    """

    def __init__(self, model: R2, config: TrainConfig, mlrl: Mlrl | None, teacher: R2 | None) -> None:
        super().__init__()
        self.model, self.mlrl, self.config = model, mlrl, config
        self._teacher = [teacher] if teacher else []

    def forward(self, batch: Batch, generator: torch.Generator, phase: Phase) -> dict[str, Tensor]:
        """Each loss by name; "total" is what to minimise. With MLRL also "spread", which is none."""
        found: dict[str, Tensor] = {}
        total = batch.embedding.new_zeros(())
        if phase == "align":
            found = self._aligned(batch)
            return found | {"total": found["video"]}
        if phase == "train":
            found = self._supervised(batch, generator)
            total = weighted(found, self.config.weights)
            if self._teacher:
                total = total + self.config.distil * found["distil"]
        if self.mlrl is not None and (phase == "refine" or self.config.refine == "joint"):
            refined = self._refined(batch, generator)
            found |= {"mlrl": refined.total, "spread": refined.spread}
            total = refined.total if phase == "refine" else total + self.config.refine_weight * refined.total
        return found | {"total": total}

    def _aligned(self, batch: Batch) -> dict[str, Tensor]:
        """The contrast of windows and texts alone, before anything is said about time."""
        model = self.model
        cls = model.map_video(batch.layers)[:, :, :, 0].transpose(1, 2)
        pooled = model.pooled_layers(model.query_maps(batch.words, batch.asked, batch.word_mask))
        with self._precisely(cls):
            return contrasts(cls, batch.row_video, pooled, batch.targets)

    def _supervised(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        model, words = self.model, batch.words
        if self.config.query_noise:
            noise = torch.randn(words.shape, generator=generator, device=words.device)
            words = words + self.config.query_noise * words.norm(dim=-1, keepdim=True) * noise / words.shape[-1] ** 0.5
        query = model.query_maps(words, batch.asked, batch.word_mask)
        if model.config.mode == "clip":
            outputs = model(batch.layers[batch.row_video], batch.embedding[batch.row_video], query, self._mask(batch))
            assert isinstance(outputs, ClipOutputs)
            with self._precisely(words):
                found = clip_losses(outputs, query.pooled, batch.targets, model.config.strides)
            cls, rows = outputs.cls, torch.arange(len(batch.row_video), device=words.device)
        else:
            maps = model.video_maps(batch.layers, batch.embedding)
            watched = VideoMaps(*(each[batch.row_video] for each in maps))
            causal, _ = model.prefill(watched, query)
            with self._precisely(words):
                found = causal_losses(causal, batch.targets)
            cls, rows = maps.tokens[:, :, :, 0].transpose(1, 2), batch.row_video
            if self._teacher:
                found["distil"] = self._distilled(causal, batch)
        pooled = model.pooled_layers(query)
        with self._precisely(words):
            return found | contrasts(cls, rows, pooled, batch.targets)

    @staticmethod
    def _precisely(like: Tensor) -> torch.autocast:
        """Losses are differences of large sums: not for bfloat16."""
        return torch.autocast(like.device.type, enabled=False)

    def _distilled(self, student: CausalOutputs, batch: Batch) -> Tensor:
        """The teacher's saliency as a distribution over the crop, and how likely it finds each window foreground."""
        (teacher,) = self._teacher
        with torch.no_grad():
            query: QueryMaps = teacher.query_maps(batch.words, batch.asked, batch.word_mask)
            layers, embedding = batch.layers[batch.row_video], batch.embedding[batch.row_video]
            known = teacher(layers, embedding, query, self._mask(batch))
            assert isinstance(known, ClipOutputs)
            likely = surest(known.logits, layers.shape[1])
        mask = self._mask(batch)
        unread = torch.where(mask, 0.0, -1e4)
        wanted, given = ((each.saliency.float() / TEMPERATURE + unread).log_softmax(1) for each in (known, student))
        ranking = F.kl_div(given, wanted, log_target=True, reduction="batchmean")
        inside = F.binary_cross_entropy_with_logits(student.logits.amax(-1).float(), likely.float(), reduction="none")
        return ranking + (inside * mask).sum() / mask.sum()

    def _refined(self, batch: Batch, generator: torch.Generator) -> MlrlLoss:
        assert self.mlrl is not None
        # One query of each crop: the windows are the same for all of them.
        first = torch.searchsorted(batch.row_video, torch.arange(len(batch.layers), device=batch.layers.device))
        return self.mlrl.loss(
            self.model, batch.layers, batch.words[first], batch.word_mask[first], generator, batch.mask
        )

    @staticmethod
    def _mask(batch: Batch) -> Tensor:
        return batch.mask[batch.row_video]
