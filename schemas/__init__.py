"""The wire contract, version 1: what crosses NATS and nothing else.

Lives here: msgspec structs, one module per direction, their decoders, subjects, names and refusal codes.
May not live here: I/O, clocks, vLLM, NATS, anything else of ours. `common`, `service` and `control` import this.
The rules behind the shapes are in `docs/protocol.md`; `cox schema` prints all of it as JSON Schema.
"""

VERSION = 1
"""Version of the contract: the `v1` in every subject."""
