//! The notify socket: what a worker's process sends to `NOTIFY_SOCKET`, in the form of `sd_notify(3)`.
//!
//! A datagram is lines of `NAME=VALUE`. Whatever else is in it is passed over, for programs send it to systemd as well.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

/// A line that means something to the master.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notification {
    /// `READY=1`.
    Ready,
    /// `EXTEND_TIMEOUT_USEC=`, microseconds.
    Extend(Duration),
    /// `STATUS=`, as it came: it may hold control characters.
    Status(String),
    /// `WATCHDOG=1`.
    Alive,
    /// `WATCHDOG=trigger`.
    Stuck,
}

/// Reads a datagram; what is no UTF-8 in it becomes U+FFFD.
#[must_use]
pub fn decode(datagram: &[u8]) -> Vec<Notification> {
    String::from_utf8_lossy(datagram).lines().filter_map(line).collect()
}

fn line(line: &str) -> Option<Notification> {
    match line.split_once('=')? {
        ("READY", "1") => Some(Notification::Ready),
        ("EXTEND_TIMEOUT_USEC", by) => {
            by.parse().ok().map(|by| Notification::Extend(Duration::from_micros(by)))
        }
        ("STATUS", text) => Some(Notification::Status(text.to_owned())),
        ("WATCHDOG", "1") => Some(Notification::Alive),
        ("WATCHDOG", "trigger") => Some(Notification::Stuck),
        // STOPPING= and MAINPID= change nothing.
        _ => None,
    }
}
