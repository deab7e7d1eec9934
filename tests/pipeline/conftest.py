"""Pictures, the rows of their folder, and sources of every kind that name the same pictures."""

import functools
import http.server
import threading

import pytest
from helpers.photos import make_photos
from helpers.sources import KINDS, embedded, relative, rows


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten good pictures and three bad ones, in folders."""
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder)
    return folder


@pytest.fixture(scope="module")
def of_folder(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "folder"
    embedded([photos], out)
    return rows(out)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """All that the tests write, over HTTP on this machine; gives what makes a path a URL."""
    root = tmp_path_factory.getbasetemp()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield lambda path: f"http://127.0.0.1:{running.server_port}/{path.relative_to(root)}"
        running.shutdown()


@pytest.fixture
def made(photos, server, tmp_path):
    """Makes the sources of a kind."""

    def make(kind):
        name, maker = KINDS[kind]
        if kind == "files by URL":
            (tmp_path / name).write_text("\n".join(server(photos / name) for name in relative(photos)))
            return [tmp_path / name]
        sources = maker(photos, tmp_path / name)
        return [server(source) for source in sources] if kind.endswith("by URL") else sources

    return make
