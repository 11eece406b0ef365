"""MLRL: refines an R2 by predicting states of hidden windows and words from what is left of a recording and its query.

A joint-embedding predictive architecture (I-JEPA: Assran et al. 2023, arXiv:2301.08243) over windows instead of image
patches; that it is called MLRL, and its ratios, come from this project's own design. Nothing is reconstructed and no
label is read, so unlabelled video will do.

    student     the R2 that is refined: reads the context alone, with noise and dropout on its features
    teacher     a moving average of it: reads everything, clean; its layer-normalised states are the targets
    predictor   guesses the targets from the student's states; thrown away afterwards, like all of `Mlrl`

`Mlrl` holds what is thrown away. The student is handed in, and the caller optimises it: alone first (Rep/MR), or with
`MlrlLoss.total` added to the losses of its labels (Rep+MR).

Letters: B batch, T windows, K layers, P patches, L text tokens, C width of R2, E width of the predictor.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.errors import ModelError
from models.r2 import R2

COLLAPSED = 0.1
"""A `MlrlLoss.spread` below this is a collapse. Seen in small models: 0.37 to 1 untrained, at least 0.24 in training,
and less than 0.05 where training was made to collapse."""


@dataclass(frozen=True, slots=True)
class MlrlConfig:
    """What is hidden, how the rest is disturbed, and the size of the predictor."""

    inputs: Literal["clip+query", "clip", "query"] = "clip+query"
    """The side that is hidden in part, disturbed and predicted: windows, words or both, their losses summed. The other
    side is shown whole and clean."""
    target_ratio: float = 0.15
    """Of a row's windows (or words), hidden from the student and predicted; at least one."""
    blocks: int = 4
    """M: contiguous runs that the targets form, or as many as there are targets."""
    context_ratio: float = 0.85
    """Of the rest, shown to the student; at least one."""
    noise: float = 0.1
    """Standard deviation of Gaussian noise on the student's features, relative to that of each token's own."""
    dropout: float = 0.1
    """Probability that one of the student's features becomes 0."""
    momentum: float = 0.996
    """Of the teacher, at the beginning; it rises linearly to 1."""
    predictor_width: int = 128
    predictor_depth: int = 2
    heads: int = 4
    """Of the predictor."""

    def __post_init__(self) -> None:
        width, heads = self.predictor_width, self.heads
        for name, fits, must in (
            ("inputs", self.inputs in ("clip+query", "clip", "query"), '"clip+query", "clip" or "query"'),
            ("target_ratio", 0 < self.target_ratio < 1, "more than 0 and less than 1"),
            ("blocks", self.blocks > 0, "positive"),
            ("context_ratio", 0 < self.context_ratio <= 1, "more than 0 and at most 1"),
            ("noise", 0 <= self.noise < math.inf, "at least 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and less than 1"),
            ("momentum", 0 <= self.momentum <= 1, "from 0 to 1"),
            ("predictor_depth", self.predictor_depth > 0, "positive"),
            ("heads", heads > 0, "positive"),
            (
                "predictor_width",
                width > 0 and not width % (2 * max(1, heads)),
                f"a multiple of twice the {heads} heads",
            ),
        ):
            if not fits:
                raise ModelError(f"{name} must be {must}, got {getattr(self, name)!r}")


class MlrlLoss(NamedTuple):
    """Of one batch, scalars."""

    total: Tensor  # windows + words
    windows: Tensor  # mean squared error; 0 where no window was hidden
    words: Tensor  # the same of words
    spread: Tensor  # how well the teacher tells things apart, see `check_collapse`


