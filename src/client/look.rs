//! The status, asked for again and again beside a wait, for the numbers of a live display. It has a connection of its
//! own and never blocks; whatever goes wrong with it is no failure: then there are no numbers.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reuseportd_wire::control::{REPLY_BYTES_MAX, Reply, Request, decode_reply, encode};
use reuseportd_wire::status::Status;
use socket2::{Domain, SockAddr, Socket, Type};

/// From one answer to the next question: as often as numbers can be read, and little work for the master.
const PAUSE: Duration = Duration::from_millis(200);
/// Then a question is given up.
const PATIENCE: Duration = Duration::from_secs(2);

/// A question under way, or the pause before the next.
pub(super) struct Look {
    path: PathBuf,
    underway: Option<(UnixStream, Vec<u8>)>,
    /// When the question under way is given up, else when the next is asked.
    due: Instant,
}

impl Look {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), underway: None, due: Instant::now() + PAUSE }
    }

    /// Forgets a question under way.
    pub(super) fn restart(&mut self) {
        (self.underway, self.due) = (None, Instant::now() + PAUSE);
    }

    /// Can be read when there is more of an answer.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.underway.as_ref().map(|(stream, _)| stream.as_fd())
    }

    /// When there is something to do, whether or not there is an answer.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Takes what has come, and asks when it is time: the status once an answer is whole.
    pub(super) fn go_on(&mut self) -> Option<Status> {
        let now = Instant::now();
        if let Some((stream, line)) = &mut self.underway {
            let is_over = read(stream, line) || line.len() > REPLY_BYTES_MAX || now >= self.due;
            if !is_over {
                return None;
            }
            let answer = decode_reply(line);
            self.restart();
            return match answer {
                Ok(Reply::Status { status }) => Some(*status),
                Ok(_) | Err(_) => None,
            };
        }
        if now >= self.due {
            self.underway = ask(&self.path).map(|stream| (stream, Vec::new()));
            self.due = now + if self.underway.is_some() { PATIENCE } else { PAUSE };
        }
        None
    }
}

/// Asks, if that is possible at once.
fn ask(path: &Path) -> Option<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).ok()?;
    socket.connect(&SockAddr::unix(path).ok()?).ok()?;
    let mut stream = UnixStream::from(OwnedFd::from(socket));
    stream.write_all(encode(&Request::Status {}).ok()?.as_bytes()).ok()?;
    Some(stream)
}

/// Reads what is there; true when nothing more will come.
fn read(stream: &mut UnixStream, line: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 16 * 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return true,
            Ok(count) => line.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return line.last() == Some(&b'\n'),
            Err(_) => return true,
        }
        if line.last() == Some(&b'\n') || line.len() > REPLY_BYTES_MAX {
            return true;
        }
    }
}
