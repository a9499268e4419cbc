"""What reaches the page's server over HTTP, and what its pages may load.

Uploads lose their names before the web framework sees them, because it makes file names of them. A policy
for the content of all pages lets browsers load nothing from another server.
"""

import re
import secrets

UPLOAD = 64_000_000  # bytes of a request that uploads files
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"same-origin"),
]


def anonymous(body: bytes, boundary: bytes) -> tuple[bytes, bytes]:
    """The files of a multipart body under names of our own.

    Args:
        body: a body of type multipart/form-data.
        boundary: what separates its parts.

    Returns:
        (body, boundary) with the files alone.
    """
    ours = secrets.token_hex(32).encode()
    parts = []
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:]:
        head, blank, content = part.partition(b"\r\n\r\n")
        if blank and not head.startswith(b"--") and re.search(rb"\bfilename\*?=", head):
            name = f"{secrets.token_hex(16)}.png".encode()  # browsers show it as a picture of any format
            lines = (b'content-disposition: form-data; name="files"; filename="' + name + b'"', b"", content)
            parts.append(b"--" + ours + b"\r\n" + b"\r\n".join(lines) + b"\r\n")
    return b"".join(parts) + b"--" + ours + b"--\r\n", ours


class Guard:
    """ASGI middleware: anonymous uploads of limited size, and the policy on every answer.

    Args:
        app: the application behind it.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        if scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
            await self._upload(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    async def _upload(self, scope, receive, send) -> None:
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        kind = dict(headers).get(b"content-type", b"")
        boundary = re.search(rb'(?i)^multipart/form-data\s*;.*\bboundary="?([^";,]+)"?', kind)
        if not boundary:
            await _refuse(send, 400, "an upload must be multipart/form-data")
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > UPLOAD:
                await _refuse(send, 413, f"an upload must have at most {UPLOAD // 1_000_000} MB")
                return
        renamed, ours = anonymous(bytes(body), boundary[1].strip())
        kept = [pair for pair in headers if pair[0] not in (b"content-type", b"content-length")]
        kept.append((b"content-type", b"multipart/form-data; boundary=" + ours))
        kept.append((b"content-length", str(len(renamed)).encode()))
        is_given = False

        async def given():
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": renamed, "more_body": False}

        await self.app({**scope, "headers": kept}, given, send)


async def _refuse(send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
