"""On a GPU: held requests say the same, urgent ones go first, and steering costs nothing.

`bench/h200.sh` is the way in; `python -m bench.gpu --help` lists the rest. One run starts three engines on the
same GPU and keeps them: `identity` (small, seeded, batch-invariant; done while the others load), `stock` and
`steered` (8B shape, dummy weights: speed does not depend on them). Stock and steered take turns, one of them
always idle, so that they are compared within one run on one machine. Afterwards every mode of vLLM gets a small engine
of its own.

    plan       what is measured, in which order, how long each takes (pure)
    run        starts NATS and the engines, hands out units of the plan until the time is up, saves after each
    host       one engine and the units that run on it; `engine`, `schedulers`, `load`, `wire` are its tools
    overhead, colocation, continuing, command, identity   one part of the measurement each
    client     the command path's client, a process of its own
    modes      the modes of vLLM that are proven, and what must come of each (pure)
    trials     an engine for each mode, several side by side; `trial` is one of them
    summary    one table from the JSON; `plot` the frontier
"""
