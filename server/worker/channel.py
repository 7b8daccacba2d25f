"""Messages over a private socketpair: a 4-byte length, then msgpack. Knows the types, not what they mean."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec

from server.worker.messages import FromWorker, ToWorker

_LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 1 << 28
READ_BYTES = 1 << 18


def _frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


class WorkerChannel:
    """The worker's end: blocking, because a worker with nothing to do has nothing else to wait for."""

    def __init__(self, sock: socket.socket) -> None:
        self.received = 0  # messages
        self._socket = sock
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromWorker) -> None:
        """Raises BrokenPipeError or ConnectionResetError when the api process is gone."""
        self._socket.sendall(_frame(self._encoder.encode(message)))

    def receive(self, *, wait: bool) -> list[ToWorker]:
        """Every message that has arrived; with `wait`, at least one. Raises EOFError when the api process is gone.

        A message that has begun is waited for. The socket holds little at a time, so a long message that was taken as
        it came, a piece before each step, would hold up what is sent after it for many steps: an Abort too.
        """
        messages = self._complete()
        while self._fill(wait=bool(self._buffer) or (wait and not messages)):
            messages += self._complete()
        return messages

    def _fill(self, *, wait: bool) -> bool:
        try:
            data = self._socket.recv(READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if not data:
            raise EOFError
        self._buffer += data
        return True

    def _complete(self) -> list[ToWorker]:
        messages, at = [], 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if len(self._buffer) - at < _LENGTH.size + length:
                break
            at += _LENGTH.size
            messages.append(self._decoder.decode(memoryview(self._buffer)[at : at + length]))
            at += length
        del self._buffer[:at]
        self.received += len(messages)
        return messages


class EngineChannel:
    """The api process's end, on its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.sent = 0  # messages
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._encoder = msgspec.msgpack.Encoder()
        self._outgoing = bytearray()

    @classmethod
    async def open(cls, sock: socket.socket) -> EngineChannel:
        return cls(*await asyncio.open_connection(sock=sock, limit=READ_BYTES))

    def send(self, message: ToWorker) -> None:
        """Never waits: what is queued here was admitted, so it is bounded. A dead worker's channel swallows it.

        What is sent in one turn of the event loop goes out in one write, so that the sequences of a request start in
        the same step.
        """
        self.sent += 1
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += _frame(self._encoder.encode(message))

    def _flush(self) -> None:
        if not self._writer.is_closing():
            self._writer.write(bytes(self._outgoing))
        self._outgoing.clear()

    async def receive(self) -> FromWorker | None:
        """The next message; None when the worker is gone."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > FRAME_BYTES_MAX:
                return None
            message: FromWorker = self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    def close(self) -> None:
        """At once: nobody reads what may be left to send."""
        self._writer.transport.abort()
