//! Receiving from UDP sockets.

use std::net::{SocketAddr, UdpSocket};

use rustix::io::Errno;

use crate::listener::pause;
use crate::{Error, Watchdog};

/// No datagram is longer, so none is cut.
const DATAGRAM_BYTES_MAX: usize = 65_535;

/// Receives until nothing waits in the socket and says how many datagrams that were. The socket is made non-blocking.
///
/// The socket can be closed then: the master has seen to it that no more come. What waits in a UDP socket
/// when it is closed is lost.
///
/// # Errors
/// Receiving fails for a reason that lies in the socket itself.
pub fn drain_datagrams(socket: &UdpSocket, received: impl FnMut(&[u8], SocketAddr)) -> Result<u32, Error> {
    set_nonblocking(socket)?;
    Receiver::new().receive(socket, u32::MAX, &mut None, received)
}

/// The room for a datagram.
pub(crate) struct Receiver {
    buffer: Vec<u8>,
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self { buffer: vec![0; DATAGRAM_BYTES_MAX] }
    }

    /// Receives what waits in a non-blocking socket, `most` at the most, and says how many datagrams that were.
    pub(crate) fn receive(
        &mut self,
        socket: &UdpSocket,
        most: u32,
        watchdog: &mut Option<Watchdog>,
        mut received: impl FnMut(&[u8], SocketAddr),
    ) -> Result<u32, Error> {
        let mut count = 0;
        while count < most {
            watchdog.as_mut().map(Watchdog::feed).transpose()?;
            let source = match socket.recv_from(&mut self.buffer) {
                Ok((length, peer)) => {
                    count += 1;
                    received(&self.buffer[..length], peer);
                    continue;
                }
                Err(source) => source,
            };
            match Errno::from_io_error(&source) {
                Some(Errno::AGAIN) => break,
                Some(Errno::NOBUFS | Errno::NOMEM) => pause()?,
                // What became of a datagram that this program sent; said once, and no reason to stop receiving.
                Some(
                    Errno::INTR
                    | Errno::CONNREFUSED
                    | Errno::MSGSIZE
                    | Errno::PERM
                    | Errno::ACCESS
                    | Errno::PROTO
                    | Errno::NOPROTOOPT
                    | Errno::NETDOWN
                    | Errno::NETUNREACH
                    | Errno::HOSTDOWN
                    | Errno::HOSTUNREACH
                    | Errno::NONET,
                ) => {}
                _ => return Err(Error::io("receive")(source)),
            }
        }
        Ok(count)
    }
}

pub(crate) fn set_nonblocking(socket: &UdpSocket) -> Result<(), Error> {
    socket.set_nonblocking(true).map_err(Error::io("make a UDP socket non-blocking"))
}
