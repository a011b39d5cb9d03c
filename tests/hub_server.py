"""A server on loopback that speaks the Hugging Face Hub's upload calls."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What was asked and what is stored.

    Attributes:
        files: path in the repository to bytes, of complete commits.
        calls: method, path and whether the token was right, in order.
        broken: how many of the next commits are answered with 500; -1 all.
        slow: seconds that a commit takes.
    """

    def __init__(self, token):
        self.token, self.files, self.calls = token, {}, []
        self.broken, self.slow, self.stored = 0, 0.0, {}
        self.ended = threading.Event()

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def hub(self):
        return self.server.hub

    def answer(self, status, value=None):
        data = json.dumps(value or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        hub, path = self.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self.chunks()
        known = self.headers.get("Authorization") == f"Bearer {hub.token}"
        hub.calls.append(("POST", path, known))
        base = f"http://{self.headers['Host']}"
        if not known:
            self.answer(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            made = json.loads(body)
            self.answer(200, {"url": f"{base}/{made['organization']}/{made['name']}"})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{base}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]  # fmt: skip
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            hub.ended.wait(hub.slow)
            if hub.broken:
                hub.broken -= 1
                self.answer(500, {"error": "Internal Error"})
                return
            hub.commit(json.loads(line) for line in body.splitlines())
            commit = "0" * 40
            url = f"{base}/me/model/commit/{commit}"
            self.answer(200, {"commitUrl": url, "commitOid": commit, "success": True})
        else:
            self.answer(404, {"error": path})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.calls.append(("PUT", self.path, True))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.stored[oid] = data
        self.answer(200)

    def do_GET(self):
        self.hub.calls.append(("GET", self.path, True))
        self.answer(404, {"error": self.path})

    def chunks(self):
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data


@contextmanager
def running_hub(token):
    """A hub and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = hub = Hub(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
