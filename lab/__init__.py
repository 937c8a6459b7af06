"""The laboratory: the real vLLM scheduler and the real control core, in virtual time on a simulated device.

Nothing sleeps, no process is started, no NATS is needed; ten minutes of traffic take seconds, and the same seed
gives the same run. What is real: vLLM's scheduler and KV manager (stock, or ours), the steering core, the control
core and its policies, status frames and commands. What is not: the device (`service.simulated.roofline` says how
long a step takes), the network (`link` delays and loses messages) and the clock (`agenda`).

The one package that may import both `service` and `control`; only `cox lab` imports it, when it is called.

    agenda      virtual time                       suites     traffic by name; trace: traffic from a file
    modelless   vLLM's scheduler without a model   metrics    what is reported, as VTC's authors define it
    admission   reserve: as VTC's implementation   published  what papers report
    schedulers  ours and vLLM's, in virtual time   report     tables; plots: pictures
    engine      one worker; link, controller: the rest of the world
    experiment  one run, from traffic to what became of every request
"""
