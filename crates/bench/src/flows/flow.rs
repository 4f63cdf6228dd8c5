//! One flow: its socket, and what is not answered yet.

use super::report::{FlowReport, Span, Who};
use nix::libc;
use nix::sys::socket::getsockopt;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Longest answer that is looked at, in bytes.
const ANSWER_BYTES_MAX: usize = 512;

/// `SK_MEMINFO_DROPS`: datagrams the socket had no room for.
const DROPS: usize = 8;

/// The option is in none of the socket crates; its result is an array of nine numbers.
#[derive(Clone, Copy)]
struct MemInfo;

nix::getsockopt_impl!(
    MemInfo,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    [u32; 9],
    nix::sys::socket::sockopt::GetStruct<[u32; 9]>
);

/// One flow.
#[derive(Debug)]
pub(crate) struct Flow {
    socket: UdpSocket,
    /// What the run and this flow begin their datagrams with.
    label: String,
    /// Answers of generations below this are strays.
    pub(crate) floor: u32,
    /// From when on it has no more turns.
    pub(crate) ends: Option<Instant>,
    /// Sequence number of the first datagram in `window`; all before it are answered.
    first: usize,
    window: VecDeque<Datagram>,
    report: FlowReport,
}

/// A datagram that was sent.
#[derive(Debug)]
struct Datagram {
    due: Instant,
    sent_us: u64,
    answered_by: Option<Who>,
}

/// What came in.
#[derive(Debug)]
pub(crate) enum Heard {
    Answer {
        who: Who,
        latency: Duration,
        sent_us: u64,
    },
    /// To what was answered already.
    Duplicate,
    /// Somebody says that nobody is there.
    Refused,
    /// No answer to anything that was asked.
    Wrong(String),
    Nothing,
    Failed(io::Error),
}

/// What became of sending.
#[derive(Debug)]
pub(crate) struct Sent {
    /// An earlier datagram was refused.
    pub(crate) refused: bool,
    pub(crate) result: io::Result<()>,
}

impl Flow {
    pub(crate) fn begin(
        target: SocketAddr,
        source: IpAddr,
        receive_buffer: usize,
        label: String,
    ) -> io::Result<Self> {
        let socket = UdpSocket::bind((source, 0))?;
        // Beyond the limit of the system only with CAP_NET_ADMIN.
        if set_socket_recv_buffer_size_force(&socket, receive_buffer).is_err() {
            set_socket_recv_buffer_size(&socket, receive_buffer)?;
        }
        socket.connect(target)?;
        socket.set_nonblocking(true)?;
        let report = FlowReport {
            source: socket.local_addr()?,
            begun_us: 0,
            sent: 0,
            answers: 0,
            duplicates: 0,
            refused: 0,
            lost_us: Vec::new(),
            spans: Vec::new(),
        };
        Ok(Self { socket, label, floor: 0, ends: None, first: 0, window: VecDeque::new(), report })
    }

    pub(crate) fn source(&self) -> SocketAddr {
        self.report.source
    }

    pub(crate) fn begun_us(&self) -> u64 {
        self.report.begun_us
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.report.sent > 0
    }

    /// Sends the next datagram, `now_us` into the run.
    pub(crate) fn send(&mut self, due: Instant, now_us: u64) -> Sent {
        let datagram = format!("{} {}", self.label, self.report.sent);
        let mut result = self.socket.send(datagram.as_bytes());
        // Said of an earlier datagram, in place of sending this one.
        let refused = matches!(&result, Err(error) if error.kind() == ErrorKind::ConnectionRefused);
        if refused {
            self.report.refused += 1;
            result = self.socket.send(datagram.as_bytes());
        }
        if result.is_ok() {
            if !self.has_begun() {
                self.report.begun_us = now_us;
            }
            self.report.sent += 1;
            self.window.push_back(Datagram { due, sent_us: now_us, answered_by: None });
        }
        Sent { refused, result: result.map(|_| ()) }
    }

