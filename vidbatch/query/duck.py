"""DuckDB over an output: a connection whose views are the tables, and one query at a time."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vidbatch.errors import InfraError, UsageError, VidbatchError
from vidbatch.query.views import MACROS, statements, table_view
from vidbatch.storage import StoreSettings, open_store
from vidbatch.tables import PARTITIONS, ROOT, SCHEMAS

if TYPE_CHECKING:
    import duckdb
    from rich.table import Table

SHOWN_ROWS = 200
"""Of a query, on a terminal: more is for `--json` or a LIMIT."""

_FEATURE_ROWS = 10_000
"""Rows looked at for the names of a model's features: nearly every frame has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """What a query gave."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    """Python values: timestamps in UTC, dates, lists; whole numbers of any width are int."""
    note: str = ""
    """What one should know about the rows: "" unless the output is empty."""

    def dicts(self) -> list[dict[str, Any]]:
        """The rows with the names of their columns."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def connect(output: str, settings: StoreSettings | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection, in memory, with every view and macro of the output.

    On disk each query sees what is there when it starts; of a bucket the connection sees what was
    there when it first listed a table. A table without any file is empty, not an error.
    Timestamps are in UTC. The caller closes it.

    Raises:
        UsageError: the URI names no store.
        InfraError: the store cannot be read.
    """
    return _Views(output, settings, wanted=None).connection


def sql(output: str, query: str, settings: StoreSettings | None = None) -> QueryResult:
    """Runs a DuckDB query over the views of an output; of several statements the last one counts.

    Raises:
        UsageError: the query is wrong; in one line, with the nearest name.
        InfraError: the store cannot be read.
    """
    import duckdb

    views = _Views(output, settings, wanted=query)
    try:
        relation = views.connection.sql(query)
        found = pa.table({}) if relation is None else relation.to_arrow_table()
    except (duckdb.Error, OSError) as error:
        raise views.explain(error) from error
    finally:
        views.connection.close()
    columns = [[_plain(v) for v in column.to_pylist()] for column in found.columns]
    rows = list(zip(*columns, strict=True))
    return QueryResult(columns=tuple(found.column_names), rows=rows, note=views.note)


def result_table(result: QueryResult) -> Table:
    """A result for the terminal, at most `SHOWN_ROWS` of its rows."""
    from rich.table import Table
    from rich.text import Text

    more = len(result.rows) - SHOWN_ROWS
    hint = f"{more} more rows: use LIMIT or --json" if more > 0 else result.note
    table = Table(caption=hint or None)
    for name in result.columns:
        table.add_column(Text(name), overflow="fold")
    for row in result.rows[:SHOWN_ROWS]:
        table.add_row(*(Text(_text(v)) for v in row))  # as it is: `[…]` is no markup here
    return table


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(_text(v) for v in value[:8])}, … {len(value)}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Sums of integers come as decimals without places: int again."""
    if isinstance(value, Decimal) and value.as_tuple().exponent == 0:
        return int(value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A model as the output's own tables describe it."""

    name: str
    dim: int
    features: tuple[str, ...]


