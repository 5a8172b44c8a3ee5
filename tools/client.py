"""JSON over HTTP with retries: what the search client, the critic and --engine openai share.

On urllib alone: Hugging Face's client refuses every request while HF_HUB_OFFLINE is set, a local server's too, and
has no completions endpoint.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from core.trajectory import writable


class ServerError(RuntimeError):
    """A server could not be reached, refused the request or gave no readable answer."""


def request_json(
    url: str, body: dict | None = None, key: str = "", timeout: float = 60.0, retries: int = 4, backoff: float = 0.5
) -> Any:
    """The decoded answer to a GET (no body) or a POST of JSON; half a surrogate pair in it becomes "?".

    timeout: seconds per attempt. retries: further attempts, after backoff, 2·backoff, 4·backoff … seconds, on what may
    pass: no connection, a timeout, HTTP 408, 429 and 5xx, an unreadable answer. key: bearer token; a redirect does not
    carry it on. Raises ServerError.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                answer = json.loads(reply.read())
                return json.loads(writable(json.dumps(answer, ensure_ascii=False)))
        except urllib.error.HTTPError as e:
            problem = f"HTTP {e.code} {e.read(200).decode('utf-8', 'replace')}"
            if e.code < 500 and e.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException, ValueError) as e:
            problem = str(getattr(e, "reason", e)) or type(e).__name__
    raise ServerError(f"{url} after {attempt + 1} attempts: {problem}")
