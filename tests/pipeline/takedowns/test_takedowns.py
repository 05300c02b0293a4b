"""A takedown matches the right rows."""

import pyarrow as pa
import pytest

from jobs.publishing.forget import parse_takedown
from pipeline.takedowns.takedown_list import Forgotten
from tests.pipeline.downloads.test_hosts import SPELLINGS


@pytest.mark.parametrize("url", [*SPELLINGS, "https://cdn.example.org/a", "//CDN.EXAMPLE.ORG./a"])
def test_a_domain_matches_every_spelling_of_its_hosts(url):
    forgotten = Forgotten(domains=frozenset({"example.org"}))
    assert forgotten.has_name(url)
    assert forgotten.mask(pa.table({"url": ["http://other.test/a", url, None]})).tolist() == [False, True, False]


@pytest.mark.parametrize("url", ["http://notexample.org/a", "http://example.org.other.test/a", "http://org/a",
                                 "http://other.test/example.org", "http://example.org@other.test/", "example.org.png",
                                 "http://other.test\\@example.org/a"])
def test_a_domain_matches_no_other_host(url):
    assert not Forgotten(domains=frozenset({"example.org"})).has_name(url)


@pytest.mark.parametrize("text", [
    "example.org", "EXAMPLE.ORG", "example.org.", ".example.org", "*.example.org", " example.org ", "example.org:443",
    "user@example.org", "example.org/path", "ｅｘａｍｐｌｅ.org", "example%2eorg", "https://example.org/a?b",
    "http:example.org", "//example.org/", "\\\\example.org\\a", "example。org"])
def test_a_domain_has_many_spellings(tmp_path, text):
    assert parse_takedown(str(tmp_path), [], [], [], [text]).domains == {"example.org"}


@pytest.mark.parametrize("text", ["", " ", ".", "*", "http://x y/..", "//", "http://", "a^b", "a b", "[::1", "@"])
def test_an_invalid_domain_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"is no host\nhint: as in example\.org"):
        parse_takedown(str(tmp_path), [], [], [], [text])


def test_a_domain_in_two_scripts_is_one_domain(tmp_path):
    one, other = (parse_takedown(str(tmp_path), [], [], [], [text]).domains
                  for text in ("bücher.example", "XN--BCHER-KVA.example."))
    assert one == other == {"xn--bcher-kva.example"}


def test_a_takedown_by_url_stores_no_credentials_and_finds_old_and_new_rows(tmp_path):
    full = "https://me:word@h.org/a?X-Goog-Signature=word&ref=7"
    takedown = parse_takedown(str(tmp_path), [], [full], [], [])
    assert "word" not in str(takedown.urls)
    for forgotten in (takedown, Forgotten(urls=frozenset({full}))):  # the second as earlier versions listed it
        rows = [full, "https://***@h.org/a?X-Goog-Signature=word&ref=7", *takedown.urls,
                "https://me:other@h.org/a?X-Goog-Signature=other&ref=7", "https://***@h.org/a?X-Goog-Signature=word&ref=8"]
        assert forgotten.mask(pa.table({"url": rows})).tolist() == [True, True, True, True, False]
