//! The two clocks: monotonic for decisions, wall for people.

use reuseportd_core::Time;
use rustix::time::{ClockId, clock_gettime};

/// Now, as the core counts time.
pub(super) fn now() -> Time {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Time(seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0)))
}

/// A point of the core's time as RFC 3339, by the wall clock as it is set now.
pub(super) fn wall(time: Time) -> String {
    let ago = i64::try_from(now().since(time).as_millis()).unwrap_or(i64::MAX);
    let then = jiff::Timestamp::now() - jiff::SignedDuration::from_millis(ago);
    then.round(jiff::Unit::Millisecond).unwrap_or(then).to_string()
}
