//! The kernel's own list of sockets (`NETLINK_SOCK_DIAG`), read by hand: two fixed structures of 72 bytes.
//!
//! A dump shows a reuseport group in the order of `listen()`, or `bind()` for UDP (IPv6), or in its reverse (IPv4);
//! [`listen_order`] hides the difference.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

/// Bits for [`Query::states`].
pub mod states {
    /// Established.
    pub const ESTABLISHED: u32 = 1 << 1;
    /// Half-open handshakes: SYN seen, answered, not confirmed.
    pub const SYN_RECV: u32 = 1 << 3;
    /// We closed first and wait for the other side.
    pub const FIN_WAIT1: u32 = 1 << 4;
    /// Our close is confirmed, theirs isn't.
    pub const FIN_WAIT2: u32 = 1 << 5;
    /// Closed on both sides; the kernel waits for stragglers.
    pub const TIME_WAIT: u32 = 1 << 6;
    /// Not bound to a connection (UDP sockets that aren't connected).
    pub const CLOSE: u32 = 1 << 7;
    /// The other side has closed, we haven't.
    pub const CLOSE_WAIT: u32 = 1 << 8;
    /// Both have closed, the last confirmation is out.
    pub const LAST_ACK: u32 = 1 << 9;
    /// Listeners.
    pub const LISTEN: u32 = 1 << 10;
    /// Both closed at once.
    pub const CLOSING: u32 = 1 << 11;
}

/// Which addresses a query covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 sockets.
    V4,
    /// IPv6 sockets, dual-stack ones and their IPv4 connections included.
    V6,
    /// Both, IPv4 first.
    Both,
}

/// Which protocol a query covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

/// What to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Protocol.
    pub protocol: Protocol,
    /// Address families.
    pub family: Family,
    /// Only sockets with this local port.
    pub port: Option<u16>,
    /// Only sockets in these [`states`].
    pub states: u32,
}

/// One socket as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// One bit of [`states`].
    pub state: u32,
    /// Local address.
    pub local: SocketAddr,
    /// Remote address; unspecified with port 0 for listeners.
    pub remote: SocketAddr,
    /// Inode; 0 for half-open handshakes and for sockets nobody holds any more.
    pub inode: u32,
    /// The kernel's name for the socket, never reused.
    pub cookie: u64,
    /// User the socket belongs to.
    pub uid: u32,
    /// Listener: depth of the accept queue. Otherwise bytes to be read.
    pub recv_queue: u32,
    /// Listener: backlog. Otherwise bytes not yet confirmed.
    pub send_queue: u32,
    /// Packets or connections this socket had to drop.
    pub drops: Option<u32>,
    /// IPv6 listeners: whether they refuse IPv4.
    pub v6only: Option<bool>,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
const MESSAGE_BYTES: usize = 72;
const ATTRIBUTE_SKMEMINFO: u16 = 7;
const ATTRIBUTE_SKV6ONLY: u16 = 11;
/// Index of the drop counter in the SKMEMINFO array of u32.
const SKMEMINFO_DROPS: usize = 8;

/// Lists sockets in the kernel's dump order.
///
/// # Errors
/// `Interrupted` when the list changed so much during the dump that entries may be missing or double: ask again.
/// Else what the kernel says.
pub fn dump(query: &Query) -> io::Result<Vec<Socket>> {
    Lister::open()?.dump(query)
}

/// The kernel's ear for queries. Kept open it needs no further descriptor for the next one.
#[derive(Debug)]
pub struct Lister {
    netlink: OwnedFd,
}

impl Lister {
    /// Lists the sockets of the network namespace this thread is in now.
    ///
    /// # Errors
    /// EMFILE or ENFILE.
    pub fn open() -> io::Result<Lister> {
        let protocol = Some(netlink::SOCK_DIAG);
        let netlink = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        Ok(Lister { netlink })
    }

    /// Lists sockets in the kernel's dump order.
    ///
    /// # Errors
    /// As of [`dump`]. What is left unread then would be taken for the next answer: open another.
    pub fn dump(&self, query: &Query) -> io::Result<Vec<Socket>> {
        let families: &[u8] = match query.family {
            Family::V4 => &[AF_INET],
            Family::V6 => &[AF_INET6],
            Family::Both => &[AF_INET, AF_INET6],
        };
        let mut sockets = Vec::new();
        let mut buffer = vec![0_u8; 64 * 1024];
        for &family in families {
            rustix::net::send(&self.netlink, &request(query, family), SendFlags::empty())?;
            loop {
                let (_, length) = rustix::net::recv(&self.netlink, buffer.as_mut_slice(), RecvFlags::TRUNC)?;
                let reply =
                    buffer.get(..length).ok_or_else(|| malformed("a reply longer than the buffer"))?;
                if parse(reply, &mut sockets)? == Parsed::Done {
                    break;
                }
            }
        }
        // The kernel filters by port too, but not in every dump of every version: what was asked for is what is returned.
        sockets.retain(|socket| query.port.is_none_or(|port| socket.local.port() == port));
        Ok(sockets)
    }
}

