"""The summaries of the sequences asked about last, as tables that can be scored.

    table      structure of arrays: per layer, the summaries of a chain of blocks, dequantised
    found by   the first key; a table serves every chain that it begins or that begins it
    grows      when a chain that begins with its keys is asked about
    ends       as the least recently used, when all of them take more than `capacity_bytes`

A row is of one *content*: a block that was stored anew, or came back from a lossy codec, has
another, and its row is replaced. A block without a summary has a row that says `must`.

Envelope: a block of SmolLM2-135M takes 100 kB in a table (gsa-k4), 4 k tokens 12 to 15 MB; they
are made in 30 ms, once.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from ucm.kernels.block_scores import SummaryTable
from ucm.kernels.summary_record import MUST, layout_dtype

from .errors import CapacityError, InvalidArgumentError
from .types import KEY_BYTES, BlockKey, NamespaceId, SummaryKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ucm.kernels.summary_record import Records

    from .hashing import CheckedKeys
    from .layout import KvLayout

    Bools = NDArray[np.bool_]

BUSY_RETRY_S = 0.01
"""Hint to a call that found its table in use until its time was over: about what scoring takes."""

NO_CONTENT = 0
"""What a row without a summary is of."""

ROWS_PER_STEP = 256
"""Rows added between two looks at how large a table is."""


@dataclass(frozen=True, slots=True)
class TableOwner:
    """Whose blocks a table is about."""

    namespace: NamespaceId
    kind: SummaryKind
    layout: KvLayout


class TableName(NamedTuple):
    """What tables are found by; those of chains that fork have the same one."""

    namespace: NamespaceId
    kind: SummaryKind
    first_key: BlockKey


class RowSource(Protocol):
    """Where the rows of one chain come from."""

    def content(self, index: int) -> int:
        """Of what content the summary of block `index` is; `NO_CONTENT` if there is none."""

    def records(self, index: int) -> Records | None:
        """That summary, [num_layers, num_kv_heads]; None if it turns out to be damaged."""


class SequenceTable:
    """The table of one chain. Used under `lock` only."""

    def __init__(self, name: TableName, layout: KvLayout) -> None:
        """Empty."""
        self.name = name
        self.lock = threading.Lock()
        self.keys = b""
        """Of its rows, back to back. Only grows."""
        self.scores = SummaryTable(name.kind, layout)
        self._layout = layout
        self._contents = np.empty(0, np.uint64)

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""
        return self.scores.num_bytes + len(self.keys) + self._contents.nbytes

    def serves(self, keys: CheckedKeys) -> bool:
        """Whether `keys` begins with the table's keys, or they with it."""
        own = self.keys
        return keys.packed.startswith(own) or own.startswith(keys.packed)

    def known(self, count: int) -> Bools:
        """[count]: which of the leading rows have a summary."""
        found: Bools = self._contents[:count] != NO_CONTENT
        return found

    def update(self, keys: CheckedKeys, source: RowSource, max_bytes: int) -> None:
        """Have the leading rows be what `source` says of the chain `keys`, and add those missing.

        Raises:
            InvalidArgumentError: the table would take more than `max_bytes`.
        """
        count, old = len(keys), len(self._contents)
        if count > old:  # before a row is made: a refusal must not take what it refuses
            self._check_size(count, self.scores.least_bytes(count), max_bytes)
        contents = np.array([source.content(index) for index in range(count)], np.uint64)
        changed = np.flatnonzero(contents[:old] != self._contents[: min(count, old)])
        for index in changed.tolist():
            self.scores.replace(index, self._row(source, contents, index))
            self._contents[index] = contents[index]
        for start in range(old, count, ROWS_PER_STEP):
            end = min(start + ROWS_PER_STEP, count)
            rows = [self._row(source, contents, index) for index in range(start, end)]
            self.scores.replace(start, np.stack(rows))  # not `extend`: this may be a second try
            self._contents = np.concatenate([self._contents, contents[start:end]])
            self.keys = keys.packed[: end * KEY_BYTES]
            self._check_size(count, self.num_bytes, max_bytes)

    def _row(self, source: RowSource, contents: NDArray[np.uint64], index: int) -> Records:
        records = source.records(index) if contents[index] != NO_CONTENT else None
        if records is not None:
            return records
        contents[index] = NO_CONTENT
        shape = (self._layout.num_layers, self._layout.num_kv_heads)
        unknown = np.zeros(shape, layout_dtype(self._layout, self.name.kind))
        unknown["flags"] = MUST
        return unknown

    def _check_size(self, wanted: int, num_bytes: int, max_bytes: int) -> None:
        if num_bytes > max_bytes:
            raise InvalidArgumentError(
                f"{wanted} blocks take {num_bytes} bytes or more to score, summaries.table_bytes "
                f"is {max_bytes}: raise it, or ask with fewer keys"
            )


