//! Sockets that the service manager passes to the master: the LISTEN_FDS protocol, from its other side.

use std::os::fd::OwnedFd;

use reuseportd_sys::image;
use reuseportd_wire::env;

use super::seats::FIRST_NUMBER;

/// One socket.
#[derive(Debug)]
pub(super) struct Passed {
    /// As the service manager calls it; empty if it has no name.
    pub(super) name: String,
    pub(super) socket: OwnedFd,
}

/// More is no number of sockets.
const PASSED_MAX: i32 = 4096;

/// Takes what was passed to this process, close-on-exec from now on; to be asked once, before a re-exec: what is in the
/// environment means nothing later.
pub(super) fn passed() -> Vec<Passed> {
    let variable = |name: &str| std::env::var(name).ok();
    let number = |name: &str| variable(name)?.parse::<i32>().ok();
    let Some(count) = number(env::LISTEN_FDS).filter(|count| (1..=PASSED_MAX).contains(count)) else {
        return Vec::new();
    };
    if number(env::LISTEN_PID) != i32::try_from(std::process::id()).ok() {
        return Vec::new();
    }
    let names = variable(env::LISTEN_FDNAMES).unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let taken = (FIRST_NUMBER..FIRST_NUMBER + count).zip(names).filter_map(|(number, name)| {
        let socket = image::take_carried(number);
        let socket =
            socket.inspect_err(|error| eprintln!("socket {number} ({name}) was not passed: {error}"));
        Some(Passed { name, socket: socket.ok()? })
    });
    taken.collect()
}
