"""The temporal pyramid and the class and boundary heads, as published and without strides.

As published (`whole`) the level of stride s is s times coarser and every convolution looks ahead. The causal form keeps
all weights and gives every level an output at every window: strides become dilations, padding moves to the left, and
the heads' three taps stand s apart. Zeros enter at the input of each convolution before the first window.

Letters: B batch, T windows, C width, S levels, E width of what must be remembered of a window.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Earlier = Callable[[slice, Tensor, int], Tensor]
"""(part of the remembered column, what it is now (.., part), lag) -> what it was `lag` windows ago, (.., part)."""

_OUTPUTS = 3  # class logit, log distance to the start, log distance to the end


def surest(logits: list[Tensor], length: int) -> Tensor:
    """The largest class probability over the levels of a whole recording, (B, T), from (B, T / stride) of each.

    A level's values hold T // n times each, as published, and the last one to the end.
    """
    held = []
    for logit in logits:
        x = logit.sigmoid().repeat_interleave(length // logit.shape[1], 1)
        held.append(torch.cat([x, x[:, -1:].expand(-1, length - x.shape[1])], 1))
    return torch.stack(held).amax(0)


class _Conv(nn.Module):
    """A convolution over time whose weight lies as a step reads it: (outputs, taps, inputs)."""

    def __init__(self, inputs: int, outputs: int, taps: int) -> None:
        super().__init__()
        like = nn.Conv1d(inputs, outputs, taps)
        assert like.bias is not None
        self.weight = nn.Parameter(like.weight.detach().transpose(1, 2).contiguous())
        self.bias = nn.Parameter(like.bias.detach())

    def whole(self, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
        """(B, T, inputs) -> (B, .., outputs)."""
        return F.conv1d(x.mT, self.weight.transpose(1, 2), self.bias, stride, padding).mT

    def forward(self, taps: Tensor) -> Tensor:
        """Inputs that were already found, oldest first, (.., taps inputs) -> (.., outputs)."""
        return F.linear(taps, self.weight.flatten(1), self.bias)


class _Level(nn.Module):
    """The way from one window to `stride` of them: log2(stride) times convolution (2 taps), norm, ReLU."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        depth = stride.bit_length() - 1
        self.convs = nn.ModuleList(_Conv(width, width, 2) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def steps(self) -> Iterator[tuple[int, _Conv, nn.Module]]:
        """Dilation, convolution and norm, in order."""
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(conv, _Conv)
            yield 2**place, conv, norm

    def whole(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T // stride, C)."""
        for _, conv, norm in self.steps():
            x = F.relu(norm(conv.whole(x, stride=2)))
        return x


class _Head(nn.Module):
    """Convolution, ReLU, convolution; three taps each."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden, self.out = _Conv(width, width, 3), _Conv(width, outputs, 3)

    def whole(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, outputs)."""
        return self.out.whole(F.relu(self.hidden.whole(x, padding=1)), padding=1)

    def products(self, taps: Tensor) -> Tensor:
        """taps (.., 3 C) -> what each tap of the last convolution makes of them, oldest first, (.., outputs, 3)."""
        hidden = F.relu(self.hidden(taps))
        products = F.linear(hidden, self.out.weight.flatten(0, 1))
        return products.view(*taps.shape[:-1], *self.out.weight.shape[:2])


class Heads(nn.Module):
    """(.., T, C) -> how likely each window is inside a moment, and how far away the moment's start and end are."""

    def __init__(self, width: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.width, self.strides = width, strides
        self.levels = nn.ModuleList(_Level(width, stride) for stride in strides)
        self.classify, self.locate = _Head(width, 1), _Head(width, 2)
        self.scales = nn.Parameter(torch.ones(len(strides)))
        self.lags: list[int] = sorted(
            {lag for s in strides for lag in (*(2**i for i in range(s.bit_length() - 1)), s, 2 * s)}
        )
        """How far back a step looks: convolutions of dilation 1, 2, .., s / 2, the heads' taps s and 2 s."""
        self.factors = nn.Buffer(torch.tensor(strides, dtype=torch.float32), persistent=False)
        self.arrivals = nn.Buffer(self._arrivals(), persistent=False)

    @property
    def reach(self) -> int:
        """How many windows a step must remember."""
        return self.lags[-1]

    @property
    def column(self) -> int:
        """E: hidden state, the output of each convolution of each level, and the products of two of the last taps."""
        convs = sum(stride.bit_length() - 1 for stride in self.strides)
        return (1 + convs) * self.width + len(self.strides) * _OUTPUTS * 2

    def pyramid(self, hidden: Tensor) -> list[Tensor]:
        """hidden (B, T, C) -> (B, T // s, C) for each level s no longer than T."""
        return [level.whole(hidden) for level in self._levels() if hidden.shape[1] >= level.stride]

    def whole(self, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """hidden (B, T, C) -> for each level of the pyramid: logits (B, T // s), distances (B, T // s, 2)."""
        pyramid = self.pyramid(hidden)
        logits = [self.classify.whole(x).squeeze(-1) for x in pyramid]
        factors = zip(pyramid, self.scales, self.strides, strict=False)
        return logits, [self.locate.whole(x).exp() * scale * stride for x, scale, stride in factors]

    def causal(self, hidden: Tensor, earlier: Earlier) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (.., C) -> logits (.., S), distances (.., S, 2) in windows, columns to remember (.., E).

        One body serves all windows at once, (B, T, C), and one at a time, (R, C): what differs is where `earlier` finds
        the past.
        """
        columns, taps = [hidden], []
        for level in self._levels():
            x, part = hidden, slice(0, self.width)
            for dilation, conv, norm in level.steps():
                x, at = F.relu(norm(conv(torch.cat([earlier(part, x, dilation), x], -1)))), len(columns) * self.width
                part = slice(at, at + self.width)
                columns.append(x)
            taps += [earlier(part, x, 2 * level.stride), earlier(part, x, level.stride), x]
        # The heads are shared by all levels: (.., S, 3 C).
        inputs = torch.cat(taps, -1).view(*hidden.shape[:-1], len(self.strides), 3 * self.width)
        # The last convolution has three outputs: what its taps multiply is remembered as products, not as inputs.
        products = torch.cat([self.classify.products(inputs), self.locate.products(inputs)], -2)  # (.., S, 3, 3)
        second, first, now = products.unbind(-1)  # (.., S, 3): due 2 s and s windows later, and now
        due = torch.cat([second, first], -1).flatten(-2)
        part = slice(len(columns) * self.width, self.column)
        came = F.linear(torch.cat([earlier(part, due, lag) for lag in self.lags], -1), self.arrivals)
        raw = now + came.view(now.shape) + torch.cat([self.classify.out.bias, self.locate.out.bias])
        return raw[..., 0], raw[..., 1:].exp() * (self.scales * self.factors)[:, None], torch.cat([*columns, due], -1)

    def _arrivals(self) -> Tensor:
        """(S 3, lags S 6) of zeros and ones: which of the products remembered from which lag each output takes in."""
        picked = torch.zeros(len(self.strides), _OUTPUTS, len(self.lags), len(self.strides), 2, _OUTPUTS)
        for level, stride in enumerate(self.strides):
            for tap, lag in enumerate((2 * stride, stride)):
                for output in range(_OUTPUTS):
                    picked[level, output, self.lags.index(lag), level, tap, output] = 1.0
        return picked.flatten(2).flatten(0, 1)

    def _levels(self) -> Iterator[_Level]:
        for level in self.levels:
            assert isinstance(level, _Level)
            yield level