class _Views:
    """A connection with the views that the text `wanted` mentions (None: all of them).

    Making a view lists its table and opens a file of it, so a query pays for its own alone.
    """

    def __init__(self, output: str, settings: StoreSettings | None, *, wanted: str | None) -> None:
        import duckdb

        self.store = open_store(output, settings or StoreSettings())
        empty = next(iter(self.store.list_keys(f"{ROOT}/")), None) is None
        self.note = f"nothing has been written below {self.store.uri} yet" if empty else ""
        self.filesystem: Any = None
        self.connection = duckdb.connect()
        self.connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
        root = re.sub(r"([*?\[])", r"[\1]", self.store.uri)  # they stand for themselves
        if "://" in self.store.uri:
            from vidbatch.storage.filesystem import StoreFileSystem

            self.filesystem = StoreFileSystem(self.store)
            self.connection.register_filesystem(self.filesystem)
            root = "vidbatch://"
        self.connection.execute("SET VARIABLE vidbatch_root = ?", [root])
        words = set() if wanted is None else set(re.findall(r"\w+", wanted.lower()))
        try:
            self._make(words)
        except (duckdb.Error, OSError) as error:
            self.connection.close()
            raise self.explain(error) from error

    def _make(self, words: set[str]) -> None:
        every = dict(statements())
        of_models = any(w.startswith(("features_", "embeddings_")) for w in words - every.keys())
        if of_models or not words & every.keys():
            first = {name: every[name] for name in ("models", "features_all")}
            self._create(first)
            every = {k: v for k, v in statements(self._models()) if k not in first}
        needed = _closure(words & every.keys() or every.keys(), every)
        self._create({name: text for name, text in every.items() if name in needed})

    def _create(self, texts: dict[str, str]) -> None:
        import duckdb

        for name, text in texts.items():
            try:
                self.connection.execute(text)
            except duckdb.IOException as error:
                table = next((t for t in PARTITIONS if table_view(t) == name), None)
                if table is None or "No files found" not in str(error):
                    raise
                dates = {"dt": pa.date32()}
                levels = [pa.field(k, dates.get(k, pa.string())) for k in PARTITIONS[table]]
                nothing = pa.schema([*SCHEMAS[table], *levels]).empty_table()
                self.connection.register("nothing", nothing)
                self.connection.execute(f"CREATE TABLE {name} AS FROM nothing")
                self.connection.unregister("nothing")

    def _models(self) -> Iterator[_Known]:
        """The models of the output, oldest first, with the names of their features."""
        rows = self.connection.execute(
            "SELECT name, model, coalesce(dim, 0) FROM models ORDER BY first_run, model"
        ).fetchall()
        for name, partition, dim in rows:
            features = self.connection.execute(
                "SELECT DISTINCT feature FROM "
                f"(SELECT feature FROM features_all WHERE model = ? LIMIT {_FEATURE_ROWS})",
                [partition],
            ).fetchall()
            yield _Known(name=name, dim=dim, features=tuple(sorted(f for (f,) in features)))

    def _names(self, query: str) -> list[str]:
        return [name for (name,) in self.connection.execute(query).fetchall()]

    def explain(self, error: Exception) -> VidbatchError:
        """What went wrong, in one line: the store's own error, or the query's mistake."""
        import duckdb

        failure: VidbatchError | None = self.filesystem and self.filesystem.failure
        if failure is not None:
            return failure
        text = " ".join(str(error).partition("\n\nLINE")[0].split())
        if isinstance(error, duckdb.IOException | OSError) or "part-" in text:
            return InfraError(f"{self.store.uri}: the query stopped: {text}")
        missing, no_column = _MISSING.search(text), _NO_COLUMN.search(text)
        if missing:
            name = missing["name"]
            if missing["what"] == "Table":
                known = {n for n, _ in statements()} | set(self._names(_MADE))
                hint = _nearest(name, sorted(known - MACROS.keys()), "there are")
                return UsageError(f"no table {name!r} in this output — {hint}")
            hint = _nearest(name, sorted(MACROS), "of its own it has")
            return UsageError(f"no function {name!r}, neither here nor in DuckDB — {hint}")
        if no_column:
            name = no_column["a"] or no_column["b"]
            bindings = re.findall(r"\"([^\"]+)\"", text.partition("Candidate")[2])
            columns = [b.rpartition(".")[2] for b in bindings] or self._names(_COLUMNS)
            hint = _nearest(name, columns, "near it are")
            return UsageError(f"no column {name!r} in what the query reads — {hint}")
        return UsageError(f"the query cannot be run: {text}")


def _closure(wanted: Iterable[str], texts: dict[str, str]) -> set[str]:
    """Views and those that they read."""
    found: set[str] = set()
    todo = set(wanted)
    while todo:
        found |= todo
        words = {w for n in todo for w in re.findall(r"\w+", re.sub("--.*", "", texts[n]))}
        todo = (words & texts.keys()) - found
    return found


_MADE = "SELECT view_name FROM duckdb_views() WHERE NOT internal"
_COLUMNS = "SELECT DISTINCT column_name FROM duckdb_columns() WHERE NOT internal ORDER BY ALL"
_MISSING = re.compile(
    r"(?P<what>Table Function|Scalar Function|Table) with name \"?(?P<name>[^\s\"]+)\"? does not"
)
_NO_COLUMN = re.compile(
    r"column \"(?P<a>[^\"]+)\" not found|does not have a column named \"(?P<b>[^\"]+)\""
)


def _nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(known)}"
