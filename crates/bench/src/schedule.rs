//! What is due when, decided ahead of time so that a slow server can't slow the arrivals down.

use crate::fate::Kind;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// Something that becomes due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Due {
    /// The next connection of the steady stream.
    New,
    /// The next burst.
    Burst,
    /// A client of this kind comes (again).
    Client(Kind),
    /// A connection wants to act, or has waited long enough.
    Connection { slot: usize, number: u64 },
    /// No more arrivals.
    End,
}

/// A queue ordered by time.
#[derive(Debug, Default)]
pub(crate) struct Agenda(BinaryHeap<Reverse<(Instant, Due)>>);

impl Agenda {
    pub(crate) fn add(&mut self, at: Instant, due: Due) {
        self.0.push(Reverse((at, due)));
    }

    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<(Instant, Due)> {
        self.next_at().filter(|at| *at <= now)?;
        self.0.pop().map(|Reverse(entry)| entry)
    }
}

/// Repeatable random numbers (splitmix64).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Uniform in 0 (included) to 1 (excluded).
    pub(crate) fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform between the two.
    pub(crate) fn between(&mut self, (least, most): (Duration, Duration)) -> Duration {
        least + (most - least).mul_f64(self.unit())
    }

    /// The gap to the next arrival of a Poisson process.
    pub(crate) fn exponential(&mut self, per_second: f64) -> Duration {
        Duration::from_secs_f64(-(1.0 - self.unit()).ln() / per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agenda_gives_what_is_due_in_order_of_time() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut agenda = Agenda::default();
        agenda.add(at(2), Due::Burst);
        agenda.add(at(1), Due::New);
        agenda.add(at(9), Due::End);
        assert_eq!(agenda.pop_due(at(5)), Some((at(1), Due::New)));
        assert_eq!(agenda.pop_due(at(5)), Some((at(2), Due::Burst)));
        assert_eq!(agenda.pop_due(at(5)), None);
        assert_eq!(agenda.next_at(), Some(at(9)));
    }

    #[test]
    fn exponential_gaps_have_the_wanted_mean() {
        let mut random = Random::new(7);
        let total: Duration = (0..20_000).map(|_| random.exponential(1000.0)).sum();
        assert!((19.0..21.0).contains(&total.as_secs_f64()), "{total:?}");
    }
}
