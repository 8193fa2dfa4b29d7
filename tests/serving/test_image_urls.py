"""Which addresses may be requested; connections go to checked addresses only."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mgllava.serving import image_urls
from mgllava.serving.errors import RequestError
from mgllava.serving.image_urls import ImageHosts, download_image, is_public
from mgllava.serving.limits import ServingLimits


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1"),
        *("192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fc00::1", "fe80::1", "fe80::1%eth0", "ff02::1", "2001:db8::1", "100::1", "::127.0.0.1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::1"),
        *("2001:0:7f00:1::1", "localhost", ""),
    ],
)
def test_other_addresses_are_not_public(address):
    assert not is_public(address)


def test_host_list():
    assert ImageHosts.parse("public") == ImageHosts()
    assert ImageHosts.parse("none") == ImageHosts(public=False)
    hosts = ImageHosts.parse("Pictures.Internal, [fd00::1]:9000")
    assert hosts == ImageHosts(False, frozenset({("pictures.internal", None), ("fd00::1", 9000)}))
    url = image_urls.httpx.URL
    assert hosts.lists(url("http://pictures.internal/a")) and hosts.lists(url("https://PICTURES.internal:443/a"))
    assert not hosts.lists(url("http://pictures.internal:9000/a")) and not hosts.lists(url("http://[fd00::1]/a"))
    assert hosts.lists(url("http://[fd00::1]:9000/a")) and not hosts.lists(url("http://x.pictures.internal/a"))


@pytest.mark.parametrize("text", ["", "a,", "http://a", "a/b", "user@a", "*.a", "a:port", "none,a"])
def test_bad_host_list_is_refused(text):
    with pytest.raises(ValueError, match="allowed_image_hosts"):
        ImageHosts.parse(text)


class NameServer:
    """Replaces the resolver: returns its answers one after another, and records the names."""

    def __init__(self, monkeypatch, *answers):
        self.answers, self.asked, self.ports = list(answers), [], []
        name_server = self

        def getaddrinfo(host, port, **kwargs):
            name_server.asked.append(host)
            name_server.ports.append(port)
            found = name_server.answers.pop(0) if len(name_server.answers) > 1 else name_server.answers[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

        monkeypatch.setattr(image_urls.socket, "getaddrinfo", getaddrinfo)


@pytest.fixture
def connections(monkeypatch):
    """The addresses that the client tried to connect to; no attempt succeeds."""
    opened = []

    async def connect(self, request):
        opened.append((request.url.host, request.headers["Host"], request.extensions["sni_hostname"]))
        raise image_urls.httpx.ConnectError("not in this test")

    monkeypatch.setattr(image_urls.httpx.AsyncHTTPTransport, "handle_async_request", connect)
    return opened


def download(url, hosts="public", **limits):
    room = image_urls.DownloadRoom(2**20)
    return asyncio.run(download_image(url, "url", ImageHosts.parse(hosts), ServingLimits(**limits), room))


def test_connection_goes_to_the_checked_address_when_the_name_changes_it(monkeypatch, connections):
    names = NameServer(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    with pytest.raises(RequestError, match="could not be downloaded"):
        download("https://pictures.test/a.png")
    assert names.asked == ["pictures.test"]
    assert connections == [("8.8.8.8", "pictures.test", "pictures.test")]


def test_one_private_address_among_several_refuses_the_name(monkeypatch, connections):
    NameServer(monkeypatch, ["8.8.8.8", "10.0.0.1"])
    with pytest.raises(RequestError, match="public address"):
        download("https://pictures.test/a.png")
    assert not connections


def test_all_addresses_are_tried(monkeypatch, connections):
    NameServer(monkeypatch, ["8.8.8.8", "8.8.4.4", "8.8.8.8"])
    with pytest.raises(RequestError):
        download("http://pictures.test:8080/a.png")
    assert connections == [(ip, "pictures.test:8080", "pictures.test") for ip in ("8.8.8.8", "8.8.4.4")]


@pytest.mark.parametrize(
    ("start", "port"), [("http://a", 80), ("https://a", 443), ("http://a:443", 443), ("https://a:9", 9)]
)
def test_ports_are_those_of_the_url_or_the_scheme(monkeypatch, connections, start, port):
    names = NameServer(monkeypatch, ["127.0.0.1"])
    with pytest.raises(RequestError, match="could not be downloaded"):
        download(f"{start}/a.png", "a,a:9,a:443")
    assert names.ports == [port] and len(connections) == 1
    if port not in (80, 9) and start.startswith("https"):
        with pytest.raises(RequestError, match="host from which this server downloads"):
            download("http://a:443/a.png", "a")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://8.8.8.8/a.png", "must be an http or https URL"),
        ("http:///a.png", "must be an http or https URL"),
        ("http://me:word@8.8.8.8/a.png", "must not hold a user name or password"),
        ("http://me@8.8.8.8/a.png", "must not hold a user name or password"),
    ],
)
def test_other_urls_are_refused(connections, url, said):
    with pytest.raises(RequestError, match=said) as error:
        download(url)
    assert (error.value.param, error.value.code) == ("url", "invalid_image_url") and not connections


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/compressed", "must be sent uncompressed"),
        ("/announced", r"must have at most 10,000,000 bytes \(`--max-image-bytes`\)"),
        ("/endless", r"must have at most 10,000,000 bytes \(`--max-image-bytes`\)"),
        ("/gone", "must be an image, but its host answered with status 404"),
        ("/to-file", "must be an http or https URL"),
        ("/to-private", "host from which this server downloads"),
    ],
)
def test_answers_of_hosts_that_are_refused(site, path, said):
    room = image_urls.DownloadRoom(10**9)
    hosts, limits = ImageHosts.parse(site.url.removeprefix("http://")), ServingLimits(image_bytes=10**7)
    with pytest.raises(RequestError, match=said) as error:
        asyncio.run(download_image(site.url + path, "url", hosts, limits, room))
    assert (error.value.param, error.value.code) == ("url", "invalid_image_url")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_may_be_as_large_as_their_limit(site, kind):
    """They are asked for uncompressed, as a compressed file could unpack to any size."""
    hosts, size = ImageHosts.parse(site.url.removeprefix("http://")), len(site.picture)
    get = {"image": image_urls.download_image, "video": image_urls.download_video}[kind]

    def run(size):
        limits = ServingLimits(**{f"{kind}_bytes": size})
        return asyncio.run(get(f"{site.url}/to-picture", "url", hosts, limits, image_urls.DownloadRoom(10**9)))

    assert run(size) == site.picture
    headers = {"User-Agent": "mgllava-serve", "Accept": f"{kind}/*", "Accept-Encoding": "identity"}
    assert {name: site.headers[name] for name in headers} == headers
    with pytest.raises(RequestError, match=f"--max-{kind}-bytes"):
        run(size - 1)


def test_unlisted_public_host_is_refused_without_public(monkeypatch, connections):
    names = NameServer(monkeypatch, ["8.8.8.8"])
    for hosts in ("none", "pictures.internal"):
        with pytest.raises(RequestError, match="host from which this server downloads"):
            download("https://pictures.test/a.png", hosts)
    assert not connections and not names.asked


@pytest.fixture
def tls_site(tmp_path, monkeypatch):
    """A host with a certificate for `pictures.test`, which the client trusts; returns its port."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out"]
    command += [certificate, "-subj", "/CN=pictures.test", "-addext", "subjectAltName=DNS:pictures.test"]
    subprocess.run(command, check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.headers["Host"].encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(image_urls, "_ssl_context", lambda: ssl.create_default_context(cafile=certificate))
    yield server.server_address[1]
    server.shutdown()


def test_certificate_is_that_of_the_name_not_of_the_address(tls_site, monkeypatch):
    NameServer(monkeypatch, ["127.0.0.1"])
    for host in ("pictures.test", "other.test"):
        url, allowed = f"https://{host}:{tls_site}/a.png", f"{host}:{tls_site}"
        if host == "pictures.test":
            assert download(url, allowed) == allowed.encode()
        else:
            with pytest.raises(RequestError, match="certificate"):
                download(url, allowed)


def test_names_without_an_answer_do_not_block_other_work(monkeypatch):
    """The system's resolver can take half a minute; asyncio's threads, which parse requests, must not wait for it."""
    answered = threading.Event()
    monkeypatch.setattr(image_urls.socket, "getaddrinfo", lambda *args, **kwargs: answered.wait(60) and [])
    # Threads that answer after the end of the test leave no room behind.
    monkeypatch.setattr(image_urls, "_lookups", image_urls._Lookups(image_urls.MAX_LOOKUPS))

    async def run():
        hosts, limits = ImageHosts(), ServingLimits(image_timeout=0.3)
        urls = [f"http://host{number}.test/a.png" for number in range(2 * image_urls.MAX_LOOKUPS)]
        room = image_urls.DownloadRoom(0)
        downloads = [asyncio.ensure_future(download_image(url, "url", hosts, limits, room)) for url in urls]
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 20) == "free"
        for error in await asyncio.gather(*downloads, return_exceptions=True):
            assert isinstance(error, RequestError) and "within 0.3 seconds" in error.message
        answered.set()

    asyncio.run(run())


def test_images_of_a_request_share_their_bytes(site):
    host, size = site.url.removeprefix("http://"), 3 * len(site.picture) // 2

    async def run():
        room = image_urls.DownloadRoom(size)
        url, hosts = f"{site.url}/picture.png", ImageHosts.parse(host)
        assert await download_image(url, "url", hosts, ServingLimits(), room) == site.picture
        with pytest.raises(RequestError, match="together"):
            await download_image(url, "url", hosts, ServingLimits(), room)

    asyncio.run(run())
