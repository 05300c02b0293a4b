"""A server that speaks S3: moto, one request at a time.

moto looks at the condition of a write, and writes, in two steps that another request may come between. S3 does not.
"""

import io
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_application, _lock = DomainDispatcherApplication(create_backend_app), threading.Lock()


def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request. The body is read before, so that a slow client does not keep others out."""
    if length := int(environ.get("CONTENT_LENGTH") or 0):
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
    with _lock:
        return list(_application(environ, start_response))


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), answer, threaded=True)
