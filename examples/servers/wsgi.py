"""The application behind gunicorn.toml."""

import os


def application(environ, start_response):
    body = f"generation={os.environ['REUSEPORTD_GENERATION']} pid={os.getpid()}\n".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
