"""A stand-in for the Hugging Face hub, for the tests of what is downloaded from there."""

import hashlib
import http.server
import json
import threading


class Hub:
    """A stand-in for the Hugging Face hub: the listing of a data set, page by page, and its files, with ranges.

    `faults` says of a path what goes wrong in the requests to come: a number of bytes after which the connection
    breaks, an HTTP error, "whole" (ranges are ignored), or "junk" (other bytes).
    """

    def __init__(self, repo: str, folder: str):
        self.files, self.faults, self.ranges, self.requests = {}, {}, [], []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.requests.append(self.path)
                path, _, query = self.path.partition("?")
                if self.path.startswith(f"/api/datasets/{repo}/tree/main/{folder}?"):
                    hub.list(self, query)
                elif path.startswith(f"/datasets/{repo}/resolve/main/"):
                    hub.send(self, path.removeprefix(f"/datasets/{repo}/resolve/main/"))
                else:
                    self.send_error(404)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def list(self, handler, query):
        """Two entries a page, as the hub gives a thousand."""
        entries = [
            {"type": "file", "path": name, "size": len(its), "lfs": {"oid": hashlib.sha256(its).hexdigest()}}
            for name, its in self.files.items()
        ]
        entries += [
            {"type": "file", "path": "data/README.md", "size": 3},
            {"type": "directory", "path": "data", "size": 0},
        ]
        page = int(query.partition("cursor=")[2] or 0)
        body = json.dumps(entries[2 * page : 2 * page + 2]).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        if len(entries) > 2 * page + 2:
            url = f"{self.address}{handler.path.partition('?')[0]}?recursive=true&cursor={page + 1}"
            handler.send_header("Link", f'<{url}>; rel="next"')
        handler.end_headers()
        handler.wfile.write(body)

    def send(self, handler, name):
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        body, asked = self.files[name], handler.headers.get("Range")
        self.ranges.append(asked)
        if fault in (403, 404, 503):
            handler.send_error(fault)
            return
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "whole" else 0
        if first >= len(body):
            handler.send_error(416)
            return
        handler.send_response(206 if first else 200)
        handler.send_header("Content-Length", str(len(body) - first))
        handler.end_headers()
        body = bytes(len(body)) if fault == "junk" else body
        end = first + fault if isinstance(fault, int) else len(body)
        handler.wfile.write(body[first:end])

    def close(self):
        self.server.shutdown()
        self.server.server_close()
