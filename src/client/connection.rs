//! One question to a master over its control socket, and the replies to it. Nothing here waits without a limit but
//! for the outcome of what the master has taken on: there `--timeout` is the limit, and the master's own phases are.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reuseportd_wire::control::{ControlError, REPLY_BYTES_MAX, Reply, Request, decode_reply, encode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};

use super::error::ClientError;

/// How long a client is patient.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For the connection, and again for the first reply: a master that works answers at once.
    pub(super) answer: Duration,
    /// `--timeout`: for everything.
    pub(super) whole: Option<Duration>,
}

impl Patience {
    /// Ten seconds for the first reply: more than a busy machine takes, less than a person waits.
    pub(super) fn new(whole: Option<Duration>) -> Self {
        Self { answer: Duration::from_secs(10), whole }
    }
}

/// A connected control socket on which one request was sent.
pub(super) struct Connection {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    /// What is there of the next reply.
    line: Vec<u8>,
    patience: Patience,
    opened: Instant,
    answered: bool,
}

impl Connection {
    /// Connects and asks.
    ///
    /// # Errors
    /// No master, no permission, or the time is up.
    pub(super) fn open(path: &Path, request: &Request, patience: Patience) -> Result<Self, ClientError> {
        let failed = |action, source| ClientError::Socket { path: path.to_owned(), action, source };
        let opened = Instant::now();
        let limit = patience.whole.map_or(patience.answer, |whole| whole.min(patience.answer));
        // The kernel takes zero for "no limit".
        let limit = limit.max(Duration::from_millis(1));
        let socket =
            Socket::new(Domain::UNIX, Type::STREAM, None).map_err(|error| failed("create", error))?;
        // A unix socket with a full accept queue makes connect() wait for so long.
        socket.set_write_timeout(Some(limit)).map_err(|error| failed("set up", error))?;
        let address =
            SockAddr::unix(path).map_err(|source| ClientError::NoPath { path: path.to_owned(), source })?;
        let connected = socket.connect(&address);
        let connection = Self {
            path: path.to_owned(),
            stream: BufReader::new(UnixStream::from(OwnedFd::from(socket))),
            line: Vec::new(),
            patience,
            opened,
            answered: false,
        };
        connected.map_err(|error| connection.not_connected(error))?;
        connection.ask(request)?;
        Ok(connection)
    }

    fn not_connected(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => ClientError::NoMaster { path, source },
            ErrorKind::PermissionDenied => ClientError::NotAllowed { path, source },
            ErrorKind::WouldBlock => self.too_late(),
            _ => ClientError::Socket { path, action: "connect", source },
        }
    }

    fn ask(&self, request: &Request) -> Result<(), ClientError> {
        let line = encode(request).map_err(|source| self.not_understood(source))?;
        match self.stream.get_ref().write_all(line.as_bytes()) {
            // A master that hangs up may have said why: the reply tells.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(self.too_late()),
            Err(source) => Err(ClientError::Socket { path: self.path.clone(), action: "write", source }),
            Ok(()) => Ok(()),
        }
    }

    /// The next reply that is no refusal.
    ///
    /// # Errors
    /// The time is up, the master refuses or goes away, or what it says is no reply.
    pub(super) fn reply(&mut self) -> Result<Reply, ClientError> {
        loop {
            if let Some(reply) = self.reply_beside(None, None)? {
                return Ok(reply);
            }
        }
    }

    /// The same, or none when `beside` can be read or `until` has come first.
    ///
    /// # Errors
    /// As of [`Connection::reply`].
    pub(super) fn reply_beside(
        &mut self,
        beside: Option<BorrowedFd<'_>>,
        until: Option<Instant>,
    ) -> Result<Option<Reply>, ClientError> {
        while self.line.last() != Some(&b'\n') && self.line.len() <= REPLY_BYTES_MAX {
            if !self.wait(beside, until)? {
                return Ok(None);
            }
            let chunk = self.stream.buffer();
            if chunk.is_empty() {
                return Err(ClientError::Closed { path: self.path.clone() });
            }
            let end = chunk.iter().position(|byte| *byte == b'\n').map_or(chunk.len(), |at| at + 1);
            self.line.extend_from_slice(&chunk[..end]);
            self.stream.consume(end);
        }
        self.answered = true;
        let line = std::mem::take(&mut self.line);
        match decode_reply(&line).map_err(|source| self.not_understood(source))? {
            Reply::Error { message, code, receipt } => Err(ClientError::Refused { message, code, receipt }),
            reply => Ok(Some(reply)),
        }
    }

    /// Stays until the master closes the connection, which its process does at the latest when it ends.
    ///
    /// # Errors
    /// It is still open when it should have been closed long since.
    pub(super) fn until_closed(mut self) -> Result<(), ClientError> {
        (self.opened, self.answered) = (Instant::now(), false);
        loop {
            let bytes = match self.wait(None, None) {
                Ok(_) => self.stream.buffer().len(),
                Err(ClientError::Socket { .. }) => 0,
                Err(late) => return Err(late),
            };
            if bytes == 0 {
                return Ok(());
            }
            self.stream.consume(bytes);
        }
    }

    /// Waits for something to read, which is in the buffer then: nothing when the master has closed the connection.
    /// False when `beside` can be read or `until` has come first.
    fn wait(&mut self, beside: Option<BorrowedFd<'_>>, until: Option<Instant>) -> Result<bool, ClientError> {
        let first = (!self.answered).then_some(self.patience.answer);
        let limit = first.into_iter().chain(self.patience.whole).min();
        let failed =
            |path: &Path, source| ClientError::Socket { path: path.to_owned(), action: "read", source };
        while self.stream.buffer().is_empty() {
            let left = limit.map(|limit| limit.saturating_sub(self.opened.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(self.too_late());
            }
            let pause = until.map(|until| until.saturating_duration_since(Instant::now()));
            let timeout = left.into_iter().chain(pause).min().and_then(|time| Timespec::try_from(time).ok());
            let mut fds = vec![PollFd::new(self.stream.get_ref(), PollFlags::IN)];
            fds.extend(beside.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            match poll(&mut fds, timeout.as_ref()) {
                // SIGSTOP and SIGCONT interrupt it.
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(&self.path, errno.into())),
            }
            let can_be_read: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if can_be_read.first() == Some(&true) {
                match self.stream.fill_buf().map(|_| ()) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(source) => return Err(failed(&self.path, source)),
                    Ok(()) => return Ok(true),
                }
            } else if can_be_read.contains(&true) || until.is_some_and(|until| until <= Instant::now()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn too_late(&self) -> ClientError {
        match self.patience.whole {
            Some(whole) if self.opened.elapsed() >= whole => ClientError::TimedOut(whole),
            _ => ClientError::Silent { path: self.path.clone(), waited: self.patience.answer },
        }
    }

    /// The master answered something that does not belong to the request.
    pub(super) fn unexpected(&self) -> ClientError {
        ClientError::Unexpected { path: self.path.clone() }
    }

    fn not_understood(&self, source: ControlError) -> ClientError {
        ClientError::NotUnderstood { path: self.path.clone(), source }
    }
}
