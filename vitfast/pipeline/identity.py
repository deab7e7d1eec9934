"""What embeddings were made with: those of two identities must not meet in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from vitfast.version import __version__

if TYPE_CHECKING:
    from vitfast.engine.engine import Engine

OUTPUT_DTYPES = ("float32", "float16")
MODEL, IDENTITY = b"vitfast.model", b"vitfast.identity"
"""Names in the metadata of a schema."""


@dataclass(frozen=True)
class Identity:
    """What decides an embedding besides the picture.

    Attributes:
        weights: a hash of architecture and weights (`Engine.fingerprint`).
        preprocess: the fields of `Preprocess`, and whether EXIF orientation is heeded.
        dtype: what the model computes in, and which products of an 8-bit model are left in bf16.
        version: of vitfast.
        output_dtype: of the vectors in the folder, "float32" or "float16".
    """

    weights: str
    preprocess: dict[str, Any]
    dtype: str
    version: str = __version__
    output_dtype: str = "float32"

    @classmethod
    def of(cls, engine: Engine, exif_orientation: bool = True, output_dtype: str = "float32") -> Identity:
        """The identity of embeddings that this engine makes.

        Raises:
            ValueError: if it knows no preprocessing, or output_dtype is neither "float32" nor "float16".
        """
        if output_dtype not in OUTPUT_DTYPES:
            raise ValueError(f"output_dtype must be one of {', '.join(OUTPUT_DTYPES)}, got {output_dtype!r}")
        if engine.preprocess is None:
            raise ValueError("the engine knows no preprocessing, which is part of what embeddings are")
        preprocess = {**asdict(engine.preprocess), "exif_orientation": exif_orientation}
        if not engine.preprocess.draft:
            del preprocess["draft"]  # as folders of earlier versions have it
        skipped = ", ".join(sorted(engine.plan.skip_quantize))
        dtype = f"{engine.precision} with {skipped} in bf16" if skipped else engine.precision
        return cls(engine.fingerprint, json.loads(json.dumps(preprocess)), dtype, output_dtype=output_dtype)

    @classmethod
    def from_json(cls, text: bytes | None) -> Identity | None:
        """What `to_json` wrote; None for anything else."""
        try:
            content = {"output_dtype": "float32", **json.loads(text or b"")}
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return None

    def to_json(self) -> bytes:
        """As it is noted in the metadata of a part: float32 is not, so that parts of 0.1.0 have the same text."""
        content = asdict(self)
        if self.output_dtype == OUTPUT_DTYPES[0]:
            del content["output_dtype"]
        return json.dumps(content, sort_keys=True).encode()

    def differences(self, other: Identity) -> list[str]:
        """What of this is not as in `other`, each with both values."""
        mine, theirs = ({**asdict(one), **one.preprocess} for one in (self, other))
        names = [name for name in {**mine, **theirs} if name != "preprocess"]
        return [
            f"{name} {mine.get(name)!r}, not {theirs.get(name)!r}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]


def described(model: str, identity: Identity) -> dict[bytes, bytes | str]:
    """The metadata of the schema of embeddings."""
    return {MODEL: model, IDENTITY: identity.to_json()}


def identity_of(metadata: Mapping[bytes, bytes] | None) -> tuple[str, Identity | None]:
    """The model's name and the identity that the metadata of a schema states; None where it states none."""
    metadata = metadata or {}
    return metadata.get(MODEL, b"").decode(), Identity.from_json(metadata.get(IDENTITY))
