"""The HTTP edge, in vLLM's API server: who asks, what they may ask for, how much may wait, and what is counted.

`core.py` decides, `asgi.py` carries out, `hook.py` holds on to vLLM's inside; `status.py` hears the engines, for
`caps.py` and for `metrics.py` with its `tally.py` and `page.py`; `trace.py` writes spans. vLLM is told of all that by
`service/identity.py`.
"""
