"""Files: uploaded as a form, listed page by page, read and deleted; no client's name is a path."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from asking import Api, error_of, make_api
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from server.api.multipart import Form, read_form
from server.errors import InvalidRequest
from server.jobs.files import safe_name
from server.jobs.store import Store

LINES = b'{"text": "One."}\n{"text": "Two."}\n'


def upload(api: Api, content: bytes = LINES, name: str = "train.jsonl", **fields: str) -> Any:
    return api.client.post("/v1/files", data={"purpose": "fine-tune", **fields}, files={"file": (name, content)})


def kept(store: Store) -> list[str]:
    return sorted(path.name for path in (store.directory / "files").iterdir())


def test_a_file_comes_and_goes(api: Api, store: Store) -> None:
    made = upload(api).json()
    assert made == {
        "id": made["id"], "object": "file", "bytes": len(LINES), "created_at": made["created_at"], "expires_at": None,
        "filename": "train.jsonl", "purpose": "fine-tune", "status": "processed", "status_details": None,
    }  # fmt: skip
    assert made["id"].startswith("file-")
    path = f"/v1/files/{made['id']}"
    assert api.client.get(path).json() == made
    content = api.client.get(f"{path}/content")
    assert (content.content, content.headers["content-disposition"]) == (LINES, 'attachment; filename="train.jsonl"')
    assert kept(store) == [made["id"]]
    assert api.client.delete(path).json() == {"id": made["id"], "object": "file", "deleted": True}
    assert kept(store) == []
    for response in (api.client.get(path), api.client.get(f"{path}/content"), api.client.delete(path)):
        assert error_of(response, 404)["message"] == f"No such File object: {made['id']}"


def test_lists_have_pages(api: Api) -> None:
    ids = [upload(api, purpose=purpose).json()["id"] for purpose in ("batch", "fine-tune", "batch", "batch")]
    whole = api.client.get("/v1/files").json()
    assert [each["id"] for each in whole["data"]] == ids[::-1]
    assert (whole["object"], whole["first_id"], whole["last_id"], whole["has_more"]) == ("list", ids[3], ids[0], False)
    page = api.client.get("/v1/files", params={"purpose": "batch", "order": "asc", "limit": 2}).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([ids[0], ids[2]], True)
    rest = api.client.get("/v1/files", params={"purpose": "batch", "order": "asc", "after": ids[2]}).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([ids[3]], False)
    assert api.client.get("/v1/files", params={"purpose": "vision"}).json()["data"] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", "0"), ("limit", "x"), ("limit", "10001"), ("order", "up"), ("after", "file-none")],
)
def test_lists_asked_for_wrongly(api: Api, name: str, value: str) -> None:
    assert error_of(api.client.get("/v1/files", params={name: value}), 400)["param"] == name


def test_a_clients_name_is_no_path(api: Api, store: Store, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    made = upload(api, name="../../../etc/passwd").json()
    assert made["filename"] == "passwd"
    assert {path.name for path in set(tmp_path.rglob("*")) - set(before)} == {made["id"]}
    for strange in ("..%2F..%2Flock", "../lock", "%2e%2e/jobs.sqlite", "a" * 3000):
        assert api.client.get(f"/v1/files/{strange}/content").status_code == 404
    assert safe_name("C:\\a\\b.jsonl") == "b.jsonl"
    assert safe_name("a\r\nb\0/") == "file"
    assert len(safe_name("x" * 999)) == 255


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"purpose": "vision"}, "purpose"), ({"expires_after[seconds]": "5"}, "expires_after")],
)
def test_wrong_fields(api: Api, store: Store, fields: dict[str, str], param: str) -> None:
    assert error_of(upload(api, **fields), 400)["param"] == param
    assert kept(store) == []


def test_what_is_no_form_or_no_file(api: Api, store: Store) -> None:
    post = api.client.post
    assert error_of(post("/v1/files", json={"purpose": "batch"}), 400)["message"].startswith("The body")
    assert error_of(post("/v1/files", data={"purpose": "batch"}, files={"x": b"1"}), 400)["param"] == "file"
    assert error_of(post("/v1/files", files={"file": LINES}), 400)["param"] == "purpose"
    assert error_of(upload(api, b""), 400)["param"] == "file"
    twice = [("file", ("a", b"1")), ("file", ("b", b"2"))]
    assert error_of(post("/v1/files", data={"purpose": "batch"}, files=twice), 400)["param"] == "file"
    form = {"content-type": "multipart/form-data; boundary=b"}
    for body in (b"", b"--b", b"--b\r\ncontent-disposition: form-data; name=file; filename=x\r\n\r\nabc", b"zzz"):
        error_of(post("/v1/files", content=body, headers=form), 400)
    error_of(post("/v1/files", content=b"--b--", headers={"content-type": "multipart/form-data"}), 400)
    many = {f"f{i}": "x" for i in range(40)}
    error_of(upload(api, **many), 400)
    error_of(upload(api, long="x" * 70_000), 400)
    assert kept(store) == []


def test_a_form_has_bounds_before_its_file(api: Api, store: Store) -> None:
    """CVE-2026-42561, CVE-2024-53981: headers without end, and much that is no part of it."""
    headers = {"content-type": "multipart/form-data; boundary=b"}
    name = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"'
    for noise in (b"\r\nx: y" * 1000, b"\r\nx: " + b"y" * 100_000, b"\r\n" + b"y" * 100_000 + b": x"):
        error_of(api.client.post("/v1/files", content=name + noise + b"\r\n\r\n1\r\n--b--", headers=headers), 400)
    epilogue = form_of([("purpose", None, b"batch"), ("file", "x", b"1")]) + b"\r\n" * 100_000
    assert api.client.post("/v1/files", content=epilogue, headers=headers).json()["bytes"] == 1
    assert len(kept(store)) == 1


def test_a_file_that_is_too_large(api: Api, store: Store) -> None:
    most = store.files.max_bytes
    assert upload(api, b"x" * most).json()["bytes"] == most
    assert error_of(upload(api, b"x" * (most + 1)), 413)["code"] == "file_too_large"
    assert len(kept(store)) == 1


def test_fields_nobody_knows_are_named(api: Api) -> None:
    assert upload(api, colour="red").headers["x-ignored-fields"] == "colour"


def test_a_full_disk_is_a_503_and_leaves_nothing(api: Api, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert error_of(upload(api), 503)["code"] == "storage_error"
    assert kept(store) == []
    assert api.client.get("/v1/files").json()["data"] == []
    assert upload(api).status_code == 200


class FullDisk(io.RawIOBase):
    """A file on it: what is written stays in the buffer until it is full, or closed."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("size", [0, 1, 125, 3_000, 900_000])