    /// Takes one datagram from the socket.
    pub(crate) fn hear(&mut self, now: Instant) -> Heard {
        let mut buffer = [0; ANSWER_BYTES_MAX];
        let bytes = match self.socket.recv(&mut buffer) {
            Ok(length) => &buffer[..length],
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => return Heard::Nothing,
                ErrorKind::ConnectionRefused => {
                    self.report.refused += 1;
                    return Heard::Refused;
                }
                _ => return Heard::Failed(error),
            },
        };
        self.judge(bytes, now).unwrap_or_else(|| Heard::Wrong(String::from_utf8_lossy(bytes).into_owned()))
    }

    fn judge(&mut self, bytes: &[u8], now: Instant) -> Option<Heard> {
        let (who, sequence) = parse(bytes, &self.label)?;
        let sent = usize::try_from(self.report.sent).ok()?;
        if sequence >= sent {
            return None;
        }
        let waiting = sequence.checked_sub(self.first).and_then(|at| self.window.get_mut(at));
        let Some(datagram) = waiting.filter(|datagram| datagram.answered_by.is_none()) else {
            self.report.duplicates += 1;
            return Some(Heard::Duplicate);
        };
        datagram.answered_by = Some(who);
        let latency = now.saturating_duration_since(datagram.due);
        let heard = Heard::Answer { who, latency, sent_us: datagram.sent_us };
        self.report.answers += 1;
        while let Some(who) = self.window.front().and_then(|datagram| datagram.answered_by) {
            self.pass(Some(who));
        }
        Some(heard)
    }

    /// Books the oldest datagram, so that who answered is known in the order of sending.
    fn pass(&mut self, answered_by: Option<Who>) {
        let Some(Datagram { sent_us, .. }) = self.window.pop_front() else { return };
        self.first += 1;
        let Some(who) = answered_by else { return self.report.lost_us.push(sent_us) };
        match self.report.spans.last_mut().filter(|span| span.who == who) {
            Some(span) => (span.last_us, span.answers) = (sent_us, span.answers + 1),
            None => self.report.spans.push(Span { who, first_us: sent_us, last_us: sent_us, answers: 1 }),
        }
    }

    /// Answers that its socket had no room for.
    pub(crate) fn dropped(&self) -> io::Result<u64> {
        Ok(u64::from(getsockopt(&self.socket, MemInfo)?[DROPS]))
    }

    /// Ends it: what is not answered now is lost.
    pub(crate) fn close(mut self) -> FlowReport {
        while let Some(datagram) = self.window.front() {
            let answered_by = datagram.answered_by;
            self.pass(answered_by);
        }
        self.report
    }
}

impl AsFd for Flow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Who answered which datagram: `GENERATION SEAT PID LABEL SEQUENCE`.
fn parse(bytes: &[u8], label: &str) -> Option<(Who, usize)> {
    let mut words = std::str::from_utf8(bytes).ok()?.splitn(4, ' ');
    let mut number = || words.next()?.parse().ok();
    let who = Who { generation: number()?, seat: number()?, pid: number()? };
    let sequence = words.next()?.strip_prefix(label)?.strip_prefix(' ')?;
    Some((who, sequence.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_what_was_asked_is_one() {
        let who = Who { generation: 2, seat: 0, pid: 77 };
        assert_eq!(parse(b"2 0 77 1-9 5 12", "1-9 5"), Some((who, 12)));
        for wrong in
            ["", "1-9 5 12", "2 0 77 1-9 5 ", "2 0 77 1-9 6 12", "2 0 77 1-9 51 12", "2 x 77 1-9 5 12"]
        {
            assert_eq!(parse(wrong.as_bytes(), "1-9 5"), None, "{wrong}");
        }
        assert_eq!(parse(b"2 0 77 1-9 5 12\xff", "1-9 5"), None);
    }

    #[test]
    fn who_answered_is_told_in_the_order_of_sending() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap();
        let mut flow = Flow::begin(target, target.ip(), 4096, "L".into()).unwrap();
        let now = Instant::now();
        for us in 0..5 {
            flow.send(now, us * 10).result.unwrap();
        }
        // 1 is answered late and twice, 3 never.
        for (pid, sequence) in [(7, 0), (8, 2), (7, 1), (7, 1), (8, 4)] {
            assert!(flow.judge(format!("1 0 {pid} L {sequence}").as_bytes(), now).is_some());
        }
        assert!(flow.judge(b"1 0 7 L 5", now).is_none(), "never asked");
        let report = flow.close();
        let spans: Vec<_> = report
            .spans
            .iter()
            .map(|span| (span.who.pid, span.first_us, span.last_us, span.answers))
            .collect();
        assert_eq!(spans, [(7, 0, 10, 2), (8, 20, 40, 2)]);
        assert_eq!((report.answers, report.duplicates, report.lost_us), (4, 1, vec![30]));
    }
}
