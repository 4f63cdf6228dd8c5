//! The `ebpf` engine's own program on scratch sockets.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::fd::AsFd;

use reuseportd_sys::bpf::{BpfError, EbpfGroup, Plan, Range};
use reuseportd_sys::capability;

use super::scratch::{Waiter, connect, expect_all_at, group, readable};
use super::{AGAIN, ALLOW_BPF, Trouble, is_out_of_descriptors};

impl From<BpfError> for Trouble {
    fn from(error: BpfError) -> Self {
        let errno = error.errno().map(std::io::Error::from_raw_os_error);
        match errno {
            Some(errno) if is_out_of_descriptors(&errno) => errno.into(),
            // With CAP_BPF: it is not the kernel's program that fails, but the call that is kept from it.
            Some(errno) if errno.kind() == ErrorKind::PermissionDenied => {
                Trouble::untested(error.to_string(), ALLOW_BPF)
            }
            _ => Trouble::Failed(error.to_string()),
        }
    }
}

/// Where the plan points.
fn point_at(steer: &EbpfGroup, key: u32) -> Result<(), Trouble> {
    let range = Range { weight_below: 0, base: key, count: 1, counter: 0, step: 0 };
    // Plan records 0 and 1: the one for the other key may be in force.
    steer.write_plan(key, &Plan { ranges: vec![range] })?;
    Ok(steer.select(key)?)
}

fn steered(listener: &TcpListener) -> Result<EbpfGroup, Trouble> {
    if !capability::has_bpf() {
        return Err(Trouble::untested("CAP_BPF is missing", "reuseportd doctor   # again, with CAP_BPF"));
    }
    let steer = EbpfGroup::new(2, None)?;
    steer.admit(0, listener.as_fd())?;
    point_at(&steer, 0)?;
    steer.attach(listener.as_fd())?;
    Ok(steer)
}

/// Only what was admitted is chosen, and one write changes which.
pub(super) fn steering() -> Result<(), Trouble> {
    let listeners = group(3)?;
    let steer = steered(&listeners[1])?;
    expect_all_at(1, &listeners)?;
    steer.admit(1, listeners[2].as_fd())?;
    expect_all_at(1, &listeners)?;
    point_at(&steer, 1)?;
    expect_all_at(2, &listeners)
}

/// A queued connection whose listener closes goes where the program says; true if that woke who waits there.
pub(super) fn migration() -> Result<bool, Trouble> {
    let mut listeners = group(2)?;
    let steer = steered(&listeners[0])?;
    steer.admit(1, listeners[1].as_fd())?;
    let client = connect(&listeners)?;
    if readable(&listeners)? != Some(0) {
        return Err(Trouble::Failed("the connection came to the wrong listener".to_owned()));
    }
    let waiter = Waiter::at(&listeners[1..])?;
    point_at(&steer, 1)?;
    drop(listeners.remove(0));
    let is_woken = waiter.woken()?.is_some();
    match listeners[0].accept() {
        Ok((_, peer)) if peer == client.local_addr()? => Ok(is_woken),
        Ok(_) => Err(Trouble::untested("somebody else connected to the scratch port", AGAIN)),
        Err(error) => {
            Err(Trouble::Failed(format!("the queue of a closing listener did not move (accept: {error})")))
        }
    }
}
