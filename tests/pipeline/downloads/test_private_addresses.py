"""Private IPs are refused in URLs and behind host names, in every notation."""

import ipaddress

import pytest

from pipeline.downloads import resolver
from tests.pipeline import web_server
from tests.pipeline.downloads.download_requests import FILES, get, reason, results

pytestmark = pytest.mark.usefixtures("no_warnings")


# Addresses.

PRIVATE = ["127.0.0.1", "127.255.255.255", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
           "169.254.169.254", "100.64.0.1", "100.127.255.255", "100.100.100.200", "192.0.0.192", "192.0.2.1",
           "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1",
           "255.255.255.255", "168.63.129.16", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
           "::ffff:0:10.0.0.1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b::10.0.0.1",
           "64:ff9b::169.254.169.254", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:db8::1",
           "2001:0:a00:1::1", "2001::1", "100::1", "4000::1"]
PUBLIC = ["8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.1", "172.32.0.1", "223.255.255.255", "1.1.1.1",
          "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_ips_are_refused_in_urls_and_behind_names(names, connected, address):
    names.answers["name.test"] = [[address]]
    literal = f"[{address}]" if ":" in address else address
    for url in (f"http://{literal}/", f"https://{literal}:8443/", "http://name.test/"):
        assert reason(url, allow_hosts=(), retries=2) == "forbidden_address"
    assert not connected


@pytest.mark.parametrize("address", PUBLIC)
def test_public_ips_are_connected_to(names, connected, address):
    names.answers["name.test"] = [[address]]
    literal = f"[{address}]" if ":" in address else address
    for url in (f"http://{literal}/", "http://name.test/"):
        connected.clear()
        assert reason(url, allow_hosts=()) == "connect"
        assert {ipaddress.ip_address(ip) for ip in connected} == {ipaddress.ip_address(address)}


@pytest.mark.parametrize("host", [
    "%31%32%37.0.0.1", "１２７.0.0.1", "①②⑦.⓪.⓪.①", "127。0。0。1", "127.0.0.1", "user:password@127.0.0.1",
    "8.8.8.8@127.0.0.1", "127.0.0.1:80",
])
def test_browser_spellings_of_this_machine_are_refused(connected, host):
    assert reason(f"http://{host}/", allow_hosts=()) == "forbidden_address" and not connected
    assert reason(f"http://{host.removesuffix(':80')}:9/") == "connect" and set(connected) == {"127.0.0.1"}


@pytest.mark.parametrize("host", [
    "2130706433", "0x7f000001", "017700000001", "127.1", "127.0.1", "0x7f.1", "0177.0.0.1", "0x7f.0x0.0x0.0x1",
    "127.0.0.1.", "0", "0x0", "0xA9FEA9FE", "[::ffff:7f00:1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]", "localhost",
    "LOCALHOST",
])
def test_system_spellings_of_this_machine_are_refused(connected, host):
    """These use the system's resolver, because it may read such names as IPs."""
    assert reason(f"http://{host}/", allow_hosts=()) == "forbidden_address"
    assert reason(f"http://{host}/", allow_hosts=("127.0.0.1",)) == "forbidden_address"
    assert not connected


def test_spellings_of_other_machines_are_allowed(connected):
    assert reason("http://0x08080808/", allow_hosts=()) == "connect" and connected == ["8.8.8.8"]


def test_numbers_that_only_the_system_reads_as_ips_are_refused(names, connected):
    names.answers["0x7f.1e"] = [["127.0.0.1"]]
    assert reason("http://0x7f.1e/", allow_hosts=()) == "forbidden_address" and not connected


def test_one_private_ip_among_public_ones_is_refused(names, connected):
    for addresses in (["8.8.8.8", "10.0.0.1"], ["2606:4700::1111", "8.8.8.8", "::1"]):
        names.answers["mixed.test"] = [addresses]
        assert reason("http://mixed.test/", allow_hosts=()) == "forbidden_address"
    assert not connected


def test_the_connection_goes_to_the_checked_ip(site, names, connected):
    """If a name changes its IP after the check, the connection still goes to the checked IP."""
    port = site.rpartition(":")[2]
    names.answers["rebound.test"] = [["8.8.8.8"], ["127.0.0.1"]]
    web_server.seen(site)
    connected.clear()
    assert reason(f"http://rebound.test:{port}/a.jpg", allow_hosts=(), retries=2) == "connect"
    assert set(connected) == {"8.8.8.8"} and names.lookups["rebound.test"] == 1
    names.answers["mine.test"] = [["127.0.0.1"], ["127.0.0.9"]]
    assert get(f"http://mine.test:{port}/a.jpg", allow_hosts=("mine.test",)) == FILES["a.jpg"]
    assert connected[-1] == "127.0.0.1" and web_server.seen(site)["requests"] == 1


def test_a_name_that_becomes_private_is_refused_at_the_next_lookup(site, names, connected, monkeypatch):
    monkeypatch.setattr(resolver, "_DNS_SECONDS", -1.0)
    names.answers["rebound.test"] = [["8.8.8.8"], ["127.0.0.1"]]
    assert reason("http://rebound.test/", allow_hosts=(), retries=2) == "forbidden_address"
    assert connected == ["8.8.8.8"]


def test_allowed_hosts_may_be_private(site, names):
    host, _, port = site.rpartition(":")
    names.answers.update({"mine.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]})
    url, to = f"http://{site}/a.jpg", f"http://{site}/redirect?to="
    for allowed in ((host,), (site,), ("other.test", site)):
        assert get(url, allow_hosts=allowed) == FILES["a.jpg"]
    for allowed in ((), (f"{host}:1",), ("mine.test",), ("127.0.0.2",), (f"mine.test:{port}",)):
        assert reason(url, allow_hosts=allowed) == "forbidden_address"
    assert get(f"http://mine.test:{port}/a.jpg", allow_hosts=(f"MINE.test:{port}",)) == FILES["a.jpg"]
    assert reason(f"http://other.test:{port}/a.jpg", allow_hosts=("mine.test",)) == "forbidden_address"
    assert reason(f"http://mine.test.:{port}/a.jpg", allow_hosts=("mine.test",)) in {"forbidden_address", "dns"}
    assert get(f"{to}http://mine.test:{port}/a.jpg", allow_hosts=(site, "mine.test")) == FILES["a.jpg"]
    assert reason(f"{to}http://mine.test:{port}/a.jpg", allow_hosts=(site,)) == "forbidden_address"
    assert reason(f"{to}http://127.1:{port}/a.jpg", allow_hosts=(site,)) == "forbidden_address"
    # A connection of one name is not reused for another name.
    assert [str(result)[:9] for result in results(
        [f"http://mine.test:{port}/", f"http://other.test:{port}/"], allow_hosts=("mine.test",))] == [
            "http_404:", "forbidden"]


def test_allowed_hosts_may_be_private_with_ipv6(connected):
    for allowed in ("::1", "[::1]", "[::1]:9", "0:0::1"):
        assert reason("http://[::1]:9/", allow_hosts=(allowed,)) == "connect"
    assert reason("http://[::1]:8/", allow_hosts=("[::1]:9",)) == "forbidden_address"
    assert reason("http://127.0.0.1/", allow_hosts=("127.0.0.1:8000",)) == "forbidden_address"
