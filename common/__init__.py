"""What both sides of the wire share and is no part of the contract: how to reach NATS, logs, secret files.

May not live here: anything of `service` or `control`. It may know `schemas`, which knows nothing of it.
"""