def test_an_upload_of_any_size_to_a_full_disk_is_a_503(
    size: int, api: Api, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: io.BufferedWriter(FullDisk()))
        response = upload(api, LINES[:1] * size)
    assert error_of(response, 503 if size else 400)["code"] == ("storage_error" if size else "invalid_value")
    assert kept(store) == []


def test_files_expire(api: Api, store: Store) -> None:
    made = upload(api, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}).json()
    assert made["expires_at"] == made["created_at"] + 3600
    kept_file = upload(api).json()["id"]

    async def expire() -> None:
        await store.database.run(
            lambda connection: connection.exec_driver_sql("UPDATE files SET expires_at = 5 WHERE expires_at > 0")
        )
        await store.files.delete_expired()

    assert api.client.get(f"/v1/files/{made['id']}").status_code == 200
    asyncio.run(expire())
    assert api.client.get(f"/v1/files/{made['id']}").status_code == 404
    assert kept(store) == [kept_file]


def test_keys_see_their_own(store: Store) -> None:
    api = make_api(store=store, keys={"ann": "key-of-ann", "bob": "key-of-bob"})
    ann, bob = ({"authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
    form = {"data": {"purpose": "batch"}, "files": {"file": LINES}}
    made = api.client.post("/v1/files", headers=ann, **form).json()["id"]
    assert [each["id"] for each in api.client.get("/v1/files", headers=ann).json()["data"]] == [made]
    assert api.client.get("/v1/files", headers=bob).json()["data"] == []
    for path in (f"/v1/files/{made}", f"/v1/files/{made}/content"):
        assert api.client.get(path, headers=bob).status_code == 404
    assert api.client.delete(f"/v1/files/{made}", headers=bob).status_code == 404
    assert error_of(api.client.get("/v1/files", headers=bob, params={"after": made}), 400)["param"] == "after"
    assert api.client.get("/v1/files").status_code == 401


def test_without_a_directory_the_routes_say_what_is_missing() -> None:
    api = make_api()
    for method, path in (
        ("POST", "/v1/files"),
        ("GET", "/v1/files/file-x/content"),
        ("DELETE", "/v1/files/file-x"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine-tunes"),
        ("GET", "/v1/batches"),
    ):
        error = error_of(api.client.request(method, path), 404)
        assert error["code"] == "data_dir_required"
        assert "--data-dir" in error["message"]


class Kept(list[bytes]):
    async def write(self, data: bytes) -> None:
        self.append(data)


def form_of(parts: list[tuple[str, str | None, bytes]]) -> bytes:
    body = b""
    for name, filename, content in parts:
        more = "" if filename is None else f'; filename="{filename}"'
        body += f'--b\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--b--\r\n"


@given(content=st.binary(max_size=300), first=st.booleans(), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_a_form_is_the_same_in_any_pieces(content: bytes, first: bool, cuts: list[int]) -> None:
    """Unless the content holds the boundary, as no client's would."""
    if b"\r\n--b" in b"\r\n" + content:
        return
    parts = [("purpose", None, b"batch"), ("file", "a.jsonl", content)]
    body = form_of(parts if first else parts[::-1])

    async def pieces() -> AsyncIterator[bytes]:
        rest, at = body, 0
        while rest:
            size = cuts[at % len(cuts)]
            yield rest[:size]
            rest, at = rest[size:], at + 1

    async def read() -> tuple[Form, Kept]:
        sink = Kept()
        return await read_form(Headers({"content-type": "multipart/form-data; boundary=b"}), pieces(), sink), sink

    form, sink = asyncio.run(read())
    assert (form.fields, form.filename, b"".join(sink)) == ({"purpose": "batch"}, "a.jsonl", content)


@given(st.binary(max_size=200))
def test_no_bytes_are_more_than_a_wrong_form(noise: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"--b\r\n" + noise

    headers = Headers({"content-type": "multipart/form-data; boundary=b"})
    with pytest.raises(InvalidRequest):
        asyncio.run(read_form(headers, pieces(), Kept()))
