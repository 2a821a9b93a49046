"""Tar shards, and a server that hands out parts of files."""

from __future__ import annotations

import http.server
import io
import os
import tarfile
from pathlib import Path

from conftest import textured


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    textured(seed, *((120, 90) if seed % 3 else (90, 120))).save(buffer, "jpeg")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, as any web server does (and Python's does not)."""

    ranges = True

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = self.translate_path(self.path)
        if not wanted or not self.ranges or not os.path.isfile(path):
            super().do_GET()
            return
        content = Path(path).read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        pass
