//! The shipped unit, run by the systemd of Debian 12 and by that of Debian 13.

mod activation;
mod crash;
mod hardening;
mod reload;
mod start;
mod stop;
mod trial;
mod unit;
mod watchdog;

/// The same tests with each systemd.
macro_rules! with_each_systemd {
    ($($test:ident),* $(,)?) => {
        mod v252 {
            $(#[test] fn $test() { super::$test(crate::support::machine::Systemd::V252); })*
        }
        mod v257 {
            $(#[test] fn $test() { super::$test(crate::support::machine::Systemd::V257); })*
        }
    };
}
use with_each_systemd;
