"""Configuration: one frozen dataclass a component, a docstring under each field.

A component receives *its* section and never reads the environment. `ucm.config_loader` fills these
from the command line, the environment, a TOML file and the defaults, in that order of precedence.
Sizes are bytes; a file or flag may say `4GiB`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30

POLICY_NAMES = ("tree-gdsf", "lru", "s3-fifo")
CODEC_NAMES = ("raw", "bp-zstd", "int8", "fp8", "int4")
"""Eviction policies, the default first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """The daemon's sockets, sessions and limits on calls."""

    socket_path: Path = Path("/tmp/ucm/ucm.sock")  # noqa: S108  replaced by the loader
    """gRPC socket for engines, mode 0660. `<socket>.door` passes descriptors and `<socket>.admin`
    takes administration calls. The loader's default is in the user's runtime folder."""
    allowed_uids: tuple[int, ...] = ()
    """Users who may connect besides the daemon's own; the door checks them by SO_PEERCRED."""
    max_sessions: int = 64
    """Connections at once; each holds a staging arena."""
    max_namespaces: int = 16
    """Open namespaces; each holds an arena and an index."""
    staging_bytes: int = 256 * MIB
    """Staging arena of one session: what it may have in flight towards the store. Sparse: costs
    memory only where it is written."""
    max_keys_per_call: int = 16384
    """Longest list of keys in one call: half a million tokens of 32-token blocks."""
    max_message_bytes: int = 8 * MIB
    """Largest gRPC message; names and checksums only, so small."""
    rpc_threads: int = 16
    """Threads that answer calls. Loads that wait for the disk and flushes hold at most half of
    them, stores that are copied a quarter; one more is refused with a retry hint."""
    max_waiting_loads: int = 8
    """Loads that wait for the disk at once, but never more than half of `rpc_threads`. Twice as
    many are in service at once, from memory or not. On a busy machine each takes as many times
    longer; fewer mean more refusals, with retry hints."""
    max_crowded_loads: int = 0
    """Loads in service at once while more come than those limits admit: few, because loads share
    processors and a disk, so that who is admitted is about as fast as alone. 0: half of the
    processors that the daemon may use, for a load keeps one busy there and one at its client."""
    max_calls_per_session: int = 8
    """Calls of one session in service at once; one more is refused with a retry hint, so that no
    client holds all the threads. An engine makes two: one on its step path, one behind it. Calls at
    the door are none of them: the session has a thread there, which serves one at a time."""
    inflight_bytes_per_session: int = 1 * GIB
    """Bytes that the disk may be reading for one session. A load that needs more gets its leading
    blocks, and NO_SPACE for the others, so that no client fills the queue of reads."""
    drain_timeout_s: float = 10.0
    """On SIGTERM: how long leases may run out and accepted blocks be flushed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The host-memory tier."""

    capacity_bytes: int = 4 * GIB
    """Sum over all namespaces' arenas. Sparse until used, but for `prefault_bytes`. A namespace
    keeps what it has used as long as it is open, whatever it has evicted: an arena is sealed and
    gives no pages back. When another needs memory, namespaces that nobody uses are closed."""
    prefault_bytes: int = 256 * MIB
    """How far ahead of use each namespace's memory is made real, in the background and in pages of
    2 MiB where the kernel makes them, so that stores and loads do not wait for it to find pages
    (5 us each) and read with less processor time; at most an eighth of the capacity, and a quarter
    of this before the first use. Counts as used. 0 switches it off."""
    high_watermark: float = 0.95
    """Eviction starts above this share of the capacity..."""
    low_watermark: float = 0.90
    """... and goes on down to this one, so that it runs in batches."""
    max_pinned_share: float = 0.5
    """Share of the memory a namespace can use that pins may keep, so that loads find room."""
    max_pin_s: float = 4 * 3600.0
    """Longest that a pin lasts; an engine that still needs it pins again."""
    policy: str = "tree-gdsf"
    """Who goes first: `tree-gdsf` keeps what is dear to recompute and often used, `lru` what was
    used last, `s3-fifo` what was used twice. All keep whole prefixes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeConfig:
    """The NVMe tier."""

    path: Path | None = None
    """Data folder; None switches the tier off. Must belong to the daemon's user."""
    capacity_bytes: int = 16 * GIB
    """Sum of all segments."""
    segment_bytes: int = 1 * GIB
    """Size of one preallocated segment file."""
    codec: str = "raw"
    """How new namespaces encode blocks on the disk: `raw`, `bp-zstd` (exact, 30 % smaller in
    bfloat16), or `int8`, `fp8`, `int4`, which lose precision: they serve namespaces that accept a
    loss, the others get `bp-zstd`. A namespace keeps the codec that it was made with. Memory is
    always raw, because clients map it."""
    high_watermark: float = 0.95
    """As for memory."""
    low_watermark: float = 0.90
    """As for memory."""
    admission: str = "always"
    """Which blocks are written: `always` each, or `second-touch` those that are stored or loaded
    again within an hour. That saves the disk most writes (in public traces 58 to 76 % of blocks
    are never used again) and costs a miss where a block's first reuse finds it gone from memory.
    A flush waits for what was admitted, not for the rest."""
    policy: str = "tree-gdsf"
    """As for memory."""
    io: str = "auto"
    """How device memory is read into: not at all (`posix`), directly (`gds`, GPUDirect Storage),
    through pinned buffers of kvikio (`kvikio-compat`) or of ours (`pinned`); `auto` takes the best
    that works here. Host memory is POSIX in all. `ucm status` says which and why, `ucm doctor`
    what is missing."""
    io_threads: int = 8
    """Threads of preadv/pwritev; 8 to 16 reach the ceiling of one device."""
    max_read_bytes_per_s: int = 0
    """Most bytes that are read from the disk in a second, for a disk that others use too; 0 is no
    limit. Clients that read the files themselves are told, and each keeps to it for itself."""
    write_queue_bytes: int = 1 * GIB
    """Accepted blocks that wait for the disk; above it new ones stay in memory only."""
    commit_blocks: int = 256
    """Blocks that share one fdatasync and one index transaction, at most."""
    commit_interval_s: float = 0.005
    """How long a commit waits for company."""
    index_map_bytes: int = 4 * GIB
    """Address space of one namespace's LMDB index; sparse. Records take at most a quarter, so that
    deletions always find room: some four million blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionConfig:
    """What tree-GDSF takes a hit to be worth; the other policies do not ask."""

    attention_tokens: float = 8192.0
    """Position in a prompt at which attention costs the engine as much as the weights, which is
    P / (2*L*H*D) for P weights, L layers and H query heads of size D: 3000 for SmolLM2-135M, 25000
    for 7B models. The policy takes a root, so the middle serves both."""
    nvme_load_share: float = 0.1
    """Time to load a block from NVMe over the time to compute it at the beginning of a prompt:
    0.001 for an engine on a CPU, 0.3 for one on a fast GPU beside a slow disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SummariesConfig:
    """Summaries of blocks, for namespaces that somebody opened with a kind of them."""

    capacity_bytes: int = 256 * MIB
    """Encoded summaries in memory, over all namespaces; each may use half of what others leave, so
    that the first does not starve the next. A summary of SmolLM2-135M is 36 KiB: 1/20 of its block
    in bf16, 1/40 in fp32. Sparse: costs memory only where it is written."""
    table_bytes: int = 128 * MIB
    """Tables that selections are computed from, for the sequences that were asked about last."""
    max_queued_blocks: int = 1024
    """Blocks in memory that wait for their summary to be computed; what finds no place is computed
    when somebody asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionsConfig:
    """Collections of documents, and blocks of deleted ones."""

    bar_s: float = 30 * 86400.0
    """How long, after a deleted document was erased, no engine may store its blocks again; putting
    a document that names them ends it at once. It outlasts engines that still hold them in their
    own memory. Costs 100 bytes of memory a block. 0 is for good."""
    map_bytes: int = 1 * GIB
    """Address space of the registry's LMDB; sparse. Records take at most a quarter, so that
    deletions always find room: about two million blocks of documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """Limits on work in flight and on leases."""

    max_queued_transfers: int = 4096
    """Promotions that may wait; one more is refused."""
    max_leases_per_session: int = 256
    """Leases a session may hold at once."""
    progress_bytes: int = 4 * MIB
    """Memory that a session and its daemon share for the progress of layer by layer promotions: 8
    bytes a slab of the blocks that are being promoted, 64 MiB of them in 4 KiB slabs cost 128 KiB.
    A load that finds no room there gets its blocks that are in memory, and NO_SPACE for the others.
    Sparse: costs memory only where it is written."""
    lease_timeout_s: float = 30.0
    """A lease that nobody completes ends after this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """The Prometheus endpoint."""

    port: int = 0
    """TCP port on loopback; 0 switches it off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Logging."""

    level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaConfig:
    """What one tenant may hold over all its namespaces: `[quota.TENANT]`, in a file only.

    `[quota."*"]` is for tenants that have no section of their own, `[quota.""]` for engines that
    name no tenant. Reservations are for named tenants only and together at most the capacity.
    """

    memory_bytes: int = 0
    """Most host memory; 0 is no limit. At its quota a tenant evicts its own blocks."""
    memory_reserved_bytes: int = 0
    """Host memory that no other tenant takes."""
    nvme_bytes: int = 0
    """Most disk space, in whole segments (rounded down); 0 is no limit."""
    nvme_reserved_bytes: int = 0
    """Disk space that no other tenant takes, in whole segments (rounded up)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The daemon's whole configuration, one section a component."""

    service: ServiceConfig = field(default_factory=ServiceConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    nvme: NvmeConfig = field(default_factory=NvmeConfig)
    eviction: EvictionConfig = field(default_factory=EvictionConfig)
    summaries: SummariesConfig = field(default_factory=SummariesConfig)
    collections: CollectionsConfig = field(default_factory=CollectionsConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    quota: Mapping[str, QuotaConfig] = field(default_factory=dict)
    """By the tenant's name."""
