//! One question to a master over its control socket, and the replies to it. Nothing here waits without a limit but
//! for the outcome of what the master has taken on: there `--timeout` is the limit, and the master's own phases are.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reuseportd_wire::control::{ControlError, REPLY_BYTES_MAX, Reply, Request, decode_reply, encode};
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
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') && line.len() <= REPLY_BYTES_MAX {
            let chunk = self.wait()?;
            if chunk.is_empty() {
                return Err(ClientError::Closed { path: self.path.clone() });
            }
            let end = chunk.iter().position(|byte| *byte == b'\n').map_or(chunk.len(), |at| at + 1);
            line.extend_from_slice(&chunk[..end]);
            self.stream.consume(end);
        }
        self.answered = true;
        match decode_reply(&line).map_err(|source| self.not_understood(source))? {
            Reply::Error { message, code, receipt } => Err(ClientError::Refused { message, code, receipt }),
            reply => Ok(reply),
        }
    }

    /// Stays until the master closes the connection, which its process does at the latest when it ends.
    ///
    /// # Errors
    /// It is still open when it should have been closed long since.
    pub(super) fn until_closed(mut self) -> Result<(), ClientError> {
        (self.opened, self.answered) = (Instant::now(), false);
        loop {
            let bytes = match self.wait() {
                Ok(chunk) => chunk.len(),
                Err(ClientError::Socket { .. }) => 0,
                Err(late) => return Err(late),
            };
            if bytes == 0 {
                return Ok(());
            }
            self.stream.consume(bytes);
        }
    }

    /// What can be read; empty when the master has closed the connection.
    fn wait(&mut self) -> Result<&[u8], ClientError> {
        let first = (!self.answered).then_some(self.patience.answer);
        let limit = first.into_iter().chain(self.patience.whole).min();
        loop {
            let left = limit.map(|limit| limit.saturating_sub(self.opened.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(self.too_late());
            }
            let filled = self.stream.get_ref().set_read_timeout(left).and_then(|()| self.stream.fill_buf());
            match filled.map(|_| ()) {
                // SIGSTOP and SIGCONT interrupt a read that has a limit.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(source) => {
                    return Err(ClientError::Socket { path: self.path.clone(), action: "read", source });
                }
                Ok(()) => return Ok(self.stream.buffer()),
            }
        }
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
