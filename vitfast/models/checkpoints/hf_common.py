"""What the transformers families share: settings, activations, and the names of a block's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from vitfast.models import config, schema
from vitfast.models.checkpoints.source import CheckpointError, Source, read_settings
from vitfast.models.config import ViTConfig

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""What a classifier's logits are for, in transformers' words."""

SideOrSides = Annotated[int | Sequence[int], schema.side_or_sides(1, 65_536)]


def _names_of_classes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (isinstance(index, int) or (isinstance(index, str) and index.isdecimal()))
        for index, name in value.items()
    )


@dataclass(frozen=True)
class Origin:
    """What a config.json was saved from; null and absent are the same in every setting."""

    architectures: Annotated[Sequence[str], schema.TEXTS] = ()
    model_type: Annotated[str, schema.TEXT] = ""


@dataclass(frozen=True)
class Labels:
    """The part of a config.json that is about classes."""

    id2label: Annotated[
        Mapping[int | str, str] | None, schema.Domain("an object: class number -> name", _names_of_classes)
    ] = None
    num_labels: config.Classes = 2
    problem_type: Annotated[str | None, schema.one_of(*PROBLEM_TYPES)] = None

    @property
    def classes(self) -> int:
        """Classes of a classifier: as many as there are labels, and 2 (the library's default) if none are listed."""
        return self.num_labels if self.id2label is None else len(self.id2label)

    def names(self, classes: int) -> tuple[str, ...] | None:
        """The class names; None if there are none but the library's placeholders, or they do not number the classes."""
        named = {int(index): name for index, name in (self.id2label or {}).items()}
        if not classes or set(named) != set(range(classes)):
            return None
        listed = tuple(named[i] for i in range(classes))
        return None if listed == tuple(f"LABEL_{i}" for i in range(classes)) else listed


@dataclass(frozen=True)
class Settings:
    """The architecture in a config.json, with the defaults of the configuration classes."""

    hidden_size: config.Width = 768
    num_hidden_layers: config.Depth = 12
    num_attention_heads: config.Heads = 12
    head_dim: Annotated[int, schema.whole(1, 65_536)] = 0
    hidden_act: Annotated[str, schema.TEXT] = "gelu"
    layer_norm_eps: config.Eps = 1e-12
    image_size: SideOrSides = 224
    patch_size: SideOrSides = 16
    num_channels: config.Channels = 3

    def common(self, where: str) -> dict[str, Any]:
        """The fields of ViTConfig that all transformers families have.

        Raises:
            CheckpointError: for an activation that the forward does not have.
        """
        patch, image = pair(self.patch_size), pair(self.image_size)
        grid = [side // p for side, p in zip(image, patch, strict=True)]
        if 0 in grid:
            raise CheckpointError(f"{where}: image_size must be at least one patch, got {image} and patch_size={patch}")
        return {
            # Their patch convolution leaves out what is past the last whole patch.
            "image_size": (grid[0] * patch[0], grid[1] * patch[1]),
            "off_grid": "crop",
            "patch_size": patch,
            "width": self.hidden_size,
            "depth": self.num_hidden_layers,
            "heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "in_channels": self.num_channels,
            "activation": activation(self.hidden_act, where),
            "norm_eps": self.layer_norm_eps,
            "dynamic_size": True,
        }


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str, where: str) -> str:
    """Our name of a transformers activation.

    Raises:
        CheckpointError: if the forward does not have it.
    """
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"{where}: hidden_act={name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def find_prefix(state: Mapping[str, Tensor], prefixes: Sequence[str], marker: str) -> str:
    """What stands before the encoder's names; the first candidate if none of them leads to `marker`."""
    return next((prefix for prefix in prefixes if prefix + marker in state), prefixes[0])


@dataclass(frozen=True)
class BlockNames:
    """Source names of one block's parts, without "weight" and "bias"; `block` has a place for the index."""

    block: str
    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: tuple[str, ...]
    fc2: str
    layer_scales: tuple[str, str] | None = None

    def read(
        self, source: Source, config: ViTConfig, prefix: str, *, qkv_bias: bool = True, key_bias: bool = True,
        proj_bias: bool = True, mlp_bias: bool = True,
    ) -> None:  # fmt: skip
        """Take every block from `source`; without `key_bias` q and v have a bias, and k has none."""
        for i in range(config.depth):
            ours, theirs = f"blocks.{i}.", prefix + self.block.format(i)
            self.norm(source, config, f"{ours}norm1", theirs + self.norm1)
            qkv = [theirs + name for name in self.qkv]
            source.dense(f"{ours}qkv", *qkv, bias=qkv_bias and key_bias)
            if qkv_bias and not key_bias:
                given = (f"{qkv[0]}bias", None, f"{qkv[2]}bias")
                source.join_biases(f"{ours}qkv.bias", given, config.heads * config.head_dim)
            source.dense(f"{ours}proj", theirs + self.proj, bias=proj_bias)
            self.norm(source, config, f"{ours}norm2", theirs + self.norm2)
            source.dense(f"{ours}fc1", *(theirs + name for name in self.fc1), bias=mlp_bias)
            source.dense(f"{ours}fc2", theirs + self.fc2, bias=mlp_bias)
            if self.layer_scales and config.layer_scale:
                source.copy(f"{ours}layer_scale1", theirs + self.layer_scales[0])
                source.copy(f"{ours}layer_scale2", theirs + self.layer_scales[1])

    @staticmethod
    def norm(source: Source, config: ViTConfig, ours: str, theirs: str) -> None:
        """Take a LayerNorm, or an RMSNorm, which has no bias."""
        source.copy(f"{ours}.weight", f"{theirs}weight")
        if config.norm == "layer_norm":
            source.copy(f"{ours}.bias", f"{theirs}bias")

    def present(self, state: Mapping[str, Tensor], prefix: str) -> int:
        """How many of the first block's dense weights `state` holds under these names."""
        theirs = prefix + self.block.format(0)
        return sum(f"{theirs}{name}weight" in state for name in (*self.qkv, self.proj, *self.fc1, self.fc2))


