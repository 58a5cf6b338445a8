"""Namespaces and mounts: new ones made, old ones rejoined, roots left, and CVEs that begin so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

from .harness import REFUSED

if TYPE_CHECKING:
    from .harness import Abuse

NAMESPACES = {
    "user": 0x10000000,
    "mnt": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
}


@pytest.mark.parametrize("name", NAMESPACES)
def test_unshare(abuse: Abuse, name: str) -> None:
    """Root of a user namespace reaches most kernel bugs of the last decade (CVE-2022-0185, ...)."""
    both = NAMESPACES[name] | NAMESPACES["user"]
    result = abuse(f"print(raw(272, {NAMESPACES[name]}), raw(272, {both}))", raw=True)
    assert result.stdout == "EPERM EPERM\n"


def test_clone_with_namespace_flags(abuse: Abuse) -> None:
    """What unshare may not, clone must not either; in any combination."""
    flags = [flag for name, flag in NAMESPACES.items() if name != "time"]
    combined = [*flags, NAMESPACES["user"] | NAMESPACES["net"], sum(flags)]
    result = abuse(
        f"""
        for flags in {combined}:
            child = raw(56, flags | signal.SIGCHLD, 0, 0, 0, 0)
            if child == 0: os._exit(0)
            print(child)
        """,
        raw=True,
    )
    assert result.stdout == "EPERM\n" * len(combined)


def test_clone3(abuse: Abuse) -> None:
    """Its flags lie in memory, where no filter can read them: the call must not exist."""
    result = abuse(
        """
        arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, signal.SIGCHLD)
        child = raw(435, arguments, 64)
        if child == 0: os._exit(0)
        print(child)
        """,
        raw=True,
    )
    assert result.stdout == "ENOSYS\n"


def test_clone_flags_in_the_upper_half(abuse: Abuse) -> None:
    """The filter compares 32 bits of 64: the kernel must not see more than the filter did."""
    result = abuse(
        """
        before = os.readlink('/proc/self/ns/user')
        child = raw(56, (0x10000000 << 32) | signal.SIGCHLD, 0, 0, 0, 0)
        if child == 0:
            os._exit(os.readlink('/proc/self/ns/user') != before)
        print('refused' if isinstance(child, str) else os.waitpid(child, 0)[1])
        """,
        raw=True,
    )
    assert result.stdout in ("refused\n", "0\n")


@pytest.mark.parametrize("name", NAMESPACES)
def test_setns(abuse: Abuse, name: str) -> None:
    """Back into the namespaces of pid 1, or once more into one's own."""
    result = abuse(
        f"""
        for pid in ('1', 'self'):
            fd = outcome(os.open, f'/proc/{{pid}}/ns/{name}', os.O_RDONLY)
            print(fd if isinstance(fd, str) else raw(308, fd, 0))
        """,
        raw=True,
    )
    assert set(result.stdout.split()) <= REFUSED | {"ENOENT"}


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("165, b'tmpfs', b'/tmp', b'tmpfs', 0, 0", id="mount-tmpfs"),
        pytest.param("165, b'/', b'/tmp', 0, 4096, 0", id="bind-the-root"),
        pytest.param("165, 0, b'/usr', 0, 0x1020, 0", id="remount-writable-CVE-2014-5206"),
        pytest.param(
            "165, b'cgroup', b'/tmp', b'cgroup', 0, b'memory'", id="cgroup-v1-CVE-2022-0492"
        ),
        pytest.param(
            "165, b'overlay', b'/tmp', b'overlay', 0, b'lowerdir=/usr,upperdir=/tmp'",
            id="overlay-CVE-2021-3493",
        ),
        pytest.param("165, b'proc', b'/tmp', b'proc', 0, 0", id="full-proc"),
        pytest.param("165, b'sysfs', b'/tmp', b'sysfs', 0, 0", id="sysfs"),
        pytest.param("165, 0, b'/', 0, 0x104000, 0", id="shared-propagation"),
        pytest.param("166, b'/proc', 2", id="umount-proc"),
        pytest.param("166, b'/tmp', 2", id="umount-what-covers-the-hosts-tmp"),
        pytest.param("155, b'/tmp', b'/tmp'", id="pivot_root"),
        pytest.param("428, -100, b'/', 1", id="open_tree-clone"),
        pytest.param("429, -1, b'', -100, b'/tmp', 4", id="move_mount"),
        pytest.param("430, b'ext4', 0", id="fsopen-CVE-2022-0185"),
        pytest.param("431, 0, 1, b'a', b'b', 0", id="fsconfig-CVE-2021-4154"),
        pytest.param("432, 0, 0, 0", id="fsmount"),
        pytest.param("433, -100, b'/usr', 0", id="fspick"),
        pytest.param("442, -100, b'/usr', 0, bytes(32), 32", id="mount_setattr"),
        pytest.param("457, bytes(32), bytes(512), 512, 0", id="statmount"),
        pytest.param("458, bytes(32), bytes(512), 8, 0", id="listmount"),
    ],
)
def test_mounts(abuse: Abuse, call: str) -> None:
    """Old and new mount interface alike."""
    assert abuse(f"print(raw({call}))", raw=True).stdout.strip() in REFUSED


