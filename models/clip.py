"""The backbone `clip`: OpenAI's ViT-B/32, B/16, L/14 and L/14 at 336 pixels, as the Hugging Face hub holds them.

Two towers that give the hidden states after each of their last K blocks beside the usual embedding (Radford et al.
2021, arXiv:2103.00020, section 2.4); a K that a tower does not have is a ModelError. Modules bear the names of the
hub's weight files, typing slips included, so that no table of names stands between the two. Both towers export to ONNX
with any batch size and any length of text.

Letters: N images or texts, S image side, P patches, L tokens, K hidden states, D width of a tower, E width of the
space that both share.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.clip_files import WEIGHTS, file_of, fill, find, read_tokenizer, read_weights
from models.errors import ModelError

# Configs from before transformers 4.31 name 2 as the end of a text, which it never was. In such a model the end is
# found as the largest id of the text, as OpenAI's code does.
EOS_IS_LARGEST = 2


class _QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": _QuickGelu, "gelu": nn.GELU}


@dataclass(frozen=True)
class TowerConfig:
    """One transformer. Width must be a multiple of heads."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ModelError(f"CLIP config: width {self.width} is not a multiple of {self.heads} heads")
        if self.activation not in _ACTIVATIONS:
            raise ModelError(f"CLIP config: activation {self.activation!r} is not one of {', '.join(_ACTIVATIONS)}")


