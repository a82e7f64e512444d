"""A private RabbitMQ node with a TLS listener for the whole run, and the scripts on it.

Each worker of pytest-xdist has such a node.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import pika
import pytest
import trustme
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError
from port_for import get_port
from pytest_rabbitmq.factories.executor import RabbitMqExecutor
from scripts import Pair, Script
from servers import Tls, node_environment, signal_node

# Started from a background job, this process ignores SIGINT, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Stop at once, in one line, where there is no RabbitMQ to test against."""
    # Workers of pytest-xdist have threads, but what pexpect forks there only begins a script.
    config.addinivalue_line("filterwarnings", "ignore:.*use of forkpty:DeprecationWarning")
    server = config.getoption("rabbitmq_server") or config.getini("rabbitmq_server")
    if not Path(server).exists():
        install = "apt-get install rabbitmq-server, or pass --rabbitmq-server and --rabbitmq-ctl"
        pytest.exit(f"RabbitMQ is not installed: there is no {server} ({install})", returncode=1)


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    """Configure the node before it starts: a TLS listener, and nothing shared with other nodes."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "node.pem")
    port = get_port(None)
    assert port
    (folder / "rabbitmq.conf").write_text(
        f"listeners.ssl.default = {port}\n"
        f"ssl_options.cacertfile = {folder}/ca.pem\n"
        f"ssl_options.certfile = {folder}/node.pem\n"
        f"ssl_options.keyfile = {folder}/node.pem\n"
        "max_message_size = 134217728\n"  # RabbitMQ 4 allows only 16 MiB if it is not told
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in node_environment(folder).items():
            patch.setenv(name, value)
        # Nodes that share a few cores must not spin while they wait.
        patch.setenv("ERL_FLAGS", "+sbwt none +sbwtdcpu none +sbwtdio none")
        cafile = folder / "ca.pem"
        yield Tls(port, cafile, f"amqps://localhost:{port}/?cafile={cafile}")


@pytest.fixture(scope="session")
def broker(tls: Tls, request: pytest.FixtureRequest) -> RabbitMqExecutor:
    """Return the running node."""
    node = request.getfixturevalue("rabbitmq_proc")
    assert isinstance(node, RabbitMqExecutor)
    return node


@pytest.fixture(scope="session")
def url(broker: RabbitMqExecutor) -> str:
    """Return the node's address."""
    return f"amqp://localhost:{broker.port}/"


@pytest.fixture
def channel(url: str) -> Iterator[BlockingChannel]:
    """Return a channel of pika's, the client that is not aio-pika."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    yield connection.channel()
    with suppress(AMQPError):  # tests kill the node
        connection.close()


@pytest.fixture
def pair(url: str, tmp_path: Path) -> Iterator[Pair]:
    """Return the pair on the node. What a test starts ends with the test."""
    with ExitStack() as running:
        yield Pair(url, tmp_path, running)


@pytest.fixture
def stalled(pair: Pair) -> Iterator[tuple[Script, BinaryIO]]:
    """Return a receiver that writes to a pipe, and the end of the pipe that nobody reads yet.

    The broker gives up on its connection if it does not hear from it for four seconds.
    """
    reading, writing = os.pipe()
    receiver = pair.receive("--url", pair.url + "?heartbeat=2", stdout=writing)
    os.close(writing)
    with open(reading, "rb") as out:
        yield receiver, out


@pytest.fixture
def healthy(broker: RabbitMqExecutor) -> Iterator[None]:
    """Leave the node running, whatever a test does to it."""
    yield
    if broker.running():
        signal_node(broker, signal.SIGCONT)
    else:
        broker.kill().start()
