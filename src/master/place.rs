//! Where listeners really are: which address of the config they serve, and that those of a group are in one place.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use reuseportd_core::GroupId;
use reuseportd_sys::socket;
use reuseportd_wire::status::Protocol;

use super::Shell;
use crate::config::Listen;

/// Whether a listener takes what arrives at a configured address: itself, a dual-stack `[::]` for `0.0.0.0`, or an IPv6
/// socket bound to an IPv4 address, which is how Java does it.
pub(super) fn serves(local: SocketAddr, is_v6only: bool, listen: &Listen) -> bool {
    let is_dual_stack = local.is_ipv6() && local.ip().is_unspecified() && !is_v6only;
    if local == listen.address {
        return is_v6only || !listen.v6only || !is_dual_stack;
    }
    if SocketAddr::new(local.ip().to_canonical(), local.port()) == listen.address {
        return true;
    }
    let is_any_v4 = listen.address.is_ipv4() && listen.address.ip().is_unspecified();
    local.port() == listen.address.port() && is_dual_stack && is_any_v4
}

/// What is wrong with listeners in these places, none of which serves the address.
pub(super) fn elsewhere(places: &[SocketAddr], listen: &Listen) -> String {
    let address = listen.address;
    if places.contains(&address) {
        return format!(
            "its listener on {address} takes IPv4 connections too, which v6only = true forbids: set IPV6_V6ONLY before \
             bind()"
        );
    }
    let mut places: Vec<String> = places.iter().map(SocketAddr::to_string).collect();
    places.sort();
    places.dedup();
    let places = places.join(", ");
    format!("it listens on {places}, not on {address}: make it bind {address}, or change [[listen]] address")
}

/// Where a socket is that a worker hands over; or why it can't be listened on for this address.
pub(super) fn check_bound(fd: BorrowedFd<'_>, listen: &Listen) -> Result<SocketAddr, String> {
    let bound = socket::local_addr(fd).map_err(|error| format!("it is no socket of this kind: {error}"))?;
    let is_v6only = bound.is_ipv6() && rustix::net::sockopt::ipv6_v6only(fd.as_fd()).unwrap_or(false);
    if bound == listen.address && !serves(bound, is_v6only, listen) {
        return Err(elsewhere(&[bound], listen));
    }
    if !serves(bound, is_v6only, listen) {
        return Err(format!("it is bound to {bound}, not to {}", listen.address));
    }
    if !socket::is_reuseport(fd).unwrap_or(false) {
        return Err("it is not set SO_REUSEPORT".to_owned());
    }
    let is_datagram = socket::is_datagram(fd).unwrap_or(false);
    match listen.protocol {
        Protocol::Tcp if is_datagram => return Err("it is a UDP socket, and TCP is configured".to_owned()),
        Protocol::Udp if !is_datagram => return Err("it is a TCP socket, and UDP is configured".to_owned()),
        Protocol::Udp => return Ok(bound),
        Protocol::Tcp => {}
    }
    if socket::is_listening(fd).unwrap_or(true) {
        return Err("it listens already; the master calls listen()".to_owned());
    }
    Ok(bound)
}

impl Shell {
    /// Notes where a listener of a group is; or why it can't be there.
    pub(super) fn note_bound(&mut self, group: GroupId, bound: SocketAddr) -> Result<(), String> {
        let before = self.groups.of(group).and_then(|group| group.bound).filter(|before| *before != bound);
        if let Some(before) = before.filter(|_| self.listeners.is_used(group)) {
            return Err(format!(
                "it is bound to {bound} while {before} is served: the kernel steers only among sockets of one address; \
                 make it bind {before}, or restart the service"
            ));
        }
        self.groups.note_bound(group, bound);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Bind;

    fn is_served(local: &str, is_v6only: bool, address: &str, v6only: bool) -> bool {
        let address = address.parse().unwrap();
        let listen = Listen {
            name: "x".into(),
            protocol: Protocol::Tcp,
            address,
            bind: Bind::Worker,
            v6only,
            backlog: 1,
            force_reuseport: false,
            flows: None,
        };
        serves(local.parse().unwrap(), is_v6only, &listen)
    }

    #[test]
    fn a_dual_stack_listener_serves_the_ipv4_address() {
        assert!(is_served("127.0.0.1:80", false, "127.0.0.1:80", false));
        assert!(is_served("[::]:80", false, "0.0.0.0:80", false));
        assert!(is_served("[::ffff:127.0.0.1]:80", false, "127.0.0.1:80", false));
        assert!(!is_served("[::ffff:127.0.0.2]:80", false, "127.0.0.1:80", false));
        assert!(!is_served("[::]:80", true, "0.0.0.0:80", false));
        assert!(!is_served("[::]:80", false, "127.0.0.1:80", false));
        assert!(!is_served("0.0.0.0:80", false, "[::]:80", false));
        assert!(is_served("[::]:80", true, "[::]:80", true));
        assert!(!is_served("[::]:80", false, "[::]:80", true), "it would take IPv4 as well");
    }
}