@dataclass(frozen=True)
class ClipConfig:
    """All that shapes the two towers, and the numbers that prepare their input."""

    image: TowerConfig
    text: TowerConfig
    patch: int  # side of a patch, pixels
    image_size: int = 224  # side S, pixels: the short side is resized to it, bicubic and antialiased, then cropped
    projection: int = 512  # width E
    vocabulary: int = 49408
    context: int = 77  # tokens of the longest text, with its start and end
    eos_token_id: int = 49407  # where a text is pooled; EOS_IS_LARGEST stands for the largest id in the text
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # RGB of pixels in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ModelError(f"CLIP config: image size {self.image_size} is not a multiple of patch {self.patch}")

    @property
    def patches(self) -> int:
        """P. A tower sees one token more, the class token, which comes first."""
        return (self.image_size // self.patch) ** 2

    @classmethod
    def from_file(cls, path: Path) -> "ClipConfig":
        """Read a config.json of the hub. What it leaves out has transformers' defaults, which are those of B/32.

        Raises:
            ModelError: it cannot be read, or does not describe a CLIP model.
        """
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
        if not isinstance(config, dict) or config.get("model_type", "clip") != "clip":
            raise ModelError(f"{path}: not the config of a model of type 'clip'")

        def section(tower: str) -> Any:
            # Some configs carry an old twin of a section beside it. transformers lets the twin win, defaults included.
            twin = config.get(f"{tower}_config_dict")
            return (config.get(f"{tower}_config") or {}) if twin is None else twin

        def read(values: Any, key: str, default: Any) -> Any:
            value = values.get(key, default) if isinstance(values, dict) else None
            if type(value) is not type(default) or (isinstance(value, int) and value < 1):
                raise ModelError(f"{path}: {key} is {value!r}, where CLIP ViT-B/32 has {default!r}")
            return value

        def tower(values: Any, default: TowerConfig) -> TowerConfig:
            keys = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
            keys += ["hidden_act", "layer_norm_eps"]  # in the order of the fields
            return TowerConfig(*(read(values, *pair) for pair in zip(keys, astuple(default), strict=True)))

        image, text = section("vision"), section("text")
        return cls(
            image=tower(image, VIT_B32.image),
            text=tower(text, VIT_B32.text),
            patch=read(image, "patch_size", VIT_B32.patch),
            image_size=read(image, "image_size", VIT_B32.image_size),
            projection=read(config, "projection_dim", VIT_B32.projection),
            vocabulary=read(text, "vocab_size", VIT_B32.vocabulary),
            context=read(text, "max_position_embeddings", VIT_B32.context),
            eos_token_id=read(text, "eos_token_id", VIT_B32.eos_token_id),
        )


_BASE, _BASE_TEXT = TowerConfig(768, 12, 12, 3072), TowerConfig(512, 12, 8, 2048)
_LARGE, _LARGE_TEXT = TowerConfig(1024, 24, 16, 4096), TowerConfig(768, 12, 12, 3072)
VIT_B32 = ClipConfig(_BASE, _BASE_TEXT, patch=32)
VIT_B16 = ClipConfig(_BASE, _BASE_TEXT, patch=16)
VIT_L14 = ClipConfig(_LARGE, _LARGE_TEXT, patch=14, projection=768)
VIT_L14_336 = ClipConfig(_LARGE, _LARGE_TEXT, patch=14, image_size=336, projection=768)


class _Attention(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        # As one product and one transposition, and the attention by hand: engines spend as long on what lies between
        # products as on the products themselves, and torch's own attention becomes three times as many nodes.
        projections = self.q_proj, self.k_proj, self.v_proj
        weight, bias = (torch.cat([getattr(each, name) for each in projections]) for name in ("weight", "bias"))
        qkv = nn.functional.linear(x, weight, bias).view(*x.shape[:-1], 3 * self.heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, 1)  # (N, H, L, D / H)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if attend is not None:
            scores = scores.masked_fill(~attend, float("-inf"))
        y: Tensor = self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


class _Block(nn.Module):
    """Pre-norm transformer block: nothing touches the residual stream but two additions."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(config.width, config.norm_eps) for _ in range(2))
        self.self_attn = _Attention(config)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(config.width, config.mlp_width),
                activation=_ACTIVATIONS[config.activation](),
                fc2=nn.Linear(config.mlp_width, config.width),
            )
        )

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), attend)
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class _Encoder(nn.Module):
    """The blocks of a tower. Gives the residual stream after each of the last `keep`."""

    def __init__(self, config: TowerConfig, keep: int) -> None:
        super().__init__()
        if not 1 <= keep <= config.layers:
            raise ModelError(f"CLIP: layers is {keep}, a tower of {config.layers} blocks gives 1 to {config.layers}")
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.skip = config.layers - keep

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """x (N, L, D), attend (N, 1, L, L) bool or None for all -> (N, K, L, D)."""
        kept = []
        for index, layer in enumerate(self.layers):
            x = layer(x, attend)
            if index >= self.skip:
                kept.append(x)
        return torch.stack(kept, 1)


class _ImageEmbeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.image.width
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + config.patches, width)

    def forward(self, pixels: Tensor) -> Tensor:
        # The convolution as a product: its windows do not overlap, and engines know more about products. Colours come
        # last, as decoders give them, so that an engine can drop the transposition in front of this one.
        weight, patch = self.patch_embedding.weight, self.patch_embedding.kernel_size[0]
        side = pixels.shape[-1] // patch
        x = pixels.permute(0, 2, 3, 1).reshape(-1, side, patch, side, 3 * patch)
        x = x.transpose(2, 3).reshape(-1, side * side, 3 * patch * patch)
        patches = nn.functional.linear(x, weight.permute(0, 2, 3, 1).flatten(1))  # (N, P, D)
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class ClipImageTower(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with one more norm before the first block."""

    def __init__(self, config: ClipConfig, layers: int = 4) -> None:
        super().__init__()
        self.image_size = config.image_size
        width, eps = config.image.width, config.image.norm_eps
        self.embeddings = _ImageEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps)
        self.encoder = _Encoder(config.image, layers)
        self.post_layernorm = nn.LayerNorm(width, eps)
        self.visual_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels -> hidden states and embedding.

        Args:
            pixels: (N, 3, S, S) float, RGB in [0, 1] less the config's mean and over its std; ModelError if of
                another side.
        Returns:
            layers (N, K, 1+P, D): the residual stream after each of the last K blocks, the last block last, without
                the norm after it. Token 0 is the class token, the patches follow row by row.
            pooled (N, E): the image's embedding, not of unit norm.
        """
        # Up to a patch more would go unseen, because the convolution drops what does not fill a patch.
        if tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            raise ModelError(f"CLIP takes images of side {self.image_size}, not pixels {list(pixels.shape)}")
        layers: Tensor = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return layers, self.visual_projection(self.post_layernorm(layers[:, -1, 0]))


class ClipTextTower(nn.Module):
    """Causal transformer: a token sees itself and what comes before it, so the last one has read all of the text."""

    def __init__(self, config: ClipConfig, layers: int = 4) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        width = config.text.width
        sizes = {"token_embedding": config.vocabulary, "position_embedding": config.context}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in sizes.items()})
        self.encoder = _Encoder(config.text, layers)
        self.final_layer_norm = nn.LayerNorm(width, config.text.norm_eps)
        self.text_projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, as `Clip.tokenize` gives them -> hidden states and embedding.

        Args:
            ids: (N, L) int64, L at most the context; each row holds the end of its text.
            mask: (N, L) int64, 1 a token and 0 padding, which comes after the text.
        Returns:
            layers (N, K, L, D): the residual stream after each of the last K blocks, the last block last, without the
                norm after it. What stands at padding means nothing.
            pooled (N, E): the text's embedding, not of unit norm.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        # Built of comparisons, which stay symbolic in an export: (1, 1, L, L) & (N, 1, 1, L).
        attend = (place[:, None] >= place)[None, None] & (mask > 0)[:, None, None, :]
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](place)
        layers: Tensor = self.encoder(x, attend)
        # The first of the largest, since padding may have the id of the end. int32 is what ArgMax runs on everywhere.
        end = (ids if self.eos_token_id == EOS_IS_LARGEST else ids == self.eos_token_id).int().argmax(-1)  # (N,)
        last = layers[:, -1][torch.arange(ids.shape[0], device=ids.device), end]
        return layers, self.text_projection(self.final_layer_norm(last))


@dataclass(frozen=True)
class Clip:
    """A CLIP model, frozen and in evaluation mode, with the tokenizer that its text tower was trained on."""

    config: ClipConfig
    image: ClipImageTower
    text: ClipTextTower
    tokenizer: Tokenizer
    tokenizer_file: Path

    def tokenize(self, texts: Sequence[str], *, truncate: bool) -> tuple[Tensor, Tensor]:
        """Texts, at least one -> ids, mask (N, L) int64 for the text tower; L is that of the longest text.

        A text beyond the context raises ModelError or, with `truncate`, is cut to it, its end token kept.
        """
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        context = self.config.context
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            if len(row) > context:
                if not truncate:
                    raise ModelError(f"text of {len(row)} tokens, CLIP reads {context} at most: {text[:60]!r}...")
                rows[i] = row[: context - 1] + row[-1:]
        # Padding has the id of the end, as in transformers: the text is over before it.
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=rows[0][-1])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def load_clip(source: str | Path, layers: int = 4) -> Clip:
    """Load a model of transformers' layout from a folder or, through the hub's local cache, from the hub.

    Args:
        source: a folder with config.json, tokenizer.json and model.safetensors (or pytorch_model.bin), or the hub's
            name of a model, such as `openai/clip-vit-base-patch32`. A folder goes before a name.
        layers: K, how many hidden states the towers give.
    Raises:
        ModelError: the hub gives no such model, a file is missing or damaged, or weights and config do not fit.
    """
    folder = find(source)
    config = ClipConfig.from_file(file_of(folder, "config.json"))
    tokenizer_file = file_of(folder, "tokenizer.json")
    end = None if config.eos_token_id == EOS_IS_LARGEST else config.eos_token_id
    tokenizer = read_tokenizer(tokenizer_file, config.vocabulary, end)
    with torch.device("meta"):  # the weights come from the file: drawing random ones first takes seconds
        image, text = ClipImageTower(config, layers), ClipTextTower(config, layers)
    path = file_of(folder, *WEIGHTS)
    weights = read_weights(path)
    fill(image, "vision_model", weights, path)
    fill(text, "text_model", weights, path)
    # The temperature of the training loss, and what old versions of transformers saved of range(n), are no weights.
    unknown = sorted(key for key in weights if key != "logit_scale" and not key.endswith("embeddings.position_ids"))
    if unknown:
        raise ModelError(f"{path}: {len(unknown)} tensors that CLIP does not have, the first is {unknown[0]}")
    image, text = image.eval().requires_grad_(False), text.eval().requires_grad_(False)
    return Clip(config, image, text, tokenizer, tokenizer_file)
