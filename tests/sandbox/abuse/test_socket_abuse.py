"""Sockets: families that reach the host, names that reach a neighbour, rights that travel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import NativeSandbox, Status

from .harness import REFUSED

if TYPE_CHECKING:
    from .harness import Abuse


@pytest.mark.parametrize(
    ("family", "kind", "protocol"),
    [
        pytest.param(2, 1, 0, id="AF_INET-TCP"),
        pytest.param(2, 2, 0, id="AF_INET-UDP-CVE-2017-1000112"),
        pytest.param(2, 3, 1, id="AF_INET-raw-ping"),
        pytest.param(2, 6, 0, id="AF_INET-DCCP-CVE-2017-6074"),
        pytest.param(2, 5, 132, id="AF_INET-SCTP"),
        pytest.param(2, 1, 262, id="AF_INET-MPTCP"),
        pytest.param(10, 1, 0, id="AF_INET6"),
        pytest.param(40, 1, 0, id="AF_VSOCK-CVE-2021-26708"),
        pytest.param(17, 3, 0x300, id="AF_PACKET-CVE-2017-7308"),
        pytest.param(16, 3, 0, id="AF_NETLINK-route"),
        pytest.param(16, 3, 12, id="AF_NETLINK-netfilter-CVE-2024-1086"),
        pytest.param(16, 3, 9, id="AF_NETLINK-audit"),
        pytest.param(38, 5, 0, id="AF_ALG-CVE-2019-8912"),
        pytest.param(31, 3, 1, id="AF_BLUETOOTH-CVE-2020-12351"),
        pytest.param(29, 3, 1, id="AF_CAN-CVE-2010-2959"),
        pytest.param(21, 5, 0, id="AF_RDS-CVE-2010-3904"),
        pytest.param(30, 5, 0, id="AF_TIPC-CVE-2021-43267"),
        pytest.param(44, 3, 0, id="AF_XDP"),
        pytest.param(41, 2, 0, id="AF_KCM"),
        pytest.param(43, 1, 0, id="AF_SMC"),
        pytest.param(15, 3, 2, id="AF_KEY"),
        pytest.param(24, 2, 0, id="AF_PPPOX"),
        pytest.param(39, 1, 0, id="AF_NFC"),
        pytest.param(42, 2, 0, id="AF_QIPCRTR"),
        pytest.param(4, 2, 0, id="AF_IPX"),
        pytest.param(3, 5, 0, id="AF_AX25"),
        pytest.param(2 | 1 << 32, 1, 0, id="AF_INET-with-high-bits"),
    ],
)
def test_family_is_refused(abuse: Abuse, family: int, kind: int, protocol: int) -> None:
    """Only AF_UNIX exists: the other families are kernel surface, and vsock leads to the host.

    EOPNOTSUPP from socketpair would mean that the family's code, or module, was reached.
    """
    result = abuse(
        f"print(raw(41, {family}, {kind}, {protocol}), "
        f"raw(53, {family}, {kind}, {protocol}, (ctypes.c_int * 2)()))",
        raw=True,
    )
    assert set(result.stdout.split()) <= REFUSED | {"EAFNOSUPPORT"}


def test_python_sees_an_oserror(abuse: Abuse) -> None:
    """The refusal reads like a machine without a network, not like a crash."""
    result = abuse("""
        import socket, urllib.request
        for attempt in (lambda: socket.create_connection(('127.0.0.1', 22), 1),
                        lambda: socket.create_server(('127.0.0.1', 8000)),
                        lambda: urllib.request.urlopen('http://10.0.0.1/', timeout=1)):
            try: attempt()
            except OSError: print('OSError')
    """)
    assert (result.status, result.stdout) == (Status.OK, "OSError\n" * 3)


def test_abstract_name_does_not_reach_a_neighbour(neighbours: NativeSandbox) -> None:
    """Abstract addresses belong to the network namespace, not to a directory (sandlock, bwrap)."""
    listen = """
import socket, time
s = socket.socket(socket.AF_UNIX)
s.bind('\\0meeting-point'); s.listen(); s.settimeout(0.5)
try: s.accept(); print('met')
except TimeoutError: print('alone')
"""
    connect = """
