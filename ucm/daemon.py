"""The daemon's life: configuration in, sockets open, a drain, everything closed.

    start   socket folder + lock -> store and manager -> door -> gRPC (engines, operators) -> READY
    stop    refuse sessions and stores -> leases run out -> flush -> close in the opposite order

The first request to stop drains for at most `service.drain_timeout_s`; a second one skips the
wait. What was accepted and could not be flushed in time is counted in the log: the cache may lose
blocks, never lie about them. Nothing listens but the three sockets, and the metrics port if asked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from ucm.storage.folder import note_socket

from . import __version__
from .answers import Answers
from .call_guard import ADMIN_POLICIES, ENGINE_POLICIES, Policy, PolicyInterceptor
from .clock import Clock, SystemClock
from .collection_service import CollectionService
from .config import Config
from .door import Door, SessionTokens
from .errors import ConfigError
from .manager import Manager
from .metrics import Metrics
from .protos import cache_pb2 as pb
from .protos import cache_pb2_grpc as pb_grpc
from .sd_notify import Notifier
from .service import AdminService, CacheService
from .sockets import ADMIN_MODE, SOCKET_MODE, SocketFolder, admin_path, door_path, grpc_target

_log = logging.getLogger(__name__)

_TICK_S: Final = 0.25
_POLL_S: Final = 0.02
_FLUSH_SLICE_S: Final = 0.25
_RPC_GRACE_S: Final = 0.5
_RPCS_A_THREAD: Final = 4
"""Calls in service or waiting for a thread: a longer queue only makes every answer late. One more
is refused by gRPC itself."""
_ADMIN_THREADS: Final = 4
_METRICS_HOST: Final = "127.0.0.1"


class Daemon:
    """One daemon in this process: `start` it, then `run` it until it is asked to stop.

    `request_stop` may be called from any thread and from a signal handler.
    """

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Take the socket path, open the store, bind the sockets; nothing answers yet.

        Args:
            config: the whole configuration.
            environ: where the service manager's `NOTIFY_SOCKET` is; this process's when None.
            clock: for leases; the machine's when None.

        Raises:
            ConfigError: the socket path, the data folder or the metrics port cannot be used.
        """
        self.config = config
        self.metrics = Metrics()
        self.tokens = SessionTokens()
        self._notifier = Notifier(os.environ if environ is None else environ)
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._close_timeout_s = config.service.drain_timeout_s
        self._health = health.HealthServicer(experimental_non_blocking=True)
        with contextlib.ExitStack() as stack:
            self._build(stack, clock or SystemClock())
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _build(self, stack: contextlib.ExitStack, clock: Clock) -> None:
        """Open everything in order; `stack` closes it in the opposite one."""
        service = self.config.service
        path = service.socket_path
        stack.callback(SocketFolder(path).close)
        self.manager = Manager(self.config, clock=clock, metrics=self.metrics)
        stack.callback(self._close_manager)
        if self.config.nvme.path is not None:
            note_socket(self.config.nvme.path, path.absolute())
        self._serve_metrics(stack)
        self.answers = Answers(self.manager, service)
        stack.callback(self.answers.close)
        self.door = Door(door_path(path), self.answers, self.tokens, service)
        stack.callback(self.door.stop)
        self._engine = self._server(stack, service.rpc_threads, ENGINE_POLICIES)
        self.engine_service = CacheService(self.answers, self.tokens, service)
        pb_grpc.add_CacheServicer_to_server(self.engine_service, self._engine)
        _bind(self._engine, path, SOCKET_MODE)
        self._admin = self._server(stack, _ADMIN_THREADS, ADMIN_POLICIES)
        pb_grpc.add_AdminServicer_to_server(
            AdminService(self.manager, self.config, self.request_stop), self._admin
        )
        pb_grpc.add_CollectionsServicer_to_server(
            CollectionService(self.manager.collections, service.max_keys_per_call), self._admin
        )
        _bind(self._admin, admin_path(path), ADMIN_MODE)

    def _server(
        self, stack: contextlib.ExitStack, threads: int, policies: Mapping[str, Policy]
    ) -> grpc.Server:
        limit = self.config.service.max_message_bytes
        pool = ThreadPoolExecutor(threads, thread_name_prefix="ucm-rpc")
        server = grpc.server(
            pool,
            interceptors=[PolicyInterceptor(policies, self.tokens)],
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=threads * _RPCS_A_THREAD,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
        )
        stack.callback(_stop_server, server, pool, self.manager.interrupt)
        return server

    def _serve_metrics(self, stack: contextlib.ExitStack) -> None:
        port = self.config.metrics.port
        if not port:
            return
        try:
            server, thread = start_http_server(port, _METRICS_HOST, self.metrics.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.port {port} on {_METRICS_HOST} cannot be used: {error.strerror}; "
                "choose another, or 0 for none"
            ) from error
        stack.callback(thread.join)
        stack.callback(server.server_close)
        stack.callback(server.shutdown)

    def start(self) -> None:
        """Begin to answer, and tell the service manager."""
        self._engine.start()
        self._admin.start()
        self.door.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        path = self.config.service.socket_path
        _log.info("ucm %s serves at %s", __version__, path)
        self._notifier.ready(f"serving at {path}")

    def run(self) -> None:
        """Serve until asked to stop, then drain. `close` does the rest."""
        while not self._stop.wait(_TICK_S):
            self.manager.tick()
            self.manager.status()  # refreshes the gauges
        self._drain()

    def request_stop(self) -> None:
        """Ask `run` to drain and return; asked again, it does not wait for the drain."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _drain(self) -> None:
        """Refuse what is new, wait for leases to end and for accepted blocks to be flushed."""
        deadline_s = time.monotonic() + self.config.service.drain_timeout_s
        _log.info("draining for at most %g s", self.config.service.drain_timeout_s)
        self._notifier.stopping("draining")
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.door.drain()
        self.manager.drain(timeout_s=0)
        self._close_timeout_s = 0.0
        while self.manager.status().num_leases and time.monotonic() < deadline_s:
            self.manager.tick()
            if self._hurry.wait(_POLL_S):
                break
        while self.manager.status().write_queue_blocks and not self._hurry.is_set():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            self.manager.flush(timeout_s=min(left_s, _FLUSH_SLICE_S))
        left = self.manager.status().write_queue_blocks
        if left:
            _log.warning("%d accepted blocks were not flushed in time and are dropped", left)

    def _close_manager(self) -> None:
        self.manager.close(timeout_s=self._close_timeout_s)

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *(item.full_name for item in pb.DESCRIPTOR.services_by_name.values())):
            self._health.set(name, status)

    def close(self) -> None:
        """Close everything, whatever state it is in. Idempotent."""
        self._open.close()
        _log.info("stopped")


def _bind(server: grpc.Server, path: Path, mode: int) -> None:
    # The folder keeps strangers out until the mode is set; nothing is accepted before `start`.
    try:
        server.add_insecure_port(grpc_target(path))
        path.chmod(mode)
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"cannot listen at {path}: {error}") from error


def _stop_server(
    server: grpc.Server, pool: ThreadPoolExecutor, interrupt: Callable[[], None]
) -> None:
    interrupt()  # whoever waits for the disk is answered now, with what there is
    server.stop(_RPC_GRACE_S).wait()
    pool.shutdown(wait=True)
