"""What an operator may choose, from options of `statsvc serve` or variables STATSVC_<NAME>, read once."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """The service of one store."""

    model_config = SettingsConfigDict(env_prefix="STATSVC_", env_ignore_empty=True, frozen=True, extra="ignore")

    store: str = Field(description="the store: a path, or s3://bucket/prefix; it may appear later")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all, with a token")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: a free one")
    token: SecretStr | None = Field(None, description="bearer token that every request but /healthz must carry")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="origins whose pages may read, separated by commas; none unless asked"
    )
    max_requests: int = Field(1024, ge=1, description="requests answered at a time; more are told to come back")
    max_rows: int = Field(256, ge=1, description="rows of one answer of /targets")
    max_answer_bytes: int = Field(256 << 20, ge=1, description="bytes of one answer that is computed, not served")
    grace_seconds: int = Field(30, ge=0, description="how long transfers may go on after SIGTERM")
    accel_prefix: str | None = Field(
        None, description="internal location of an nginx in front, which then sends the bytes (X-Accel-Redirect)"
    )

    @field_validator("store")
    @classmethod
    def _store_is_no_service(cls, store: str) -> str:
        if store.startswith(("http://", "https://")):
            raise ValueError(
                "a service reads a store itself, not another service: give its path, or s3://bucket/prefix"
            )
        return store

    @model_validator(mode="after")
    def _accel_is_for_files(self) -> Self:
        if self.accel_prefix is not None and "://" in self.store.removeprefix("file://"):
            raise ValueError(
                "accel_prefix is for a store of files, which nginx sends itself; leave it out for objects elsewhere"
            )
        return self

    @field_validator("token")
    @classmethod
    def _token_can_be_sent(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None:
            value = token.get_secret_value()
            if not value.isascii() or not value.isprintable() or " " in value:
                raise ValueError("a bearer token is printable ASCII without spaces")
        return token

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(origin.strip() for origin in value.split(",") if origin.strip())
        return value

    @field_validator("accel_prefix")
    @classmethod
    def _accel_is_a_location(cls, prefix: str | None) -> str | None:
        if prefix is not None and not prefix.startswith("/"):
            raise ValueError("accel_prefix is the path of an internal nginx location, such as /store-files/")
        return prefix if prefix is None or prefix.endswith("/") else f"{prefix}/"
