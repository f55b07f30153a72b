"""The JSON documents of the service, for its OpenAPI schema and for whoever reads the code first."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

DIGEST = "3f0d6b0c9f3c7a51c1f9e1b0f7ad3c5f1f0b7d1e0b9c4a7f8e6d5c4b3a291807"


class Document(BaseModel):
    """Frozen; unknown fields are a defect of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(BaseModel):
    """RFC 9457: what is wrong, and in `detail` what to do about it."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["no teacher 'sam' in this store; there are dino, siglip"])


class OutputShape(Document):
    tokens: int = Field(examples=[256])
    dim: int = Field(examples=[768])
    grid: tuple[int, int] | None = Field(description="rows and columns of the patches", examples=[[16, 16]])


class CacheSet(Document):
    name: str = Field(examples=["phi-s-3f0d6b0c9f3c-int8"])
    dataset_shards: int
    rows: int = Field(description="rows with a target")
    bytes: int
    status: dict[str, int] = Field(description="rows by status", examples=[{"ok": 250, "undecodable": 1}])
    damaged_commits: int = Field(description="commits that fail their checksum; `statsvc verify` lists them")


class TeacherCard(Document):
    """What is known about one teacher."""

    name: str = Field(examples=["dino"])
    fingerprint: str = Field(description="of everything that decides its numbers", examples=[DIGEST])
    outputs: dict[str, OutputShape]
    preprocessing: dict[str, Any]
    measured_dataset_shards: int
    fits: dict[str, dict[str, str | dict[str, str]]] = Field(
        description="digest, or the reason of a refusal, by output and method",
        examples=[{"patches": {"phi-s": DIGEST, "pca": {"refused": "rank 5 of 768"}}}],
    )
    cache_sets: list[CacheSet]
    links: dict[str, str] = Field(examples=[{"phis": "/teachers/dino/phis"}])


class Teachers(Document):
    teachers: list[TeacherCard]
    rows_per_shard: int = Field(description="row = dataset shard * rows_per_shard + position * views_per_image + view")
    views_per_image: int = Field(description="rows of each sample")


class TransformCard(Document):
    """A fitted transform: y = (x - mean) @ matrix.T. The matrix comes with format=safetensors or npz."""

    teacher: str = Field(examples=["dino"])
    output: str = Field(examples=["patches"])
    method: str = Field(examples=["phi-s"])
    digest: str = Field(description="its identity; targets of two digests are never mixed", examples=[DIGEST])
    alpha: float | None = Field(description="the one gain of the isotropic methods", examples=[0.7412])
    count: int = Field(description="feature vectors it was fitted on")
    images: int = Field(description="images those came from; each view of an image counts as one")
    dim: int = Field(description="channels of a feature", examples=[768])
    rank: int = Field(description="channels of a target", examples=[768])
    mean: list[float] = Field(description="[dim], in the teacher's units")
    rotation: str = Field(examples=["hadamard"])
    hadamard: str = Field(description="construction of the Hadamard matrix", examples=["sylvester(2) x paley1(384)"])
    fingerprint: str = Field(examples=[DIGEST])
    converged: bool = Field(description="whether the pilot is known to be large enough")
    links: dict[str, str] = Field(examples=[{"immutable": f"/transforms/{DIGEST}"}])


class MomentsCard(Document):
    """Statistics of the pilot. The covariance comes with format=npz."""

    teacher: str
    output: str
    count: int = Field(description="feature vectors")
    dim: int
    mean: list[float] = Field(description="[dim]")
    variance: list[float] = Field(description="[dim], the covariance's diagonal, ddof 1")
    digest: str = Field(description="sha256 of count, mean and scatter", examples=[DIGEST])
    fingerprint: str
    links: dict[str, str]


class ShardEntry(Document):
    shard: int = Field(examples=[0])
    rows: int = Field(description="rows with a target", examples=[10000])
    bytes: int = Field(examples=[2621640004])
    crc32c: str = Field(description="of the whole object", examples=["48674bc7"])
    content_crc32c: str = Field(
        description="of its contents, which tells objects apart; the ETag", examples=["1c291ca3"]
    )


class Shards(Document):
    """Committed feature shards of one array."""

    teacher: str
    set: str
    array: str = Field(examples=["patches/codes"])
    transform: str | None = Field(
        description="digest of the transform these targets were made with; null: features in the teacher's space",
        examples=[DIGEST],
    )
    shards: list[ShardEntry]
    damaged: list[int] = Field(
        description="dataset shards whose commit fails its checksum; `statsvc verify --repair` mends them",
        examples=[[]],
    )
    next: str | None = Field(description="where the list goes on", examples=[None])


class Row(Document):
    row: int = Field(description="shard * rows_per_shard + position * views_per_image + view", examples=[42])
    dataset_shard: str | None = Field(description="name of the tar", examples=["train-000000.tar"])
    shard: int
    position: int = Field(description="of the sample in the tar")
    view: int
    status: str = Field(description="absent until the dataset shard is cached", examples=["ok"])
    teachers: dict[str, str] = Field(description="status by teacher", examples=[{"dino": "ok"}])


class Sample(Document):
    """Where a sample lies; a key that several tars have, has rows in each."""

    key: str = Field(examples=["000042"])
    rows: list[Row]


class Names(Document):
    names: list[str] = Field(examples=[["000000.json", "000001.json"]])


class Progress(Document):
    """How far the run is."""

    state: str = Field(description="waiting (no store yet), running, stopped or finished", examples=["running"])
    dataset_shards: dict[str, int | None] = Field(examples=[{"planned": 100, "indexed": 100, "quarantined": 0}])
    samples: int
    rows_per_second: float
    teachers: dict[str, Any]


class Health(Document):
    status: str = Field(examples=["ok"])


class Report(Document):
    """What is known about the fits of a teacher, and the drift of its cached targets from the pilot."""

    teacher: str = Field(examples=["dino"])
    fits: dict[str, dict[str, dict[str, Any]]] = Field(
        description="by output and method", examples=[{"patches": {"phi-s": {"alpha": 0.7412, "converged": True}}}]
    )
    drift: dict[str, dict[str, list[dict[str, Any]]]] = Field(
        description="by cache set and output, for each dataset shard: rows, rms of the channel means (0 is expected), "
        "mean, least and largest of the channel variances (1 is expected of phi-s and standardize)"
    )
    damaged: list[int] = Field(
        description="dataset shards whose drift cannot be read; `statsvc verify --repair` mends them", examples=[[]]
    )
