//! One client connection, from its SYN to its fate.

use crate::fate::{Fate, Kind};
use crate::reply::{Expected, Reply, Tags, Verdict};
use crate::spec::{Protocol, Spec};
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrV4, SocketFlags, SocketType};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// When and how a client asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    /// Distinguishes connections; it picks the source address and the text of an echo.
    pub(crate) number: u64,
    /// When the client was to arrive.
    pub(crate) due: Instant,
    /// From arrival to the moment the last piece of the request is sent.
    pub(crate) silence: Duration,
    /// In how many pieces the request goes out, evenly over the silence.
    pub(crate) pieces: u32,
    /// The lowest generation that may answer a connection begun now.
    pub(crate) floor: u32,
}

/// A right answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    pub(crate) latency: Duration,
    pub(crate) tags: Tags,
}

/// What an event led to.
#[derive(Debug)]
pub(crate) enum Progress {
    Pending,
    /// Answered, and the connection stays for another request.
    Answered(Answer),
    /// Answered, and that was the last one.
    Finished(Answer),
    /// The end, without an answer to this very event.
    Settled(Fate, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Asking,
    Idle,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) plan: Plan,
    pub(crate) begun: Instant,
    /// When [`Connection::wake`] is to be called next.
    pub(crate) wake_at: Instant,
    socket: OwnedFd,
    phase: Phase,
    /// When the request under way was due to be wholly sent: latency counts from here.
    asked: Instant,
    requests_left: u32,
    request: Vec<u8>,
    pieces_out: u32,
    sent: usize,
    reply: Reply,
    /// A write met a reset. The kernel tells it once, but what came before it can still be read.
    reset: bool,
}

/// Why a connection could not even begin, or its connect failed at once.
pub(crate) type Failure = (Fate, String);

impl Connection {
    /// Sends the SYN.
    pub(crate) fn begin(spec: &Spec, plan: Plan, now: Instant) -> Result<Self, Failure> {
        let local = |action| move |errno: Errno| (Fate::LocalError, format!("{action}: {errno}"));
        let family = if spec.target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(local("socket"))?;
        if let Some(source) = spec.source(plan.number) {
            bind_address_only(socket.as_fd(), source).map_err(local("bind"))?;
        }
        if plan.pieces > 1 {
            // Else Nagle's algorithm would hold back the second piece until the first is acknowledged.
            rustix::net::sockopt::set_tcp_nodelay(&socket, true).map_err(local("TCP_NODELAY"))?;
        }
        match rustix::net::connect(&socket, &spec.target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err((connect_fate(errno), format!("connect: {errno}"))),
        }
        let (request, expected) = question(spec, plan);
        Ok(Self {
            plan,
            begun: now,
            wake_at: now + spec.connect_timeout,
            socket,
            phase: Phase::Connecting,
            asked: plan.due + plan.silence,
            requests_left: if plan.kind == Kind::KeepAlive { spec.keep_alive_requests } else { 1 },
            request,
            pieces_out: 0,
            sent: 0,
            reply: Reply::new(expected),
            reset: false,
        })
    }

    /// The local address, for the account of a loss.
    pub(crate) fn source(&self) -> Option<SocketAddr> {
        rustix::net::getsockname(&self.socket).ok()?.try_into().ok()
    }

    /// Between two requests: nothing is lost if it ends now.
    pub(crate) fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// When the client behind it comes again on schedule.
    pub(crate) fn next_visit(&self, spec: &Spec) -> Instant {
        match self.plan.kind {
            Kind::KeepAlive if self.phase != Phase::Idle => self.asked + spec.keep_alive_every,
            _ => self.asked,
        }
    }

    /// The socket became readable or writable.
    pub(crate) fn ready(&mut self, spec: &Spec, now: Instant) -> Progress {
        if self.phase == Phase::Connecting {
            match rustix::net::sockopt::socket_error(&self.socket) {
                Ok(Ok(())) => self.phase = Phase::Asking,
                Ok(Err(errno)) | Err(errno) => {
                    return Progress::Settled(connect_fate(errno), format!("connect: {errno}"));
                }
            }
            self.ask(spec, now);
        } else {
            self.flush();
        }
        self.read(spec, now)
    }

    /// `wake_at` has come.
    pub(crate) fn wake(&mut self, spec: &Spec, now: Instant) -> Progress {
        match self.phase {
            Phase::Connecting => {
                let waited = spec.connect_timeout;
                return Progress::Settled(Fate::TimeoutConnect, format!("SYN unanswered for {waited:?}"));
            }
            Phase::Asking if self.pieces_out == self.plan.pieces => {
                let waited = spec.response_timeout;
                return Progress::Settled(Fate::TimeoutResponse, format!("no whole response for {waited:?}"));
            }
            Phase::Asking => {}
            Phase::Idle => {
                let (request, expected) = question(spec, self.plan);
                (self.request, self.reply) = (request, Reply::new(expected));
                (self.sent, self.pieces_out, self.phase) = (0, 0, Phase::Asking);
            }
        }
        self.ask(spec, now);
        // A reset met while writing makes no further edge: look for it now.
        if self.reset { self.read(spec, now) } else { Progress::Pending }
    }

