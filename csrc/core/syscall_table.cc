#include "core/syscall_table.h"

#include <sys/syscall.h>

#include <array>

namespace thor {
namespace {

// Numbers from 424 on are the same on every architecture, and newer than some headers we build on.
// clang-format off: one call a line would hide the groups.

constexpr auto kAllowed = std::to_array<std::uint32_t>({
    // Memory.
    __NR_brk, __NR_mmap, __NR_munmap, __NR_mprotect, __NR_mremap, __NR_madvise,
    __NR_msync, __NR_membarrier,
    // Files: the mount namespace holds nothing writable that is worth protecting.
    __NR_read, __NR_write, __NR_close, __NR_lseek, __NR_pread64, __NR_pwrite64,
    __NR_readv, __NR_writev, __NR_preadv, __NR_pwritev, __NR_fstat,
    __NR_newfstatat, __NR_statx, __NR_faccessat, __NR_readlinkat, __NR_getdents64, __NR_getcwd,
    __NR_chdir, __NR_fchdir, __NR_renameat, __NR_renameat2, __NR_mkdirat, __NR_unlinkat,
    __NR_linkat, __NR_symlinkat, __NR_fchmod, __NR_fchmodat, __NR_fchown, __NR_fchownat,
    __NR_umask, __NR_truncate, __NR_ftruncate, __NR_fallocate, __NR_fsync, __NR_fdatasync,
    __NR_sync_file_range, __NR_utimensat, __NR_copy_file_range, __NR_sendfile, __NR_splice,
    __NR_tee, __NR_statfs, __NR_fstatfs, __NR_dup, __NR_dup3, __NR_pipe2, __NR_mknodat,
    436 /* close_range */, 439 /* faccessat2 */, 452 /* fchmodat2 */,
    // Waiting.
    __NR_ppoll, __NR_pselect6, __NR_epoll_create1, __NR_epoll_ctl, __NR_epoll_pwait,
    __NR_eventfd2, __NR_timerfd_create, __NR_timerfd_settime, __NR_timerfd_gettime,
    __NR_nanosleep, __NR_clock_nanosleep,
    441 /* epoll_pwait2 */,
    // Time.
    __NR_gettimeofday, __NR_clock_gettime, __NR_clock_getres, __NR_times, __NR_getitimer,
    __NR_setitimer, __NR_timer_create, __NR_timer_settime, __NR_timer_gettime,
    __NR_timer_getoverrun, __NR_timer_delete,
    // Signals, which stay inside the pid namespace.
    __NR_rt_sigaction, __NR_rt_sigprocmask, __NR_rt_sigreturn, __NR_rt_sigpending,
    __NR_rt_sigsuspend, __NR_rt_sigtimedwait, __NR_rt_sigqueueinfo, __NR_rt_tgsigqueueinfo,
    __NR_sigaltstack, __NR_signalfd4, __NR_kill, __NR_tkill, __NR_tgkill, __NR_restart_syscall,
    // Processes and threads, as many as RLIMIT_NPROC grants.
    __NR_execve, __NR_execveat, __NR_exit, __NR_exit_group, __NR_wait4, __NR_waitid,
    __NR_set_tid_address, __NR_set_robust_list, __NR_get_robust_list, __NR_futex, __NR_rseq,
    __NR_sched_yield, __NR_sched_getaffinity, __NR_sched_getparam,
    __NR_sched_getscheduler, __NR_sched_get_priority_max, __NR_sched_get_priority_min,
    __NR_sched_rr_get_interval, __NR_getpriority,
    449 /* futex_waitv */, 454 /* futex_wake */, 455 /* futex_wait */, 456 /* futex_requeue */,
    434 /* pidfd_open */, 424 /* pidfd_send_signal */,
    // Identity: reading it, and changes that need capabilities a snippet lacks.
    __NR_getpid, __NR_getppid, __NR_gettid, __NR_getuid, __NR_geteuid, __NR_getgid,
    __NR_getegid, __NR_getresuid, __NR_getresgid, __NR_getgroups, __NR_setuid, __NR_setgid,
    __NR_setreuid, __NR_setregid, __NR_setresuid, __NR_setresgid, __NR_setgroups, __NR_getpgid,
    __NR_setpgid, __NR_getsid, __NR_setsid, __NR_capget, __NR_capset, __NR_getrlimit,
    __NR_setrlimit, __NR_getrusage, __NR_sysinfo, __NR_uname, __NR_getcpu, __NR_getrandom,
    // Local sockets; which families there are is decided where they are made.
    __NR_bind, __NR_listen, __NR_accept, __NR_accept4, __NR_connect,
    __NR_getsockname, __NR_getpeername, __NR_shutdown,
    __NR_sendto, __NR_recvfrom, __NR_sendmsg, __NR_recvmsg, __NR_sendmmsg, __NR_recvmmsg,
#if defined(__x86_64__)
    // Older forms that newer architectures never had.
    __NR_creat, __NR_stat, __NR_lstat, __NR_access, __NR_readlink, __NR_getdents,
    __NR_rename, __NR_mkdir, __NR_rmdir, __NR_unlink, __NR_link, __NR_symlink, __NR_chmod,
    __NR_chown, __NR_lchown, __NR_utime, __NR_utimes, __NR_futimesat, __NR_dup2, __NR_pipe,
    __NR_mknod, __NR_poll, __NR_select, __NR_epoll_create, __NR_epoll_wait, __NR_eventfd,
    __NR_pause, __NR_time, __NR_alarm, __NR_signalfd, __NR_fork, __NR_vfork, __NR_arch_prctl,
    __NR_getpgrp,
#endif
});

constexpr auto kForbidden = std::to_array<std::uint32_t>({
    // Other processes' memory and descriptors.
    __NR_ptrace, __NR_process_vm_readv, __NR_process_vm_writev, __NR_kcmp,
    440 /* process_madvise */, 438 /* pidfd_getfd */,
    // Namespaces and mounts.
    __NR_unshare, __NR_setns, __NR_mount, __NR_umount2, __NR_pivot_root, __NR_chroot,
    429 /* move_mount */, 428 /* open_tree */, 430 /* fsopen */, 431 /* fsconfig */,
    432 /* fsmount */, 433 /* fspick */, 442 /* mount_setattr */,
    // Kernel surface with a history.
    __NR_bpf, __NR_perf_event_open, __NR_keyctl, __NR_add_key, __NR_request_key,
    __NR_userfaultfd, __NR_init_module, __NR_finit_module, __NR_delete_module, __NR_kexec_load,
    __NR_kexec_file_load, __NR_reboot, __NR_swapon, __NR_swapoff, __NR_quotactl, __NR_acct,
    __NR_settimeofday, __NR_clock_settime, __NR_adjtimex, __NR_clock_adjtime, __NR_personality,
    __NR_syslog, __NR_vhangup, __NR_open_by_handle_at, __NR_name_to_handle_at,
    __NR_fanotify_init, __NR_fanotify_mark, __NR_sethostname, __NR_setdomainname, __NR_seccomp,
    425 /* io_uring_setup */, 426 /* io_uring_enter */, 427 /* io_uring_register */,
    // Memory no limit of ours counts.
    __NR_memfd_create, __NR_vmsplice, __NR_mlock, __NR_mlock2, __NR_mlockall,
    447 /* memfd_secret */,
    // System V and POSIX message IPC, asynchronous I/O, scheduling policy.
    __NR_shmget, __NR_shmat, __NR_shmctl, __NR_shmdt, __NR_semget, __NR_semop, __NR_semctl,
    __NR_semtimedop, __NR_msgget, __NR_msgsnd, __NR_msgrcv, __NR_msgctl, __NR_mq_open,
    __NR_mq_unlink, __NR_mq_timedsend, __NR_mq_timedreceive, __NR_mq_notify, __NR_mq_getsetattr,
    __NR_io_setup, __NR_io_submit, __NR_io_destroy, __NR_io_getevents, __NR_ioprio_set,
    __NR_migrate_pages, __NR_move_pages, __NR_mbind, __NR_set_mempolicy, __NR_sched_setattr,
    __NR_sched_setscheduler, __NR_sched_setparam,
    // What one snippet could see of another that has the same read-only files open, and attributes
    // that would outlive a snippet.
    __NR_flock, __NR_inotify_init1, __NR_inotify_add_watch, __NR_inotify_rm_watch,
    __NR_setxattr, __NR_lsetxattr, __NR_fsetxattr, __NR_removexattr, __NR_lremovexattr,
    __NR_fremovexattr, 463 /* setxattrat */, 466 /* removexattrat */,
    __NR_mincore,  // shows a file's owner what of it is cached
#if defined(__x86_64__)
    // Older forms that newer architectures never had.
    __NR_iopl, __NR_ioperm, __NR_modify_ldt, __NR_inotify_init,
#endif
});

// clang-format on

}  // namespace

std::span<const std::uint32_t> allowed_syscalls() { return kAllowed; }

std::span<const std::uint32_t> forbidden_syscalls() { return kForbidden; }

}  // namespace thor