/// Sorts a dump so that each reuseport group is in the order in which its sockets came: by `listen()`, of UDP by `bind()`.
/// IPv4 groups come first.
#[must_use]
pub fn listen_order(sockets: Vec<Socket>) -> Vec<Socket> {
    let (mut v4, v6): (Vec<Socket>, Vec<Socket>) =
        sockets.into_iter().partition(|socket| socket.local.is_ipv4());
    v4.reverse();
    v4.extend(v6);
    v4
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `nlmsghdr` and `inet_diag_req_v2`.
fn request(query: &Query, family: u8) -> [u8; MESSAGE_BYTES] {
    let mut bytes = [0; MESSAGE_BYTES];
    bytes[0..4].copy_from_slice(&72_u32.to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[16] = family;
    bytes[17] = query.protocol as u8;
    bytes[18] = 1 << (ATTRIBUTE_SKMEMINFO - 1);
    bytes[20..24].copy_from_slice(&query.states.to_ne_bytes());
    bytes[24..26].copy_from_slice(&query.port.unwrap_or(0).to_be_bytes());
    // No cookie: all ones means "any".
    bytes[64..72].fill(0xff);
    bytes
}

/// Whether more replies follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Receive again.
    More,
    /// The dump is complete.
    Done,
}

/// Reads one received buffer and appends the sockets in it.
///
/// # Errors
/// `InvalidData` for a reply that contradicts itself, `Interrupted` for an inconsistent dump, else the kernel's
/// own error.
pub fn parse(mut reply: &[u8], sockets: &mut Vec<Socket>) -> io::Result<Parsed> {
    while !reply.is_empty() {
        let length = word(reply, 0)? as usize;
        let message = reply.get(..length).filter(|_| length >= HEADER_BYTES);
        let message = message.ok_or_else(|| malformed("a message of an impossible length"))?;
        if half(message, 6)? & NLM_F_DUMP_INTR != 0 {
            return Err(io::Error::new(
                io::ErrorKind::Interrupted,
                "the list of sockets changed during the dump",
            ));
        }
        let body = &message[HEADER_BYTES..];
        match half(message, 4)? {
            NLMSG_DONE => {
                // The dump's own result rides on the end marker.
                return match word(body, 0).map(u32::cast_signed) {
                    Ok(errno) if errno < 0 => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
                    _ => Ok(Parsed::Done),
                };
            }
            NLMSG_ERROR => {
                return Err(io::Error::from_raw_os_error(word(body, 0)?.cast_signed().saturating_neg()));
            }
            SOCK_DIAG_BY_FAMILY => sockets.push(parse_socket(body)?),
            _ => {}
        }
        // Messages start at multiples of four bytes.
        reply = reply.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(Parsed::More)
}

/// `inet_diag_msg` and its attributes.
fn parse_socket(body: &[u8]) -> io::Result<Socket> {
    if body.len() < MESSAGE_BYTES {
        return Err(malformed("a socket that is cut short"));
    }
    let address = |at: usize, port: usize| -> io::Result<SocketAddr> {
        let octets: [u8; 16] =
            body[at..at + 16].try_into().map_err(|_| malformed("an address that is cut short"))?;
        let ip = match body[0] {
            AF_INET => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
            AF_INET6 => IpAddr::V6(Ipv6Addr::from(octets)),
            _ => return Err(malformed("a socket of a family that was not asked for")),
        };
        Ok(SocketAddr::new(ip, u16::from_be_bytes([body[port], body[port + 1]])))
    };
    let mut socket = Socket {
        state: 1_u32.checked_shl(u32::from(body[1])).unwrap_or(0),
        local: address(8, 4)?,
        remote: address(24, 6)?,
        cookie: u64::from(word(body, 44)?) | u64::from(word(body, 48)?) << 32,
        recv_queue: word(body, 56)?,
        send_queue: word(body, 60)?,
        uid: word(body, 64)?,
        inode: word(body, 68)?,
        drops: None,
        v6only: None,
    };
    let mut rest = &body[MESSAGE_BYTES..];
    while rest.len() >= 4 {
        let length = usize::from(half(rest, 0)?);
        let value = rest.get(4..length).ok_or_else(|| malformed("an attribute of an impossible length"))?;
        match half(rest, 2)? {
            ATTRIBUTE_SKMEMINFO => socket.drops = word(value, SKMEMINFO_DROPS * 4).ok(),
            ATTRIBUTE_SKV6ONLY => socket.v6only = value.first().map(|&flag| flag != 0),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(socket)
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    word.map(|word| u32::from_ne_bytes(*word)).ok_or_else(|| malformed("a field that is cut short"))
}

fn half(bytes: &[u8], at: usize) -> io::Result<u16> {
    let half = bytes.get(at..).and_then(|rest| rest.first_chunk::<2>());
    half.map(|half| u16::from_ne_bytes(*half)).ok_or_else(|| malformed("a field that is cut short"))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("sock_diag sent {what}"))
}

#[cfg(test)]
mod tests;