    /// Sends the pieces that are due.
    fn ask(&mut self, spec: &Spec, now: Instant) {
        let due = |piece: u32| self.asked - self.plan.silence * (self.plan.pieces - piece) / self.plan.pieces;
        while self.pieces_out < self.plan.pieces && due(self.pieces_out + 1) <= now {
            self.pieces_out += 1;
        }
        self.wake_at = if self.pieces_out < self.plan.pieces {
            due(self.pieces_out + 1)
        } else {
            now + spec.response_timeout
        };
        self.flush();
    }

    fn flush(&mut self) {
        let released = self.request.len() * self.pieces_out as usize / self.plan.pieces as usize;
        while self.phase == Phase::Asking && self.sent < released {
            match rustix::net::send(&self.socket, &self.request[self.sent..released], SendFlags::NOSIGNAL) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.reset = true;
                    return;
                }
            }
        }
    }

    /// Reads to the end of what is there: the socket is edge-triggered.
    fn read(&mut self, spec: &Spec, now: Instant) -> Progress {
        let mut answer = None;
        loop {
            let mut buffer = [0; 16 * 1024];
            let eof = match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((0, _)) => true,
                Ok((bytes, _)) => {
                    self.reply.push(&buffer[..bytes]);
                    false
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return answer.map_or(Progress::Pending, Progress::Answered),
                Err(errno) => return self.broken(errno, answer),
            };
            if let Some(answer) = answer {
                // Whatever follows a whole answer is no part of it; an end here is an orderly one.
                return Progress::Finished(answer);
            }
            if self.phase == Phase::Idle {
                return self.spoken_to_while_idle(eof);
            }
            // An end of file behind a reset is only the reset, told before.
            match self.reply.verdict(eof && !self.reset) {
                Verdict::Incomplete if eof => {
                    let how = if self.reset { "reset while asking" } else { "end of file" };
                    return Progress::Settled(self.reply.cut(self.reset), how.into());
                }
                Verdict::Incomplete => {}
                Verdict::Wrong(why) => return Progress::Settled(Fate::Wrong, why),
                Verdict::Right { reusable } => {
                    let right = Answer { latency: now - self.asked.min(now), tags: self.reply.tags() };
                    self.requests_left -= 1;
                    if !reusable || self.requests_left == 0 {
                        return Progress::Finished(right);
                    }
                    self.phase = Phase::Idle;
                    self.asked += spec.keep_alive_every;
                    self.wake_at = self.asked;
                    answer = Some(right);
                }
            }
        }
    }

    fn broken(&self, errno: Errno, answer: Option<Answer>) -> Progress {
        match (answer, errno) {
            (Some(answer), _) => Progress::Finished(answer),
            (None, Errno::CONNRESET | Errno::PIPE) => {
                let fate = if self.is_idle() { Fate::ResetBeforeResponse } else { self.reply.cut(true) };
                Progress::Settled(fate, format!("read: {errno}"))
            }
            (None, Errno::TIMEDOUT) => Progress::Settled(Fate::TimeoutResponse, format!("read: {errno}")),
            (None, _) => Progress::Settled(Fate::LocalError, format!("read: {errno}")),
        }
    }

    fn spoken_to_while_idle(&self, eof: bool) -> Progress {
        if eof {
            Progress::Settled(Fate::Answered, "closed between requests".into())
        } else {
            Progress::Settled(Fate::Wrong, "data between requests".into())
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Binds the address and leaves the port to connect(2), which may share it among targets.
fn bind_address_only(socket: BorrowedFd<'_>, source: Ipv4Addr) -> Result<(), Errno> {
    setsockopt(&socket, IpBindAddressNoPort, &true)
        .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    rustix::net::bind(socket, &SocketAddrV4::new(source, 0))
}

fn connect_fate(errno: Errno) -> Fate {
    match errno {
        Errno::CONNREFUSED => Fate::Refused,
        Errno::CONNRESET | Errno::PIPE => Fate::ResetBeforeResponse,
        Errno::TIMEDOUT => Fate::TimeoutConnect,
        _ => Fate::LocalError,
    }
}

fn question(spec: &Spec, plan: Plan) -> (Vec<u8>, Expected) {
    match &spec.protocol {
        Protocol::Http(path) => {
            let version = if plan.kind == Kind::KeepAlive { "1.1" } else { "1.0" };
            let request = format!("GET {path} HTTP/{version}\r\nHost: {}\r\n\r\n", spec.target);
            (request.into_bytes(), Expected::Http)
        }
        Protocol::Echo => {
            let line = format!("hello-{}", plan.number);
            let expected = line.to_uppercase().into_bytes();
            ((line + "\n").into_bytes(), Expected::Line(expected))
        }
        Protocol::Line { asked, answer } => {
            (format!("{asked}\n").into_bytes(), Expected::Line(answer.clone().into_bytes()))
        }
    }
}
