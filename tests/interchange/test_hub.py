"""The model card beside a detector, and its way to the Hugging Face Hub (a stand-in on this machine)."""

from __future__ import annotations

import http.server
import json
import threading

import huggingface_hub
import pytest

import siamese_detr
from siamese_detr.errors import UserError
from tiny_finetuning import learned


class Hub(http.server.BaseHTTPRequestHandler):
    """Takes what ``HfApi`` sends when it makes a repository and uploads a folder."""

    uploaded: dict[str, str] = {}  # noqa: RUF012

    def do_POST(self):
        if self.headers["Transfer-Encoding"] == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}/someone/cats"
        if self.path == "/api/repos/create":
            answer = {"url": url, "name": "someone/cats"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" not in self.path:  # is the model card's metadata valid?
            answer = {"errors": [], "warnings": []}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            Hub.uploaded |= {x["value"]["path"]: x["value"]["content"] for x in lines if x["key"] == "file"}
            answer = {"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True}
        self.answer(answer)

    def do_GET(self):
        self.answer({"id": "someone/cats", "sha": "0", "siblings": []})

    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


def test_the_card_says_what_the_detector_finds_and_how_well():
    run, _ = learned()
    for name in ("best", "last"):
        card = huggingface_hub.ModelCard.load(run.out / name / "README.md")
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "object-detection"
        assert card.data.license == "unknown"
        assert "8 training images with 8 boxes; 8 validation images." in card.text
        assert f'siamese_detr.load("{run.out / name}")' in card.text
    best = max(run.history, key=lambda record: record["AP"])
    text = (run.out / "best" / "README.md").read_text()
    for row in best["classes"]:
        assert f"| {row['name']} | 4 | {100 * row['AP']:.1f} | {100 * row['AP50']:.1f} |" in text


def test_a_detector_is_pushed_to_the_hub(tmp_path, monkeypatch):
    run, _ = learned()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    options = {"model": str(run.out), "out": str(tmp_path / "out"), "push": "someone/cats", "quiet": True}
    try:
        siamese_detr.export(**options)
    finally:
        server.shutdown()
        server.server_close()
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "siamese_detr.json"}
    assert set(Hub.uploaded) >= files
    assert 'siamese_detr.load("someone/cats")' in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="is written, but cannot be uploaded as someone/cats"):
        siamese_detr.export(**options)
    with pytest.raises(UserError, match="push has no effect"):
        siamese_detr.export(**options | {"format": "research"})