def test_chroot_twice(abuse: Abuse) -> None:
    """chroot into a subdirectory with the current one outside, then climb (Chuvakin, 2002)."""
    result = abuse(
        """
        os.mkdir('in')
        print(outcome(os.chroot, 'in'))
        for _ in range(64): os.chdir('..')
        print(outcome(os.chroot, '.'), os.path.samefile('.', '/'))
        """,
        raw=True,
    )
    assert result.stdout == "EPERM\nEPERM True\n"


def test_climbing_out(abuse: Abuse) -> None:
    """``..`` of every directory one can open, by path and by descriptor."""
    result = abuse("""
        import os
        root = os.stat('/')
        outside = []
        for start in ('/', '/tmp', '/proc/self/root', '/proc/self/cwd', '/dev', '/usr', '/dev/shm'):
            fd = os.open(start, os.O_RDONLY | os.O_DIRECTORY)
            for _ in range(64):
                above = os.open('..', os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = above
            if not os.path.samestat(os.fstat(fd), root): outside.append(start)
            os.close(fd)
        print(outside, sorted(set(os.listdir('/')) & {'.host', 'sys', 'var', 'run', 'boot'}))
    """)
    assert result.stdout == "[] []\n"


@pytest.mark.parametrize(
    "name", ["uid_map", "gid_map", "setgroups", "projid_map", "timens_offsets"]
)
def test_maps_are_written_once(abuse: Abuse, name: str) -> None:
    """A second mapping would make more of one's uid (CVE-2014-8989, CVE-2018-18955)."""
    result = abuse(
        f"""
        def write(text):
            with open('/proc/self/{name}', 'w') as file:
                file.write(text)
        print(*{{outcome(write, t) for t in ('0 0 1', '0 0 4294967295', 'allow', 'monotonic 9 9')}})
        """,
        raw=True,
    )
    assert set(result.stdout.split()) <= REFUSED | {"EROFS", "EINVAL", "ENOENT"}


def test_host_name_stays(abuse: Abuse) -> None:
    """The UTS namespace is the jail's: what one snippet sets, the next would see."""
    result = abuse(
        "print(raw(170, b'owned', 5), raw(171, b'owned', 5), os.uname().nodename)", raw=True
    )
    assert result.stdout == "EPERM EPERM sandbox\n"


def test_privileged_helpers_are_absent_or_useless(abuse: Abuse) -> None:
    """newuidmap, unshare(1), mount(8), su: file capabilities and setuid bits count for nothing."""
    result = abuse("""
        import subprocess
        for command in (['unshare', '-Ur', 'true'], ['mount', '-t', 'tmpfs', 'x', '/tmp'],
                        ['su', '-c', 'true'], ['newuidmap', '2', '0', '0', '1'],
                        ['nsenter', '-t', '1', '-a', 'true'], ['chroot', '/', 'true']):
            try:
                done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
                if done.returncode == 0: print(command)
            except FileNotFoundError: pass
    """)
    assert (result.status, result.stdout) == (Status.OK, "")
