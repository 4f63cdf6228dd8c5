//! When a seat may be filled again.

use crate::id::Time;
use crate::plan::{Breaker, Plan};
use alloc::collections::VecDeque;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// The pause before a seat's next worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    /// How long to wait after a worker that ran for `uptime`: not at all the first time, then longer and longer.
    pub(crate) fn after_exit(&mut self, uptime: Duration, plan: &Plan) -> Duration {
        if uptime >= plan.stable_after {
            self.next = Duration::ZERO;
        }
        let pause = self.next;
        self.next = if pause.is_zero() { plan.backoff } else { (pause * 2).min(plan.backoff_max) };
        pause
    }
}

/// Exits of the last while; enough of them open the breaker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Exits {
    recent: VecDeque<Time>,
}

impl Exits {
    /// Notes an exit and says whether it opens the breaker.
    pub(crate) fn note(&mut self, now: Time, breaker: &Breaker) -> bool {
        self.recent.push_back(now);
        while self.recent.front().is_some_and(|first| now.since(*first) > breaker.window) {
            self.recent.pop_front();
        }
        self.recent.len() >= usize::from(breaker.exits)
    }

    /// Forgets them all.
    pub(crate) fn clear(&mut self) {
        self.recent.clear();
    }
}
