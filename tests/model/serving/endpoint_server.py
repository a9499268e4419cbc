"""A server on loopback with OpenAI's interface around an engine; tests/serve has the real one of vLLM."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cumo_model.serving.messages import picture_in
from cumo_model.serving.sampling import Sampling


class Handler(BaseHTTPRequestHandler):
    """Streams the answers of `server.engine`, and keeps the requests in `server.asked`."""

    def do_GET(self):
        if self.path != "/v1/models":
            self._send(404, {"detail": "Not Found"})
            return
        self._send(200, {"object": "list", "data": [{"id": self.server.name, "object": "model"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        try:
            messages = [self._message(message) for message in request["messages"]]
            tokens, limit = request.get("max_tokens", 1_000_000), self.server.positions
            if limit is not None and limit <= tokens < 1_000_000:
                raise ValueError(f"the maximum context length is {limit} tokens, got max_tokens {tokens}")
            options = request["temperature"], request.get("top_p", 1.0), request.get("seed")
            sampling = Sampling(tokens, *options)
            stream = self.server.engine.stream(messages, sampling)
        except ValueError as error:
            self._send(400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            with stream as pieces:
                for piece in pieces:
                    self._chunk(request, [{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
            reply = pieces.reply
            finish = "stop" if reply.finish == "stop" else "length"
            self._chunk(request, [{"index": 0, "delta": {}, "finish_reason": finish}])
            used = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
            self._chunk(request, [], usage={**used, "total_tokens": sum(used.values())})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.left.set()

    def _message(self, message):
        if isinstance(message["content"], str):
            return message
        parts = [
            part if part["type"] == "text" else {"type": "image", "image": picture_in(part)}
            for part in message["content"]
        ]
        return {**message, "content": parts}

    def _chunk(self, request, choices, **more):
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": request["model"]}
        self.wfile.write(f"data: {json.dumps({**chunk, 'choices': choices, **more})}\n\n".encode())
        self.wfile.flush()

    def _send(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def silent(is_over):
    """A `do_POST` whose answer has a first piece, and a second one only when `is_over` is set."""
    chunk = '{"choices": [{"index": 0, "delta": {"content": "a "}, "finish_reason": null}]}'

    def answer(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {chunk}\n\n".encode())
        self.wfile.flush()
        is_over.wait(120)

    return answer


@contextmanager
def serving(engine, name="tiny"):
    """The server, with its address as `url`; it ends with the `with` block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.engine, server.name, server.asked, server.left = engine, name, [], threading.Event()
    server.positions = None  # refuses longer answers than this, as vLLM does
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
