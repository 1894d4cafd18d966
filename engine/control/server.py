"""The unix socket that requests come in by, for one user alone: clients, lines and their bounds."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import threading
from pathlib import Path
from typing import Any

from engine.control.request import MAX_LINE_BYTES, ControlError, refusal
from engine.control.steering import Steering

MAX_UNREAD_BYTES = 256 * 1024  # of answers that a client does not take
MAX_CLIENTS = 32
CREDENTIALS = struct.Struct("3i")


class ControlSocket:
    """Listens at a path, for this user alone, in a thread of its own. Close it before the process ends.

    Raises:
        ControlError: the path cannot be bound.
    """

    def __init__(self, path: Path, steering: Steering) -> None:
        self._path = path
        self._steering = steering
        self._selector = selectors.DefaultSelector()
        self._in: dict[socket.socket, bytearray] = {}
        self._out: dict[socket.socket, bytearray] = {}
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            path.unlink(missing_ok=True)  # of an earlier attempt: the job's lock says that no other is alive
            self._server.bind(str(path))
            path.chmod(0o600)
            self._server.listen(MAX_CLIENTS)
        except OSError as error:
            self._server.close()
            raise ControlError(f"cannot listen at {path}: {error}", code="TP-6507") from error
        self._stop_reader, self._stop_writer = os.pipe()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._selector.register(self._stop_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._stop_writer, b".")
        self._thread.join(5.0)
        self._selector.close()
        os.close(self._stop_reader)
        os.close(self._stop_writer)
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            for key, events in self._selector.select():
                if key.fileobj is self._server:
                    self._accept()
                elif key.fd == self._stop_reader:
                    for client in list(self._in):
                        self._drop(client)
                    self._server.close()
                    return
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._talk(key.fileobj, events)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._server.accept()
            uid = peer_uid(client)
            client.setblocking(False)
            if uid != os.geteuid() or len(self._in) >= MAX_CLIENTS:
                answer = (
                    refusal("TP-7852", f"user {uid} has no say here")
                    if uid != os.geteuid()
                    else refusal("TP-7853", f"{MAX_CLIENTS} connections are open already")
                )
                with client:
                    client.send(json.dumps(answer).encode() + b"\n")
                return
            self._in[client], self._out[client] = bytearray(), bytearray()
            self._selector.register(client, selectors.EVENT_READ)

    def _talk(self, client: socket.socket, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                received = client.recv(MAX_LINE_BYTES)
                if not received:
                    self._drop(client)
                    return
                self._read(client, received)
            if self._out.get(client):
                sent = client.send(self._out[client])
                del self._out[client][:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if client in self._out:
            more = selectors.EVENT_WRITE if self._out[client] else 0
            self._selector.modify(client, selectors.EVENT_READ | more)

    def _read(self, client: socket.socket, received: bytes) -> None:
        pending, answers = self._in[client], self._out[client]
        pending += received
        while (end := pending.find(b"\n")) >= 0:
            line = bytes(pending[:end])
            del pending[: end + 1]
            answers += json.dumps(self._answer(line)).encode() + b"\n"
        if len(pending) > MAX_LINE_BYTES:
            answers += json.dumps(self._answer(bytes(pending))).encode() + b"\n"
            with contextlib.suppress(OSError):
                client.send(answers)
            self._drop(client)  # where its next request begins nobody can tell
        elif len(answers) > MAX_UNREAD_BYTES:
            self._drop(client)

    def _answer(self, line: bytes) -> dict[str, Any]:
        if len(line) > MAX_LINE_BYTES:
            return refusal("TP-6508", f"a request may have {MAX_LINE_BYTES} bytes at most")
        return self._steering.answer(line)

    def _drop(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        del self._in[client], self._out[client]
        client.close()


def peer_uid(connected: socket.socket) -> int:
    """The user at the other end of a unix socket, as the kernel knows it."""
    _, uid, _ = CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(uid)