def blocks(present: Tensor, config: MlrlConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What to predict and what to predict it from -> target and context, (B, T) bool.

    `present`, (B, T) bool, is false on padding at the end. The targets are `config.blocks` runs that neither overlap
    nor touch. A row of one window is all context: nothing would be left to predict it from.
    """
    # Planned on the CPU: a GPU would be waited for in each row.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    plan = torch.Generator().manual_seed(seed)
    target, context = (torch.zeros(present.shape, dtype=torch.bool) for _ in range(2))
    for row, length in enumerate(present.sum(1).tolist()):
        count = min(max(1, round(config.target_ratio * length)), length - 1)
        if count > 0:
            runs = min(config.blocks, count, length - count + 1)
            # Between and around the windows that are no targets there are length - count + 1 gaps: a run in each of
            # some of them.
            gaps = torch.randperm(length - count + 1, generator=plan)[:runs].sort().values
            begin = 0
            for i, gap in enumerate(gaps.tolist()):
                end = begin + count // runs + (i < count % runs)
                target[row, gap + begin : gap + end] = True
                begin = end
        rest = (~target[row, :length]).nonzero()[:, 0]
        shown = max(1, round(config.context_ratio * len(rest)))
        context[row, rest[torch.randperm(len(rest), generator=plan)[:shown]]] = True
    return target.to(present.device), context.to(present.device)


def check_collapse(spread: float) -> None:
    """Raise ModelError where the teacher makes the same of everything: every target is then easy, and means nothing.

    The loss falls all the better then, so it cannot tell. `spread` is that of one batch or, steadier, a mean of some.
    """
    if not spread >= COLLAPSED:  # what is not a number is no better
        raise ModelError(
            f"the refinement has collapsed: the teacher's states spread by {spread:.3g} of their inputs, less than "
            f"{COLLAPSED:g}; lower the learning rate, or raise the momentum"
        )


class _Predictor(nn.Module):
    """A small transformer over the windows and words that are shown or wanted.

    It attends to all of them at all times, also where the R2 is causal: a causal R2 must not see what comes after a
    window, but the guess about one may be made with everything that is known, for this is not what runs live.
    """

    def __init__(self, width: int, config: MlrlConfig) -> None:
        super().__init__()
        inner = config.predictor_width
        self.enter, self.leave = nn.Linear(width, inner), nn.Linear(inner, width)
        self.blank = nn.Parameter(0.02 * torch.randn(inner))  # in place of what is wanted and not shown
        self.kinds = nn.Parameter(0.02 * torch.randn(2, inner))  # window, word
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(inner, config.heads, 4 * inner, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.predictor_depth)
        )
        self.norm = nn.LayerNorm(inner)

    def forward(
        self, tokens: Sequence[Tensor], shown: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Of windows and of words: tokens (B, N, C), shown and wanted (B, N) bool -> guesses (B, N, C)."""
        sides = [
            torch.where(there[..., None], self.enter(x), self.blank) + _positions(x.shape[1], self.blank) + kind
            for x, there, kind in zip(tokens, shown, self.kinds, strict=True)
        ]
        unread = ~torch.cat([there | asked for there, asked in zip(shown, wanted, strict=True)], 1)
        x = torch.cat(sides, 1)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=unread)
        guesses: tuple[Tensor, ...] = self.leave(self.norm(x)).split([side.shape[1] for side in sides], 1)
        return guesses


