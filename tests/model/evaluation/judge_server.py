"""A judge on loopback with OpenAI's interface, which answers by a function."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.reply(request)`: a text, or (code, message) for an error."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(request)
            self.server.keys.add(self.headers["Authorization"])
        reply = self.server.reply(request)
        if isinstance(reply, tuple):
            code, content = reply[0], {"error": {"message": reply[1]}}
        else:
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            content = {
                "id": "c",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
            code = 200
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@contextmanager
def judging(reply):
    """The server, with its address as `url`, and as `asked` the requests; it ends with the `with` block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.reply, server.asked, server.keys, server.lock = reply, [], set(), threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def text_of(request):
    """The prompt of a request."""
    return request["messages"][-1]["content"]
