"""URLs are sent as browsers send them, redirects are followed, and credentials go to no other host."""

import base64
from urllib.parse import quote_from_bytes

import pytest

from tests.pipeline import web_server
from tests.pipeline.downloads.download_requests import FILES, get, reason, results

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.mark.parametrize(("typed", "sent"), [
    ("/a%20b%2Fc%c3%bc", "/a%20b%2Fc%c3%bc"), ("/%zz%", "/%zz%"), ("/ü b<\">", "/%C3%BC%20b%3C%22%3E"),
    ("?a=b&c=ä+d%26e", "?a=b&c=%C3%A4+d%26e"), ("/x?y#z", "/x?y"), ("/a/../b/./c?d=/../", "/b/c?d=/../"),
    ("\\a\\b", "/a/b"), ("/a//b", "/a//b"), ("/a\n\tb ", "/ab"), ("/\x00\x7f\udcff", "/%00%7F%FF"),
    ("/!$&'()*+,;=:@~|[]", "/!$&'()*+,;=:@~|[]"),
])
def test_urls_are_sent_as_browsers_send_them(site, typed, sent):
    assert get(f" http://{site}/echo{typed}").split(b" ")[1].decode() == f"/echo{sent}"


def test_unicode_paths_and_credentials_are_sent_encoded(site):
    assert get(f"http://{site}/päth/ü b.jpg") == get(f"HTTP://{site}/p%C3%A4th/%c3%bc%20b.jpg") == b"unicode"
    assert get(f"http://user:p%40ss:w@{site}/private?user:p%40ss:w") == web_server.BODY
    assert get(f"http://üser@{site}/private?%C3%BCser:") == web_server.BODY
    assert reason(f"http://{site}/private?user:password") == "http_401"


def test_redirects_are_followed(site):
    assert get(f"http://{site}/hops/5?file=a.jpg") == FILES["a.jpg"]
    assert reason(f"http://{site}/hops/6") == reason(f"http://{site}/loop", retries=2) == "too_many_redirects"
    for status in (301, 302, 303, 307, 308):
        assert get(f"http://{site}/redirect?status={status}&to=/a.jpg") == FILES["a.jpg"]
    for to in ("a.jpg", "./x/../a.jpg", f"//{site}/a.jpg", f"http://{site}/a.jpg#part", "%20/a.jpg", "\\a.jpg",
               f"HTTP:\\\\{site}\\a.jpg"):
        assert get(f"http://{site}/redirect?to={to}") == FILES["a.jpg"], to
    for to in ("/p%C3%A4th/%C3%BC b.jpg", "/p%25C3%25A4th/%25c3%25bc%2520b.jpg"):
        assert get(f"http://{site}/redirect?to={to}") == b"unicode", to
    assert get(f"http://{site}/redirect?to=/echo/%E9").split(b" ")[1] == b"/echo/%E9"


@pytest.mark.parametrize(("to", "expected"), [
    ("http://[", "bad_url"), ("//", "too_many_redirects"), ("http://a b/", "bad_url"), ("http://:80/", "bad_url"),
    ("http://", "too_many_redirects"), ("http:///x", "http_404"), ("http://a:99999/", "bad_url"),
    ("http://a:b/", "bad_url"), ("ftp://127.0.0.1/", "bad_url"), ("file:///etc/passwd", "bad_url"),
    ("javascript:alert(1)", "bad_url"), ("data:image/png;base64,AAAA", "bad_url"), ("http://%FF%FE/", "bad_url"),
    ("//%00/", "protocol"), ("http://x%EF%BC%8Fy.test/", "bad_url"), ("http://a..b/", "bad_url"),
    (f"http://{'a' * 64}.test/", "bad_url"), ("http://[::1/", "bad_url"), ("http://[v1.a]/", "bad_url"),
    ("http://[fe80::1%25lo]/", "bad_url"), ("", "http_302"), ("http://256.1.1.1/", "bad_url"),
    ("http://none.invalid/", "dns"),
    ("http://localhost:9/", "forbidden_address"), ("http://127.0.0.2:9/", "forbidden_address"),
    ("http://169.254.169.254/latest/meta-data/", "forbidden_address"), ("//0x7f.1:9/", "forbidden_address"),
    ("https://10.0.0.1/", "forbidden_address"),
])
def test_forbidden_redirects_are_refused(site, names, to, expected):
    names.answers["localhost"] = [["127.0.0.1"]]
    escaped = quote_from_bytes(to.encode()) if "%" not in to else to
    web_server.seen(site)
    assert reason(f"http://{site}/redirect?to={escaped}", retries=2) == expected
    assert web_server.seen(site)["requests"] == {"too_many_redirects": 6, "http_404": 2}.get(expected, 1)


@pytest.mark.parametrize("url", [
    "", " ", "a.jpg", "/a.jpg", "//", "http://", "http:", "http:a", "http:///a", "http://[", "http://a b/", "http://a:b/",
    "http://a:99999/", "http://a:0/", "http://:80/", "http://@/", "ftp://a/", "file:///etc/passwd", "http://\x00/",
    "http://\ud800/", "http://a/\ud800", "http://a\u200bb.test/", "http://" + "a" * 64 + ".test/", "http://a..b/",
    "http://.../", "javascript:alert(1)", "http://a^b/", "http://a%2fb/", "http://a%40b/",
    "http://[::1]a/", "http://[v1.a]/", "http://256.0.0.1/", "http://1.2.3.4.5/", "http://0xg.1.09/",
    "http://user:s3cret@[/", "http://" + "ü" * 300 + ".test/",
])
def test_an_invalid_url_is_refused(url):
    result = results([url])[0]
    assert result.startswith("bad_url: ") and "s3cret" not in result


def test_a_host_name_may_be_in_any_script(site, names):
    names.answers["xn--mnchen-3ya.test"] = [["127.0.0.1"]]
    port = site.rpartition(":")[2]
    assert get(f"http://MÜNCHEN.test:{port}/a.jpg", allow_hosts=("münchen.test",)) == FILES["a.jpg"]


def test_credentials_go_nowhere_else_and_into_no_text(site, names):
    names.answers["mine.test"] = [["127.0.0.1"]]
    port = site.rpartition(":")[2]
    allowed = {"allow_hosts": ("127.0.0.1", "mine.test")}
    basic = b"Authorization: Basic " + base64.b64encode(b"user:s3cret")
    for to, goes in (("/echo", True), (f"http://{site}/echo", True), (f"http://mine.test:{port}/echo", False)):
        assert (basic in get(f"http://user:s3cret@{site}/redirect?to={to}", **allowed)) is goes
    for path in ("/garbage", "/cut", "/reset", "/loop", "/hang", "/status/500", "/headers", "/forever",
                 "/gzipped?as=br", "/redirect?to=http://[", "/redirect?to=http://user:s3cret@none.test/", "/redirect?to=ftp://s3cret/"):
        result = results([f"http://user:s3cret@{site}{path}{'&' if '?' in path else '?'}token=s3cret"],
                         read_timeout=0.2, max_bytes=1000)[0]
        assert isinstance(result, str) and "s3cret" not in result and "user" not in result, result
    for url in ("http://user:s3cret@none.test/?s3cret", "http://user:s3cret@127.0.0.1:9/?s3cret",
                "https://user:s3cret@127.0.0.1:9/?s3cret", "http://user:s3cret@10.0.0.1/"):
        assert "s3cret" not in results([url])[0]
