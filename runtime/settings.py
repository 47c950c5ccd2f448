"""Every setting of every process, declared once.

One file, because the launcher hands each process its share and `tandem config show` lists them all.
"""

from typing import Annotated, Literal

from pydantic import Field

from runtime.config import Settings

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Transport = Literal["auto", "gloo", "shm", "nccl", "cuda_ipc"]
Secret = Annotated[str | None, Field(repr=False)]
"""Shown nowhere and on no command line of ours; TANDEM_<NAME>_FILE names a file that holds it."""


class ProcessSettings(Settings):
    """What every process has."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """auto: text on a terminal, JSON lines elsewhere."""
    model: str = ""
    """Directory or Hugging Face hub id of the checkpoint; empty: the bundled demo model."""
    internal_secret: Secret = None
    """Secret of the calls between our processes; of several, the first is shown and all are accepted."""
    max_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Above this share of the memory of the control group, or of the machine, new requests are refused."""
    admin_key: Secret = None
    """Key for /metrics and /debug/state from other hosts; unset: loopback only."""


class GatewaySettings(ProcessSettings):
    """The gateway: public edge, admission, routing, text."""

    http_port: Port = 8000
    """OpenAI-compatible HTTP."""
    grpc_port: Port = 50051
    """Public gRPC."""
    internal_port: Port = 0
    """gRPC for workers that register; 0: any free port."""
    internal_host: str | None = None
    """Address that the internal port listens on; unset: --host, but of `tandem up` loopback."""
    served_model_name: str | None = None
    """Name of the model in the API; unset: the last part of --model."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the checkpoint's."""
    max_concurrent_requests: Count = 1024
    """Requests in flight; more wait."""
    max_waiting_requests: Annotated[int, Field(ge=0)] = 1024
    """Requests that wait for admission, API keys in turn; more are refused at once with a retry hint."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest life of a request; a client's own deadline only shortens it."""
    migration_timeout_s: Annotated[float, Field(ge=0)] = 20.0
    """A request that has lost its worker waits this long for another, or for its restart."""
    max_body_bytes: Count = 2 * 1024 * 1024
    """Largest HTTP body; gRPC messages have twice this."""
    local_prefill_threshold: Annotated[int, Field(ge=0)] = 0
    """Prompts shorter than this many tokens are prefilled on the decode worker."""
    peer_directory: str = ""
    """Directory in which gateway processes that share the public ports find each other."""
    reflection: bool = True
    """gRPC server reflection on the public port."""
    api_keys: Secret = None
    """Keys of which clients must show one (Bearer), with commas between; unset: everybody is served."""
    share_prefix_cache: bool = False
    """Requests of different API keys may share cached blocks, and see by their speed what others asked."""


class EngineSettings(ProcessSettings):
    """The engine inside a worker."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on a GPU, float32 on a CPU (where exactness is defined)."""
    max_model_len: Count | None = None
    """Longest prompt plus output in tokens; unset: the checkpoint's."""
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    """Tokens in a KV block."""
    kv_cache_memory: str = "auto"
    """Memory of one worker's KV pool, for example 8GiB; auto: 1GiB on a CPU, on a GPU what is free."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of a GPU's memory that is free beside weights and steps, the share of a KV pool that is auto."""
    max_num_seqs: Count = 256
    """Most requests in one step."""
    max_num_batched_tokens: Literal["auto"] | Count = "auto"
    """Most tokens in one step, longer prompts are computed in chunks; auto: 512 on a CPU, 2048 on a GPU."""
    layer_stream_threshold: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """KV of a prompt's chunks of so many tokens leaves by layer groups; 0: never; auto: 256 on a GPU."""
    prefix_cache: bool = True
    """Keep KV blocks after their requests and share them among requests that start alike."""
    scheduling_policy: Literal["fcfs", "priority", "mlfq"] = "fcfs"
    """fcfs: in order of arrival; priority: the requests' own; mlfq: the least served first."""
    preemption_mode: Literal["auto", "swap", "recompute"] = "auto"
    """What becomes of a running request whose KV blocks another one needs."""
    swap_space: str = "1GiB"
    """Host memory of one worker for the KV of preempted requests; 0: none."""
    speculative: str = "auto"
    """off, ngram, or draft:DIR for a draft model; auto: the draft inside the model's directory, if any."""
    num_draft_tokens: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = "auto"
    """Tokens drafted per request and step; auto: as many as pay, so that it is never slower than off."""
    draft_acceptance: Literal["coupled", "rejection"] = "coupled"
    """coupled: the tokens of speculation off; rejection: of the same distribution, whatever the seed."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """auto: on a GPU every rank captures its decode steps at the start and replays them; off: neither."""
    cuda_graph_sizes: list[Annotated[int, Field(ge=1, le=1024)]] = Field(default=[])
    """Numbers of requests that captured steps are padded to; none: 1, 2, 4, 8, 16, ... --max-num-seqs."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Start a decode step before the last has ended, or the next pass of a draft model; auto: on a GPU."""
    threads: Count = 1
    """CPU threads of one worker's tensor operations."""


class WorkerSettings(EngineSettings):
    """A prefill or decode worker."""

    gateway: list[str] = Field(default=["127.0.0.1:50050"])
    """Internal gRPC addresses (host:port) of the gateways to register with."""
    port: Port = 0
    """gRPC for gateways and KV links; 0: any free port."""
    metrics_port: Port = 0
    """HTTP /metrics, /health, /ready and /debug/state; 0: any free port."""
    advertise_host: str | None = None
    """Host that others reach this worker by; auto: the address towards the gateway; unset: --host."""
    worker_id: str | None = None
    """Stable name of this worker; unset: role and a random suffix."""
    tensor_parallel_size: Count = 1
    """Processes that compute the model together, each on a share of its heads."""
    devices: str = ""
    """GPUs of this worker, one for each of these processes, for example 0,1; empty: the CPU."""
    transport: Transport = "auto"
    """How KV slabs move; auto: the best that both ends have. nccl and cuda_ipc need GPUs, shm one host."""
    kv_interface_host: str | None = None
    """Address that the KV data sockets bind to; unset: the advertised one if that is auto, else --host."""


class UpSettings(GatewaySettings, EngineSettings):
    """Everything on this machine: one gateway, N prefill and M decode workers."""

    gateway_processes: Count = 1
    """Gateway processes, which share the public ports; limits on requests are each one's own."""
    prefill: Annotated[int, Field(ge=0)] = 1
    """Prefill workers; 0: co-located, decode workers prefill for themselves."""
    decode: Count = 1
    """Decode workers."""
    prefill_tp: Count = 1
    """Tensor parallel size of each prefill worker."""
    decode_tp: Count = 1
    """Tensor parallel size of each decode worker."""
    prefill_devices: str = ""
    """GPUs of the prefill workers, for example 0,1: --prefill-tp for each in turn; empty: the CPU."""
    decode_devices: str = ""
    """GPUs of the decode workers, for example 2,3: --decode-tp for each in turn; empty: the CPU."""
    transport: Transport = "auto"
    """How KV slabs move between workers."""
    restart_stuck_after_s: Annotated[float, Field(gt=0)] = 30.0
    """A worker that was ready, lives and has not been ready again for so long is killed and started again."""
