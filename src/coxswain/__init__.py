"""Coxswain steers running vLLM engines from outside: hold, continue, reorder and share, over NATS.

The folders `schemas`, `service`, `control` and `lab` at the top of the repository install as the
sub-packages of the same names. This package itself holds nothing but the version.
"""

__version__ = "0.1.0"
