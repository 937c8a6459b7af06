"""Where each tenant waits, over all workers of a fleet. Pure; kept by `fleet`, read by policies."""

from typing import Final

from coxswain.schemas.names import is_class

MAX_CLASSES: Final = 1_024
"""Classes that somebody is known to be in: a policy may configure all of them, on every worker."""


class Presence:
    """Where each tenant is, over all live workers: kept as it changes, never searched for."""

    def __init__(self) -> None:
        self.waiting: dict[str, set[str]] = {}
        """Tenant → workers where it has anything queued."""
        self.moved: dict[str, None] = {}
        """Tenants of which `waiting` changed since `Fleet.settle`."""
        self.classes: set[str] = set()
        """Classes that any tenant or request was ever seen in, the first `MAX_CLASSES` of them."""

    def meet(self, class_: str) -> None:
        """Somebody is in the class."""
        if class_ not in self.classes and len(self.classes) < MAX_CLASSES and is_class(class_):
            self.classes.add(class_)

    def note(self, tenant: str, worker: str, *, here: bool) -> None:
        """The tenant waits on the worker now, or not any more."""
        self.moved[tenant] = None
        workers = self.waiting.get(tenant)
        if workers is None:
            if here:
                self.waiting[tenant] = {worker}
        elif here:
            workers.add(worker)
        else:
            workers.discard(worker)
            if not workers:
                del self.waiting[tenant]
