"""A Google Cloud Storage service on this machine, in memory, for TensorFlow, TensorStore and Orbax.

TensorFlow only talks to https://…googleapis.com. It is sent here as to an HTTPS proxy, which answers itself.
The others take the address from the environment.
"""

import http.server
import json
import os
import pathlib
import re
import ssl
import subprocess
import threading
import urllib.parse


class FakeGcs:
    """The service, and the environment variables that a process needs to use it.

    Attributes:
      objects: "bucket/name" -> (contents, generation).
      environment: the variables.
    """

    def __init__(self, folder: pathlib.Path):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, str] = {}  # path of an upload session -> "bucket/name"
        self.lock = threading.Lock()
        key, certificate = folder / "key.pem", folder / "certificate.pem"
        hosts = "DNS:www.googleapis.com,DNS:storage.googleapis.com"
        names = ["-subj", "/CN=www.googleapis.com", "-addext", f"subjectAltName={hosts}"]
        openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*openssl, *files], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.gcs, self._server.context = self, context
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "HTTPS_PROXY": address,
            "CURL_CA_BUNDLE": str(certificate),
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "STORAGE_EMULATOR_HOST": address,
        }

    def close(self) -> None:
        """Ends the service."""
        self._server.shutdown()
        self._server.server_close()

    def put(self, path: str, data: bytes) -> int:
        """Writes an object "bucket/name"; returns its generation."""
        with self.lock:
            generation = self.objects.get(path, (b"", 0))[1] + 1
            self.objects[path] = (data, generation)
            return generation

    def put_folder(self, folder: str | os.PathLike, path: str) -> None:
        """Copies the files of a local folder to "bucket/name/"."""
        for file in pathlib.Path(folder).rglob("*"):
            if file.is_file():
                self.put(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def names(self, prefix: str) -> list[str]:
        """Names of the objects that start with a prefix, without it."""
        with self.lock:
            return sorted(path.removeprefix(prefix) for path in self.objects if path.startswith(prefix))


class Handler(http.server.BaseHTTPRequestHandler):
    """Requests of the JSON API, and downloads from https://storage.googleapis.com/BUCKET/NAME."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def do_CONNECT(self) -> None:
        """A proxy's tunnel; the connection goes on with TLS, and is answered here."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.close_connection = False

    def do_GET(self) -> None:
        """Bucket, list, metadata or contents."""
        url, query, found = self._parse()
        if re.fullmatch(r"/storage/v1/b/[^/]+", url.path):
            self._send({"name": url.path.split("/")[-1], "location": "us"})
        elif found and found["name"] is None:
            self._send(self._list(found["bucket"], query))
        else:
            path = f"{found['bucket']}/{found['name']}" if found else urllib.parse.unquote(url.path[1:])
            data, generation = self.server.gcs.objects.get(path, (None, 0))
            if data is None:
                self._send({"error": {"code": 404, "message": "no such object"}}, 404)
            elif found and query.get("alt") != "media":
                self._send(_metadata(path, data, generation))
            else:
                self._send_contents(data, generation)

    def do_POST(self) -> None:
        """An upload, the start of a resumable one, or a copy."""
        url, query, found = self._parse()
        body = self._body()
        copied = re.fullmatch(r"(.+)/rewriteTo/b/([^/]+)/o/(.+)", url.path)
        if copied:
            _, _, source = self._parse(copied[1])
            data, _ = self.server.gcs.objects[f"{source['bucket']}/{source['name']}"]
            self.server.gcs.put(f"{copied[2]}/{urllib.parse.unquote(copied[3])}", data)
            self._send({"done": True})
        elif query.get("uploadType") == "resumable":
            session = f"/session/{len(self.server.gcs.uploads)}"
            self.server.gcs.uploads[session] = f"{found['bucket']}/{query['name']}"
            self._send({}, headers={"Location": f"https://www.googleapis.com{session}"})
        else:
            path = f"{found['bucket']}/{query['name']}"
            if not self._generation_matches(path, query):
                self._send({"error": {"code": 412}}, 412)
                return
            self._send(_metadata(path, body, self.server.gcs.put(path, body)))

    def do_PUT(self) -> None:
        """The contents of a resumable upload, in one part."""
        path = self.server.gcs.uploads[urllib.parse.urlsplit(self.path).path]
        data = self._body()
        self._send(_metadata(path, data, self.server.gcs.put(path, data)))

    def do_DELETE(self) -> None:
        """Removes an object."""
        _, _, found = self._parse()
        with self.server.gcs.lock:
            gone = self.server.gcs.objects.pop(f"{found['bucket']}/{found['name']}", None)
        self._send({} if gone else {"error": {"code": 404}}, 204 if gone else 404)

    def _parse(self, path: str | None = None) -> tuple:
        """(URL, query, match of bucket and object name) of the request, or of another path."""
        url = urllib.parse.urlsplit(path or self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        found = re.fullmatch(r"(?:/upload)?/storage/v1/b/(?P<bucket>[^/]+)/o(?:/(?P<name>.+))?", url.path)
        groups = found and {k: v and urllib.parse.unquote(v) for k, v in found.groupdict().items()}
        return url, query, groups

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for name in self.server.gcs.names(f"{bucket}/"):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(_metadata(f"{bucket}/{name}", *self.server.gcs.objects[f"{bucket}/{name}"]))
        return {"items": items, "prefixes": sorted(prefixes)}

    def _generation_matches(self, path: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == self.server.gcs.objects.get(path, (b"", 0))[1]

    def _send_contents(self, data: bytes, generation: int) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if not wanted:
            self._reply(200, data, headers)
        elif int(wanted[1]) >= len(data):
            self._reply(416, b"", headers)
        else:
            part = data[int(wanted[1]) : int(wanted[2] or len(data)) + 1]
            headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}"
            self._reply(206, part, headers)

    def _send(self, record: dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = b"" if status == 204 else json.dumps(record).encode()
        self._reply(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _metadata(path: str, data: bytes, generation: int) -> dict[str, str]:
    bucket, name = path.split("/", 1)
    return {
        "name": name, "bucket": bucket, "size": str(len(data)), "generation": str(generation),
        "updated": "2026-01-01T00:00:00.000Z", "metageneration": "1",
    }  # fmt: skip
