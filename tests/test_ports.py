from __future__ import annotations

import socket

import pytest

from couturier.components.errors import CouturierError
from couturier.components.ports import LOOPBACK, free_port, is_free, wanted_port


def test_a_free_port_is_free_until_somebody_listens() -> None:
    port = free_port()
    assert is_free(port)
    assert wanted_port(port, option="--port", purpose="the service") == port
    with socket.socket() as listener:
        listener.bind((LOOPBACK, port))
        listener.listen()
        assert not is_free(port)
        with pytest.raises(CouturierError, match=rf"port {port} .* the service wants it.*--port"):
            wanted_port(port, option="--port", purpose="the service")
