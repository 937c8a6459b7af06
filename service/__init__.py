"""What runs in the engine's processes: the steered scheduler and its bus, the HTTP identity, the launcher.

May import `schemas` and vLLM; never `control`. Everything that depends on a vLLM version sits in
`service/scheduler/compat.py`.
"""
