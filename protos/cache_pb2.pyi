from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_MEMORY: _ClassVar[Tier]
    TIER_NVME: _ClassVar[Tier]

class LoadStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOAD_STATUS_UNSPECIFIED: _ClassVar[LoadStatus]
    LOAD_STATUS_READY: _ClassVar[LoadStatus]
    LOAD_STATUS_MISS: _ClassVar[LoadStatus]
    LOAD_STATUS_CORRUPT: _ClassVar[LoadStatus]
    LOAD_STATUS_TIMED_OUT: _ClassVar[LoadStatus]
    LOAD_STATUS_NO_SPACE: _ClassVar[LoadStatus]

class LoadMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOAD_MODE_UNSPECIFIED: _ClassVar[LoadMode]
    LOAD_MODE_MAPPED: _ClassVar[LoadMode]
    LOAD_MODE_DIRECT: _ClassVar[LoadMode]

class SourceKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_KIND_UNSPECIFIED: _ClassVar[SourceKind]
    SOURCE_KIND_MEMORY: _ClassVar[SourceKind]
    SOURCE_KIND_PROMOTING: _ClassVar[SourceKind]
    SOURCE_KIND_EXTENT: _ClassVar[SourceKind]

class StoreStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STORE_STATUS_UNSPECIFIED: _ClassVar[StoreStatus]
    STORE_STATUS_WANTED: _ClassVar[StoreStatus]
    STORE_STATUS_ACCEPTED: _ClassVar[StoreStatus]
    STORE_STATUS_PRESENT: _ClassVar[StoreStatus]
    STORE_STATUS_NO_SPACE: _ClassVar[StoreStatus]
    STORE_STATUS_ORPHAN: _ClassVar[StoreStatus]
    STORE_STATUS_CORRUPT: _ClassVar[StoreStatus]
    STORE_STATUS_REFUSED: _ClassVar[StoreStatus]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]

class SummaryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUMMARY_KIND_UNSPECIFIED: _ClassVar[SummaryKind]
    SUMMARY_KIND_GSA_K4: _ClassVar[SummaryKind]
    SUMMARY_KIND_GSA_2: _ClassVar[SummaryKind]
    SUMMARY_KIND_SHADOW2: _ClassVar[SummaryKind]
    SUMMARY_KIND_SHADOW4: _ClassVar[SummaryKind]
    SUMMARY_KIND_MEAN: _ClassVar[SummaryKind]
    SUMMARY_KIND_BOX: _ClassVar[SummaryKind]
    SUMMARY_KIND_CUBOID: _ClassVar[SummaryKind]
    SUMMARY_KIND_HASH128: _ClassVar[SummaryKind]
    SUMMARY_KIND_MAXNORM: _ClassVar[SummaryKind]

class SummaryStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUMMARY_STATUS_UNSPECIFIED: _ClassVar[SummaryStatus]
    SUMMARY_STATUS_READY: _ClassVar[SummaryStatus]
    SUMMARY_STATUS_NO_SUMMARY: _ClassVar[SummaryStatus]
    SUMMARY_STATUS_MISS: _ClassVar[SummaryStatus]

class SelectMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SELECT_MODE_UNSPECIFIED: _ClassVar[SelectMode]
    SELECT_MODE_SHARED: _ClassVar[SelectMode]
    SELECT_MODE_PER_HEAD: _ClassVar[SelectMode]

class PutOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUT_OUTCOME_UNSPECIFIED: _ClassVar[PutOutcome]
    PUT_OUTCOME_NEW: _ClassVar[PutOutcome]
    PUT_OUTCOME_KNOWN: _ClassVar[PutOutcome]
    PUT_OUTCOME_CHANGED: _ClassVar[PutOutcome]
