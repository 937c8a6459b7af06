"""The command line; what each word does is in the module of its name."""

import argparse
import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.gpu.plan import Mode


def main() -> int:
    """Run one of them."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Measure steering on a GPU.")
    words = parser.add_subparsers(dest="word", required=True)

    run = words.add_parser(
        "run", help="everything, within a deadline; what is saved already is not run again"
    )
    run.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the JSON and the logs")
    run.add_argument(
        "--deadline", type=float, default=3_600.0, metavar="S", help="end within so many seconds"
    )
    run.add_argument(
        "--dry",
        dest="mode",
        action="store_const",
        const=Mode.DRY,
        default=Mode.GPU,
        help="small, without a GPU: is every line of it in order?",
    )
    run.add_argument(
        "--simulated",
        dest="mode",
        action="store_const",
        const=Mode.SIMULATED,
        help="all of it, without a GPU: what should be seen?",
    )
    run.add_argument(
        "--only", default="", metavar="TEXT,…", help="parts or units whose name begins with one of these"
    )
    run.add_argument(
        "--graphs",
        type=int,
        default=0,
        metavar="TOKENS",
        help="CUDA graphs for steps of up to so many tokens",
    )
    run.add_argument(
        "--option", action="append", default=[], metavar="NAME=JSON",
        help="of both large engines, as in async_scheduling=false; several times if need be",
    )  # fmt: skip
    run.add_argument("--list", action="store_true", help="say what would be run, and for how long")

    for word, text in (("summary", "one table from the JSON"), ("plot", "the frontier as a PNG")):
        words.add_parser(word, help=text).add_argument("folder", type=Path)

    host = words.add_parser("host", help="(inside a run) one engine")
    host.add_argument("side", choices=["stock", "steered"])
    host.add_argument("--model", type=Path, required=True)
    host.add_argument("--kv-bytes", type=int, default=0)
    host.add_argument("--graphs", type=int, default=0)
    host.add_argument("--option", action="append", default=[])
    host.add_argument("--mode", type=Mode, default=Mode.GPU)

    identity = words.add_parser("identity", help="held requests say the same; alone or inside a run")
    identity.add_argument("--json", type=Path, required=True)
    identity.add_argument("--mode", type=Mode, default=Mode.GPU)
    identity.add_argument("--deadline", type=float, default=3_600.0, metavar="S")

    trial = words.add_parser("trial", help="(inside a run) one engine in one mode of vLLM")
    trial.add_argument("name")
    trial.add_argument("--models", type=Path, required=True)
    trial.add_argument("--json", type=Path, required=True)
    trial.add_argument("--mode", type=Mode, default=Mode.GPU)

    model = words.add_parser("model", help="(inside a run) write the seeded model")
    model.add_argument("folder", type=Path)

    client = words.add_parser("client", help="(inside a run) send commands")
    client.add_argument("request")
    client.add_argument("--worker", required=True)
    client.add_argument("--count", type=int, required=True)
    return _do(parser.parse_args())


def _do(chosen: argparse.Namespace) -> int:
    # Each imports what it needs: an engine's process must not have touched torch, and the plot needs no vLLM.
    match chosen.word:
        case "run":
            from bench.gpu.run import listing, run

            only = tuple(filter(None, re.split(",(?! )", chosen.only)))  # names have ", " in them
            if chosen.list:
                print(listing(chosen.mode, only))
                return 0
            todo = {"mode": chosen.mode, "deadline_s": chosen.deadline, "only": only, "graphs": chosen.graphs}
            todo["options"] = _options(chosen.option)
            return asyncio.run(run(chosen.out, **todo))
        case "summary":
            from bench.gpu.summary import summary

            print(summary(chosen.folder))
        case "plot":
            from bench.gpu.plot import plot

            print(plot(chosen.folder))
        case "host":
            from bench.gpu.host import host

            options = _options(chosen.option)
            asyncio.run(host(chosen.side, chosen.model, chosen.kv_bytes, chosen.mode, chosen.graphs, options))
        case "identity":
            from bench.gpu.identity import identity

            return asyncio.run(identity(chosen.json, chosen.mode, deadline_s=chosen.deadline))
        case "trial":
            from bench.gpu.trial import trial

            return asyncio.run(trial(chosen.name, chosen.models, chosen.json, chosen.mode))
        case "model":
            from bench.gpu.identity import write_model

            write_model(chosen.folder)
        case "client":
            from bench.gpu.client import client

            asyncio.run(client(chosen.request, chosen.worker, chosen.count))
    return 0


def _options(given: list[str]) -> dict[str, Any]:
    pairs = (each.partition("=") for each in given)
    return {name: json.loads(value) for name, _, value in pairs}


if __name__ == "__main__":
    sys.exit(main())
