//! The `cbpf` engine on scratch sockets.

use std::os::fd::AsFd;

use reuseportd_sys::cbpf::{Pick, Share, attach_slots};

use super::Trouble;
use super::scratch::{expect_all_at, group};

/// A program naming a slot chooses it. Attached once: replacing one is unsafe on some kernels.
pub(super) fn slot() -> Result<(), Trouble> {
    let listeners = group(3)?;
    attach_slots(listeners[0].as_fd(), &[Share { weight_below: 0, slots: vec![1], pick: Pick::Hash }])
        .map_err(|error| Trouble::Failed(format!("cannot attach a classic program: {error}")))?;
    expect_all_at(1, &listeners)
}
