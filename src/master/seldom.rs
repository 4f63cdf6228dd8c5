//! Warnings that strangers can cause as often as they like: told seldom enough that they don't fill the log.

use std::time::Duration;

use reuseportd_core::Time;

use super::clock;

/// So many are told within one period, the others are counted.
const TOLD_MAX: u32 = 10;
const PERIOD: Duration = Duration::from_secs(10);

/// One kind of warning.
#[derive(Debug, Default)]
pub(super) struct Seldom {
    /// When the period began; none has yet.
    since: Option<Time>,
    told: u32,
    untold: u64,
}

impl Seldom {
    /// It has happened again. If it is to be told: how often it was not since the last time.
    pub(super) fn again(&mut self) -> Option<u64> {
        self.again_at(clock::now())
    }

    fn again_at(&mut self, now: Time) -> Option<u64> {
        if self.since.is_none_or(|since| now.since(since) >= PERIOD) {
            (self.since, self.told) = (Some(now), 0);
        }
        if self.told == TOLD_MAX {
            self.untold += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_told_is_counted() {
        let mut seldom = Seldom::default();
        let start = Time(1);
        assert!((0..TOLD_MAX).all(|_| seldom.again_at(start) == Some(0)));
        assert!((0..7).all(|_| seldom.again_at(start.after(PERIOD / 2)).is_none()));
        assert_eq!(seldom.again_at(start.after(PERIOD)), Some(7));
        assert_eq!(seldom.again_at(start.after(PERIOD)), Some(0));
    }
}
