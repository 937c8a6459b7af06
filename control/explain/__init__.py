"""Why a request or a tenant was slow, from the event log: `cox explain`. Pure.

`life.py` is one request's phases, `ahead.py` who went first; `story.py` tells one request, `slow.py` a tenant.
"""
