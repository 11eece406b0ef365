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
"""(part of the remembered column, the same for all windows (B, T, part), lag) -> what it was `lag` windows ago."""

_OUTPUTS = 3  # class logit, log distance to the start, log distance to the end


class _Level(nn.Module):
    """The way from one window to `stride` of them: log2(stride) times convolution (2 taps), norm, ReLU."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        depth = stride.bit_length() - 1
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 2, stride=2) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def whole(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T // stride, C)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x.mT).mT))
        return x


class _Head(nn.Module):
    """Convolution, ReLU, convolution; three taps each."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Conv1d(width, width, 3, padding=1)
        self.out = nn.Conv1d(width, outputs, 3, padding=1)

    def whole(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, outputs)."""
        y: Tensor = self.out(F.relu(self.hidden(x.mT))).mT
        return y


class Heads(nn.Module):
    """(B, T, C) -> how likely each window is inside a moment, and how far away the moment's start and end are."""

    def __init__(self, width: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.width, self.strides = width, strides
        self.levels = nn.ModuleList(_Level(width, stride) for stride in strides)
        self.classify, self.locate = _Head(width, 1), _Head(width, 2)
        self.scales = nn.Parameter(torch.ones(len(strides)))
        self.lags = sorted({lag for s in strides for lag in (s // 2, s, 2 * s) if lag})
        """How far back a step looks: a convolution of dilation s / 2, the heads' taps s and 2 s."""

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
        """hidden (B, T, C) -> logits (B, T, S), distances (B, T, S, 2) in windows, columns to remember (B, T, E).

        One body serves all windows at once and one at a time: what differs is where `earlier` finds the past.
        """
        columns, at = [hidden], self.width
        taps = []
        for level in self._levels():
            x, part = hidden, slice(0, self.width)
            for i, (conv, norm) in enumerate(zip(level.convs, level.norms, strict=True)):
                assert isinstance(conv, nn.Conv1d)
                x = F.relu(norm(_taps((earlier(part, x, 2**i), x), conv)))
                part, at = slice(at, at + self.width), at + self.width
                columns.append(x)
            taps.append(torch.stack([earlier(part, x, 2 * level.stride), earlier(part, x, level.stride), x], -1))
        inputs = torch.stack(taps, -3).flatten(-2)  # (B, T, S, 3 C): the heads are shared by all levels
        # The last convolution has three outputs: what its taps multiply is remembered as products, not as inputs.
        products = torch.cat([_products(inputs, head) for head in (self.classify, self.locate)], -2)  # (B, T, S, 3, 3)
        columns.append(products[..., :2].flatten(2))
        parts = []
        for i, stride in enumerate(self.strides):
            part = slice(at, at + _OUTPUTS * 2)
            mine = columns[-1][..., i * _OUTPUTS * 2 : (i + 1) * _OUTPUTS * 2]
            second, first = earlier(part, mine, 2 * stride), earlier(part, mine, stride)
            at += _OUTPUTS * 2
            parts.append(
                products[:, :, i, :, 2]
                + first.view(*first.shape[:-1], _OUTPUTS, 2)[..., 1]
                + second.view(*second.shape[:-1], _OUTPUTS, 2)[..., 0]
            )
        biases = [head.out.bias for head in (self.classify, self.locate)]
        out = torch.stack(parts, 2) + torch.cat([bias for bias in biases if bias is not None])  # (B, T, S, 3)
        factor = self.scales * torch.tensor(self.strides, dtype=out.dtype, device=out.device)
        return out[..., 0], out[..., 1:].exp() * factor[:, None], torch.cat(columns, -1)

    def _levels(self) -> Iterator[_Level]:
        for level in self.levels:
            assert isinstance(level, _Level)
            yield level


def _taps(inputs: tuple[Tensor, ...], conv: nn.Conv1d) -> Tensor:
    """A convolution whose inputs, (.., C) each, oldest first, were already found."""
    return F.linear(torch.stack(inputs, -1).flatten(-2), conv.weight.flatten(1), conv.bias)


def _products(inputs: Tensor, head: _Head) -> Tensor:
    """inputs (.., 3 C) -> what each tap of the head's last convolution gives, oldest first: (.., outputs, 3)."""
    hidden = F.relu(F.linear(inputs, head.hidden.weight.flatten(1), head.hidden.bias))
    weight = head.out.weight.transpose(1, 2).flatten(0, 1)  # (outputs 3, C)
    return F.linear(hidden, weight).view(*inputs.shape[:-1], -1, 3)
