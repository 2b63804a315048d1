"""Whatever a server does ends in one sentence, within the time for it."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable

import pytest
import torch

from bntool.checkpoints.addresses import Address
from bntool.checkpoints.remote import http
from bntool.checkpoints.remote.http import HttpClient, Limits
from bntool.checkpoints.remote.transfers import Transfers
from bntool.cli.main import main
from bntool.errors import UnreachableFileError, UsageError
from tests.places import SAMPLES
from tests.programs.file_server import TLS, FileServer, Handler, serve_files, serve_proxy

DIGITS = (SAMPLES / "digits.pt").read_bytes()


def endless(handler: Handler, _: bytes) -> bool:
    handler.send_response(200)
    handler.end_headers()
    while not handler.files.over.is_set():
        handler.wfile.write(bytes(1 << 16))
    return True


def silent(handler: Handler, _: bytes) -> bool:
    handler.files.over.wait(100)
    return True


def slow_headers(handler: Handler, _: bytes) -> bool:
    handler.drip(b"HTTP/1.1 206 Partial Content\r\n" + b"X: y\r\n" * 1000)
    return True


def slow_body(handler: Handler, data: bytes) -> bool:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 0-65535/{len(data)}")
    handler.send_header("Content-Length", "65536")
    handler.end_headers()
    handler.drip(data)
    return True


def cut_off(handler: Handler, data: bytes) -> bool:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes 0-{len(data[:65536]) - 1}/{len(data)}")
    handler.send_header("Content-Length", "65536")
    handler.end_headers()
    handler.wfile.write(data[:100])
    handler.close_connection = True
    return True


def another_part(handler: Handler, data: bytes) -> bool:
    handler.answer(206, data[:65536], {"Content-Range": f"bytes 5-65540/{len(data)}"})
    return True


def no_part_named(handler: Handler, data: bytes) -> bool:
    handler.answer(206, data[:65536])
    return True


def longer_than_it_says(handler: Handler, data: bytes) -> bool:
    handler.answer(206, data[:65536], {"Content-Range": f"bytes 0-65535/{len(data)}", "Content-Length": "65537"})
    return True


def grows(handler: Handler, data: bytes) -> bool:
    handler.answer_range(data, size=len(data) + len(handler.files.asked) - 1)
    return True


def changes(handler: Handler, data: bytes) -> bool:
    handler.answer_range(data, etag=f'"{len(handler.files.asked)}"')
    return True


def stops_giving_parts(handler: Handler, data: bytes) -> bool:
    if len(handler.files.asked) == 1:
        return False
    handler.answer(200, data)
    return True


def redirects_forever(handler: Handler, _: bytes) -> bool:
    handler.answer(302, b"", {"Location": f"/{len(handler.files.asked)}"})
    return True


def redirects_to(place: str) -> Callable[[Handler, bytes], bool]:
    def behave(handler: Handler, _: bytes) -> bool:
        handler.answer(302, b"", {"Location": place})
        return True

    return behave


def compressed(handler: Handler, data: bytes) -> bool:
    handler.answer(206, data, {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}", "Content-Encoding": "gzip"})
    return True


def in_chunks(size: str) -> Callable[[Handler, bytes], bool]:
    def behave(handler: Handler, data: bytes) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-{len(data[:65536]) - 1}/{len(data)}")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(f"{size}\r\n".encode())
            for _ in range(2000):  # 128 MB
                handler.wfile.write(bytes(65536))
        return True

    return behave


def no_http(handler: Handler, _: bytes) -> bool:
    handler.wfile.write(b"220 ftp ready\r\n" * 5)
    handler.close_connection = True
    return True


def always(status: int) -> Callable[[Handler, bytes], bool]:
    def behave(handler: Handler, _: bytes) -> bool:
        handler.answer(status, b"no")
        return True

    return behave


CASES = [
    (endless, "the server gives the file as a whole only"),
    (silent, "the server takes too long to answer"),
    (slow_headers, "the server takes too long to answer"),
    (slow_body, "the server takes too long to answer"),
    (cut_off, "asked 3 times: the answer is cut off"),
    (another_part, "the server sends another part of the file than it was asked for"),
    (no_part_named, "the server does not say which part of the file it sends"),
    (longer_than_it_says, "the server sends another part of the file than it was asked for"),
    (grows, "the file was changed on the server while it was read"),
    (changes, "the file was changed on the server while it was read"),
    (stops_giving_parts, "the server gives no parts of the file any more"),
    (redirects_forever, "the server redirects more than 5 times"),
    (redirects_to("file:///etc/passwd"), "redirects to what is no address of a file"),
    (redirects_to("http://[::1/net.pt"), "redirects to what is no address of a file"),
    (redirects_to("http://user:password@127.0.0.1/"), "redirects to what is no address of a file"),
    (redirects_to("http://93.184.216.34/net.pt"), "or would be read in plain text"),
    (redirects_to("https://127.0.0.1/net.pt"), "the server redirects to another kind of address"),
    (compressed, "the server sends the file in another form than it is in"),
    (in_chunks("zz"), "asked 3 times: the answer is cut off"),
    (in_chunks("-1"), "asked 3 times"),
    (in_chunks("-65"), "asked 3 times"),
    (no_http, "asked 3 times: it does not speak HTTP as it should"),
    (always(401), "gives it only to those who may have it (401)"),
    (always(404), "there is no such file"),
    (always(416), "the file is empty"),
    (always(503), "asked 3 times: the server answers 503"),
    (always(418), "the server answers 418 instead of the file"),
]


@pytest.mark.parametrize(("behave", "sentence"), CASES, ids=[sentence for _, sentence in CASES])
def test_a_hostile_server_is_one_sentence(behave, sentence: str, server: FileServer, monkeypatch, capsys) -> None:
    is_slow = behave in (silent, slow_headers, slow_body)  # others would be, too, on a machine that is
    limits = Limits(answer=0.3, rate=1e6) if is_slow else Limits(answer=1000.0, whole=1000.0)
    monkeypatch.setattr("bntool.checkpoints.remote.opening.LIMITS", limits)
    monkeypatch.setattr("bntool.checkpoints.remote.transfers.MAX_WHOLE", 1_000_000)
    server.files["/net.pt"] = DIGITS
    server.behave = behave
    code = main(["inspect", f"{server.url}/net.pt"])
    printed = capsys.readouterr()
    assert code == 3
    assert printed.err.count("\n") == 1
    assert sentence in printed.err
    assert not printed.out


def test_one_that_fails_once_is_asked_again(server: FileServer) -> None:
    server.files["/net.pt"] = DIGITS

    def behave(handler: Handler, _: bytes) -> bool:
        handler.close_connection = len(handler.files.asked) % 2 == 1
        return handler.close_connection

    server.behave = behave
    assert main(["inspect", f"{server.url}/net.pt", "--quiet"]) == 0


def test_one_range_that_fails_ends_those_that_are_on_their_way(server: FileServer, monkeypatch, capsys) -> None:
    """Headers of records are fetched together; nobody waits for the slow ones when one is refused."""
    data = server.files["/net.pt"] = make_archive()
    monkeypatch.setattr("bntool.checkpoints.remote.opening.LIMITS", Limits(answer=1000.0, whole=1000.0))
    given_up = []

    def behave(handler: Handler, _: bytes) -> bool:
        start, _end = handler.read_range(len(data))
        if 0 < start < len(data) // 2:
            handler.answer(403, b"")
            return True
        if 0 < start < len(data) - 70_000:
            if not handler.files.over.wait(100):
                given_up.append(start)
            return True
        return False

    server.behave = behave
    assert main(["inspect", f"{server.url}/net.pt"]) == 3
    assert "those who may have it" in capsys.readouterr().err
    assert not given_up


def make_archive() -> bytes:
    stream = io.BytesIO()
    torch.save([torch.zeros(30_000) for _ in range(6)], stream)
    return stream.getvalue()


def test_time_that_is_up_late_cuts_no_connection_that_is_used_again() -> None:
    address = Address("http://localhost/net.pt")
    connection = http._Connection(http.split(address.text, address), ["127.0.0.1"])
    with http._TimeLimit(connection, 1000, address) as limit:
        pass
    limit._end()  # the timer had begun when it was cancelled
    assert not connection.is_cut


def test_a_connection_that_is_cut_after_the_last_byte_is_not_kept(server: FileServer, monkeypatch) -> None:
    server.files["/net.pt"] = DIGITS
    used = []
    connect = http._Connection.connect
    monkeypatch.setattr(http._Connection, "connect", lambda self: (used.append(self), connect(self)))
    address = Address(f"{server.url}/net.pt")
    with contextlib.closing(HttpClient(Limits())) as client:
        for _ in range(2):
            with client.ask(address, address.text, {}, start=0, length=10) as answer:
                assert answer.read(10) == DIGITS[:10]
                answer._limit._end()
    assert len(set(used)) == 2


def test_one_that_is_slow_in_all_is_given_up(server: FileServer, monkeypatch, capsys) -> None:
    monkeypatch.setattr("bntool.checkpoints.remote.opening.LIMITS", Limits(answer=5.0, whole=0.2, rate=1e9))

    def behave(handler: Handler, _: bytes) -> bool:
        time.sleep(0.15)
        return False

    server.files["/net.pt"] = DIGITS
    server.behave = behave
    assert main(["diff", f"{server.url}/net.pt", f"{server.url}/net.pt"]) == 3
    assert "the server is too slow" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address",
    [
        "http://example.com/net.pt",
        "https://user:password@127.0.0.1/net.pt",
        "https:///net.pt",
        "https://127.0.0.1:99999/net.pt",
        "https://127.0.0.1/a b.pt",
        "ftp://127.0.0.1/net.pt",
    ],
)
def test_addresses_that_are_not_read_are_said_to_be_so(address: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(http.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.216.34", 80))])
    assert main(["inspect", address]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "password@" not in printed


@pytest.mark.parametrize(
    ("ip", "is_followed"),
    [("10.0.0.1", False), ("127.0.0.1", False), ("169.254.169.254", False), ("::1", False), ("::ffff:10.0.0.1", False),
     ("100.64.0.1", False), ("93.184.216.34", True)],
)  # fmt: skip
def test_no_public_server_leads_to_a_private_one(ip: str, is_followed: bool, server: FileServer, monkeypatch) -> None:
    """The network is this machine's, whose server stands for all hosts; TLS is left out."""
    hosts = {"public.test": "93.184.216.34", "other.test": ip}
    port = int(server.url.rpartition(":")[2])

    def connect(self) -> None:
        self.sock = self._hold(http.socket.create_connection(("127.0.0.1", port)))

    monkeypatch.setattr(http, "_resolve", lambda target, _: [hosts[target.host]])
    monkeypatch.setattr(http, "_find_proxy", lambda *_: None)
    monkeypatch.setattr(http._Connection, "connect", connect)
    server.files["/there.pt"] = DIGITS
    server.behave = lambda handler, _: handler.path == "/net.pt" and redirect(handler)

    def redirect(handler: Handler) -> bool:
        handler.answer(302, b"", {"Location": "https://other.test/there.pt"})
        return True

    address = Address("https://public.test/net.pt")
    transfers = Transfers(address, address.text, {"Authorization": "Bearer secret"})
    if is_followed:
        transfers.begin(100)
        assert transfers.url == "https://other.test/there.pt"
    else:
        with pytest.raises(UnreachableFileError, match="private network"):
            transfers.begin(100)
    transfers.close()
    sent = {path: headers.get("authorization") for path, headers in server.asked}
    assert sent == {"/net.pt": "Bearer secret", **({"/there.pt": None} if is_followed else {})}


