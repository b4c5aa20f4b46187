"""What is known of a request from its head on."""

from __future__ import annotations

import pytest
from exchanges import Client, Driver, Trial, exchange

from gateway.proxy.exchange import own_id, request_id
from gateway.upstream.readers import reader_for


@pytest.mark.parametrize("given", ["abc-1._:", "x" * 128])
def test_a_clients_id_is_kept_where_it_can_be_written(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "a\r\nb", "é"])
def test_another_one_is_made_instead_of_what_cannot(given: str | None) -> None:
    assert len(request_id(given)) == 32
    assert request_id(given) != request_id(given)


def test_samples_are_drawn_by_an_id_that_no_client_chooses() -> None:
    """Or a client could have all of its answers listened to, or none."""
    one = exchange(Client(), Driver(), x_request_id="mine")
    other = exchange(Client(), Driver(), x_request_id="mine")
    assert one.request_id == other.request_id == "mine"
    assert one.sample_id != other.sample_id
    assert one.sample_id == own_id(one.number)


def test_only_a_reader_that_listens_is_tapped() -> None:
    one = Trial().exchange
    one.read_with(reader_for(one.endpoint.form, one.options, tapped=True), stream=False)
    assert one.tapped is one.reader
    one.read_with(reader_for(one.endpoint.form, one.options), stream=False)
    assert one.tapped is None


def test_what_its_client_does_is_told_to_what_moves_it() -> None:
    told: list[str] = []

    class Pipeline(Driver):
        def client_left(self, _: object) -> None:
            told.append("left")

        def client_paused(self, _: object) -> None:
            told.append("paused")

        def client_resumed(self, _: object) -> None:
            told.append("resumed")

    one = exchange(Client(), Pipeline())
    one.pause()
    one.resume()
    one.abandon()
    assert told == ["paused", "resumed", "left"]