class SummaryTables:
    """All tables, within a budget of memory. Thread-safe.

    Those in use count when they are given back: as many as calls are served at once may come on
    top.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """None yet."""
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._by_name: dict[TableName, list[SequenceTable]] = {}
        self._sizes: OrderedDict[SequenceTable, int] = OrderedDict()
        """By last use."""
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Host memory of all that are kept."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._sizes)

    @contextmanager
    def using(
        self, owner: TableOwner, keys: CheckedKeys, source: RowSource, deadline_s: float
    ) -> Iterator[SequenceTable]:
        """The table of a chain of at least one block, up to date, for the length of the block.

        Args:
            owner: whose keys they are.
            keys: the chain.
            source: its summaries.
            deadline_s: by `time.monotonic`, of the wait for who else uses it.

        Raises:
            CapacityError: others use it all the time.
            InvalidArgumentError: it would be too large.
        """
        table = self._locked(owner, keys, deadline_s)
        try:
            table.update(keys, source, self._capacity_bytes)
            self._keep(table)
            yield table
        except InvalidArgumentError:
            self._drop(table)
            raise
        finally:
            table.lock.release()

    def _locked(self, owner: TableOwner, keys: CheckedKeys, deadline_s: float) -> SequenceTable:
        name = TableName(owner.namespace, owner.kind, keys[0])
        while True:
            with self._lock:
                tables = self._by_name.setdefault(name, [])
                found = max(
                    (table for table in tables if table.serves(keys)),
                    key=lambda table: len(table.keys),
                    default=None,
                )
                if found is None:
                    found = SequenceTable(name, owner.layout)
                    tables.append(found)
                    self._sizes[found] = 0
            left_s = max(0.0, deadline_s - time.monotonic())
            if not found.lock.acquire(timeout=left_s):
                raise CapacityError(
                    "others score the same sequence; come again", retry_after_s=BUSY_RETRY_S
                )
            if found.serves(keys):
                return found
            found.lock.release()  # it has grown another way meanwhile

    def _keep(self, table: SequenceTable) -> None:
        """Note a use and the size; the least recently used make room."""
        with self._lock:
            if table in self._sizes:
                self._num_bytes += table.num_bytes - self._sizes[table]
                self._sizes[table] = table.num_bytes
                self._sizes.move_to_end(table)
            while self._num_bytes > self._capacity_bytes and len(self._sizes) > 1:
                self._forget_locked(next(iter(self._sizes)))

    def _drop(self, table: SequenceTable) -> None:
        with self._lock:
            if table in self._sizes:
                self._forget_locked(table)

    def forget(self, namespace: NamespaceId) -> None:
        """Keep no table of a namespace: blocks of it were deleted."""
        with self._lock:
            for table in [each for each in self._sizes if each.name.namespace == namespace]:
                self._forget_locked(table)

    def _forget_locked(self, table: SequenceTable) -> None:
        self._num_bytes -= self._sizes.pop(table)
        tables = self._by_name[table.name]
        tables.remove(table)
        if not tables:
            del self._by_name[table.name]

    def check_integrity(self) -> list[str]:
        """Every violated invariant, in words."""
        with self._lock:
            named = sum(len(tables) for tables in self._by_name.values())
            problems = []
            if sum(self._sizes.values()) != self._num_bytes or named != len(self._sizes):
                problems.append("summary tables: sizes or names are miscounted")
            if self._num_bytes > self._capacity_bytes:
                problems.append("summary tables: more memory than summaries.table_bytes")
            return problems
