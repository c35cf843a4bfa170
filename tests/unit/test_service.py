"""The gRPC services: who may call what, limits, errors, health, reflection."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ucm import call_guard, errors
from ucm.client import RemoteCache, connect
from ucm.daemon import Daemon
from ucm.protos import cache_pb2 as pb
from ucm.protos import cache_pb2_grpc as pb_grpc
from ucm.sockets import admin_path, grpc_target
from ucm.testing.blocks import chain, put, tiny_spec
from ucm.testing.daemon import running_daemon, short_folder, small_config
from ucm.types import ROOT_KEY
from ucm.wire import ERROR_METADATA, TOKEN_METADATA

MAX_KEYS = 64


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with short_folder() as folder:
        config = small_config(folder, nvme=False)
        limits = dataclasses.replace(
            config.service, max_keys_per_call=MAX_KEYS, max_message_bytes=64 << 10
        )
        with running_daemon(dataclasses.replace(config, service=limits)) as found:
            yield found


@pytest.fixture
def cache(daemon: Daemon) -> Iterator[RemoteCache]:
    with connect(daemon.config.service.socket_path, timeout_s=5) as found:
        yield found


@pytest.fixture
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(grpc_target(daemon.config.service.socket_path)) as found:
        yield found


@pytest.fixture
def admin_channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(grpc_target(admin_path(daemon.config.service.socket_path))) as found:
        yield found


def failure(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, str]:
    """Code, class name in the trailing metadata, and details of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert isinstance(error, grpc.Call)
    name = dict(error.trailing_metadata() or ()).get(ERROR_METADATA, "")
    return error.code(), str(name), str(error.details())


def methods_in(packed: bytes, service_name: str) -> set[str]:
    """Methods of one service in a serialised file descriptor."""
    file = descriptor_pb2.FileDescriptorProto.FromString(packed)
    return {
        f"/{service_name}/{method.name}"
        for found in file.service
        for method in found.method
        if f"{file.package}.{found.name}" == service_name
    }


