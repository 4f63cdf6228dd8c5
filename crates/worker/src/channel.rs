//! The worker's end of the handover channel.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags};
use reuseportd_wire::channel::{ChannelError, DATAGRAM_BYTES_MAX, FromWorker, LISTENERS_MAX, ToWorker};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair, sockopt,
};

use crate::{Bound, Error};

/// What the master says to a serving worker.
#[derive(Debug)]
pub enum Order {
    /// [`drain`](crate::drain) every listener, close it, say [`Orders::drained`], finish open
    /// connections, exit.
    Stop,
    /// [`drain`](crate::drain) the listener of a dead sibling, close it, say [`Orders::taken`], and serve
    /// what was accepted.
    Take {
        /// The listener's name.
        name: String,
        /// The sibling's listener; its queue holds connections nobody else will accept.
        listener: TcpListener,
    },
    /// The master is gone: go on serving. No further order comes; drop the [`Orders`] or stop polling them.
    MasterGone,
}

/// The orders of the master. To wait for one together with other things, poll it for readability and
/// call [`Orders::try_next_order`] until that returns `None`.
#[derive(Debug)]
pub struct Orders {
    channel: Channel,
}

impl Orders {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel }
    }

    /// Waits for the next order.
    pub fn next_order(&mut self) -> Order {
        loop {
            if let Some(order) = self.order_in(self.channel.wait_heard()) {
                return order;
            }
        }
    }

    /// The next order, if one has come.
    pub fn try_next_order(&mut self) -> Option<Order> {
        loop {
            match self.channel.heard() {
                Heard::Nothing => return None,
                heard => {
                    if let Some(order) = self.order_in(heard) {
                        return Some(order);
                    }
                }
            }
        }
    }

    /// Says that after [`Order::Stop`] every listener was accepted empty and closed.
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
        self.channel.socket.as_fd()
    }
}

#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
    /// The far end of [`Channel::silent`], kept so that it never reports an end.
    _far: Option<OwnedFd>,
}

pub(crate) enum Heard {
    Message(ToWorker, Option<OwnedFd>),
    /// Nothing yet, or nothing this worker understands (the master was told).
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

    pub(crate) fn send_ready(&self, bound: &[Bound]) -> Result<(), Error> {
        let names = bound.iter().map(|one| one.name().to_owned()).collect();
        let fds: Vec<_> = bound.iter().map(AsFd::as_fd).collect();
        self.send_with(&FromWorker::Ready(names), &fds)
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

    /// Waits first: whoever waits on a duplicate may have made the socket non-blocking.
    pub(crate) fn wait_heard(&self) -> Heard {
        // Should the wait fail, the receive says why the channel is of no use any more.
        let _ = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None));
        self.heard()
    }

    pub(crate) fn heard(&self) -> Heard {
        let mut buffer = [0; DATAGRAM_BYTES_MAX + 1];
        let (length, fd) = match receive(&self.socket, &mut buffer) {
            Err(Errno::AGAIN) => return Heard::Nothing,
            // An empty datagram is not part of the protocol, so no bytes means that the end is closed.
            Err(_) | Ok((0, _)) => return Heard::Gone,
            Ok(received) => received,
        };
        match ToWorker::decode(&buffer[..length]) {
            Ok(message) => Heard::Message(message, fd),
            Err(refused) => {
                self.answer(refused);
                Heard::Nothing
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
