import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lit_methods.datamodules.download import fetch

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves ``CONTENT`` at any path, as the server's switches say, and keeps the ``Range`` headers it got."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if self.path != "/file":
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.knows_ranges else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.hang_up_after] if server.hang_up_after else body)
        server.hang_up_after = None

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges, server.knows_ranges, server.hang_up_after = [], True, None
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def part_of(path):
    return path.with_name(path.name + ".part")


def test_fetches_once(server, tmp_path):
    path = tmp_path / "new" / "folder" / "data.bin"
    assert fetch([server.url], path, MD5) == path
    assert path.read_bytes() == CONTENT
    assert not part_of(path).exists()
    fetch([server.url], path, MD5)
    assert server.ranges == [None]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_interrupted_download_carries_on(server, tmp_path, knows_ranges):
    path = tmp_path / "data.bin"
    server.knows_ranges, server.hang_up_after = knows_ranges, 100_000
    with pytest.raises(OSError, match=r"Could not download data\.bin.*closed after 100000 of 256000 bytes"):
        fetch([server.url], path, MD5)
    assert not path.exists()
    assert part_of(path).read_bytes() == CONTENT[:100_000]
    fetch([server.url], path, MD5)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_complete_part_is_checked_and_renamed(server, tmp_path):
    path = tmp_path / "data.bin"
    part_of(path).write_bytes(CONTENT)
    fetch([server.url], path, MD5)
    assert path.read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    path = tmp_path / "data.bin"
    with pytest.raises(OSError, match=f"MD5 is {MD5}, not 0123"):
        fetch([server.url], path, "0123")
    assert list(tmp_path.iterdir()) == []


def test_part_of_another_file_is_thrown_away(server, tmp_path):
    path = tmp_path / "data.bin"
    part_of(path).write_bytes(b"something else")
    fetch([server.url], path, MD5)
    assert path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=14-", None]


def test_second_mirror(server, tmp_path):
    path = tmp_path / "data.bin"
    fetch(["http://127.0.0.1:9/file", server.url], path, MD5)
    assert path.read_bytes() == CONTENT


def test_all_mirrors_fail(server, tmp_path):
    missing = server.url + "_not"
    with pytest.raises(OSError, match="Could not download") as error:
        fetch([missing, "http://127.0.0.1:9/file"], tmp_path / "data.bin", MD5)
    assert f"{missing}: HTTP Error 404" in str(error.value)
    assert "http://127.0.0.1:9/file: " in str(error.value)
