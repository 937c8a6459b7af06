"""The command line `cox`. It talks to NATS only; everything that it can do, your own program can do too.

Lives here: which commands there are, their order and their examples. What they do is in the other modules of
this package; how they fail is in `app.py` and `exits.py`. Called by the `cox` script.
"""

import typer

from coxswain.control.cli import (
    doctor,
    events,
    explain,
    fleet,
    lab,
    launch,
    policies,
    policy_tables,
    requests,
    setup,
    steer,
    top,
)
from coxswain.control.cli.app import boundary, command, epilogue, root
from coxswain.control.cli.exits import EPILOGUE

__all__ = ["app", "main"]

LOOK, STEER, POLICY, RUN, SET_UP = "Look", "Steer", "Policy", "Run", "Set up"
WITHOUT_NATS = ("json",)
"""The global options of a command that talks to nobody."""

app = typer.Typer(
    name="cox",
    help="Steer running vLLM engines over NATS: hold, continue, reorder and share.",
    epilog=EPILOGUE,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
root(app)

command(app, "ps", panel=LOOK, example="cox ps --watch")(fleet.ps)
command(app, "top", panel=LOOK, example="cox top --record incident.jsonl")(top.top)
command(app, "requests", panel=LOOK, example="cox requests --tenant acme --state queued")(requests.requests)
command(app, "events", panel=LOOK, example="cox events --since 10m --kind held --kind continued")(
    events.events
)
command(app, "explain", panel=LOOK, example="cox explain --tenant acme --since 10m")(explain.explain)

command(app, "hold", panel=STEER, example="cox hold --tenant acme --lease 30s")(steer.hold)
command(app, "continue", panel=STEER, example="cox continue --tenant acme")(steer.continue_)
command(app, "prioritize", panel=STEER, example="cox prioritize REQUEST --priority -10")(steer.prioritize)
command(app, "abort", panel=STEER, example="cox abort REQUEST --reason 'ran away'")(steer.abort)
command(app, "rank", panel=STEER, example="cox rank --worker w1 acme=2 globex=1")(steer.rank)
command(app, "limit", panel=STEER, example="cox limit --tenant acme --max-running 8")(steer.limit)
command(app, "drain", panel=STEER, example="cox drain --worker w1")(steer.drain)

command(
    app,
    "controller",
    panel=RUN,
    shared=("nats", "fleet", "json"),
    example="cox controller --policy vtc --set wq=2",
)(launch.controller)
command(app, "worker", panel=RUN, passes_on=True)(launch.worker)
command(app, "demo", panel=RUN, passes_on=True)(launch.demo)

command(app, "init", panel=SET_UP, example="cox init --max-age 7d")(setup.init)
command(app, "schema", panel=SET_UP, shared=WITHOUT_NATS, example="cox schema --check docs/schema.json")(
    setup.schema
)
command(app, "doctor", panel=SET_UP, example="cox doctor")(doctor.doctor)
command(app, "version", panel=SET_UP, shared=WITHOUT_NATS, example="cox version --json")(setup.version)

tenants = typer.Typer(rich_markup_mode="rich")
tenants_set = "cox tenants set acme --weight 2 --class chat --priority-min 0"
tenants.callback(invoke_without_command=True, epilog=epilogue(tenants_set))(
    boundary(policy_tables.tenants_list)
)
command(tenants, "list", panel=POLICY, example="cox tenants list")(policy_tables.tenants_list)
command(tenants, "set", panel=POLICY, example=tenants_set)(policy_tables.tenants_set)
command(tenants, "rm", panel=POLICY, example="cox tenants rm acme")(policy_tables.tenants_rm)
app.add_typer(tenants, name="tenants", rich_help_panel=POLICY)

classes = typer.Typer(rich_markup_mode="rich")
classes_set = "cox classes set batch --position 10 --order priority"
classes.callback(invoke_without_command=True, epilog=epilogue(classes_set))(
    boundary(policy_tables.classes_list)
)
command(classes, "list", panel=POLICY, example="cox classes list")(policy_tables.classes_list)
command(classes, "set", panel=POLICY, example=classes_set)(policy_tables.classes_set)
command(classes, "rm", panel=POLICY, example="cox classes rm batch")(policy_tables.classes_rm)
app.add_typer(classes, name="classes", rich_help_panel=POLICY)

command(app, "policies", panel=POLICY, shared=WITHOUT_NATS, example="cox policies --json")(policies.policies)

laboratory = typer.Typer(
    rich_markup_mode="rich",
    help="Try policies on the real scheduler in virtual time: no GPU, no NATS, ten minutes of traffic in seconds.",
    epilog=epilogue("cox lab compare --suite overload --policies fcfs,vtc"),
    no_args_is_help=True,
)
command(
    laboratory,
    "run",
    panel=RUN,
    shared=WITHOUT_NATS,
    example="cox lab run --suite overload --policy vtc --plots out",
)(lab.run)
command(
    laboratory,
    "compare",
    panel=RUN,
    shared=WITHOUT_NATS,
    example="cox lab compare --suite overload --policies fcfs,vtc,rpm20",
)(lab.compare)
command(laboratory, "suites", panel=LOOK, shared=WITHOUT_NATS, example="cox lab suites --json")(lab.suites)
app.add_typer(laboratory, name="lab", rich_help_panel=RUN)


def main() -> None:
    """Run `cox` with the process's arguments; exits with a code of `exits.Exit`."""
    app()
