"""An object store on loopback: the emulator of Google's on PyPI, and what it lacks of the protocol that we rely on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

import pytest

BUCKET, DENIED = "bucket", "denied"
#: What clients read; the gRPC of buckets of another kind would first wait for its time to be up.
VARIABLES = {
    "STORAGE_EMULATOR_HOST": "{address}",
    "TENSORSTORE_GCS_HTTP_URL": "{address}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


class ObjectStore:
    """A running store."""

    def __init__(self, address: str, storage):
        self.address, self._storage = address, storage
        self.denies: Callable[[str, str], bool] = lambda method, name: False
        """Called with each request's method and object, on the server's thread: whether it is denied."""

    def names(self) -> list[str]:
        """All objects of the bucket."""
        return [found["name"] for found in self._storage.get_file_list(BUCKET, None, None)[0]]

    def content(self, name: str) -> bytes:
        """An object."""
        return self._storage.get_file(BUCKET, name)

    def remove(self, name: str) -> None:
        """Removes an object."""
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
        store = ObjectStore(address, server._storage)
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


def environment(address: str) -> dict[str, str]:
    """The variables of a process that uses the store."""
    return {**os.environ, **{name: value.format(address=address) for name, value in VARIABLES.items()}}
