//! Waiting for notifications of the kernel, on a thread of their own.

use std::{os::fd::AsFd, time::Duration};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;

/// How long the thread waits at most before it sees that nobody listens any more.
const LOOK: Duration = Duration::from_secs(5);

/// Something whose descriptor becomes readable when something happened.
pub trait Notifier: AsFd + Send + 'static {
    /// Takes what is there, without waiting. False where the descriptor is of no use any more.
    fn drain(&mut self) -> bool;
}

/// Wakes the receiver after every notification; several at a time count as one. It ends when the descriptor does.
pub fn wake_on(mut notifier: impl Notifier) -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel(1);
    let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::MAX);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let ready = poll(&mut [PollFd::new(notifier.as_fd(), PollFlags::POLLIN)], timeout);
            if !matches!(ready, Ok(1..)) {
                continue;
            }
            let alive = notifier.drain();
            // A full channel wakes all the same.
            let _ = sender.try_send(());
            if !alive {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::BorrowedFd, unix::net::UnixStream},
    };

    use super::*;

    struct Stream(UnixStream);

    impl AsFd for Stream {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    impl Notifier for Stream {
        fn drain(&mut self) -> bool {
            self.0.read(&mut [0; 64]).is_ok_and(|length| length > 0)
        }
    }

    #[test]
    fn wakes_and_ends() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let mut woken = wake_on(Stream(there));
        here.write_all(b"xx").unwrap();
        assert_eq!(woken.blocking_recv(), Some(()));
        drop(here);
        assert_eq!(woken.blocking_recv(), Some(()));
        assert_eq!(woken.blocking_recv(), None);
    }
}
