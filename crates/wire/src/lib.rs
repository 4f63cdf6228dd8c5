//! The words reuseportd, its workers and its clients exchange.
//!
//! This crate holds text and nothing else: it opens no descriptor, does no I/O, reads no clock and
//! decides nothing. It turns values into bytes and bytes into values, states the limits of both, and
//! never panics on what a peer sends.
//!
//! * [`channel`]: master and worker, over the inherited handover channel.
//! * [`control`]: client and master, over the control socket.
//! * [`status`]: what `status --json` and the receipt of an upgrade say.
//! * [`notify`]: worker to master, over the notify socket.
//! * [`mod@env`]: the environment a worker is started with.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod channel;
pub mod control;
pub mod env;
pub mod notify;
pub mod status;

/// Longest name of an application or a listener, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Whether `name` may name an application or a listener: `[a-z0-9_-]`, 1 to [`NAME_BYTES_MAX`] bytes.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests;
