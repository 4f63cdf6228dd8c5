//! The loop of a worker that has none of its own.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use crate::datagram::{self, Receiver};
use crate::listener::{self, Accepted, accept, drain_alive, pause, wait};
use crate::{Error, Order, Orders, Watchdog};

/// Datagrams received from one socket before the others, and the master, have their turn.
const DATAGRAMS_PER_TURN: u32 = 16;

/// A worker that accepts connections and receives datagrams.
#[derive(Debug)]
pub struct Serving {
    /// The listeners with their names, in the order they were handed over.
    pub listeners: Vec<(String, TcpListener)>,
    /// The UDP sockets with their names, in the order they were handed over.
    pub datagrams: Vec<(String, UdpSocket)>,
    /// What the master says from now on.
    pub orders: Orders,
}

impl Serving {
    /// Accepts connections and carries out the master's orders, until told to stop: then the queues are
    /// drained, the listeners closed, the master told, and this returns. What remains is to finish the
    /// open connections and exit.
    ///
    /// `serve` is called for each connection with the listener's name, from this thread: hand the
    /// connection to another, or serve it here and let the others wait.
    ///
    /// # Errors
    /// The channel or a listener fails; [`Error::Datagrams`] if there is a UDP socket.
    pub fn accept_each(self, serve: impl FnMut(&str, TcpStream)) -> Result<(), Error> {
        match self.datagrams.first() {
            Some((name, _)) => Err(Error::Datagrams { name: name.clone() }),
            None => self.serve_each(serve, |_, _, _, _| {}),
        }
    }

    /// The same for TCP and UDP: `accepted` is called for each connection, `received` for each datagram, with the
    /// listener's name, the socket to answer on, what was received, and from whom. Told to stop, this also
    /// receives what waits in the UDP sockets, and closes them.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), reuseportd_worker::Error> {
    /// let worker = reuseportd_worker::Worker::from_env("echo=udp:127.0.0.1:8090")?;
    /// let bound = worker.bind()?;
    /// let Some(serving) = worker.ready(bound)? else { return Ok(()) };
    /// serving.serve_each(
    ///     |_name, _connection| {},
    ///     |_name, socket, datagram, peer| {
    ///         let _ = socket.send_to(datagram, peer); // a client that is gone is no error
    ///     },
    /// )
    /// # }
    /// ```
    ///
    /// Answer from the socket given: an answer from another one comes from another address. It is
    /// non-blocking, so that a datagram it has no room for is lost (`WouldBlock`), as it would be on its way.
    ///
    /// # Errors
    /// The channel, a listener or a UDP socket fails.
    pub fn serve_each(
        self,
        mut accepted: impl FnMut(&str, TcpStream),
        mut received: impl FnMut(&str, &UdpSocket, &[u8], SocketAddr),
    ) -> Result<(), Error> {
        let Self { mut listeners, datagrams, mut orders } = self;
        let (mut watchdog, mut receiver) = (Watchdog::from_env()?, Receiver::new());
        for (_, listener) in &listeners {
            listener::set_nonblocking(listener)?;
        }
        for (_, socket) in &datagrams {
            datagram::set_nonblocking(socket)?;
        }
        let mut receive = |(name, socket): &(String, UdpSocket), most, watchdog: &mut _| {
            receiver.receive(socket, most, watchdog, |datagram, peer| received(name, socket, datagram, peer))
        };
        let mut is_master_gone = false;
        while !is_master_gone || !listeners.is_empty() || !datagrams.is_empty() {
            let timeout = watchdog.as_mut().map(Watchdog::feed).transpose()?;
            for index in readable(&listeners, &datagrams, &orders, timeout)? {
                let Some((name, listener)) = listeners.get(index) else {
                    receive(&datagrams[index - listeners.len()], DATAGRAMS_PER_TURN, &mut watchdog)?;
                    continue;
                };
                match accept(listener)? {
                    Accepted::Stream(stream) => accepted(name, stream),
                    Accepted::Empty => {}
                    Accepted::Exhausted => pause()?,
                    Accepted::Closed => {
                        drop(listeners.remove(index));
                        // Unasked, if the master does not know: it has somebody else serve here.
                        if !is_master_gone {
                            orders.drained()?;
                        }
                    }
                }
            }
            match orders.try_next_order() {
                None => {}
                Some(Order::MasterGone) => is_master_gone = true,
                Some(Order::Take { name, listener }) => {
                    let count = drain_alive(&listener, &mut watchdog, |stream| accepted(&name, stream))?;
                    drop(listener);
                    orders.taken(&name, count)?;
                }
                Some(Order::Stop) => {
                    for (name, listener) in listeners {
                        drain_alive(&listener, &mut watchdog, |stream| accepted(&name, stream))?;
                    }
                    for socket in datagrams {
                        receive(&socket, u32::MAX, &mut watchdog)?;
                    }
                    return orders.drained();
                }
            }
        }
        Ok(())
    }
}

/// Waits for a connection, a datagram or an order, `timeout` at the most, and says which sockets have one, UDP counted
/// after TCP: the last first, so that a listener can be removed.
fn readable(
    listeners: &[(String, TcpListener)],
    datagrams: &[(String, UdpSocket)],
    orders: &Orders,
    timeout: Option<Duration>,
) -> Result<Vec<usize>, Error> {
    let sockets = listeners.iter().map(|(_, listener)| listener.as_fd());
    let sockets = sockets.chain(datagrams.iter().map(|(_, socket)| socket.as_fd()));
    let mut fds: Vec<_> = sockets.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)).collect();
    let count = fds.len();
    fds.push(PollFd::new(orders, PollFlags::IN));
    wait(&mut fds, timeout).map_err(Error::io("wait for connections and datagrams"))?;
    Ok((0..count).rev().filter(|&index| !fds[index].revents().is_empty()).collect())
}
