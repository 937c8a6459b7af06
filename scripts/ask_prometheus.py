"""Ask a live Prometheus all that dashboards and alerts ask: `python -m scripts.ask_prometheus [http://127.0.0.1:9090]`.

By hand, with a fleet under load: tests hold the queries to the contract, this shows that a Prometheus understands them
and has an answer. Says which panels are empty (some should be: nothing is refused, nothing is lost), which values a
dashboard offers to choose from, and which alerts fire. Exits with 1 where Prometheus refuses a query or could not
evaluate a rule.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

from scripts.dashboards import ROWS, VALUES

RATE_INTERVAL: Final = "1m"
"""What Grafana makes of `$__rate_interval` where Prometheus scrapes every 15 s."""


def panels() -> Iterator[tuple[str, str]]:
    """Every query of every dashboard as Grafana asks it where all of everything is chosen, and where it stands."""
    for name, row in ROWS.items():
        for panel in row:
            for legend, query in panel.queries.items():
                yield f"{name}: {panel.title}, {legend}", chosen(query)


def chosen(query: str) -> str:
    """A query with Grafana's variables filled in."""
    return re.sub(r"\$(?!__)\w+", ".*", query.replace("$__rate_interval", RATE_INTERVAL))


class Prometheus:
    """What is asked of it.

    Args:
        url: where it is.
    """

    def __init__(self, url: str) -> None:
        self._api = f"{url.rstrip('/')}/api/v1"

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer.

        Raises:
            ValueError: for what it refuses, in its words.
        """
        try:
            with urlopen(f"{self._api}/{path}?{urlencode(parameters)}", timeout=30) as answer:  # noqa: S310
                return json.load(answer)["data"]
        except HTTPError as error:
            raise ValueError(json.load(error)["error"]) from error


def main() -> int:
    """Ask; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:9090")
    prometheus = Prometheus(parser.parse_args().url)
    wrong = asked = 0
    say = sys.stdout.write
    for where, query in panels():
        asked += 1
        try:
            if not prometheus.get("query", query=query)["result"]:
                say(f"empty    {where}\n")
        except ValueError as error:
            wrong += 1
            say(f"refused  {where}: {error}\n")
    for name, query in VALUES.items():
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()  # type: ignore[union-attr]
        found = prometheus.get(f"label/{label}/values", **{"match[]": chosen(selector)})
        say(f"choices  {name}: {', '.join(found) or 'none'}\n")
    for group in prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            if rule["health"] == "err":
                wrong += 1
                say(f"wrong    {rule['name']}: {rule['lastError']}\n")
            elif rule.get("state") == "firing":
                say(f"firing   {rule['name']}: {rule['alerts'][0]['annotations']['summary']}\n")
    say(f"{asked} queries of panels, {wrong} wrong\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
