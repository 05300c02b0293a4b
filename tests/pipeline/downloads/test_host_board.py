"""The rules of pauses, probes and rates, by a clock that the test moves."""

import asyncio
import itertools

from pipeline.downloads import host_limits
from pipeline.downloads.host_limits import HostBoard, ProcessLimits, Report, Slots, Want

HOST = "host.example"


class Board:
    """A board with the clock and the versions of its clients."""

    def __init__(self) -> None:
        self.now = 100.0
        self.board = HostBoard(lambda: self.now)
        self.versions: dict[str, int] = {}

    def exchange(self, client: str, *reports: Report, **wants: Want) -> dict[str, Slots]:
        self.versions[client], self.states, slots = self.board.exchange(
            client, self.versions.get(client, 0), reports, {HOST: wants["want"]} if wants else {})
        return slots

    def ask(self, client: str, requests: int = 100, rate: float = 0.0) -> Slots | None:
        return self.exchange(client, want=Want(requests, rate)).get(HOST)

    def tell(self, client: str, kind: host_limits.ReportKind, **more) -> None:
        state = self.board.state(HOST)
        self.exchange(client, Report(HOST, kind, state.episode if state else 0, **more))


def test_clients_share_one_line_of_slots():
    board = Board()
    slot_times: list[float] = []
    for step in range(400):
        for client in ("a", "b", "c"):
            if slots := board.ask(client, rate=20.0):
                slot_times += [board.now + slots.delay + number * slots.interval for number in range(slots.requests)]
        board.now = 100 + step / 40
    slot_times.sort()
    assert min(after - before for before, after in itertools.pairwise(slot_times)) > 0.0499
    # The slots have no gaps, and reach at most a few seconds ahead.
    assert 200 <= len(slot_times) <= 300 and slot_times[-1] - slot_times[0] < len(slot_times) / 20 + 0.1
    assert Board().ask("a", rate=0.01) == Slots(0.0, 100.0, 1)


def test_pauses_grow_and_single_requests_probe_the_host():
    board = Board()
    board.tell("a", "refused", status=403, recent=40.0)
    for wait in (2.0, 6.0, 18.0, 54.0, 60.0, 60.0):
        state = board.board.state(HOST)
        assert state and (state.until - board.now, state.since, state.recovering) == (wait, 100.0, True)
        board.now += wait - 0.1
        assert board.ask("a") is None
        board.now += 0.1
        assert board.ask("a") == Slots(0.0, 0.0, 1) and board.ask("b") is None
        board.tell("a", "refused", status=403, recent=1.0)
    board.now += 60
    assert board.ask("b")
    board.tell("b", "answered")
    assert board.ask("a") == Slots(0.0, 0.0, 1)
    board.tell("a", "answered")
    state = board.board.state(HOST)
    assert state and not state.recovering and state.pauses == 0
    slots = board.ask("a")
    # The rate is half of that at the refusal; refusals of single requests do not count.
    assert slots and 1 / slots.interval == 20
    board.now += 100
    slots = board.ask("a")
    assert slots and 30 < 1 / slots.interval < 35


def test_a_lost_probe_blocks_for_half_a_minute_only():
    board = Board()
    board.tell("a", "refused", status=429, retry_after=10.0)
    board.now += 10
    assert board.ask("a") and board.ask("b") is None
    board.now += 29
    assert board.ask("b") is None
    board.now += 1
    assert board.ask("b")
    board.tell("b", "no answer")
    assert board.ask("a")


def test_late_refusals_change_nothing():
    board = Board()
    refusal = Report(HOST, "refused", 0, status=403)
    board.exchange("a", refusal, refusal)
    board.exchange("b", refusal)
    state = board.board.state(HOST)
    assert state and (state.episode, state.pauses) == (1, 1)
    board.now += 2
    board.exchange("a", Report(HOST, "answered", 0))
    assert board.board.state(HOST) == state


def test_a_403_about_one_url_lifts_the_limit():
    board = Board()
    board.tell("a", "refused", status=403, recent=10.0)
    board.now += 2
    board.tell("a", "single")
    assert board.ask("a") == Slots(0.0, 0.0, 100)
    state = board.board.state(HOST)
    assert state and state.single


def test_clients_get_the_changes_since_their_last_request():
    board = Board()
    board.exchange("a")
    board.tell("b", "refused", status=403)
    board.exchange("a")
    assert board.states == {HOST: board.board.state(HOST)}
    board.exchange("a")
    assert board.states == {}
    board.exchange("new")
    assert board.states.keys() == {HOST}


def test_the_number_of_remembered_hosts_is_bounded(monkeypatch):
    monkeypatch.setattr(host_limits, "_MAX_HOSTS", 10)
    board = HostBoard()
    for number in range(30):
        board.exchange("a", 0, [Report(f"{number}.example", "refused", 0, status=403)], {})
    assert board.exchange("b", 0, [], {})[1].keys() == {f"{number}.example" for number in range(20, 30)}


def test_a_client_gets_its_share_of_a_limit():
    limits = ProcessLimits(workers=4, share=4)
    slots = asyncio.run(limits.exchange([], {HOST: Want(10, 10.0)})).slots[HOST]
    assert slots.interval == 0.4
