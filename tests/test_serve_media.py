"""Where the server lets pictures come from."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the server takes the extra `serve`")

from kimi_k26.cli.serve.errors import ApiError
from kimi_k26.cli.serve.media import MediaPolicy, is_public, load_media

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::1"),
    ],
)
def test_addresses_that_are_not(address):
    assert not is_public(address)


class Site(http.server.BaseHTTPRequestHandler):
    """A web site with a file of 1000 bytes, redirects, and an endless answer."""

    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"x" * 1000)
                while self.path == "/endless":
                    self.wfile.write(b"x")
                    time.sleep(0.01)

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    """The site, at a local port; `policy(hosts, …)` makes a policy for which it has a public address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads, server.asked, server.connected = True, [], []
    names = {"pictures.example": PUBLIC, "inside.example": "10.0.0.7", "www.pictures.example": PUBLIC}

    def resolve(host, port, **kwargs):
        if host not in names:
            raise socket.gaierror("unknown host")
        found = names[host]
        found = found.pop(0) if isinstance(found, list) else found
        return [(None, None, None, None, (address, port)) for address in found.split()]

    def connect(address, timeout=None):
        server.connected.append(address[0])
        return socket.create_connection(server.server_address, timeout)

    server.names = names
    server.policy = lambda *hosts, **kwargs: MediaPolicy(hosts, resolve=resolve, connect=connect, **kwargs)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def refusal(policy: MediaPolicy, url: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        policy.load(url, "messages[0].content[0].image_url")
    assert caught.value.param == "messages[0].content[0].image_url" in caught.value.message
    return caught.value


def test_data_uris_are_taken_as_they_are():
    for uri in ("data:image/png;base64, AAAA", "DATA:,x"):
        assert MediaPolicy().load(uri, "x") == uri


@pytest.mark.once
@pytest.mark.parametrize(
    "url",
    ["/etc/passwd", "file:///etc/passwd", "ftp://pictures.example/a", "AAAA", "", "http://", "http://u:p@pictures.example/a"]
    + ["http://pictures.example:x/a", "//pictures.example/a", " data:,x", "ms://1"],
)
def test_what_is_no_address(site, url):
    assert refusal(site.policy("pictures.example"), url).status == 400
    assert not site.connected


def test_only_allowed_hosts(site):
    assert site.policy("Pictures.Example.").load("http://PICTURES.example./a.png?b=1", "x") == b"x" * 1000
    assert site.asked == [("pictures.example", "/a.png?b=1")] and site.connected == [PUBLIC]
    assert site.policy("*.pictures.example").load("http://www.pictures.example/", "x")
    for hosts in ((), ("other.example",), ("*.pictures.example",), ("tures.example",)):
        assert refusal(site.policy(*hosts), "http://pictures.example/a.png").code == "host_not_allowed"


def test_never_private_addresses(site):
    policy = site.policy("inside.example", "127.0.0.1", "localhost", "both.example", "169.254.169.254")
    site.names |= {"both.example": f"{PUBLIC} 127.0.0.1", "127.0.0.1": "127.0.0.1", "localhost": "::1"}
    site.names["169.254.169.254"] = "169.254.169.254"
    for host in ("inside.example", "127.0.0.1", "localhost", "both.example", "169.254.169.254"):
        assert refusal(policy, f"http://{host}/").code == "host_not_allowed"
    assert not site.connected


def test_a_name_that_changes_its_address(site):
    """The address that was judged is the one that is asked; each redirect is judged anew."""
    site.names["pictures.example"] = [PUBLIC, "127.0.0.1"]
    assert site.policy("pictures.example").load("http://pictures.example/a", "x")
    assert site.connected == [PUBLIC]
    site.names["pictures.example"] = [PUBLIC, "127.0.0.1"]
    assert refusal(site.policy("pictures.example"), "http://pictures.example/to//b").code == "host_not_allowed"


def test_redirects(site):
    policy = site.policy("pictures.example", "inside.example")
    assert policy.load("http://pictures.example/to//b", "x") == b"x" * 1000
    for target, code in {
        "http://inside.example/": "host_not_allowed",
        "http://other.example/": "host_not_allowed",
        "file:///etc/passwd": "invalid_media",
        "/to//to//to//to//b": "media_unavailable",
    }.items():
        assert refusal(policy, f"http://pictures.example/to/{target}").code == code


def test_limits(site):
    assert refusal(site.policy("pictures.example", max_bytes=999), "http://pictures.example/a").status == 413
    begun = time.monotonic()
    error = refusal(site.policy("pictures.example", seconds=0.3), "http://pictures.example/endless")
    assert "too long" in error.message and time.monotonic() - begun < 5
    assert "404" in refusal(site.policy("pictures.example"), "http://pictures.example/missing").message
    assert refusal(site.policy("gone.example"), "http://gone.example/").code == "media_unavailable"
    assert refusal(site.policy("pictures.example"), "https://pictures.example/").code == "media_unavailable"  # no TLS there


def test_messages(site):
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "http://pictures.example/a"}},
        {"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"},
    ]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": parts}]
    loaded = load_media(messages, site.policy("pictures.example"), 2)
    assert loaded[1]["content"][1:] == [
        {"type": "image_url", "image_url": b"x" * 1000},
        {"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"},
    ]
    assert messages[1]["content"][1]["image_url"] == {"url": "http://pictures.example/a"}
    with pytest.raises(ApiError, match=r"messages\[1\].content\[2\].*more than 1"):
        load_media(messages, site.policy("pictures.example"), 1)
