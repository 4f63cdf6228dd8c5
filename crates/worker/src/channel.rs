//! The worker's end of the handover channel.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags};
use reuseportd_wire::channel::{ChannelError, DATAGRAM_BYTES_MAX, FromWorker, LISTENERS_MAX, ToWorker};
use rustix::event::{PollFd, PollFlags, epoll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair, sockopt,
};
use signal_hook::consts::SIGTERM;

use crate::listener::wait;
use crate::{Bound, Error, Watchdog};

/// What the master says to a serving worker. A master that was restored after a crash may say it again: each order,
/// carried out once more, finds nothing left to do.
#[derive(Debug)]
pub enum Order {
    /// [`drain`](crate::drain) every listener and [`drain_datagrams`](crate::drain_datagrams) every UDP socket, close
    /// them, say [`Orders::drained`] once for all, finish open connections, exit. SIGTERM is this order too: it needs no
    /// channel.
    Stop,
    /// [`drain`](crate::drain) the listener of a dead sibling, close it, say [`Orders::taken`], and serve
    /// what was accepted.
    Take {
        /// The listener's name.
        name: String,
        /// The sibling's listener; its queue holds connections nobody else will accept.
        listener: TcpListener,
    },
    /// The master is gone: go on serving, and wait for orders as before. One can still come: SIGTERM, as `Stop`.
    MasterGone,
}

/// The orders of the master. To wait for one together with other things, poll it for readability and
/// call [`Orders::try_next_order`] until that returns `None`.
#[derive(Debug)]
pub struct Orders {
    channel: Channel,
    is_master_gone: bool,
    /// Can be read when SIGTERM has come.
    terminated: UnixStream,
    /// Can be read when one of the two can: an epoll.
    either: OwnedFd,
}

impl Orders {
    /// From now on SIGTERM is an order and no longer the end.
    pub(crate) fn new(channel: Channel) -> Result<Self, Error> {
        let failed = Error::io::<io::Error>("wait for orders and SIGTERM");
        let open = || {
            let (terminated, far) = UnixStream::pair()?;
            terminated.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(SIGTERM, OwnedFd::from(far))?;
            let either = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            for one in [channel.socket.as_fd(), terminated.as_fd()] {
                epoll::add(&either, one, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
            }
            Ok((terminated, either))
        };
        let (terminated, either) = open().map_err(failed)?;
        Ok(Self { channel, is_master_gone: false, terminated, either })
    }

    /// Hands the sockets over.
    pub(crate) fn ready(&self, bound: &[Bound]) -> Result<(), Error> {
        let names = bound.iter().map(|one| one.name().to_owned()).collect();
        let fds: Vec<_> = bound.iter().map(AsFd::as_fd).collect();
        self.channel.send_with(&FromWorker::Ready(names), &fds)
    }

    /// Waits for `serve`; `false` if it was told to stop instead.
    pub(crate) fn is_told_to_serve(&mut self, watchdog: &mut Option<Watchdog>) -> Result<bool, Error> {
        loop {
            let timeout = watchdog.as_mut().map(Watchdog::feed).transpose()?;
            self.wait(timeout)?;
            match self.heard() {
                Heard::Message(ToWorker::Serve, _) => return Ok(true),
                Heard::Message(ToWorker::Stop, _) => return Ok(false),
                Heard::Message(ToWorker::Take(_) | ToWorker::Unknown(_), _) | Heard::Nothing => {}
                Heard::Gone => return Err(Error::MasterGone),
            }
        }
    }

    /// Waits for the next order.
    pub fn next_order(&mut self) -> Order {
        loop {
            if let Some(order) = self.try_next_order() {
                return order;
            }
            // What can fail here is a shortage of memory, which passes.
            let _ = self.wait(None);
        }
    }

    /// The next order, if one has come.
    pub fn try_next_order(&mut self) -> Option<Order> {
        loop {
            match self.heard() {
                Heard::Nothing => return None,
                heard => {
                    if let Some(order) = self.order_in(heard) {
                        return Some(order);
                    }
                }
            }
        }
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<(), Error> {
        wait(&mut [PollFd::new(self, PollFlags::IN)], timeout).map_err(Error::io("wait for orders"))
    }

    /// What the master said before it sent SIGTERM comes first.
    fn heard(&mut self) -> Heard {
        let heard = if self.is_master_gone { Heard::Nothing } else { self.channel.heard() };
        match heard {
            Heard::Nothing if matches!((&self.terminated).read(&mut [0; 16]), Ok(1..)) => {
                Heard::Message(ToWorker::Stop, None)
            }
            Heard::Gone => {
                self.is_master_gone = true;
                // Its end can be read for ever. Should it stay in there, this wakes for nothing, and does no harm.
                let _ = epoll::delete(&self.either, &self.channel.socket);
                Heard::Gone
            }
            heard => heard,
        }
    }

    /// Says that after [`Order::Stop`] every listener and UDP socket was emptied and closed.
    ///
    /// # Errors
    /// The channel fails; a master that is gone is no error.
    pub fn drained(&self) -> Result<(), Error> {
        self.channel.send(&FromWorker::Drained)
    }

    /// Says that `count` connections were accepted from the listener of [`Order::Take`], and that it is closed.
    ///
    /// # Errors
    /// The channel fails; a master that is gone is no error.
    pub fn taken(&self, name: &str, count: u32) -> Result<(), Error> {
        self.channel.send(&FromWorker::Taken { name: name.to_owned(), count })
    }

    /// Tells the master why this worker can't go on.
    ///
    /// # Errors
    /// The channel fails; a master that is gone is no error.
    pub fn error(&self, text: &str) -> Result<(), Error> {
        self.channel.send_error(text)
    }

    fn order_in(&self, heard: Heard) -> Option<Order> {
        match heard {
            Heard::Message(ToWorker::Stop, _) => Some(Order::Stop),
            Heard::Message(ToWorker::Take(name), Some(fd)) => {
                Some(Order::Take { name, listener: TcpListener::from(fd) })
            }
            Heard::Message(ToWorker::Take(name), None) => {
                // The kernel drops a descriptor this process has no room for; the master still has it.
                let _ = self.error(&format!("take {name}: no descriptor arrived, raise the limit nofile"));
                None
            }
            Heard::Message(ToWorker::Serve | ToWorker::Unknown(_), _) | Heard::Nothing => None,
            Heard::Gone => Some(Order::MasterGone),
        }
    }
}

impl AsFd for Orders {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.either.as_fd()
    }
}

#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
    /// The far end of [`Channel::silent`], kept so that it never reports an end.
    _far: Option<OwnedFd>,
}

