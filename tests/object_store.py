"""Object stores on loopback: emulators on PyPI of Google's and of S3, and what they lack of the protocols that we rely
on."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Protocol
from urllib.parse import unquote

import pytest

BUCKET, DENIED = "bucket", "denied"
#: What clients read; the gRPC of buckets of another kind would first wait for its time to be up.
VARIABLES = {
    "STORAGE_EMULATOR_HOST": "{address}",
    "TENSORSTORE_GCS_HTTP_URL": "{address}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}
S3_VARIABLES = {
    "AWS_ENDPOINT_URL": "{address}",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


class ObjectStore(Protocol):
    """A running store."""

    root: str
    """The path of the bucket that can be written."""
    address: str
    denies: Callable[[str, str], bool]
    """Called with each request's method and object, on the server's thread: whether it is denied."""

    def names(self) -> list[str]:
        """All objects of the bucket."""
        ...

    def content(self, name: str) -> bytes:
        """An object."""
        ...

    def remove(self, name: str) -> None:
        """Removes an object."""
        ...


class _Google:
    root = f"gs://{BUCKET}"

    def __init__(self, address: str, storage):
        self.address, self._storage = address, storage
        self.denies = lambda method, name: False

    def names(self) -> list[str]:
        return [found["name"] for found in self._storage.get_file_list(BUCKET, None, None)[0]]

    def content(self, name: str) -> bytes:
        return self._storage.get_file(BUCKET, name)

    def remove(self, name: str) -> None:
        self._storage.delete_file(BUCKET, name)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store with a bucket that can be written and one that is denied, and the variables that lead clients there."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when it is imported
    pytest.importorskip("gcsfs", reason="needs the extra [gcs]")
    pytest.importorskip("gcp_storage_emulator", reason="needs the extra [dev]")
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound

    store: ObjectStore

    def answered(handler):
        def handle(request, response, storage, *rest):
            bucket = request.params.get("bucket_name")
            name = request.params.get("object_id") or _name_of(request)
            if store.denies(request.method, name) or bucket == DENIED:
                response.status = HTTPStatus.FORBIDDEN
                response.json({"error": {"code": 403, "message": "you may not use this bucket"}})
                return
            if wanted := request.query.get("ifGenerationMatch"):
                try:
                    generation = int(storage.get_file_obj(bucket, name)["generation"])
                except NotFound:
                    generation = 0
                if generation != int(wanted[0]):
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    response.json({"error": {"code": 412, "message": "conditionNotMet"}})
                    return
            handler(request, response, storage, *rest)
            if request.method == "GET" and isinstance(response._content, bytes):
                response["X-Goog-Generation"] = storage.get_file_obj(bucket, name)["generation"]

        return handle

    with pytest.MonkeyPatch.context() as patch:
        handlers = tuple((url, {m: answered(h) for m, h in methods.items()}) for url, methods in emulator.HANDLERS)
        patch.setattr(emulator, "HANDLERS", handlers)
        server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
        server.start()
        address = "http://{}:{}".format(*server._api._httpd.server_address)
        store = _Google(address, server._storage)
        for name, value in VARIABLES.items():
            patch.setenv(name, value.format(address=address))
        try:
            yield store
        finally:
            server.stop()


def _name_of(request) -> str:
    if "name" in request.query:
        return request.query["name"][0]
    data = request.data if request.method in ("POST", "PUT") else None
    meta = data.get("meta", data) if isinstance(data, dict) else {}
    return meta.get("name", "") if isinstance(meta, dict) else ""


class S3Store:
    """S3's protocol, by moto."""

    root = f"s3://{BUCKET}"

    def __init__(self, address: str, backend):
        self.address, self._backend = address, backend
        self.denies = lambda method, name: False
        self.ignores: Callable[[str, str], bool] = lambda method, condition: False
        """Called with each request's method and conditions (`If-Match`, `If-None-Match`): whether it has them not."""
        self.requests: list[tuple[str, str]] = []
        """Methods and objects."""

    def names(self) -> list[str]:
        return sorted(self._backend.get_bucket(BUCKET).keys)

    def content(self, name: str) -> bytes:
        return self._backend.get_object(BUCKET, name).value

    def remove(self, name: str) -> None:
        self._backend.delete_object(BUCKET, name)


@contextmanager
def s3_store() -> Iterator[S3Store]:
    """As `object_store`, of S3."""
    pytest.importorskip("s3fs", reason="needs the extra [s3]")
    pytest.importorskip("moto", reason="needs the extra [dev]")
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line on stderr for each request
    moto = DomainDispatcherApplication(create_backend_app)
    store: S3Store

    def answer(environ, start_response):
        method, _, place = environ["REQUEST_METHOD"], *environ["PATH_INFO"].partition("/")[1:]
        bucket, _, name = unquote(place).partition("/")
        store.requests.append((method, name))
        if store.denies(method, name) or bucket == DENIED:
            body = b"<Error><Code>AccessDenied</Code><Message>you may not use this bucket</Message></Error>"
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if method == "HEAD" else body]
        for condition in ("If-Match", "If-None-Match"):
            if store.ignores(method, condition):
                environ.pop(f"HTTP_{condition.upper().replace('-', '_')}", None)
        return moto(environ, start_response)

    class Handler(MotoRequestHandler):
        disable_nagle_algorithm = True  # else the client's delayed acknowledgement makes an answer take 40 ms

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.create_bucket(BUCKET, "us-east-1")
        store = S3Store(f"http://127.0.0.1:{server.server_port}", backend)
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in S3_VARIABLES.items():
            patch.setenv(name, value.format(address=store.address))
        forget_s3_client()
        thread.start()
        try:
            yield store
        finally:
            server.shutdown()
            server.server_close()
            backend.reset()
            forget_s3_client()


def forget_s3_client() -> None:
    """Let the next access to S3 read the variables again: a client has its address and credentials for good."""
    import s3fs
    from etils.epath import backend

    from sparsezoo_jax.storage import objects, s3

    objects._client.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    s3._deletions.clear()


def environment(address: str) -> dict[str, str]:
    """The variables of a process that uses the store."""
    return {**os.environ, **{name: value.format(address=address) for name, value in VARIABLES.items()}}
