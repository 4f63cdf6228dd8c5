//! The keeper: a tiny child of the master that holds descriptors by name, and the latest snapshot of the master's
//! state, so that both outlive a master that is killed. It decides nothing; the next master asks it for everything.
//!
//! Messages are datagrams of a `SOCK_SEQPACKET` socket: text, words with one space between, the verb first;
//! descriptors come along by `SCM_RIGHTS`, one for each name, [`FDS_MAX`](reuseportd_sys::socket::FDS_MAX) at most.
//! A keeper may be older or newer than its master: words behind those one knows are ignored, and a verb one does not
//! know is answered by `unknown VERB`.
//!
//! | to the keeper | | answered by |
//! |---|---|---|
//! | `hold NAME...` + descriptors | holds them; what was held under a name is closed | |
//! | `drop NAME...` | closes them | |
//! | `release NAME` | closes it, and says so when it is done | `released NAME` |
//! | `state` + memfd | the latest snapshot, in place of the one before | |
//! | `leave` | ends | |
//! | `fetch` | first word of the next master, on a connection of its own | see below |
//!
//! It says `ready` when it has begun. What it can't do it answers by `failed VERB TEXT...`, and goes on.
//!
//! `fetch` is answered by `busy` as long as the former master has its channel; its turn comes when that is gone. Then
//! by `state 1` (the version of this answer) with the memfd, if there is one; `held NAME...` with descriptors until all
//! are told; `end`. The connection is the keeper's channel from then on. Only root and the keeper's own user are
//! answered.
//!
//! Without a master the keeper stays as long as one of the processes behind its `pidfd/...` lives, and sees to it that
//! none of its `log/...` runs full, for a worker that can't print stops: what was printed last is kept.

mod client;
mod fetch;
mod process;
mod words;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub(crate) use self::client::{Keeper, SavedKeeper};
pub(crate) use self::fetch::{FetchError, Inheritance, fetch};
pub(crate) use self::process::run;

/// Number of the channel to the master in the keeper.
const CHANNEL_NUMBER: i32 = 3;
/// Number of the socket in the keeper on which the next master knocks.
const LISTENER_NUMBER: i32 = 4;
/// Its first word.
const READY: &str = "ready";
/// Connections that may wait for the keeper.
const BACKLOG: i32 = 16;
/// Names of processes: the keeper stays for them.
const PIDFD_PREFIX: &str = "pidfd/";
/// Names of pipes that are not to run full while there is no master.
const LOG_PREFIX: &str = "log/";
/// The version of the answer to `fetch`.
const VERSION: &str = "1";

/// Waits until a descriptor has one of these events, or its other end is closed; `false` when the time has passed.
fn wait_for(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result? > 0),
        }
    }
}
