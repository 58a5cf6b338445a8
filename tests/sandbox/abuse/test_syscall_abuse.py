"""Kernel surface with a history, and other ways than the usual one into the kernel."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

from .harness import REFUSED

if TYPE_CHECKING:
    from .harness import Abuse


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("321, 0, bytes(72), 72", id="bpf-CVE-2017-16995"),
        pytest.param("298, bytes(128), 0, -1, -1, 0", id="perf_event_open-CVE-2013-2094"),
        pytest.param("250, 1, b'session', 0, 0, 0", id="keyctl-join-session-CVE-2016-0728"),
        pytest.param("250, 0, -5, 1, 0, 0", id="keyctl-user-session-keyring"),
        pytest.param("248, b'user', b'bit', b'1', 1, -4", id="add_key"),
        pytest.param("249, b'user', b'bit', 0, -4", id="request_key-upcall"),
        pytest.param("323, 0", id="userfaultfd"),
        pytest.param("323, 1", id="userfaultfd-user-mode-only"),
        pytest.param("425, 8, bytes(120)", id="io_uring_setup-CVE-2022-29582"),
        pytest.param("426, 0, 1, 0, 0, 0, 0", id="io_uring_enter"),
        pytest.param("427, 0, 0, 0, 0", id="io_uring_register"),
        pytest.param("278, 1, (ctypes.c_long * 2)(id(0), 1), 1, 0", id="vmsplice-CVE-2020-29374"),
        pytest.param("101, 0, 0, 0, 0", id="PTRACE_TRACEME-CVE-2019-13272"),
        pytest.param("311, os.getpid(), 0, 0, 0, 0, 0", id="process_vm_writev-to-oneself"),
        pytest.param("135, 0x0040000", id="personality-no-randomisation"),
        pytest.param("135, 0x0400000", id="personality-read-implies-exec"),
        pytest.param("317, 1, 0, 0", id="seccomp-a-filter-of-its-own"),
        pytest.param("317, 1, 8, bytes(16)", id="seccomp-user-notification"),
        pytest.param("154, 1, bytes(16), 16", id="modify_ldt"),
        pytest.param("172, 3", id="iopl"),
        pytest.param("173, 0, 1024, 1", id="ioperm"),
        pytest.param("175, b'', 0, b''", id="init_module"),
        pytest.param("313, 0, b'', 0", id="finit_module"),
        pytest.param("176, b'x', 0", id="delete_module"),
        pytest.param("246, 0, 0, 0, 0", id="kexec_load"),
        pytest.param("320, -1, -1, 0, b'', 0", id="kexec_file_load"),
        pytest.param("169, 0xfee1dead, 672274793, 0, 0", id="reboot-of-the-namespace"),
        pytest.param("167, b'/tmp/f', 0", id="swapon"),
        pytest.param("163, b'/tmp/f'", id="acct-logs-every-process"),
        pytest.param("179, 0, 0, 0, 0", id="quotactl"),
        pytest.param("103, 3, bytes(64), 64", id="syslog-kernel-messages"),
        pytest.param("153", id="vhangup"),
        pytest.param("251, 1, 0, 1 << 13", id="ioprio_set-real-time"),
        pytest.param("240, b'q', 0o102, 0o600, 0", id="mq_open"),
        pytest.param("244, 0, 0", id="mq_notify-CVE-2017-11176"),
        pytest.param("64, 0, 1, 0o600", id="semget"),
        pytest.param("68, 0, 0o1600", id="msgget-CVE-2021-22555-spray"),
        pytest.param("238, 2, 0, 0", id="set_mempolicy"),
        pytest.param("134, b'/tmp/f'", id="uselib-CVE-2004-1235"),
        pytest.param("156, bytes(64)", id="sysctl"),
        pytest.param("139, 3", id="sysfs"),
        pytest.param("212, 0, bytes(64), 64", id="lookup_dcookie"),
        pytest.param("216, 0, 0, 0, 0, 0", id="remap_file_pages"),
        pytest.param("180, 0, 0, 0", id="nfsservctl"),
        pytest.param("205, bytes(16)", id="set_thread_area"),
        pytest.param("329, 4096, 3, 0", id="pkey_mprotect"),
        pytest.param("453, 0, 4096, 0", id="map_shadow_stack"),
        pytest.param("451, 0, bytes(16), bytes(40), 0", id="cachestat-page-cache-channel"),
        pytest.param("100_000", id="number-of-the-future"),
    ],
)
def test_call_is_refused(abuse: Abuse, call: str) -> None:
    """Each has an exploit, a hidden channel or an upcall to its name; Python needs none."""
    assert abuse(f"print(raw({call}))", raw=True).stdout.strip() in REFUSED


CODE_PAGE = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, flags={flags})
page.write(bytes({code}))
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(hex(ctypes.CFUNCTYPE(ctypes.c_long)(address)()))
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3], id="int-0x80-CVE-2010-3081"),
        # The same from 32-bit code: a far return to the compatibility code segment.
        pytest.param(
            list(bytes.fromhex("6a23 488d0503000000 50 48cb b814000000 cd80 f4")),
            id="32-bit-code-segment",
        ),
        pytest.param([0xB8, 39, 0, 0, 0x40, 0x0F, 0x05, 0xC3], id="x32-getpid-CVE-2014-0038"),
        pytest.param([0xB8, 0x08, 2, 0, 0x40, 0x0F, 0x05, 0xC3], id="x32-execve"),
    ],
)
def test_other_gates_are_a_policy_kill(abuse: Abuse, code: list[int]) -> None:
    """Foreign ABIs number their calls differently: to a filter of numbers they are disguised."""
    flags = "mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40"  # MAP_32BIT, for 32-bit code
    result = abuse(CODE_PAGE.format(flags=flags, code=code), raw=True)
    assert (result.status, result.signal) == (Status.KILLED, signal.SIGSYS)


def test_number_with_garbage_in_the_upper_half(abuse: Abuse) -> None:
    """The kernel takes 32 bits of rax; a filter must not read 64, nor the other way round."""
    result = abuse(
        "print(raw((1 << 32) | 272, 0x10000000), raw((1 << 32) | 321, 0, bytes(72), 72))", raw=True
    )
    assert set(result.stdout.split()) <= REFUSED


def test_kernel_addresses_as_arguments(abuse: Abuse) -> None:
    """Pointers into the kernel are faults, not targets (CVE-2017-5123: waitid wrote there)."""
    result = abuse(
        """
        kernel = -(1 << 46)
        print(raw(247, 0, 0, kernel, 4, 0), raw(0, 0, kernel, 8), raw(228, 0, kernel),
              raw(98, 0, kernel), raw(63, kernel))
        """,
        raw=True,
        stdin="x" * 8,
    )
    waitid, *others = result.stdout.split()
    assert waitid in ("ECHILD", "EFAULT")
    assert others == ["EFAULT"] * 4


def test_vsyscall_page(abuse: Abuse) -> None:
    """A fixed address with three system calls in it, emulated by the kernel."""
    result = abuse(
        "print(ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(0xffffffffff600400)(None) > 0)",
        raw=True,
    )
    assert result.signal in (None, signal.SIGSEGV, signal.SIGSYS)


def test_execution_prevented_by_filter_only_in_this_process(abuse: Abuse) -> None:
    """A child by exec carries the filter: a fresh program can no more than we."""
    result = abuse("""
        import subprocess, sys
        code = ('import ctypes; l = ctypes.CDLL(None, use_errno=True); '
                'print(l.unshare(0x10000000), ctypes.get_errno())')
        print(subprocess.run([sys.executable, '-I', '-S', '-c', code], capture_output=True).stdout)
    """)
    assert result.stdout == "b'-1 1\\n'\n"


def test_page_cache_is_no_message_board(abuse: Abuse) -> None:
    """Page Cache Attacks (Gruss et al., 2019): mincore must not tell what is cached."""
    result = abuse(
        """
        start = next(int(l.split('-')[0], 16) for l in open('/proc/self/maps') if 'libc' in l)
        vector = ctypes.create_string_buffer(64)
        answer = raw(27, start, 64 * 4096, vector)
        print(answer if isinstance(answer, str) else {b & 1 for b in vector.raw})
        """,
        raw=True,
    )
    assert result.stdout.strip() in REFUSED | {"{1}", "ENOMEM"}
