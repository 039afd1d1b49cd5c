"""A Google Cloud Storage that is a dict in this process, for everything that a `gs://` path goes through.

Etils reaches it by fsspec (in place of gcsfs), TensorStore by the JSON API over HTTP on localhost (its own client, unchanged),
what is asked of google-cloud-storage (Orbax's question about the kind of bucket, the locks) by a stub of it.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.registry import _registry


class Objects(MemoryFileSystem):
    """What etils sees. `store` holds the objects by "/bucket/name"."""

    protocol = ("gcs", "gs")
    store: dict[str, MemoryFile] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")


class Api(BaseHTTPRequestHandler):
    """What TensorStore sees: objects are read whole or in a range, written whole, listed and deleted."""

    protocol_version = "HTTP/1.1"
    generations: dict[str, int] = {}  # noqa: RUF012

    def log_message(self, *arguments: object) -> None:
        pass

    def asked(self) -> tuple[str, dict[str, str]]:
        """The object's key ("/bucket/name"; "/bucket/" for all) and the query."""
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        return f"/{bucket}/{query.get('name') or unquote(name[1:])}", query

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def describe(self, key: str) -> dict[str, str]:
        name, size = key.split("/", 2)[2], len(Objects.store[key].getvalue())
        return {"name": name, "size": str(size), "generation": str(self.generations.get(key, 1))}

    def do_GET(self) -> None:
        key, query = self.asked()
        if key.endswith("/"):
            found = [self.describe(k) for k in sorted(Objects.store) if k.startswith(key + query.get("prefix", ""))]
            return self.answer(200, json.dumps({"items": found}).encode())
        if key not in Objects.store:
            return self.answer(404)
        data, generation = Objects.store[key].getvalue(), str(self.generations.get(key, 1))
        if query.get("ifGenerationNotMatch") == generation:
            return self.answer(304)
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.answer(200, data, x_goog_generation=generation)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        if int(first) >= len(data):
            return self.answer(416)
        part = data[int(first) : int(last) + 1 if last else None]
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self.answer(206, part, x_goog_generation=generation, Content_Range=where)

    def do_POST(self) -> None:
        key, query = self.asked()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        present = self.generations.get(key, 1) if key in Objects.store else 0
        if int(query.get("ifGenerationMatch", present)) != present:
            return self.answer(412)
        Objects.store[key] = MemoryFile(Objects(), key, data)
        self.generations[key] = present + 1
        return self.answer(200, json.dumps(self.describe(key)).encode())

    def do_DELETE(self) -> None:
        key, _ = self.asked()
        self.answer(204 if Objects.store.pop(key, None) else 404)


class Refused(Exception):
    """Of google.api_core: what a request that is refused raises, with the status."""

    def __init__(self, code: int):
        super().__init__(f"status {code}")
        self.code = code


class Blob:
    """Of the stub of google-cloud-storage: an object, with the preconditions on its generation."""

    def __init__(self, key: str):
        self._key, self.generation = key, None

    def _check(self, if_generation_match: int | None) -> int:
        present = Api.generations.get(self._key, 1) if self._key in Objects.store else 0
        if if_generation_match is not None and if_generation_match != present:
            raise Refused(412)
        return present

    def upload_from_string(self, data: str, if_generation_match: int | None = None) -> None:
        self._check(if_generation_match)
        Objects.store[self._key] = MemoryFile(Objects(), self._key, data.encode())
        self.generation = Api.generations[self._key] = max(Api.generations.values(), default=0) + 1

    def download_as_bytes(self, end: int, if_generation_match: int | None = None) -> bytes:
        if not self._check(if_generation_match):
            raise Refused(404)
        return Objects.store[self._key].getvalue()[: end + 1]

    def delete(self, if_generation_match: int | None = None) -> None:
        if not self._check(if_generation_match):
            raise Refused(404)
        del Objects.store[self._key]


class Bucket:
    """Of the stub of google-cloud-storage, without hierarchical namespaces."""

    def __init__(self, name: str):
        self.name = name

    def blob(self, name: str) -> Blob:
        return Blob(f"/{self.name}/{name}")

    def get_blob(self, name: str) -> Blob | None:
        blob = self.blob(name)
        blob.generation = blob._check(None)
        return blob if blob.generation else None


class Client:
    """Of the stub of google-cloud-storage."""

    def get_bucket(self, name: str) -> Bucket:
        return Bucket(name)

    bucket = get_bucket


@contextmanager
def serve() -> Iterator[str]:
    """The store, empty, while the context lasts; yields the path of a bucket in it."""
    Objects.store.clear()
    Api.generations.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = Client
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry, "gcs", Objects)  # `fsspec.register_implementation`, undone at the end
        patch.setitem(sys.modules, "google.cloud", cloud)
        patch.setitem(sys.modules, "google.cloud.storage", storage)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        try:
            yield "gs://bucket"
        finally:
            server.shutdown()
            server.server_close()
