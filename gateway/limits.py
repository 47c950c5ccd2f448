"""The most that a request may ask for. docs/limits.md is made from this (`python tools/limits_table.py`)."""

from dataclasses import dataclass
from typing import Literal

MAX_URL_BYTES = 8 * 1024
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
MAX_JSON_DEPTH = 64
MAX_REQUEST_ID_CHARS = 128

MAX_MESSAGES = 2048
MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 256
MAX_BAD_WORDS = 32
MAX_BAD_WORD_BYTES = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_GRAMMAR_BYTES = 128 * 1024
MAX_CACHE_SALT_BYTES = 256
MAX_LENGTH_PENALTY = 5.0

Faces = Literal["both", "http", "grpc"]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One row. More than `most` is refused by naming `field`."""

    field: str
    """As both faces call it, or the one that has it."""
    most: int | str
    unit: str
    http_status: int = 400
    """Over gRPC it is INVALID_ARGUMENT, but RESOURCE_EXHAUSTED for a whole message."""
    faces: Faces = "both"


LIMITS = (
    Limit(field="the body", most="--max-body-bytes", unit="bytes; a gRPC message twice", http_status=413),
    Limit(field="the body's depth", most=MAX_JSON_DEPTH, unit="arrays and objects", faces="http"),
    Limit(field="the URL", most=MAX_URL_BYTES, unit="bytes", http_status=414, faces="http"),
    Limit(field="the headers", most=MAX_HEADERS, unit="headers", http_status=431, faces="http"),
    Limit(field="the headers' size", most=MAX_HEADER_BYTES, unit="bytes", http_status=431, faces="http"),
    Limit(field="request_id", most=MAX_REQUEST_ID_CHARS, unit="visible ASCII characters", faces="grpc"),
    Limit(field="prompt", most="the context less 1", unit="tokens"),
    Limit(field="messages", most=MAX_MESSAGES, unit="messages"),
    Limit(field="max_tokens", most="the context less the prompt", unit="tokens"),
    Limit(field="min_tokens", most="max_tokens", unit="tokens"),
    Limit(field="n", most=MAX_CHOICES, unit="choices"),
    Limit(field="best_of", most=MAX_CHOICES, unit="choices"),
    Limit(field="stop", most=MAX_STOPS, unit="strings"),
    Limit(field="stop, each", most=MAX_STOP_BYTES, unit="bytes"),
    Limit(field="stop_token_ids", most=MAX_STOP_TOKEN_IDS, unit="token ids"),
    Limit(field="bad_words", most=MAX_BAD_WORDS, unit="words"),
    Limit(field="bad_words, each", most=MAX_BAD_WORD_BYTES, unit="bytes"),
    Limit(field="allowed_token_ids", most="the vocabulary", unit="token ids"),
    Limit(field="logprobs", most=MAX_LOGPROBS, unit="alternatives (chat: top_logprobs)"),
    Limit(field="prompt_logprobs", most=MAX_LOGPROBS, unit="alternatives"),
    Limit(field="logit_bias", most=MAX_LOGIT_BIAS, unit="token ids"),
    Limit(field="structured_output", most=MAX_GRAMMAR_BYTES, unit="bytes (HTTP: whichever field holds it)"),
    Limit(field="cache_salt", most=MAX_CACHE_SALT_BYTES, unit="bytes"),
    Limit(field="seed", most="2^63 - 1", unit="", faces="http"),
    Limit(field="priority", most="2^31 - 1", unit="", faces="http"),
)  # fmt: skip
"""In the order of the docs. Ranges of numbers are `validation.FLOAT_RANGES`."""