import socket, time
end = time.monotonic() + 0.4
seen = set()
while time.monotonic() < end:
    try: socket.socket(socket.AF_UNIX).connect('\\0meeting-point'); seen.add('met')
    except OSError as error: seen.add(type(error).__name__)
    time.sleep(0.02)
print(*seen)
"""
    first, second = neighbours.execute_batch([listen, connect])
    assert (first.stdout, second.stdout) == ("alone\n", "ConnectionRefusedError\n")


def test_abstract_name_is_free_again(abuse: Abuse) -> None:
    """The same name, snippet after snippet, though the first left a daemon listening."""
    code = """
        import os, socket, time
        s = socket.socket(socket.AF_UNIX)
        s.bind('\\0name'); s.listen()
        if os.fork() == 0:
            os.setsid(); time.sleep(600)
        print('bound')
    """
    assert [abuse(code).stdout for _ in range(3)] == ["bound\n"] * 3


def test_sockets_of_system_services(abuse: Abuse) -> None:
    """D-Bus, systemd, Docker, syslog, X11, by path and by abstract name."""
    result = abuse("""
        import socket
        for path in ('/run/docker.sock', '/var/run/docker.sock', '/run/dbus/system_bus_socket',
                     '/run/systemd/private', '/dev/log', '/tmp/.X11-unix/X0',
                     '\\0/tmp/.X11-unix/X0',
                     '/run/containerd/containerd.sock', '\\0/containerd-shim/x.sock'):
            try: socket.socket(socket.AF_UNIX).connect(path); print(path)
            except OSError: pass
    """)
    assert (result.status, result.stdout) == (Status.OK, "")


def test_forged_credentials(abuse: Abuse) -> None:
    """SCM_CREDENTIALS may name oneself only (CVE-2013-1979)."""
    result = abuse(
        """
        import struct
        a, b = socket.socketpair()
        b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for claim in ((1, 1000, 1000), (os.getpid(), 0, 0)):
            message = [(socket.SOL_SOCKET, 2, struct.pack('3i', *claim))]
            print(outcome(a.sendmsg, [b'x'], message))
        """,
        raw=True,
    )
    assert set(result.stdout.split()) <= {"EPERM", "EINVAL"}


def test_descriptors_wait_for_the_next_snippet(abuse: Abuse) -> None:
    """A ring of sockets that hold each other lives until the kernel collects it (unix_gc)."""
    abuse("""
        import os, socket
        for _ in range(40):
            a, b = socket.socketpair()
            socket.send_fds(a, [b'x'], [a.fileno(), b.fileno()])
            socket.send_fds(b, [b'x'], [a.fileno(), b.fileno()])
            a.close(); b.close()
    """)
    result = abuse("""
        import os, socket
        a, b = socket.socketpair()
        for _ in range(10):
            socket.send_fds(a, [b'x'], [0])
            print(len(socket.recv_fds(b, 1, 1)[1]), end='')
    """)
    assert (result.status, result.stdout) == (Status.OK, "1" * 10)


def test_name_of_a_socket_in_flight(abuse: Abuse) -> None:
    """Such a ring keeps an abstract name, which anybody of the network namespace can read."""
    for _ in range(3):
        abuse("""
            import socket
            a, b = socket.socketpair()
            named = socket.socket(socket.AF_UNIX)
            named.bind('\\0message')
            socket.send_fds(a, [b'x'], [b.fileno(), named.fileno()])
        """)
        result = abuse("print('message' in open('/proc/self/net/unix').read())")
        assert result.stdout == "False\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        pytest.param(32, 1 << 30, id="SO_SNDBUFFORCE-CVE-2016-9793"),
        pytest.param(33, 1 << 30, id="SO_RCVBUFFORCE"),
        pytest.param(36, 7, id="SO_MARK"),
        pytest.param(12, 7, id="SO_PRIORITY"),
        pytest.param(1, 1, id="SO_DEBUG"),
    ],
)
def test_socket_options_that_need_privilege(abuse: Abuse, option: int, value: int) -> None:
    """CAP_NET_ADMIN of the namespace is not the snippet's."""
    code = f"print(outcome(socket.socketpair()[0].setsockopt, 1, {option}, {value}))"
    assert abuse(code, raw=True).stdout.strip() in {"EPERM", "EACCES", "ENOPROTOOPT"}
