"""Where pictures and videos of a request may come from: data URIs, and addresses of hosts the operator has allowed.

An allowed host is looked up once, every address it has must be a public one, and the connection goes to just the address
that was judged: a name that points elsewhere a moment later changes nothing. Redirects are judged anew.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Union
from urllib.parse import urljoin, urlsplit

from .errors import ApiError

REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class MediaPolicy:
    """What may be loaded.

    Args:
        hosts: names that may be asked; `*.example.com` stands for all names below. None by default.
        max_bytes: of one file.
        seconds: for one file, from look-up to last byte.
        resolve, connect: as `socket.getaddrinfo` and `socket.create_connection`.
    """

    def __init__(
        self,
        hosts: Iterable[str] = (),
        max_bytes: int = 64 * 2**20,
        seconds: float = 20.0,
        resolve: Callable = socket.getaddrinfo,
        connect: Callable = socket.create_connection,
    ):
        self.hosts = [host.lower().rstrip(".") for host in hosts]
        self.max_bytes, self.seconds = max_bytes, seconds
        self._resolve, self._connect = resolve, connect

    def load(self, url: str, place: str) -> Union[str, bytes]:
        """A data URI as it is; an address as the bytes behind it. Raises `ApiError` naming `place`."""
        if url[:5].lower() == "data:":
            return url
        if urlsplit_or_none(url) is None:
            raise refused(place, "give a data URI (data:image/png;base64,…) or an http(s) address")
        return self._fetch(url, place)

    def _fetch(self, url: str, place: str) -> bytes:
        deadline = time.monotonic() + self.seconds
        try:
            for _ in range(REDIRECTS + 1):
                answer = self._get(url, place, deadline)
                if isinstance(answer, bytes):
                    return answer
                url = urljoin(url, answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            what = "took too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise refused(place, f"cannot be loaded: {what}", "media_unavailable") from error
        raise refused(place, f"more than {REDIRECTS} redirects", "media_unavailable")

    def _get(self, url: str, place: str, deadline: float) -> Union[str, bytes]:
        """The bytes, or the address of a redirect."""
        parts = urlsplit_or_none(url)
        if parts is None:
            raise refused(place, "leads to something that is no http(s) address")
        host = parts.hostname.rstrip(".").encode("idna").decode("ascii").lower()
        if not self._allows(host):
            allowed = ", ".join(self.hosts) or "none"
            raise refused(place, f"media may not be loaded from {host!r}; allowed hosts: {allowed}", "host_not_allowed")
        secure = parts.scheme.lower() == "https"
        port = parts.port or (443 if secure else 80)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock = self._open(host, port, secure, place, deadline)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "kimi-k26", "Accept": "image/*, video/*, */*;q=0.1"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308) and answer.getheader("location"):
                return answer.getheader("location")
            if answer.status != 200:
                raise refused(place, f"{host} answered {answer.status}", "media_unavailable")
            return self._read(answer, sock, place, deadline)
        finally:
            connection.close()

    def _open(self, host: str, port: int, secure: bool, place: str, deadline: float) -> socket.socket:
        addresses = [info[4][0] for info in self._resolve(host, port, type=socket.SOCK_STREAM)]
        private = [address for address in addresses if not is_public(address)]
        if private or not addresses:
            raise refused(place, f"{host!r} is not a public address", "host_not_allowed")
        sock = self._connect((addresses[0], port), timeout=left(deadline))
        if not secure:
            return sock
        try:
            return ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise

    def _read(self, answer: http.client.HTTPResponse, sock: socket.socket, place: str, deadline: float) -> bytes:
        data = bytearray()
        while True:
            sock.settimeout(left(deadline))
            part = answer.read1(2**16)
            if not part:
                return bytes(data)
            data += part
            if len(data) > self.max_bytes:
                raise refused(place, f"is larger than {self.max_bytes} bytes", "media_too_large", status=413)

    def _allows(self, host: str) -> bool:
        return any(
            host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:])) for allowed in self.hosts
        )


def load_media(messages: list[dict], policy: MediaPolicy, limit: int) -> list[dict]:
    """The messages with every picture and video as a data URI or its bytes. Raises `ApiError` naming message and part.

    Args:
        messages: in OpenAI's form, checked.
        limit: pictures and videos of a request at most.
    """
    found = 0
    loaded = []
    for m, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for p, part in enumerate(content):
                kind = part["type"]
                if kind in ("image_url", "video_url"):
                    place = f"messages[{m}].content[{p}].{kind}"
                    found += 1
                    if found > limit:
                        raise refused(place, f"more than {limit} pictures and videos", "too_many_media")
                    source = part[kind]
                    source = source["url"] if isinstance(source, dict) else source
                    part = {"type": kind, kind: policy.load(source, place)}
                parts.append(part)
            message = {**message, "content": parts}
        loaded.append(message)
    return loaded


def urlsplit_or_none(url: str):
    """The parts of an http(s) address without a user in it; `None` for anything else."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 — raises where it is no number
    except ValueError:
        return None
    usable = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.username is None
    return parts if usable else None


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; an address that carries another one is judged by both."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        carried = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            carried = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if carried and not is_public(str(carried)):
            return False
        if ip.ipv4_mapped:
            return True
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def refused(place: str, why: str, code: str = "invalid_media", status: int = 400) -> ApiError:
    return ApiError(status, f"{place}: {why}", param=place, code=code)
