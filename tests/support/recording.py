"""vLLM's stock scheduler, writing down every request that reaches the engine process.

Loaded there by `--scheduler-cls tests.support.recording.RecordingScheduler`; one JSON line per request goes
to the file named by `RECORD_TO`. What a request's id proves is decided in that process, with the key that
it inherited.
"""

import json
import os
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from coxswain.service import request_id


class RecordingScheduler(Scheduler):
    """The stock scheduler with a log of arrivals."""

    def add_request(self, request: Any) -> None:
        """Write the arrival down, then do what vLLM does."""
        found = request_id.parse(request_id.read_key(os.environ), request.request_id)
        line = {
            "internal": request.request_id,
            "public": found.request,
            "tenant": found.tenant,
            "class": found.tenant and found.class_,
            "priority": request.priority,
        }
        with Path(os.environ["RECORD_TO"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
        super().add_request(request)
