"""What runs outside the engines: the controller and its policies, the client, the command line.

May import `schemas`; never `service`, never vLLM: this side installs and runs without an engine.
Pure cores (`fleet`, `core`, `policy`, `policies`) decide;
shells (`client`, `tables`, `lease`, `daemon`) do the I/O.
"""