TIER_UNSPECIFIED: Tier
TIER_MEMORY: Tier
TIER_NVME: Tier
LOAD_STATUS_UNSPECIFIED: LoadStatus
LOAD_STATUS_READY: LoadStatus
LOAD_STATUS_MISS: LoadStatus
LOAD_STATUS_CORRUPT: LoadStatus
LOAD_STATUS_TIMED_OUT: LoadStatus
LOAD_STATUS_NO_SPACE: LoadStatus
LOAD_MODE_UNSPECIFIED: LoadMode
LOAD_MODE_MAPPED: LoadMode
LOAD_MODE_DIRECT: LoadMode
SOURCE_KIND_UNSPECIFIED: SourceKind
SOURCE_KIND_MEMORY: SourceKind
SOURCE_KIND_PROMOTING: SourceKind
SOURCE_KIND_EXTENT: SourceKind
STORE_STATUS_UNSPECIFIED: StoreStatus
STORE_STATUS_WANTED: StoreStatus
STORE_STATUS_ACCEPTED: StoreStatus
STORE_STATUS_PRESENT: StoreStatus
STORE_STATUS_NO_SPACE: StoreStatus
STORE_STATUS_ORPHAN: StoreStatus
STORE_STATUS_CORRUPT: StoreStatus
STORE_STATUS_REFUSED: StoreStatus
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_BFLOAT16: Dtype
SUMMARY_KIND_UNSPECIFIED: SummaryKind
SUMMARY_KIND_GSA_K4: SummaryKind
SUMMARY_KIND_GSA_2: SummaryKind
SUMMARY_KIND_SHADOW2: SummaryKind
SUMMARY_KIND_SHADOW4: SummaryKind
SUMMARY_KIND_MEAN: SummaryKind
SUMMARY_KIND_BOX: SummaryKind
SUMMARY_KIND_CUBOID: SummaryKind
SUMMARY_KIND_HASH128: SummaryKind
SUMMARY_KIND_MAXNORM: SummaryKind
SUMMARY_STATUS_UNSPECIFIED: SummaryStatus
SUMMARY_STATUS_READY: SummaryStatus
SUMMARY_STATUS_NO_SUMMARY: SummaryStatus
SUMMARY_STATUS_MISS: SummaryStatus
SELECT_MODE_UNSPECIFIED: SelectMode
SELECT_MODE_SHARED: SelectMode
SELECT_MODE_PER_HEAD: SelectMode
PUT_OUTCOME_UNSPECIFIED: PutOutcome
PUT_OUTCOME_NEW: PutOutcome
PUT_OUTCOME_KNOWN: PutOutcome
PUT_OUTCOME_CHANGED: PutOutcome

class Layout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "dtype")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: Dtype
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ...) -> None: ...

class NamespaceSpec(_message.Message):
    __slots__ = ("layout", "model_id", "weights_digest", "tenant", "salt", "kv_quantization", "slab_layout", "rope_kind", "rope_base", "rope_scaling", "position_offset", "attention_kind", "tp_rank", "tp_size", "pp_stage", "pp_size", "first_layer", "kv_group", "lora_id", "lora_path", "cross_layer", "accepts_lossy")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    KV_QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    SLAB_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ROPE_KIND_FIELD_NUMBER: _ClassVar[int]
    ROPE_BASE_FIELD_NUMBER: _ClassVar[int]
    ROPE_SCALING_FIELD_NUMBER: _ClassVar[int]
    POSITION_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_KIND_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_STAGE_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    KV_GROUP_FIELD_NUMBER: _ClassVar[int]
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_PATH_FIELD_NUMBER: _ClassVar[int]
    CROSS_LAYER_FIELD_NUMBER: _ClassVar[int]
    ACCEPTS_LOSSY_FIELD_NUMBER: _ClassVar[int]
    layout: Layout
    model_id: str
    weights_digest: str
    tenant: str
    salt: str
    kv_quantization: str
    slab_layout: str
    rope_kind: str
    rope_base: float
    rope_scaling: str
    position_offset: int
    attention_kind: str
    tp_rank: int
    tp_size: int
    pp_stage: int
    pp_size: int
    first_layer: int
    kv_group: int
    lora_id: str
    lora_path: str
    cross_layer: str
    accepts_lossy: bool
    def __init__(self, layout: _Optional[_Union[Layout, _Mapping]] = ..., model_id: _Optional[str] = ..., weights_digest: _Optional[str] = ..., tenant: _Optional[str] = ..., salt: _Optional[str] = ..., kv_quantization: _Optional[str] = ..., slab_layout: _Optional[str] = ..., rope_kind: _Optional[str] = ..., rope_base: _Optional[float] = ..., rope_scaling: _Optional[str] = ..., position_offset: _Optional[int] = ..., attention_kind: _Optional[str] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., pp_stage: _Optional[int] = ..., pp_size: _Optional[int] = ..., first_layer: _Optional[int] = ..., kv_group: _Optional[int] = ..., lora_id: _Optional[str] = ..., lora_path: _Optional[str] = ..., cross_layer: _Optional[str] = ..., accepts_lossy: bool = ...) -> None: ...

