//! Sleeping until something is to be done.

use crate::Error;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use rustix::io::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

/// The most that are told at once.
pub(crate) const EVENTS_PER_TURN: usize = 512;

/// Sleeps until a socket is ready or it is `until`, and tells which are ready; `true` if `stop` can be read.
///
/// By ppoll(2) on the epoll, because epoll_wait(2) rounds to milliseconds: too coarse for thousands of arrivals.
pub(crate) fn wait(
    epoll: &OwnedFd,
    stop: Option<BorrowedFd<'_>>,
    until: Option<Instant>,
    events: &mut Vec<epoll::Event>,
) -> Result<bool, Error> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    let mut sources = vec![PollFd::new(epoll, PollFlags::IN)];
    sources.extend(stop.map(|stop| PollFd::from_borrowed_fd(stop, PollFlags::IN)));
    match rustix::event::poll(&mut sources, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(Error::generator("poll", errno)),
    }
    match epoll::wait(epoll, spare_capacity(events), Some(&Timespec::default())) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(Error::generator("epoll_wait", errno)),
    }
    Ok(sources.get(1).is_some_and(|stop| !stop.revents().is_empty()))
}