def test_a_token_goes_to_its_host_only_also_for_the_ranges_that_follow(server: FileServer) -> None:
    with serve_files({"/there.pt": DIGITS}) as other:
        server.behave = lambda handler, _: handler.answer(302, b"", {"Location": f"{other.url}/there.pt"}) is None
        transfers = Transfers(Address(f"{server.url}/net.pt"), f"{server.url}/net.pt", {"Authorization": "secret"})
        version, _, _ = transfers.begin(100)
        transfers.fetch(100, 100, version)
        assert [headers["authorization"] for _, headers in server.asked] == ["secret"]
        assert len(other.asked) == 2
        assert not [headers for _, headers in other.asked if "authorization" in headers]
        transfers.close()


def test_an_address_that_stops_working_is_asked_for_anew(server: FileServer) -> None:
    """Where a hub redirects to is signed for some minutes."""
    with serve_files({"/1": DIGITS, "/2": DIGITS}) as other:
        server.behave = lambda handler, _: (
            handler.answer(302, b"", {"Location": f"{other.url}/{len(handler.files.asked)}"}) is None
        )
        transfers = Transfers(Address(f"{server.url}/net.pt"), f"{server.url}/net.pt")
        version, _, _ = transfers.begin(100)
        del other.files["/1"]
        assert transfers.fetch(100, 100, version) == DIGITS[100:200]
        transfers.close()


