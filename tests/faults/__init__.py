"""The fault suite: a fleet of real processes under load, faults one after the other, the same checks after each.

`fleet` (the processes), `load` (clients that know what they must be told), `steering` (an operator who never rests),
`watch` (what the bus says), `checks` (what must hold), `faults`, `stops` and `cluster` (what is done, one small
function each), `rounds` (one fault from its begin to its verdict), `steps` (random steering of one engine). Run as
tests (`test_faults.py`, the short form) and as `make soak` (`__main__.py`).
"""
