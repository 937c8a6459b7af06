"""Every subject, bucket and stream of a fleet, built in one place.

Roles and verbs are part of the subject, so that NATS permissions alone decide who may do what.
"""

from typing import Final, NamedTuple

from coxswain.schemas.names import ALL, check_token

PREFIX: Final = "cox.v1"

OPERATOR: Final = "operator"
CONTROLLER: Final = "controller"
ROLES: Final = (OPERATOR, CONTROLLER)
"""Who may publish commands. The engine itself is a third holder of requests, never a publisher."""
ENGINE: Final = "engine"

QUERIES: Final = ("queue", "request", "config", "status")


class CommandSubject(NamedTuple):
    """The tokens of a command's subject after the fleet."""

    role: str
    worker: str
    verb: str


class Subjects:
    """The subjects of one fleet.

    Args:
        fleet: the fleet's name, a subject token.

    Raises:
        NameRefusedError: if the name is not a token.
    """

    def __init__(self, fleet: str) -> None:
        self.fleet = check_token("fleet", fleet)
        self.root = f"{PREFIX}.{fleet}"
        self.lead = f"{self.root}.lead"
        self.status_all = f"{self.root}.status.*"
        self.events_all = f"{self.root}.event.>"
        self.stream = f"COX_{fleet}_EVENTS"
        self.lease_bucket = f"cox_{fleet}_lease"
        self.tenants_bucket = f"cox_{fleet}_tenants"
        self.classes_bucket = f"cox_{fleet}_classes"

    def command(self, role: str, worker: str, verb: str) -> str:
        """Where a command to `worker` (or `all`) is published."""
        return f"{self.root}.cmd.{role}.{worker}.{verb}"

    def commands_of(self, worker: str) -> tuple[str, str]:
        """What a worker subscribes to for commands: its own name and `all`."""
        return f"{self.root}.cmd.*.{worker}.*", f"{self.root}.cmd.*.{ALL}.*"

    def parse_command(self, subject: str) -> CommandSubject:
        """The role, worker and verb of a command's subject as a worker receives it."""
        role, worker, verb = subject.rsplit(".", 3)[1:]
        return CommandSubject(role, worker, verb)

    def query(self, worker: str, what: str) -> str:
        """Where a question to `worker` (or `all`) is asked."""
        return f"{self.root}.query.{worker}.{what}"

    def queries_of(self, worker: str) -> tuple[str, str]:
        """What a worker subscribes to for queries: its own name and `all`."""
        return f"{self.root}.query.{worker}.*", f"{self.root}.query.{ALL}.*"

    def status(self, worker: str) -> str:
        """Where a worker publishes its status frames."""
        return f"{self.root}.status.{worker}"

    def event(self, worker: str, kind: str) -> str:
        """Where a worker publishes its events of one kind."""
        return f"{self.root}.event.{worker}.{kind}"
