//! The few system calls that no crate of ours wraps. The only unsafe code of the project.
#![expect(unsafe_code, reason = "system calls without a safe wrapper in nix or std")]

use std::{
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

/// `SO_NETNS_COOKIE` (include/uapi/asm-generic/socket.h, Linux 5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Whether the process was started without a standard output. Rust's runtime opens /dev/null in place of a missing
/// standard descriptor before `main`, so that writing succeeds and nobody ever reads it; only code that runs before the
/// runtime can tell.
static STDOUT_CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look_at_stdout() {
    // SAFETY: F_GETFD reads a flag of a descriptor number, open or not.
    let answer = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    STDOUT_CLOSED.store(answer == -1, Ordering::Relaxed);
}

/// Run by the C library before `main` (System V ABI, section "Initialization and Termination Functions").
#[used]
// SAFETY: the section holds pointers to functions of this very type, and this one needs nothing of Rust's runtime.
#[unsafe(link_section = ".init_array")]
static LOOK_AT_STDOUT: extern "C" fn() = look_at_stdout;

/// Whether the process was started without a standard output.
pub fn stdout_was_closed() -> bool {
    STDOUT_CLOSED.load(Ordering::Relaxed)
}

/// Borrows a descriptor from a type that only offers its number.
pub fn borrow<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: callers pass the descriptor of a value that they own and keep alive for the borrow.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// The cookie of the network namespace that a socket is in.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> Option<u64> {
    let mut cookie: u64 = 0;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).ok()?;
    // SAFETY: the pointers are to live locals and `length` is the size of the first.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    (answer == 0 && cookie != 0).then_some(cookie)
}

/// `struct __user_cap_header_struct` and `__user_cap_data_struct` (linux/capability.h).
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The calling thread's effective capabilities as a bit mask; all bits where the kernel does not say.
pub fn effective_capabilities() -> u64 {
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = CapHeader { version: VERSION_3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 takes one header and two data structs, which live for the call.
    let answer = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    let [low, high] = data;
    if answer == 0 { u64::from(low.effective) | u64::from(high.effective) << 32 } else { u64::MAX }
}