def layout(state: Mapping[str, Tensor], prefix: str, *candidates: BlockNames) -> BlockNames:
    """The naming that fits a state dict best."""
    return max(candidates, key=lambda names: names.present(state, prefix))


CLIP_NAMES = BlockNames(
    block="encoder.layers.{}.",
    norm1="layer_norm1.",
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    proj="self_attn.out_proj.",
    norm2="layer_norm2.",
    fc1=("mlp.fc1.",),
    fc2="mlp.fc2.",
)
"""Of CLIP's and SigLIP's towers, image and text."""
FILE_ATTENTION = ("attention.attention.query.", "attention.attention.key.", "attention.attention.value.")
MEMORY_ATTENTION = ("attention.q_proj.", "attention.k_proj.", "attention.v_proj.")


@dataclass(frozen=True)
class Family:
    """Classes of transformers that differ in little: what `vitfast.models.checkpoints.hf` asks of a family.

    Attributes:
        architectures: the classes. bases: what may stand before the encoder's names in files or modules of a class.
        by_model_type: what a file that names no class is. marker: a name that every encoder has.
        settings: of config.json, with defaults that all the classes have; defaults: class -> others.
        make: settings, class and name to the fields of ViTConfig beyond `Settings.common`.
        weights: takes all weights (source, config, settings, prefix, class). ignorable: names that may be left over.
        says: of `hf_live.NO_SAY`, the parts that have a say here.
    """

    architectures: tuple[str, ...]
    bases: Callable[[str], tuple[str, ...]]
    by_model_type: Mapping[str, Callable[[Mapping[str, Tensor]], str]]
    marker: str
    settings: type[Settings]
    make: Callable[[Any, str, int], dict[str, Any]]
    weights: Callable[[Source, ViTConfig, Any, str, str], None]
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignorable: tuple[str, ...] = ()
    says: tuple[str, ...] = ()

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]:
        """The classes."""
        return self.architectures

    @property
    def BY_MODEL_TYPE(self) -> Mapping[str, Callable[[Mapping[str, Tensor]], str]]:
        """What a file that names no class is."""
        return self.by_model_type

    @property
    def MARKER(self) -> str:
        """A name that every encoder has."""
        return self.marker

    def matches(self, architecture: str) -> bool:
        """Whether this family has the class."""
        return architecture in self.architectures

    def prefixes(self, architecture: str) -> tuple[str, ...]:
        """What may stand before the encoder's names."""
        return self.bases(architecture)

    def read(self, config: Mapping[str, Any], architecture: str, where: str) -> Settings:
        """The encoder's settings, out of a whole model's `vision_config` if need be.

        Raises:
            CheckpointError: with each field that is out of its domain.
        """
        inner = config.get("vision_config")
        if inner is not None and not schema.OBJECT.holds(inner):
            raise CheckpointError(f"{where}: vision_config must be an object, got {schema.shown(inner)}")
        given = {**self.defaults.get(architecture, {}), **{k: v for k, v in (inner or config).items() if v is not None}}
        return read_settings(self.settings, given, where, "" if inner is None else "vision_config.")

    def translate(
        self, facts: Any, classes: int, state: Mapping[str, Tensor], architecture: str, name: str
    ) -> tuple[ViTConfig, dict[str, Tensor]]:
        """Settings and state dict, of files or of a module, to ours.

        Raises:
            CheckpointError: naming the feature that cannot be represented, or the tensors that do not fit.
        """
        classes = classes if architecture.endswith("ForImageClassification") else 0
        fields = facts.common(name) | self.make(facts, architecture, classes)
        ours = ViTConfig(**fields, num_classes=classes, name=name)
        source = Source(state, name)
        self.weights(source, ours, facts, find_prefix(state, self.prefixes(architecture), self.marker), architecture)
        if classes:
            source.dense("head", "classifier.")
        return ours, source.finish(ours, self.ignorable)
