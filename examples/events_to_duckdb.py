"""Keep a fleet's events in DuckDB: python examples/events_to_duckdb.py events.duckdb [once]. Run again, it goes on."""

import asyncio
import os
import sys

import duckdb
import msgspec

from coxswain.common.connection import Connection
from coxswain.control.client import Client

TABLE = """CREATE TABLE IF NOT EXISTS events (id VARCHAR PRIMARY KEY, unix_s DOUBLE, kind VARCHAR, worker VARCHAR,
    tenant VARCHAR, class VARCHAR, request VARCHAR, event JSON)"""
FIELDS = ("id", "at", "kind", "worker", "tenant", "class", "request")
OVERLAP_S = 60.0  # workers' clocks differ, and events may be late: what is there already is passed over


async def main(path: str, *, follow: bool) -> None:
    """Go on behind what the file has; without `follow` to the end of the log."""
    with duckdb.connect(path) as db:
        db.execute(TABLE)
        [(last,)] = db.execute("SELECT max(unix_s) FROM events").fetchall()
        rows: list[list[object]] = []
        async with (
            await Client.connect(Connection.from_env(os.environ)) as client,
            asyncio.TaskGroup() as group,
        ):
            storing = group.create_task(store_each_second(db, rows))
            async for event in client.events(
                start="all" if last is None else last - OVERLAP_S, follow=follow
            ):
                plain = msgspec.to_builtins(event)
                rows.append([*map(plain.get, FIELDS), msgspec.json.encode(plain).decode()])
                if len(rows) >= 1_000:
                    store(db, rows)
            storing.cancel()
        store(db, rows)


async def store_each_second(db: duckdb.DuckDBPyConnection, rows: list[list[object]]) -> None:
    """Whether or not more come: the last event of a fleet that falls quiet is kept, too."""
    while True:
        await asyncio.sleep(1.0)
        store(db, rows)


def store(db: duckdb.DuckDBPyConnection, rows: list[list[object]]) -> None:
    """All of them or none; an event that is there stays as it is."""
    if rows:
        db.begin()
        db.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        db.commit()
        rows.clear()


asyncio.run(main(sys.argv[1], follow="once" not in sys.argv))
