from protos.tandem.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenRequest(_message.Message):
    __slots__ = ("hello", "rendezvous", "offer", "frame", "commit", "cancel", "ping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    rendezvous: Rendezvous
    offer: Offer
    frame: FrameHeader
    commit: Commit
    cancel: Cancel
    ping: LinkPing
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., rendezvous: _Optional[_Union[Rendezvous, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., frame: _Optional[_Union[FrameHeader, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ping: _Optional[_Union[LinkPing, _Mapping]] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("welcome", "rendezvous", "reserved", "rejected", "credit", "commit_ack", "cancel", "ping")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_ACK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    rendezvous: Rendezvous
    reserved: Reserved
    rejected: Rejected
    credit: Credit
    commit_ack: CommitAck
    cancel: Cancel
    ping: LinkPing
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., rendezvous: _Optional[_Union[Rendezvous, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., commit_ack: _Optional[_Union[CommitAck, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., ping: _Optional[_Union[LinkPing, _Mapping]] = ...) -> None: ...

class KvGroup(_message.Message):
    __slots__ = ("name", "num_layers", "num_kv_heads", "head_dim", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    def __init__(self, name: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class KvFacts(_message.Message):
    __slots__ = ("protocol_major", "model_hash", "tokenizer_hash", "block_size", "max_model_len", "rope", "groups")
    PROTOCOL_MAJOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    protocol_major: int
    model_hash: str
    tokenizer_hash: str
    block_size: int
    max_model_len: int
    rope: str
    groups: _containers.RepeatedCompositeFieldContainer[KvGroup]
    def __init__(self, protocol_major: _Optional[int] = ..., model_hash: _Optional[str] = ..., tokenizer_hash: _Optional[str] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., rope: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[KvGroup, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("sender", "receiver_boot_id", "stage", "sender_rank", "receiver_rank", "facts", "transports", "transport_proofs", "num_ranks")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SENDER_RANK_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_RANK_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_PROOFS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    sender: _common_pb2.WorkerIdentity
    receiver_boot_id: str
    stage: int
    sender_rank: int
    receiver_rank: int
    facts: KvFacts
    transports: _containers.RepeatedScalarFieldContainer[str]
    transport_proofs: _containers.RepeatedScalarFieldContainer[bytes]
    num_ranks: int
    def __init__(self, sender: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., receiver_boot_id: _Optional[str] = ..., stage: _Optional[int] = ..., sender_rank: _Optional[int] = ..., receiver_rank: _Optional[int] = ..., facts: _Optional[_Union[KvFacts, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., transport_proofs: _Optional[_Iterable[bytes]] = ..., num_ranks: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("epoch", "transport", "frame_sizes", "num_slabs", "num_groups", "num_ranks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    FRAME_SIZES_FIELD_NUMBER: _ClassVar[int]
    NUM_SLABS_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    transport: str
    frame_sizes: _containers.RepeatedScalarFieldContainer[int]
    num_slabs: int
    num_groups: int
    num_ranks: int
    def __init__(self, epoch: _Optional[int] = ..., transport: _Optional[str] = ..., frame_sizes: _Optional[_Iterable[int]] = ..., num_slabs: _Optional[int] = ..., num_groups: _Optional[int] = ..., num_ranks: _Optional[int] = ...) -> None: ...

class Rendezvous(_message.Message):
    __slots__ = ("blob",)
    BLOB_FIELD_NUMBER: _ClassVar[int]
    blob: bytes
    def __init__(self, blob: _Optional[bytes] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("transfer_id", "num_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    num_tokens: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("transfer_id", "ticket", "num_cached_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    ticket: int
    num_cached_tokens: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., ticket: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("transfer_id", "code", "reason", "retryable")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    code: int
    reason: str
    retryable: bool
    def __init__(self, transfer_id: _Optional[bytes] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("ticket", "sequence", "group", "first_block", "num_blocks", "first_layer", "num_layers", "size_index", "checksum")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SIZE_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    sequence: int
    group: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int
    size_index: int
    checksum: int
    def __init__(self, ticket: _Optional[int] = ..., sequence: _Optional[int] = ..., group: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., size_index: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("slabs",)
    SLABS_FIELD_NUMBER: _ClassVar[int]
    slabs: int
    def __init__(self, slabs: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("ticket", "transfer_id", "num_frames", "checksum", "first_tokens", "cached_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    transfer_id: bytes
    num_frames: int
    checksum: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    cached_tokens: int
    def __init__(self, ticket: _Optional[int] = ..., transfer_id: _Optional[bytes] = ..., num_frames: _Optional[int] = ..., checksum: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("choice", "token_id", "logprob", "finish_reason")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    choice: int
    token_id: int
    logprob: _common_pb2.TokenLogprob
    finish_reason: _common_pb2.FinishReason
    def __init__(self, choice: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[_Union[_common_pb2.TokenLogprob, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ...) -> None: ...

class CommitAck(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    def __init__(self, transfer_id: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("transfer_id", "reason")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    reason: str
    def __init__(self, transfer_id: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class LinkPing(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...
