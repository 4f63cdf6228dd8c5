//! One worker as the judge sees it.

use reuseportd_core::{Generation, Seat};

/// One worker as the orders and answers show it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Life {
    pub(crate) generation: Generation,
    pub(crate) seat: Seat,
    /// What `Spawn` was answered with.
    pub(crate) answered: Option<bool>,
    pub(crate) spawned: u64,
    pub(crate) ready: bool,
    pub(crate) ready_since: u64,
    /// Requests answered in a row, and when the last was answered.
    pub(crate) passes: u16,
    pub(crate) asked: Option<u64>,
    /// Told to stop, first.
    pub(crate) stopped: Option<u64>,
    pub(crate) replaced: bool,
    /// Its way out began.
    pub(crate) retired: Option<u64>,
    /// Its seat is no more, or somebody else's.
    pub(crate) given_up: bool,
    pub(crate) killed: bool,
    pub(crate) exited: Option<u64>,
    pub(crate) reaped: bool,
}

impl Life {
    pub(crate) fn new(generation: Generation, seat: Seat, now: u64) -> Life {
        Life {
            generation,
            seat,
            answered: None,
            spawned: now,
            ready: false,
            ready_since: now,
            passes: 0,
            asked: None,
            stopped: None,
            replaced: false,
            retired: None,
            given_up: false,
            killed: false,
            exited: None,
            reaped: false,
        }
    }
}
