//! What the difficult worker does with datagrams.

use std::collections::BTreeSet;
use std::env;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::process;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::Duration;

use reuseportd_wire::env as variables;
use socket2::{Domain, Socket, Type};

use super::{Options, STUCK, log, never, until, work};

const DATAGRAM_BYTES_MAX: usize = 65_535;

/// Clients that have a connected socket of their own.
#[derive(Debug, Default)]
pub(crate) struct Clients(Mutex<BTreeSet<SocketAddr>>);

/// Returns, and so closes the socket with whatever waits in it, when `stopped` can be read.
pub(crate) fn receive_until<'scope>(
    options: &'scope Options,
    socket: UdpSocket,
    stopped: Option<&OwnedFd>,
    clients: &'scope Clients,
    threads: &'scope Scope<'scope, '_>,
) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut is_open = true;
    let receive = || match socket.recv_from(&mut buffer) {
        Ok((length, peer)) => {
            is_open = clients.serve(options, &socket, &buffer[..length], peer, threads);
            if is_open { Ok(()) } else { Err(ErrorKind::BrokenPipe.into()) }
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(error),
    };
    let ended = until(&socket, stopped, receive);
    if !is_open {
        drop(socket);
        never();
    }
    ended
}

impl Clients {
    /// `false` if the socket is to be closed.
    pub(crate) fn serve<'scope>(
        &'scope self,
        options: &'scope Options,
        socket: &UdpSocket,
        datagram: &[u8],
        peer: SocketAddr,
        threads: &'scope Scope<'scope, '_>,
    ) -> bool {
        if datagram == b"close" {
            return false;
        }
        answer(options, socket, datagram, peer);
        if let Some(silence) = options.connect
            && self.lock().insert(peer)
        {
            match connected(socket, peer, silence) {
                Ok(socket) => drop(threads.spawn(move || self.serve_one(options, &socket, peer))),
                Err(error) => log(options, &peer.to_string(), &format!("no socket of its own: {error}")),
            }
        }
        true
    }

    /// Until it is silent. What came in before the socket was connected may be of others.
    fn serve_one(&self, options: &Options, socket: &UdpSocket, peer: SocketAddr) {
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            answer(options, socket, &buffer[..length], from);
        }
        self.lock().remove(&peer);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<SocketAddr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket on the same address that receives from this client only.
fn connected(socket: &UdpSocket, peer: SocketAddr, silence: u64) -> io::Result<UdpSocket> {
    let own = Socket::new(Domain::for_address(peer), Type::DGRAM, None)?;
    own.set_reuse_port(true)?;
    own.bind(&socket.local_addr()?.into())?;
    own.connect(&peer.into())?;
    own.set_read_timeout(Some(Duration::from_millis(silence)))?;
    Ok(own.into())
}

/// Logs a datagram, does what it demands, and answers it.
fn answer(options: &Options, socket: &UdpSocket, datagram: &[u8], peer: SocketAddr) {
    log(options, &peer.to_string(), &String::from_utf8_lossy(datagram));
    match datagram {
        b"crash" => process::exit(options.code),
        b"stuck" => never(),
        _ if STUCK.load(Ordering::Relaxed) => never(),
        _ => work(options.receive_delay),
    }
    let variable = |name| env::var(name).unwrap_or_else(|_| "0".to_owned());
    let (generation, seat) = (variable(variables::GENERATION), variable(variables::SEAT));
    let who = format!("{generation} {seat} {} ", process::id());
    // A client that is gone, or more answers than the network takes, is no error of this program.
    let _ = socket.send_to(&[who.as_bytes(), datagram].concat(), peer);
}
