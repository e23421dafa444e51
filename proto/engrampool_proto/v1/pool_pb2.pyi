from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("model", "include_spec")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_SPEC_FIELD_NUMBER: _ClassVar[int]
    model: str
    include_spec: bool
    def __init__(self, model: _Optional[str] = ..., include_spec: _Optional[bool] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("models", "limits", "server_version", "direct", "attach")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    limits: Limits
    server_version: str
    direct: bool
    attach: bool
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., server_version: _Optional[str] = ..., direct: _Optional[bool] = ..., attach: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_rows_per_request", "max_answer_bytes", "max_in_flight_bytes")
    MAX_ROWS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_rows_per_request: int
    max_answer_bytes: int
    max_in_flight_bytes: int
    def __init__(self, max_rows_per_request: _Optional[int] = ..., max_answer_bytes: _Optional[int] = ..., max_in_flight_bytes: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "spec_digest", "tables", "spec_json", "active")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    spec_digest: str
    tables: _containers.RepeatedCompositeFieldContainer[Table]
    spec_json: bytes
    active: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., spec_digest: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[Table, _Mapping]]] = ..., spec_json: _Optional[bytes] = ..., active: _Optional[bool] = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("layer", "num_rows", "row_bytes", "heads", "segments", "row_start", "row_stop")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    ROW_START_FIELD_NUMBER: _ClassVar[int]
    ROW_STOP_FIELD_NUMBER: _ClassVar[int]
    layer: int
    num_rows: int
    row_bytes: int
    heads: int
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    row_start: int
    row_stop: int
    def __init__(self, layer: _Optional[int] = ..., num_rows: _Optional[int] = ..., row_bytes: _Optional[int] = ..., heads: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., row_start: _Optional[int] = ..., row_stop: _Optional[int] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("name", "dtype", "length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    length: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., length: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("model", "version", "tables", "tokens", "layers", "number")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    tables: _containers.RepeatedCompositeFieldContainer[TableIds]
    tokens: TokenBatch
    layers: _containers.RepeatedScalarFieldContainer[int]
    number: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[TableIds, _Mapping]]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., layers: _Optional[_Iterable[int]] = ..., number: _Optional[int] = ...) -> None: ...

class TableIds(_message.Message):
    __slots__ = ("layer", "u32", "u64")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    U32_FIELD_NUMBER: _ClassVar[int]
    U64_FIELD_NUMBER: _ClassVar[int]
    layer: int
    u32: bytes
    u64: bytes
    def __init__(self, layer: _Optional[int] = ..., u32: _Optional[bytes] = ..., u64: _Optional[bytes] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("tokens", "query_start_loc", "lookback", "lookback_width", "dead", "lookback_dead")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUERY_START_LOC_FIELD_NUMBER: _ClassVar[int]
    LOOKBACK_FIELD_NUMBER: _ClassVar[int]
    LOOKBACK_WIDTH_FIELD_NUMBER: _ClassVar[int]
    DEAD_FIELD_NUMBER: _ClassVar[int]
    LOOKBACK_DEAD_FIELD_NUMBER: _ClassVar[int]
    tokens: bytes
    query_start_loc: bytes
    lookback: bytes
    lookback_width: int
    dead: bytes
    lookback_dead: bytes
    def __init__(self, tokens: _Optional[bytes] = ..., query_start_loc: _Optional[bytes] = ..., lookback: _Optional[bytes] = ..., lookback_width: _Optional[int] = ..., dead: _Optional[bytes] = ..., lookback_dead: _Optional[bytes] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("tables", "times")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[TableRows]
    times: ServerTimes
    def __init__(self, tables: _Optional[_Iterable[_Union[TableRows, _Mapping]]] = ..., times: _Optional[_Union[ServerTimes, _Mapping]] = ...) -> None: ...

class TableRows(_message.Message):
    __slots__ = ("layer", "first", "rows")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    first: int
    rows: bytes
    def __init__(self, layer: _Optional[int] = ..., first: _Optional[int] = ..., rows: _Optional[bytes] = ...) -> None: ...

class ServerTimes(_message.Message):
    __slots__ = ("queue_us", "gather_us", "total_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    GATHER_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    gather_us: int
    total_us: int
    def __init__(self, queue_us: _Optional[int] = ..., gather_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class OpenDirectRequest(_message.Message):
    __slots__ = ("tls",)
    TLS_FIELD_NUMBER: _ClassVar[int]
    tls: bool
    def __init__(self, tls: _Optional[bool] = ...) -> None: ...

class OpenDirectResponse(_message.Message):
    __slots__ = ("host", "port", "unix_path", "ticket", "valid_ms", "tls")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    VALID_MS_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    unix_path: str
    ticket: bytes
    valid_ms: int
    tls: bool
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ..., unix_path: _Optional[str] = ..., ticket: _Optional[bytes] = ..., valid_ms: _Optional[int] = ..., tls: _Optional[bool] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("model", "version", "boot_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    boot_id: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., boot_id: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("tables", "valid_ms", "boot_id")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    VALID_MS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[MappedTable]
    valid_ms: int
    boot_id: str
    def __init__(self, tables: _Optional[_Iterable[_Union[MappedTable, _Mapping]]] = ..., valid_ms: _Optional[int] = ..., boot_id: _Optional[str] = ...) -> None: ...

class MappedTable(_message.Message):
    __slots__ = ("layer", "path", "device", "inode", "size", "row_start", "row_stop", "in_memory")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ROW_START_FIELD_NUMBER: _ClassVar[int]
    ROW_STOP_FIELD_NUMBER: _ClassVar[int]
    IN_MEMORY_FIELD_NUMBER: _ClassVar[int]
    layer: int
    path: str
    device: int
    inode: int
    size: int
    row_start: int
    row_stop: int
    in_memory: bool
    def __init__(self, layer: _Optional[int] = ..., path: _Optional[str] = ..., device: _Optional[int] = ..., inode: _Optional[int] = ..., size: _Optional[int] = ..., row_start: _Optional[int] = ..., row_stop: _Optional[int] = ..., in_memory: _Optional[bool] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("unix_s", "samples")
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, unix_s: _Optional[float] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("name", "labels", "value")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    value: float
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., value: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "reason", "text")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    text: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...