def reflected_methods(channel: grpc.Channel) -> set[str]:
    """Every method that the server behind `channel` says it has."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(**request: str) -> Any:
        message = reflection_pb2.ServerReflectionRequest(**request)
        return next(iter(stub.ServerReflectionInfo(iter([message]), timeout=5)))

    methods: set[str] = set()
    for item in ask(list_services="*").list_services_response.service:
        reply = ask(file_containing_symbol=item.name).file_descriptor_response
        for packed in reply.file_descriptor_proto:
            methods |= methods_in(packed, item.name)
    return methods


@pytest.mark.parametrize("which", ["engine", "admin"])
def test_every_method_that_is_reflected_has_a_policy(
    channel: grpc.Channel, admin_channel: grpc.Channel, which: str
) -> None:
    policies = call_guard.ENGINE_POLICIES if which == "engine" else call_guard.ADMIN_POLICIES
    methods = reflected_methods(channel if which == "engine" else admin_channel)
    own = {method for method in methods if "ucm.v1" in method}
    assert own == set(call_guard.CACHE_METHODS) | set(call_guard.ADMIN_METHODS)
    hidden = call_guard.ADMIN_METHODS if which == "engine" else call_guard.CACHE_METHODS
    assert methods - set(hidden) <= set(policies)
    # Old releases of the health service do not have `List`.
    assert set(policies) - methods <= {"/grpc.health.v1.Health/List"}


@pytest.mark.parametrize("method", call_guard.CACHE_METHODS)
@pytest.mark.parametrize("token", [None, "", "not hexadecimal", "00" * 32])
def test_no_cache_method_answers_without_a_live_token(
    channel: grpc.Channel, method: str, token: str | None
) -> None:
    call = channel.unary_unary(method, None, None)
    metadata = () if token is None else ((TOKEN_METADATA, token),)
    code, name, _ = failure(lambda: call(b"", timeout=5, metadata=metadata))
    assert (code, name) == (grpc.StatusCode.PERMISSION_DENIED, "PermissionDeniedError")


@pytest.mark.parametrize(
    "method", [*call_guard.ADMIN_METHODS, "/ucm.v1.Cache/Purge", "/x", "/ucm.v1.Other/Lookup"]
)
def test_the_engines_socket_denies_everything_else(channel: grpc.Channel, method: str) -> None:
    code, name, _ = failure(lambda: channel.unary_unary(method, None, None)(b"", timeout=5))
    assert (code, name) == (grpc.StatusCode.PERMISSION_DENIED, "PermissionDeniedError")


@pytest.mark.parametrize("method", call_guard.CACHE_METHODS)
def test_the_operators_socket_has_no_cache(admin_channel: grpc.Channel, method: str) -> None:
    code, _, _ = failure(lambda: admin_channel.unary_unary(method, None, None)(b"", timeout=5))
    assert code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("by", ["grpc", "door"])
@pytest.mark.parametrize("error", [errors.CapacityError("no room"), errors.CorruptionError("x")])
def test_a_load_that_fails_gives_its_place_back(
    daemon: Daemon,
    cache: RemoteCache,
    monkeypatch: pytest.MonkeyPatch,
    error: errors.UcmError,
    by: str,
) -> None:
    handle = cache.open_namespace(tiny_spec())
    keys = chain(handle.id, 2)
    put(cache, handle, keys)
    gate = daemon.answers.gate
    inside: list[int] = []

    def fail(*_args: object, **_options: object) -> None:
        inside.append(gate.num_inside)
        raise error

    at_door = contextlib.nullcontext() if by == "door" else cache._at_door()
    with monkeypatch.context() as patched, at_door:
        patched.setattr(daemon.manager._state, "grant_locked", fail)
        for _ in range(3):
            with pytest.raises(type(error)):
                cache.prepare_load(handle.id, keys, timeout_s=1)
    assert (inside, gate.num_inside) == ([1] * 3, 0)
    cache.complete_load(cache.prepare_load(handle.id, keys, timeout_s=1).id)
    assert gate.num_inside == 0


def test_a_token_dies_with_its_session(daemon: Daemon, channel: grpc.Channel) -> None:
    cache = connect(daemon.config.service.socket_path, timeout_s=5)
    metadata = cache._metadata
    stub = pb_grpc.CacheStub(channel)
    stub.Release(pb.ReleaseRequest(), metadata=metadata, timeout=5)
    cache.close()
    code, _, _ = failure(lambda: stub.Release(pb.ReleaseRequest(), metadata=metadata, timeout=5))
    assert code is grpc.StatusCode.PERMISSION_DENIED


def test_health_needs_no_token_and_names_the_services(
    channel: grpc.Channel, admin_channel: grpc.Channel
) -> None:
    for each in (channel, admin_channel):
        stub = health_pb2_grpc.HealthStub(each)
        for name in ("", "ucm.v1.Cache", "ucm.v1.Admin"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_bad_requests_are_refused_by_name(cache: RemoteCache) -> None:
    stub, metadata = cache._stub, cache._metadata
    namespace = cache.open_namespace(tiny_spec()).id
    key, wrong = bytes(32), bytes(31)
    cases: list[tuple[Any, Any]] = [
        (stub.Lookup, pb.LookupRequest(namespace=namespace, keys=wrong)),
        (stub.Lookup, pb.LookupRequest(namespace=namespace, keys=key * (MAX_KEYS + 1))),
        (stub.Prefetch, pb.PrefetchRequest(namespace=namespace, keys=wrong)),
        (stub.PrepareLoad, pb.PrepareLoadRequest(namespace=namespace, keys=wrong)),
        (stub.PrepareLoad, pb.PrepareLoadRequest(namespace=namespace, timeout_s=-1)),
        (stub.PrepareLoad, pb.PrepareLoadRequest(namespace=namespace, timeout_s=float("nan"))),
        (
            stub.BeginLoad,
            pb.BeginLoadRequest(namespace=namespace, keys=wrong, mode="LOAD_MODE_MAPPED"),
        ),
        (
            stub.BeginLoad,
            pb.BeginLoadRequest(namespace=namespace, mode="LOAD_MODE_DIRECT", timeout_s=-1),
        ),
        (stub.BeginLoad, pb.BeginLoadRequest(namespace=namespace)),
        (stub.CompleteLoad, pb.CompleteLoadRequest(lease_id=b"short")),
        (stub.PrepareStore, pb.PrepareStoreRequest(namespace=namespace, parent=wrong)),
        (stub.PrepareStore, pb.PrepareStoreRequest(namespace=namespace)),
        (stub.CompleteStore, pb.CompleteStoreRequest(lease_id=bytes(16), keys=key)),
        (stub.CompleteStore, pb.CompleteStoreRequest(lease_id=bytes(16), checksums=b"12345678")),
        (stub.Release, pb.ReleaseRequest(lease_ids=[b"short"])),
        (stub.Release, pb.ReleaseRequest(lease_ids=[bytes(16)] * 1025)),
        (stub.Flush, pb.FlushRequest(timeout_s=-0.1)),
    ]
    for method, request in cases:
        code, name, details = failure(lambda: method(request, metadata=metadata, timeout=5))  # noqa: B023
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (request, details)
        assert name == "InvalidArgumentError"


def test_an_unknown_namespace_is_not_found(cache: RemoteCache) -> None:
    request = pb.LookupRequest(namespace=b"short")
    code, name, _ = failure(lambda: cache._stub.Lookup(request, metadata=cache._metadata))
    assert (code, name) == (grpc.StatusCode.NOT_FOUND, "BlockNotFoundError")


def test_garbage_and_oversize_messages_leave_the_server_well(
    cache: RemoteCache, channel: grpc.Channel
) -> None:
    for method in call_guard.CACHE_METHODS:
        call = channel.unary_unary(method, None, None)
        code, _, _ = failure(lambda: call(b"\xff" * 16, metadata=cache._metadata, timeout=5))  # noqa: B023
        assert code is grpc.StatusCode.INTERNAL  # grpc's own answer to what does not parse
        code, _, _ = failure(lambda: call(bytes(65 << 10), metadata=cache._metadata, timeout=5))  # noqa: B023
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    cache.lookup(cache.open_namespace(tiny_spec()).id, [])


@pytest.mark.parametrize("leaf", errors.LEAVES)
def test_every_error_names_a_grpc_status(leaf: type[errors.UcmError]) -> None:
    assert leaf.grpc_status in grpc.StatusCode.__members__


def test_kv_bytes_never_travel_in_a_message(
    cache: RemoteCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store and a load of 64 blocks: every message together is a tenth of the bytes moved."""
    sizes: list[int] = []
    for name in call_guard.CACHE_METHODS:
        method = name.rpartition("/")[2]
        original = getattr(cache._stub, method)

        def measured(request: Any, _call: Any = original, **options: Any) -> Any:
            reply = _call(request, **options)
            sizes.extend((request.ByteSize(), reply.ByteSize()))
            return reply

        monkeypatch.setattr(cache._stub, method, measured)
    call_door = cache._door.call

    def at_door(request: Any, **options: Any) -> Any:
        reply = call_door(request, **options)
        sizes.extend((request.ByteSize(), reply.ByteSize()))
        return reply

    monkeypatch.setattr(cache._door, "call", at_door)
    handle = cache.open_namespace(tiny_spec("sizes"))
    keys = chain(handle.id, MAX_KEYS)
    put(cache, handle, keys, ROOT_KEY)
    lease = cache.prepare_load(handle.id, keys, timeout_s=5)
    moved = sum(len(block.data) for block in lease.blocks if block.data is not None)
    cache.complete_load(lease.id)
    assert lease.num_ready == MAX_KEYS
    assert moved == MAX_KEYS * handle.layout.block_bytes == 512 << 10
    assert len(sizes) == 8
    assert max(sizes) <= 64 * MAX_KEYS  # a key, 2 checksums, an offset and change
    assert sum(sizes) < moved / 10


def test_open_reflection_streams_do_not_starve_engines(
    daemon: Daemon, cache: RemoteCache, channel: grpc.Channel
) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    leave = threading.Event()

    def ask_and_stay() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        leave.wait(10.0)

    num_threads = daemon.config.service.rpc_threads
    assert num_threads > call_guard.MAX_REFLECTION_STREAMS
    open_streams = []
    for _ in range(call_guard.MAX_REFLECTION_STREAMS):
        stream = stub.ServerReflectionInfo(ask_and_stay(), timeout=10)
        assert next(iter(stream)).HasField("list_services_response")
        open_streams.append(stream)
    for _ in range(num_threads):
        code, name, _details = failure(
            lambda: next(iter(stub.ServerReflectionInfo(ask_and_stay(), timeout=10)))
        )
        assert (code, name) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CapacityError")
    handle = cache.open_namespace(tiny_spec())
    assert cache.lookup(handle.id, []).num_blocks == 0
    leave.set()
    for stream in open_streams:
        assert list(stream) == []
    again = stub.ServerReflectionInfo(iter([next(ask_and_stay())]), timeout=10)
    assert next(iter(again)).HasField("list_services_response")