enum Heard {
    Message(ToWorker, Option<OwnedFd>),
    Nothing,
    Gone,
}

impl Channel {
    /// Takes the inherited descriptor, which is closed here: what stays is a duplicate that no child
    /// process inherits.
    pub(crate) fn inherited(number: RawFd) -> Result<Self, Error> {
        let take = Error::io("take the handover channel from REUSEPORTD_CHANNEL");
        Ok(Self { socket: owned(number).map_err(take)?, _far: None })
    }

    /// A channel nobody ever says anything on, for a worker without a master.
    pub(crate) fn silent() -> Result<Self, Error> {
        let (socket, far) = seqpacket_pair().map_err(Error::io("make a channel"))?;
        Ok(Self { socket, _far: Some(far) })
    }

    pub(crate) fn send_error(&self, text: &str) -> Result<(), Error> {
        self.send(&FromWorker::Error(text.to_owned()))
    }

    fn send(&self, message: &FromWorker) -> Result<(), Error> {
        self.send_with(message, &[])
    }

    fn send_with(&self, message: &FromWorker, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let datagram = message.encode()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LISTENERS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            // Fits: encode() refuses more than LISTENERS_MAX names.
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let parts = [IoSlice::new(datagram.as_bytes())];
        let send = || sendmsg(&self.socket, &parts, &mut ancillary, SendFlags::NOSIGNAL);
        match rustix::io::retry_on_intr(send) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(source) => Err(Error::io("tell the master")(source)),
        }
    }

    fn heard(&self) -> Heard {
        loop {
            let mut buffer = [0; DATAGRAM_BYTES_MAX + 1];
            let (length, fd) = match receive(&self.socket, &mut buffer) {
                Err(Errno::AGAIN) => return Heard::Nothing,
                // Said once, by the end of a master that left something unread, before what it had sent.
                Err(Errno::CONNRESET) => continue,
                // An empty datagram is not part of the protocol, so no bytes means that the end is closed.
                Err(_) | Ok((0, _)) => return Heard::Gone,
                Ok(received) => received,
            };
            match ToWorker::decode(&buffer[..length]) {
                Ok(message) => return Heard::Message(message, fd),
                Err(refused) => self.answer(refused),
            }
        }
    }

    /// What can't be understood is answered and never a reason to stop: the master may be newer.
    fn answer(&self, refused: ChannelError) {
        let verb = match refused {
            ChannelError::UnknownVerb(verb) => verb,
            ChannelError::Malformed { verb, .. } if verb != "unknown" => verb.to_owned(),
            _ => return,
        };
        let _ = self.send(&FromWorker::Unknown(verb));
    }
}

/// The descriptor behind an inherited number. The number alone owns nothing; sent through a socket of our
/// own it comes back as a descriptor that does, close-on-exec. Only then is the number closed.
fn owned(number: RawFd) -> io::Result<OwnedFd> {
    let (near, far) = seqpacket_pair()?;
    let rights = [ControlMessage::ScmRights(&[number])];
    nix::sys::socket::sendmsg::<()>(
        near.as_raw_fd(),
        &[IoSlice::new(b"channel")],
        &rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    let (_, socket) = receive(&far, &mut [0; 16])?;
    let socket = socket.ok_or(Errno::MFILE)?;
    if sockopt::socket_type(&socket)? != SocketType::SEQPACKET {
        return Err(Errno::PROTOTYPE.into());
    }
    nix::unistd::close(number)?;
    Ok(socket)
}

pub(crate) fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Never blocks.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> rustix::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let receive = || recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags);
    let received = rustix::io::retry_on_intr(receive)?;
    let mut fd = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            fd = fds.next();
        }
    }
    Ok((received.bytes, fd))
}