def test_certificates_are_held_against_names(monkeypatch, capsys) -> None:
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with serve_files({"/net.pt": DIGITS}, tls=True) as secure:
        assert main(["inspect", f"{secure.url}/net.pt"]) == 3
        assert "the certificate of the server is not valid" in capsys.readouterr().err
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS))
        assert main(["inspect", f"{secure.url}/net.pt", "--quiet"]) == 0
        secure.behave = redirects_forever
        assert main(["inspect", f"{secure.url}/net.pt"]) == 3
        monkeypatch.setattr(http, "_resolve", lambda *_: ["127.0.0.1"])
        assert main(["inspect", f"{secure.url.replace('127.0.0.1', 'other.test')}/net.pt"]) == 3
        assert "other.test" in capsys.readouterr().err


def test_a_proxy_leads_to_a_server_and_reads_nothing(monkeypatch) -> None:
    with serve_files({"/net.pt": DIGITS}, tls=True) as secure, serve_proxy(secure.url) as (proxy, asked):
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS))
        address = Address("https://public.test/net.pt")
        transfers = Transfers(address, address.text, {"Authorization": "secret"})
        assert transfers.begin(100)[1] == DIGITS[:100]
        transfers.close()
        assert asked[0].startswith(b"CONNECT public.test:443 ")
        assert b"secret" not in b"".join(asked)
        assert secure.asked[0][1]["host"] == "public.test"


def test_a_host_behind_a_proxy_is_named_to_it(monkeypatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", "internal.test")
    address = Address("https://example.com/net.pt")
    assert http.split("https://example.com/net.pt", address).proxy == ("proxy.test", 3128)
    assert http.split("https://internal.test/net.pt", address).proxy is None
    with (
        pytest.raises(UsageError, match="plain http"),
        HttpClient(Limits()).ask(Address("http://10.0.0.1/"), "http://10.0.0.1/", {}, start=0, length=1),
    ):
        pass
