"""An OpenAI-compatible endpoint that is a server of the test's own."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class Endpoint:
    """Answers with what `reply` makes of a prompt: a text, or a status code. `location` is where a 3xx leads."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.location = ""
        self.reply: Callable[[str], str | int] = lambda prompt: "3"
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body | {"path": self.path})
                endpoint.keys.append(self.headers["Authorization"])
                made = endpoint.reply(body["messages"][0]["content"])
                self.send_response(made if isinstance(made, int) else 200)
                if isinstance(made, int) and 300 <= made < 400:
                    self.send_header("Location", endpoint.location)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": made}}]}).encode())

            def do_GET(self) -> None:
                endpoint.requests.append({"path": self.path})
                endpoint.keys.append(self.headers["Authorization"])
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def running_endpoint() -> Iterator[Endpoint]:
    """An endpoint that answers until the block ends."""
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()
