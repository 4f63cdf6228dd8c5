"""The application behind uvicorn.toml."""

import os


async def application(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError(f"{scope['type']} is not served here")
    body = f"generation={os.environ['REUSEPORTD_GENERATION']} pid={os.getpid()}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