class Mlrl(nn.Module):
    """What refines an R2 and is thrown away afterwards: teacher, predictor and the query of video that has none."""

    def __init__(self, model: R2, config: MlrlConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.predictor = _Predictor(model.config.width, config)
        self.null = nn.Parameter(torch.randn(model.config.text_width))  # one word, the same in all K layers

    def train(self, mode: bool = True) -> "Mlrl":
        """As of any module, but the teacher's dropout stays off: noise on targets would be noise to be learnt."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(
        self,
        model: R2,
        layers: Tensor,
        query_layers: Tensor,
        query_mask: Tensor,
        generator: torch.Generator,
        present: Tensor | None = None,
    ) -> MlrlLoss:
        """The loss of one batch. It depends on all of the student but its heads and the pooling of the query.

        Args:
            model: the student, of the config that the teacher was copied with.
            layers: of the backbone, (B, T, K, 1+P, width), the deepest last.
            query_layers: (B, K, L, width).
            query_mask: (B, L) bool, false on padding at the end. Rows without a word have no query: they read the null
                query, which is learnt, and none of it is predicted.
            generator: of what is hidden and disturbed, on the device of `layers`.
            present: (B, T) bool, false on padding at the end. None: there is no padding.

        Raises:
            ModelError: nothing can be predicted, because rows have a single window or no query.
        """
        present = torch.ones(layers.shape[:2], dtype=torch.bool, device=layers.device) if present is None else present
        null = torch.zeros_like(query_mask)
        null[:, 0] = ~query_mask.any(1)
        words, spoken = torch.where(null[:, None, :, None], self.null, query_layers), query_mask | null
        wanted, shown = [torch.zeros_like(present), torch.zeros_like(spoken)], [present, spoken]
        seen, heard = layers, words
        if "clip" in self.config.inputs:
            wanted[0], shown[0] = blocks(present, self.config, generator)
            seen = self._disturbed(layers, generator)
        if "query" in self.config.inputs:
            wanted[1], shown[1] = blocks(query_mask, self.config, generator)
            # Nothing can be hidden of a pooled text, one word: its clean state is predicted from the disturbed one.
            wanted[1] |= query_mask & (query_mask.sum(1, keepdim=True) == 1)
            shown[1] |= null
            heard = self._disturbed(words, generator)
        if not any(each.any() for each in wanted):
            raise ModelError(f'nothing to predict with inputs "{self.config.inputs}": single windows, or no query')
        states = _states(model, seen, heard, shown[0], shown[1])
        with torch.no_grad():
            targets = _states(self.teacher, layers, words, present, spoken)
            spreads = []
            if "clip" in self.config.inputs:  # within each recording: its query must not pass for its content
                spreads.append(_spread(targets[0], layers[:, :, -1, 0], present))
            if "query" in self.config.inputs:  # over the words of all queries
                both = (each.flatten(0, 1)[None] for each in (targets[1], query_layers.mean(1), query_mask))
                spreads.append(_spread(*both))
        guesses = self.predictor(states, shown, wanted)
        errors = [_error(*each) for each in zip(guesses, targets, wanted, strict=True)]
        return MlrlLoss(errors[0] + errors[1], errors[0], errors[1], torch.stack(spreads).amin())

    @torch.no_grad()
    def update(self, model: R2, progress: float) -> None:
        """Move the teacher towards the student, after each step of the optimiser.

        `progress` of the training, from 0 to 1: the momentum rises with it from the config's to 1.
        """
        if not 0 <= progress <= 1:
            raise ModelError(f"progress must be from 0 to 1, got {progress:g}")
        share = (1 - self.config.momentum) * (1 - progress)
        for old, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
            old.lerp_(new, share)

    def _disturbed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x (.., width) with noise and dropout, also where nobody will read it.

        The noise is scaled token by token: a deviation over all windows would tell the context about the targets.
        """
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.config.dropout
        return (x + self.config.noise * x.std(-1, keepdim=True) * noise) * kept / (1 - self.config.dropout)


def _states(model: R2, layers: Tensor, words: Tensor, shown: Tensor, spoken: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the windows (B, T, C) and mapped words (B, L, C), the mean of their K layers.

    Windows that are not `shown` and words that are not `spoken` are read by no other, and such words are 0.
    """
    # The zero-shot embedding is read by the heads alone.
    query = model.query_maps(words, words.new_zeros(len(words), model.config.embedding + 1), spoken)
    mapped = torch.stack([each.tokens.masked_fill(~spoken[..., None], 0) for each in query.words]).mean(0)
    return model.encode(layers, query, shown), mapped


def _positions(length: int, like: Tensor) -> Tensor:
    """Of windows 0 .. T-1, whatever T is: (T, E), sine in one half of the channels and cosine in the other."""
    rates = 10_000.0 ** -torch.linspace(0, 1, len(like) // 2, device=like.device, dtype=like.dtype)
    angle = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], -1)


def _error(guess: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error where `wanted`, (B, N) bool; 0 if nothing is. Targets normalised as in I-JEPA."""
    target = F.layer_norm(target[wanted], target.shape[-1:])
    return (guess[wanted] - target).square().sum() / max(1, target.numel())


def _spread(made: Tensor, given: Tensor, there: Tensor) -> Tensor:
    """How different what was made (B, N, C) is, relative to what it was made from (B, N, X), where `there` (B, N)."""
    out, into = _deviation(made, there), _deviation(given, there)
    # Alike inputs, a black recording or one word alone, say nothing about what made them alike.
    return torch.where(into > 1e-3, out / into, 1.0)


def _deviation(x: Tensor, there: Tensor) -> Tensor:
    """Over N, of layer-normalised x, which layer norm cannot feign: the mean over channels and rows."""
    x = F.layer_norm(x, x.shape[-1:])
    weight = there[..., None] / there.sum(1).clamp(min=1)[:, None, None]
    mean = (x * weight).sum(1, keepdim=True)
    return ((x - mean).square() * weight).sum(1).sqrt().mean()
