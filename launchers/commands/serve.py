"""Serve a standalone model over HTTP: OpenAI's interface, and a page that shows texts being generated.

armd serve MODEL_DIR [--host 127.0.0.1] [--port 8000]
"""

import argparse
import asyncio
import ipaddress
import socket
from pathlib import Path

from armd_scale.errors import UserError
from launchers.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="model directory, written by armd export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000; 0: any free port)")
    parser.add_argument("--name", help="name of the model for clients (default: name of the directory)")
    parser.add_argument("--lanes", type=int, default=8, help="texts decoded at the same time (default 8)")
    parser.add_argument("--queue", type=int, default=64, help="maximum number of waiting texts (default 64)")
    parser.add_argument("--width", type=int, default=16, help="maximum tokens of a text per step (default 16)")
    parser.add_argument(
        "--grace", type=float, default=8.0, help="seconds that texts may take to end when the server stops (default 8)"
    )
    arguments.add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), help="default: as stored")


def run(args: argparse.Namespace) -> None:
    for name, low, high in (("port", 0, 65535), ("lanes", 1, 1024), ("queue", 1, 100_000), ("width", 1, 64)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    if not 0 <= args.grace <= 86400:
        raise UserError(f"--grace must be from 0 to 86400 seconds, not {args.grace:g}")
    try:
        import uvicorn

        from armd_scale.serving import connections
        from armd_scale.serving.app import Server
    except ImportError as error:
        raise UserError(arguments.not_installed(error.name, "serve")) from error
    import torch

    from armd_scale import inference
    from armd_scale.data import tokenizer as tokenizers

    model = inference.load(args.model, args.device, getattr(torch, args.dtype) if args.dtype else None)
    tokenizer = tokenizers.load(args.model, model.config.vocab_size, segments=False)
    name = args.name or args.model.resolve().name
    try:
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{args.host}:{args.port} cannot be bound: {reason}: choose another --port") from error
    server = Server(model, tokenizer, name, args.lanes, args.queue, args.width)
    port = listening.getsockname()[1]
    # Asked by its address; on an address for others, by any name.
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]"] if ipaddress.ip_address(address[0]).is_loopback else None
    shown = f"[{args.host}]" if ":" in args.host else args.host
    paths = "page, /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics"
    print(f"{name} on http://{shown}:{port}  ({paths})", flush=True)
    config = uvicorn.Config(
        server.app(hosts),
        http=connections.protocol(most=min(1000, connections.raise_limit() // 2)),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=round(args.grace) + 2,
    )

    class Draining(uvicorn.Server):
        """Lets the texts in lanes end before connections are closed."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await asyncio.to_thread(server.scheduler.close, args.grace)
            await super().shutdown(sockets)

    Draining(config).run(sockets=[listening])
