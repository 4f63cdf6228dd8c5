//! The identities everything else refers to. None of them is a process id or a descriptor: those belong to the shell.

use core::time::Duration;
use serde::{Deserialize, Serialize};

/// A point in time: nanoseconds of CLOCK_MONOTONIC. Always passed in, absolute, so that it survives an exec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time(pub u64);

impl Time {
    /// The point `delay` after this one; the far end of time instead of an overflow.
    #[must_use]
    pub fn after(self, delay: Duration) -> Time {
        Time(self.0.saturating_add(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was; zero if it has not come yet.
    #[must_use]
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);
    };
}

identity! {
    /// 1, 2, 3 … A number is used up by a failed upgrade too, and never comes back.
    Generation(u32)
}
identity! {
    /// One process started by the master. A respawn is a new worker on the same seat.
    WorkerId(u32)
}
identity! {
    /// A numbered place for a worker within a generation, from 0.
    Seat(u16)
}
identity! {
    /// One configured listen address: one SO_REUSEPORT group.
    GroupId(u16)
}
identity! {
    /// One listening socket of one worker in one group.
    ListenerId(u32)
}
identity! {
    /// Workers that are on their way out together.
    RetirementId(u32)
}
identity! {
    /// A control client that waits for an answer.
    Ticket(u32)
}
