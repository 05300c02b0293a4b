"""The host of a URL in any spelling is the host that a download contacts and that a takedown names."""

import pytest

from pipeline.downloads.urls import find_host, literal_address, parse_url

SPELLINGS = [
    "http://example.org/a.jpg", "https://example.org", "HTTP://EXAMPLE.ORG/a.jpg", "http://example.org./a.jpg",
    "http://example.org:80/a.jpg", "https://example.org.:8443/a?b#c", "http://example.org?a", "http://example.org#a",
    "http://user@example.org/a", "http://user:pass@example.org:81/a", "http://other.test@example.org/a",
    "http://other.test:80@example.org/a", "http://ex%61mple.org/a", "http://example%2eorg/a", "http://example.org%2E/a",
    "http://ｅｘａｍｐｌｅ.org/a", "http://example。org/a", "http://example．org/a", "http://%EF%BD%85xample.org/a",
    "http:\\\\example.org\\a", "\\\\example.org\\a", "http:/\\example.org/a", " http://example.org/a ", "http://exa\tmple.org/a",
    "http://example.org\\@other.test/a", "//example.org/a.jpg", "//EXAMPLE.org.:80/a", "//user@example.org/a",
    "http:example.org/a", "https:/example.org/a", "http:///example.org/a",
    # A download refuses these, but metadata of other programs may have them.
    "ftp://example.org/a", "s3://example.org/a", "http://example.org:99999/a", "http://example.org:port/a",
    "http://example.org../a", "http://exam\u00adple.org/a", "http://example\u200b.org/a",
]


@pytest.mark.parametrize("url", SPELLINGS)
def test_one_host_in_many_spellings(url):
    assert find_host(url) == "example.org"


@pytest.mark.parametrize(("url", "host"), [
    ("http://bücher.example/a", "xn--bcher-kva.example"), ("http://BÜCHER.example./a", "xn--bcher-kva.example"),
    ("http://xn--bcher-kva.example/a", "xn--bcher-kva.example"),
    ("http://XN--BCHER-KVA.example/a", "xn--bcher-kva.example"),
    ("http://b%C3%BCcher.example/", "xn--bcher-kva.example"),
    ("http://bu\u0308cher.example/a", "xn--bcher-kva.example"), ("http://ex_ample.org/a", "ex_ample.org"),
    ("http://127.0.0.1:80/a", "127.0.0.1"), ("http://2130706433/a", "127.0.0.1"), ("http://0x7f.1/a", "127.0.0.1"),
    ("http://127.0.0.1./a", "127.0.0.1"), ("http://[2001:DB8::0:1]:80/a", "2001:db8::1"),
    ("http://[::ffff:127.0.0.1]/a", "127.0.0.1"), ("http://www.example.org/a", "www.example.org"),
    ("http://example.org.other.test/a", "example.org.other.test"),
    ("http://other.test/http://example.org/", "other.test"),
    ("http://other.test/@example.org", "other.test"), ("http://other.test?@example.org", "other.test"),
    ("http://other.test#@example.org", "other.test"), ("http://other.test/?u=http://example.org/", "other.test"),
    ("example.org/a.jpg", ""), ("folder/example.org.jpg", ""), ("", ""), ("http://", ""), ("//", ""), ("http://[", ""),
    ("http://a b/", ""), ("http://a^b/", ""), ("http://a%2fb/", ""), ("http://a\ud800b/", ""), ("row 7", ""),
    ("key:1", ""), ("C:\\images\\a.jpg", ""),
])
def test_the_host_of_a_url_is_found(url, host):
    assert find_host(url) == host


@pytest.mark.parametrize("url", SPELLINGS)
def test_the_host_that_is_found_is_the_host_of_the_request(url):
    try:
        parsed, _ = parse_url(url)
    except ValueError:
        return
    assert (literal_address(parsed) or parsed.raw_host).rstrip(".") == find_host(url)