class DoorRequest(_message.Message):
    __slots__ = ("hello", "open_namespace", "open_segment", "open_progress", "open_summaries", "lookup", "prepare_load", "begin_load", "complete_load", "release", "give_up", "made")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OPEN_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OPEN_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    OPEN_SUMMARIES_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    PREPARE_LOAD_FIELD_NUMBER: _ClassVar[int]
    BEGIN_LOAD_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_LOAD_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    GIVE_UP_FIELD_NUMBER: _ClassVar[int]
    MADE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    open_namespace: OpenNamespace
    open_segment: OpenSegment
    open_progress: OpenProgress
    open_summaries: OpenSummaries
    lookup: LookupRequest
    prepare_load: PrepareLoadRequest
    begin_load: BeginLoadRequest
    complete_load: CompleteLoadRequest
    release: ReleaseRequest
    give_up: GiveUp
    made: str
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., open_namespace: _Optional[_Union[OpenNamespace, _Mapping]] = ..., open_segment: _Optional[_Union[OpenSegment, _Mapping]] = ..., open_progress: _Optional[_Union[OpenProgress, _Mapping]] = ..., open_summaries: _Optional[_Union[OpenSummaries, _Mapping]] = ..., lookup: _Optional[_Union[LookupRequest, _Mapping]] = ..., prepare_load: _Optional[_Union[PrepareLoadRequest, _Mapping]] = ..., begin_load: _Optional[_Union[BeginLoadRequest, _Mapping]] = ..., complete_load: _Optional[_Union[CompleteLoadRequest, _Mapping]] = ..., release: _Optional[_Union[ReleaseRequest, _Mapping]] = ..., give_up: _Optional[_Union[GiveUp, _Mapping]] = ..., made: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "client")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    client: str
    def __init__(self, protocol_version: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class OpenNamespace(_message.Message):
    __slots__ = ("spec", "namespace", "summary")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    spec: NamespaceSpec
    namespace: bytes
    summary: SummaryKind
    def __init__(self, spec: _Optional[_Union[NamespaceSpec, _Mapping]] = ..., namespace: _Optional[bytes] = ..., summary: _Optional[_Union[SummaryKind, str]] = ...) -> None: ...

class OpenSegment(_message.Message):
    __slots__ = ("namespace", "segment")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    segment: int
    def __init__(self, namespace: _Optional[bytes] = ..., segment: _Optional[int] = ...) -> None: ...

class OpenProgress(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GiveUp(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenSummaries(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    def __init__(self, namespace: _Optional[bytes] = ...) -> None: ...

class DoorReply(_message.Message):
    __slots__ = ("welcome", "opened", "error", "segment", "progress", "summaries", "found", "prepared", "begun", "completed", "released", "elsewhere")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMMARIES_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    opened: NamespaceOpened
    error: DoorError
    segment: SegmentOpened
    progress: ProgressOpened
    summaries: SummariesOpened
    found: LookupReply
    prepared: PrepareLoadReply
    begun: BeginLoadReply
    completed: CompleteLoadReply
    released: ReleaseReply
    elsewhere: Elsewhere
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., opened: _Optional[_Union[NamespaceOpened, _Mapping]] = ..., error: _Optional[_Union[DoorError, _Mapping]] = ..., segment: _Optional[_Union[SegmentOpened, _Mapping]] = ..., progress: _Optional[_Union[ProgressOpened, _Mapping]] = ..., summaries: _Optional[_Union[SummariesOpened, _Mapping]] = ..., found: _Optional[_Union[LookupReply, _Mapping]] = ..., prepared: _Optional[_Union[PrepareLoadReply, _Mapping]] = ..., begun: _Optional[_Union[BeginLoadReply, _Mapping]] = ..., completed: _Optional[_Union[CompleteLoadReply, _Mapping]] = ..., released: _Optional[_Union[ReleaseReply, _Mapping]] = ..., elsewhere: _Optional[_Union[Elsewhere, _Mapping]] = ...) -> None: ...

class Elsewhere(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "daemon_version", "token", "staging_bytes", "max_keys_per_call", "max_message_bytes", "max_read_bytes_per_s", "board_bytes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    BOARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    daemon_version: str
    token: bytes
    staging_bytes: int
    max_keys_per_call: int
    max_message_bytes: int
    max_read_bytes_per_s: int
    board_bytes: int
    def __init__(self, protocol_version: _Optional[int] = ..., daemon_version: _Optional[str] = ..., token: _Optional[bytes] = ..., staging_bytes: _Optional[int] = ..., max_keys_per_call: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_read_bytes_per_s: _Optional[int] = ..., board_bytes: _Optional[int] = ...) -> None: ...

class NamespaceOpened(_message.Message):
    __slots__ = ("namespace", "arena_bytes", "summary")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    arena_bytes: int
    summary: SummaryKind
    def __init__(self, namespace: _Optional[bytes] = ..., arena_bytes: _Optional[int] = ..., summary: _Optional[_Union[SummaryKind, str]] = ...) -> None: ...

class SegmentOpened(_message.Message):
    __slots__ = ("file_id", "is_direct")
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    IS_DIRECT_FIELD_NUMBER: _ClassVar[int]
    file_id: int
    is_direct: bool
    def __init__(self, file_id: _Optional[int] = ..., is_direct: bool = ...) -> None: ...

class ProgressOpened(_message.Message):
    __slots__ = ("area_bytes",)
    AREA_BYTES_FIELD_NUMBER: _ClassVar[int]
    area_bytes: int
    def __init__(self, area_bytes: _Optional[int] = ...) -> None: ...

class SummariesOpened(_message.Message):
    __slots__ = ("area_bytes",)
    AREA_BYTES_FIELD_NUMBER: _ClassVar[int]
    area_bytes: int
    def __init__(self, area_bytes: _Optional[int] = ...) -> None: ...

class DoorError(_message.Message):
    __slots__ = ("error", "message", "retry_after_ms")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    error: str
    message: str
    retry_after_ms: int
    def __init__(self, error: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: bytes
    def __init__(self, tiers: _Optional[bytes] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("namespace", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class PrefetchReply(_message.Message):
    __slots__ = ("queued",)
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    queued: int
    def __init__(self, queued: _Optional[int] = ...) -> None: ...

class PrepareLoadRequest(_message.Message):
    __slots__ = ("namespace", "keys", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    timeout_s: float
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class PrepareLoadReply(_message.Message):
    __slots__ = ("lease_id", "timeout_s", "statuses", "tiers", "offsets", "checksums")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    timeout_s: float
    statuses: bytes
    tiers: bytes
    offsets: _containers.RepeatedScalarFieldContainer[int]
    checksums: bytes
    def __init__(self, lease_id: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., statuses: _Optional[bytes] = ..., tiers: _Optional[bytes] = ..., offsets: _Optional[_Iterable[int]] = ..., checksums: _Optional[bytes] = ...) -> None: ...

class BeginLoadRequest(_message.Message):
    __slots__ = ("namespace", "keys", "mode", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    mode: LoadMode
    timeout_s: float
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., mode: _Optional[_Union[LoadMode, str]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class BeginLoadReply(_message.Message):
    __slots__ = ("lease_id", "timeout_s", "statuses", "sources", "tiers", "offsets", "checksums", "slots", "segments", "file_ids", "slot_offsets", "generations", "progress_offset", "progress_serial", "summary_bytes")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    FILE_IDS_FIELD_NUMBER: _ClassVar[int]
    SLOT_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_OFFSET_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_SERIAL_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    timeout_s: float
    statuses: bytes
    sources: bytes
    tiers: bytes
    offsets: _containers.RepeatedScalarFieldContainer[int]
    checksums: bytes
    slots: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    file_ids: _containers.RepeatedScalarFieldContainer[int]
    slot_offsets: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    progress_offset: int
    progress_serial: int
    summary_bytes: int
    def __init__(self, lease_id: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., statuses: _Optional[bytes] = ..., sources: _Optional[bytes] = ..., tiers: _Optional[bytes] = ..., offsets: _Optional[_Iterable[int]] = ..., checksums: _Optional[bytes] = ..., slots: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ..., file_ids: _Optional[_Iterable[int]] = ..., slot_offsets: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., progress_offset: _Optional[int] = ..., progress_serial: _Optional[int] = ..., summary_bytes: _Optional[int] = ...) -> None: ...

class CompleteLoadRequest(_message.Message):
    __slots__ = ("lease_id", "corrupt")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    corrupt: bytes
    def __init__(self, lease_id: _Optional[bytes] = ..., corrupt: _Optional[bytes] = ...) -> None: ...

class CompleteLoadReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrepareStoreRequest(_message.Message):
    __slots__ = ("namespace", "parent", "keys")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    parent: bytes
    keys: bytes
    def __init__(self, namespace: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class PrepareStoreReply(_message.Message):
    __slots__ = ("lease_id", "timeout_s", "statuses", "offsets", "summary_bytes")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    timeout_s: float
    statuses: bytes
    offsets: _containers.RepeatedScalarFieldContainer[int]
    summary_bytes: int
    def __init__(self, lease_id: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., statuses: _Optional[bytes] = ..., offsets: _Optional[_Iterable[int]] = ..., summary_bytes: _Optional[int] = ...) -> None: ...

class CompleteStoreRequest(_message.Message):
    __slots__ = ("lease_id", "keys", "checksums")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    keys: bytes
    checksums: bytes
    def __init__(self, lease_id: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., checksums: _Optional[bytes] = ...) -> None: ...

class CompleteStoreReply(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: bytes
    def __init__(self, statuses: _Optional[bytes] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("namespace", "keys", "hold_s", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    hold_s: float
    timeout_s: float
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., hold_s: _Optional[float] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ("lease_id", "num_blocks", "hold_s")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    num_blocks: int
    hold_s: float
    def __init__(self, lease_id: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., hold_s: _Optional[float] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("ratio", "tokens", "eps", "min_ratio", "max_ratio")
    RATIO_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MIN_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_RATIO_FIELD_NUMBER: _ClassVar[int]
    ratio: float
    tokens: int
    eps: float
    min_ratio: float
    max_ratio: float
    def __init__(self, ratio: _Optional[float] = ..., tokens: _Optional[int] = ..., eps: _Optional[float] = ..., min_ratio: _Optional[float] = ..., max_ratio: _Optional[float] = ...) -> None: ...

class SelectRequest(_message.Message):
    __slots__ = ("namespace", "keys", "layers", "queries", "num_queries", "num_heads", "budget", "must_blocks", "mode", "bounds", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    NUM_QUERIES_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    MUST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    layers: _containers.RepeatedScalarFieldContainer[int]
    queries: bytes
    num_queries: int
    num_heads: int
    budget: Budget
    must_blocks: _containers.RepeatedScalarFieldContainer[int]
    mode: SelectMode
    bounds: bool
    timeout_s: float
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., layers: _Optional[_Iterable[int]] = ..., queries: _Optional[bytes] = ..., num_queries: _Optional[int] = ..., num_heads: _Optional[int] = ..., budget: _Optional[_Union[Budget, _Mapping]] = ..., must_blocks: _Optional[_Iterable[int]] = ..., mode: _Optional[_Union[SelectMode, str]] = ..., bounds: bool = ..., timeout_s: _Optional[float] = ...) -> None: ...

class SelectReply(_message.Message):
    __slots__ = ("statuses", "counts", "blocks", "shares", "masses", "log_masses", "lowers", "uppers", "skipped_uppers")
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    MASSES_FIELD_NUMBER: _ClassVar[int]
    LOG_MASSES_FIELD_NUMBER: _ClassVar[int]
    LOWERS_FIELD_NUMBER: _ClassVar[int]
    UPPERS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_UPPERS_FIELD_NUMBER: _ClassVar[int]
    statuses: bytes
    counts: _containers.RepeatedScalarFieldContainer[int]
    blocks: bytes
    shares: bytes
    masses: bytes
    log_masses: bytes
    lowers: bytes
    uppers: bytes
    skipped_uppers: bytes
    def __init__(self, statuses: _Optional[bytes] = ..., counts: _Optional[_Iterable[int]] = ..., blocks: _Optional[bytes] = ..., shares: _Optional[bytes] = ..., masses: _Optional[bytes] = ..., log_masses: _Optional[bytes] = ..., lowers: _Optional[bytes] = ..., uppers: _Optional[bytes] = ..., skipped_uppers: _Optional[bytes] = ...) -> None: ...

class SelectAndLoadRequest(_message.Message):
    __slots__ = ("select", "mode")
    SELECT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    select: SelectRequest
    mode: LoadMode
    def __init__(self, select: _Optional[_Union[SelectRequest, _Mapping]] = ..., mode: _Optional[_Union[LoadMode, str]] = ...) -> None: ...

class SelectAndLoadReply(_message.Message):
    __slots__ = ("selection", "load")
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    selection: SelectReply
    load: BeginLoadReply
    def __init__(self, selection: _Optional[_Union[SelectReply, _Mapping]] = ..., load: _Optional[_Union[BeginLoadReply, _Mapping]] = ...) -> None: ...

class MapSummariesRequest(_message.Message):
    __slots__ = ("namespace", "keys", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    timeout_s: float
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class MapSummariesReply(_message.Message):
    __slots__ = ("lease_id", "timeout_s", "statuses", "offsets", "contents", "summary_bytes")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    CONTENTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    lease_id: bytes
    timeout_s: float
    statuses: bytes
    offsets: _containers.RepeatedScalarFieldContainer[int]
    contents: _containers.RepeatedScalarFieldContainer[int]
    summary_bytes: int
    def __init__(self, lease_id: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., statuses: _Optional[bytes] = ..., offsets: _Optional[_Iterable[int]] = ..., contents: _Optional[_Iterable[int]] = ..., summary_bytes: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lease_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class FlushReply(_message.Message):
    __slots__ = ("flushed",)
    FLUSHED_FIELD_NUMBER: _ClassVar[int]
    flushed: bool
    def __init__(self, flushed: bool = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("tier", "used_bytes", "capacity_bytes", "num_blocks", "quarantined_slots", "writable", "reason", "io", "io_reason")
    TIER_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IO_FIELD_NUMBER: _ClassVar[int]
    IO_REASON_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    used_bytes: int
    capacity_bytes: int
    num_blocks: int
    quarantined_slots: int
    writable: bool
    reason: str
    io: str
    io_reason: str
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., used_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., quarantined_slots: _Optional[int] = ..., writable: bool = ..., reason: _Optional[str] = ..., io: _Optional[str] = ..., io_reason: _Optional[str] = ...) -> None: ...

class NamespaceStatus(_message.Message):
    __slots__ = ("namespace", "num_blocks", "memory_blocks", "nvme_blocks", "block_bytes", "num_sessions", "problem", "tenant", "shares", "pinned_bytes", "model_id", "codec", "dtype")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NVME_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    num_blocks: int
    memory_blocks: int
    nvme_blocks: int
    block_bytes: int
    num_sessions: int
    problem: str
    tenant: str
    shares: _containers.RepeatedCompositeFieldContainer[TierShare]
    pinned_bytes: int
    model_id: str
    codec: str
    dtype: str
    def __init__(self, namespace: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., memory_blocks: _Optional[int] = ..., nvme_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., num_sessions: _Optional[int] = ..., problem: _Optional[str] = ..., tenant: _Optional[str] = ..., shares: _Optional[_Iterable[_Union[TierShare, _Mapping]]] = ..., pinned_bytes: _Optional[int] = ..., model_id: _Optional[str] = ..., codec: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class TierShare(_message.Message):
    __slots__ = ("tier", "held_bytes", "quota_bytes", "reserved_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    held_bytes: int
    quota_bytes: int
    reserved_bytes: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., held_bytes: _Optional[int] = ..., quota_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("version", "pid", "uptime_s", "state", "socket_path", "store_path", "num_sessions", "num_leases", "leased_bytes", "write_queue_blocks", "write_queue_bytes", "tiers", "namespaces", "problems", "rejected_admissions")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    STORE_PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_QUEUE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WRITE_QUEUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_ADMISSIONS_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uptime_s: float
    state: str
    socket_path: str
    store_path: str
    num_sessions: int
    num_leases: int
    leased_bytes: int
    write_queue_blocks: int
    write_queue_bytes: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStatus]
    problems: _containers.RepeatedScalarFieldContainer[str]
    rejected_admissions: int
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[float] = ..., state: _Optional[str] = ..., socket_path: _Optional[str] = ..., store_path: _Optional[str] = ..., num_sessions: _Optional[int] = ..., num_leases: _Optional[int] = ..., leased_bytes: _Optional[int] = ..., write_queue_blocks: _Optional[int] = ..., write_queue_bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStatus, _Mapping]]] = ..., problems: _Optional[_Iterable[str]] = ..., rejected_admissions: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutDocumentRequest(_message.Message):
    __slots__ = ("collection", "id", "namespace", "digest", "chunk_blocks", "keys", "num_tokens", "expires_s")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    collection: str
    id: str
    namespace: bytes
    digest: bytes
    chunk_blocks: _containers.RepeatedScalarFieldContainer[int]
    keys: bytes
    num_tokens: int
    expires_s: float
    def __init__(self, collection: _Optional[str] = ..., id: _Optional[str] = ..., namespace: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., chunk_blocks: _Optional[_Iterable[int]] = ..., keys: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., expires_s: _Optional[float] = ...) -> None: ...

class Deletion(_message.Message):
    __slots__ = ("num_blocks", "num_kept", "num_waiting")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_kept: int
    num_waiting: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_kept: _Optional[int] = ..., num_waiting: _Optional[int] = ...) -> None: ...

class PutDocumentReply(_message.Message):
    __slots__ = ("outcome", "version", "deletion")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DELETION_FIELD_NUMBER: _ClassVar[int]
    outcome: PutOutcome
    version: int
    deletion: Deletion
    def __init__(self, outcome: _Optional[_Union[PutOutcome, str]] = ..., version: _Optional[int] = ..., deletion: _Optional[_Union[Deletion, _Mapping]] = ...) -> None: ...

class ListCollectionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CollectionInfo(_message.Message):
    __slots__ = ("name", "version", "created_s", "num_documents", "num_chunks", "num_blocks", "num_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    NUM_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    created_s: float
    num_documents: int
    num_chunks: int
    num_blocks: int
    num_tokens: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., created_s: _Optional[float] = ..., num_documents: _Optional[int] = ..., num_chunks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class ListCollectionsReply(_message.Message):
    __slots__ = ("collections",)
    COLLECTIONS_FIELD_NUMBER: _ClassVar[int]
    collections: _containers.RepeatedCompositeFieldContainer[CollectionInfo]
    def __init__(self, collections: _Optional[_Iterable[_Union[CollectionInfo, _Mapping]]] = ...) -> None: ...

class ListDocumentsRequest(_message.Message):
    __slots__ = ("collection", "after_id", "after_namespace")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    AFTER_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    collection: str
    after_id: str
    after_namespace: bytes
    def __init__(self, collection: _Optional[str] = ..., after_id: _Optional[str] = ..., after_namespace: _Optional[bytes] = ...) -> None: ...

class DocumentInfo(_message.Message):
    __slots__ = ("id", "namespace", "digest", "version", "num_chunks", "num_blocks", "num_tokens", "added_s", "expires_s")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADDED_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    id: str
    namespace: bytes
    digest: bytes
    version: int
    num_chunks: int
    num_blocks: int
    num_tokens: int
    added_s: float
    expires_s: float
    def __init__(self, id: _Optional[str] = ..., namespace: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., version: _Optional[int] = ..., num_chunks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_tokens: _Optional[int] = ..., added_s: _Optional[float] = ..., expires_s: _Optional[float] = ...) -> None: ...

class ListDocumentsReply(_message.Message):
    __slots__ = ("documents", "has_more")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[DocumentInfo]
    has_more: bool
    def __init__(self, documents: _Optional[_Iterable[_Union[DocumentInfo, _Mapping]]] = ..., has_more: bool = ...) -> None: ...

class RemoveDocumentsRequest(_message.Message):
    __slots__ = ("collection", "ids", "all", "timeout_s")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    collection: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    all: bool
    timeout_s: float
    def __init__(self, collection: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ..., all: bool = ..., timeout_s: _Optional[float] = ...) -> None: ...

class RemoveDocumentsReply(_message.Message):
    __slots__ = ("num_documents", "missing", "deletion")
    NUM_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    DELETION_FIELD_NUMBER: _ClassVar[int]
    num_documents: int
    missing: _containers.RepeatedScalarFieldContainer[str]
    deletion: Deletion
    def __init__(self, num_documents: _Optional[int] = ..., missing: _Optional[_Iterable[str]] = ..., deletion: _Optional[_Union[Deletion, _Mapping]] = ...) -> None: ...

class ExpireDocumentsRequest(_message.Message):
    __slots__ = ("collection", "ids", "all", "at_s")
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    collection: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    all: bool
    at_s: float
    def __init__(self, collection: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ..., all: bool = ..., at_s: _Optional[float] = ...) -> None: ...

class ExpireDocumentsReply(_message.Message):
    __slots__ = ("num_documents",)
    NUM_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    num_documents: int
    def __init__(self, num_documents: _Optional[int] = ...) -> None: ...

class RemoveBlocksRequest(_message.Message):
    __slots__ = ("namespace", "keys", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    keys: bytes
    timeout_s: float
    def __init__(self, namespace: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DeletionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeletionsReply(_message.Message):
    __slots__ = ("num_waiting", "num_barred", "problems")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_BARRED_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_barred: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, num_waiting: _Optional[int] = ..., num_barred: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...
