//! In which order the kernel lists a group: under `cbpf` the slots of unmodified workers are read from it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use reuseportd_sys::diag::{Family, Protocol, Query, dump, listen_order as in_listen_order, states};
use reuseportd_sys::socket;

use super::Trouble;
use super::scratch::{bound_group, listen};

/// Listens in an order that is neither that of binding nor its reverse, and compares.
pub(super) fn listen_order() -> Result<(), Trouble> {
    try_family(Ipv4Addr::LOCALHOST.into())?;
    match bound_group(Ipv6Addr::LOCALHOST.into(), 1) {
        Ok(_) => try_family(Ipv6Addr::LOCALHOST.into()),
        // IPv6 is switched off: nobody will listen on it.
        Err(_) => Ok(()),
    }
}

fn try_family(ip: IpAddr) -> Result<(), Trouble> {
    let listeners = bound_group(ip, 4)?;
    let mut wanted = Vec::new();
    for index in [2, 0, 3, 1] {
        listen(&listeners[index])?;
        wanted.push(socket::cookie(listeners[index].as_fd())?);
    }
    let port = Some(listeners[0].local_addr()?.port());
    let query = Query { protocol: Protocol::Tcp, family: Family::Both, port, states: states::LISTEN };
    let listed = in_listen_order(dump(&query)?).into_iter().filter(|one| one.local.ip() == ip);
    let listed: Vec<u64> = listed.map(|one| one.cookie).collect();
    if listed == wanted {
        return Ok(());
    }
    let place = |cookie: &u64| wanted.iter().position(|one| one == cookie);
    let places: Vec<_> = listed.iter().map(place).collect();
    Err(Trouble::Failed(format!("a group of 4 on {ip} is listed in the order {places:?}")))
}
