"""Fair shares of recent service: what a tenant was served counts half after `half_life_s`.

VTC remembers for ever what tenants took from each other while both wanted more; here a tenant that was heavy
this morning is as good as new by noon. (The idea is that of decayed usage in cluster schedulers.)
"""

from typing import Annotated, ClassVar

import msgspec

from coxswain.control.fleet import Fleet
from coxswain.control.policy import Directives, Sees, Tables, each_class, weight_of
from coxswain.schemas.policy import TenantRank


class HalfLife:
    """Orders tenants by service that fades."""

    name: ClassVar[str] = "half_life"
    sees: ClassVar[Sees] = "tenants"

    class Params(msgspec.Struct, frozen=True, kw_only=True):
        """`--set half_life_s=600`."""

        half_life_s: Annotated[float, msgspec.Meta(gt=0)] = 3_600.0

    def __init__(self, params: Params) -> None:
        self.params = params
        self.usage: dict[str, float] = {}
        """Faded service per tenant, in priced tokens per weight."""
        self.fleet = Fleet()
        self.tables = Tables()
        self.at = 0.0

    def observe(self, fleet: Fleet, tables: Tables, now: float) -> None:
        """Let the past fade, then add what was served since the last look."""
        fade = 0.5 ** ((now - self.at) / self.params.half_life_s) if self.at else 1.0
        self.fleet, self.tables, self.at = fleet, tables, now
        self.usage = {tenant: used * fade for tenant, used in self.usage.items()}
        for tenant, charged in fleet.served.items():
            self.usage[tenant] = self.usage.get(tenant, 0.0) + charged

    def decide(self, now: float) -> Directives:  # noqa: ARG002  (the protocol's signature)
        """Bases that make every worker's virtual times the faded service."""
        ranks: dict[str, dict[str, TenantRank]] = {}
        for view in self.fleet.live():
            ranks[view.worker] = {
                tenant: TenantRank(
                    base=self.usage[tenant] - row.charged - row.lift,
                    weight=weight_of(self.tables.tenants, tenant),
                )
                for tenant, row in view.tenants.items()
                if tenant in self.usage
            }
        return Directives(classes=each_class(self.tables.classes, order="fair"), ranks=ranks)
